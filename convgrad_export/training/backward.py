"""The backward pass of a traced training step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward


def gradients(value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a scalar by name, without those of tensors that it does not depend on.

    Call it where the module still holds `leaves`: `torch.utils.checkpoint` calls its part of the module again in here.

    Args:
        value: 0-d.
        leaves: tensors that require a gradient.
    """
    # torch.autograd.grad would leave the active torch function modes, and a recomputed dropout has to stay in them. It
    # ends in this call: keep no graph, build none, allow tensors that are not reached, and return the gradients.
    found = _engine_run_backward(
        (value,),
        (torch.ones_like(value),),
        False,
        False,
        tuple(leaves.values()),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
