"""Batch and instance norms in steps that autograd goes through twice, at any sizes.

PyTorch's second derivative of its fused batch norm reads the sizes as Python numbers, which fixes a dynamic batch. The
fused form makes the smaller graph, so that these are for a second trace where that has happened in the first, which
made PyTorch's own checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .half_widening import computed


def _normalized(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Of x, shape [N, C, *]; mean and variance broadcast against it, weight and bias have shape [C]."""
    channels = (1, -1, *(1,) * (x.dim() - 2))
    scale = torch.rsqrt(variance + eps)
    y = (x - mean) * (scale if weight is None else scale * weight.reshape(channels))
    return y if bias is None else y + bias.reshape(channels)


def _statistics(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, with the axes kept."""
    mean = x.mean(axes, keepdim=True)
    return mean, (x - mean).square().mean(axes, keepdim=True)


def _update(running: Tensor | None, found: Tensor, momentum: float) -> None:
    """Move a running statistic, shape [C], towards this batch's, shape [N or 1, C, 1, ...], in place."""
    if running is not None:
        found = found.detach().mean(0).reshape(-1)
        running.copy_(running * (1 - momentum) + found * momentum)


def _norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    own: list[int] | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """`own` are the axes over which the statistics are taken; None for the running ones."""
    wide = computed(x)
    if own is None:
        if running_mean is None or running_var is None:
            raise ValueError("a normalization by running statistics has none")
        channels = (1, -1, *(1,) * (x.dim() - 2))
        mean, variance = running_mean.reshape(channels), running_var.reshape(channels)
    else:
        mean, variance = _statistics(wide, own)
        count: Any = math.prod(x.shape[axis] for axis in own)
        _update(running_mean, mean, momentum)
        _update(running_var, variance * count / (count - 1), momentum)
    return _normalized(wide, mean, variance, weight, bias, eps).to(x.dtype)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.batch_norm."""
    own = [0, *range(2, input.dim())] if training else None
    return _norm(input, running_mean, running_var, weight, bias, own, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.instance_norm."""
    own = list(range(2, input.dim())) if use_input_stats else None
    return _norm(input, running_mean, running_var, weight, bias, own, momentum, eps)


def _in_torchs_order(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.batch_norm and torch.instance_norm, which take weight and bias first."""

    def called(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        own: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return norm(input, running_mean, running_var, weight, bias, own, momentum, eps)

    return called


NORMS: Mapping[Any, Callable[..., Tensor]] = {
    functional.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
    torch.batch_norm: _in_torchs_order(_batch_norm),
    torch.instance_norm: _in_torchs_order(_instance_norm),
}
