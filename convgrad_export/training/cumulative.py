"""BatchNorm with `momentum=None`, whose running statistics are the plain average over all batches so far."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def cumulative_averages(module: torch.nn.Module) -> Iterator[None]:
    """While active, such layers of `module` keep their counter in tensors.

    PyTorch reads it into Python (``1 / float(num_batches_tracked)``): in a trace, the average of one certain step.
    """
    changed = [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.momentum is None and layer.training and layer.track_running_stats
    ]
    try:
        for layer in changed:
            setattr(layer, "forward", _averaging(layer))  # noqa: B010  # an instance's own forward
        yield
    finally:
        for layer in changed:
            layer.__dict__.pop("forward", None)


def _averaging(layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        layer._check_input_dim(x)
        mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if mean is None or var is None or count is None:
            raise AssertionError("a BatchNorm that tracks statistics has its buffers")
        batch_mean, batch_var = mean.clone(), var.clone()
        # with a momentum of 1, what is left in the buffers is the batch's own, or what they were if it is empty
        out = functional.batch_norm(x, batch_mean, batch_var, layer.weight, layer.bias, True, 1.0, layer.eps)
        count.add_(1)
        share = 1.0 / count.to(mean.dtype)
        mean.add_((batch_mean - mean) * share)
        var.add_((batch_var - var) * share)
        return out

    return forward
