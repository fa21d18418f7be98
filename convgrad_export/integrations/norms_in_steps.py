"""Norms in steps that autograd goes through twice, at any sizes, and forward-mode derivatives in a trace.

PyTorch's second derivative of its fused batch norm reads the sizes as Python numbers, which fixes a dynamic batch. The
fused form makes the smaller graph, so that these are for a second trace where that has happened in the first, which
made PyTorch's own checks: `NORMS`.

Its forward-mode derivatives (torch.func.jvp, jacfwd, hessian) of all fused norms leave a tangent on the device meta in
a trace, which the next operator refuses: `FORWARD_NORMS` are taken at once, while such a derivative is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .half_widening import computed
from .normalization_decompositions import moved_average


def _normalized(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Of x, shape [N, C, *]; mean and variance broadcast against it, weight and bias have shape [C]."""
    channels = (1, -1, *(1,) * (x.dim() - 2))
    scale = torch.rsqrt(variance + eps)
    y = (x - mean) * (scale if weight is None else scale * weight.reshape(channels))
    return y if bias is None else y + bias.reshape(channels)


def _statistics(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, with the axes kept; of no elements zeros, for NaN would be in the weight's gradient."""
    count = math.prod(x.shape[axis] for axis in axes)
    if isinstance(count, int):
        mean = x.mean(axes, keepdim=True)
        return mean, (x - mean).square().mean(axes, keepdim=True)
    divisor = torch.scalar_tensor(count, dtype=x.dtype, device=x.device).clamp(min=1)
    mean = x.sum(axes, keepdim=True) / divisor
    return mean, (x - mean).square().sum(axes, keepdim=True) / divisor


def _update(running: Tensor | None, found: Tensor, momentum: float, count: Any) -> None:
    """Move a running statistic, shape [C], towards this batch's, shape [N or 1, C, 1, ...], in place."""
    if running is not None:
        running.copy_(moved_average(running, found.detach().mean(0).reshape(-1), momentum, count))


def _require_several(shape: Sequence[Any], axes: Sequence[int], groups: int = 1) -> None:
    """PyTorch's check of statistics that are made of one element.

    Raises:
        ValueError: the axes hold no more than one element for each of the groups.
    """
    count: Any = math.prod(shape[axis] for axis in axes)
    if count == groups:
        raise ValueError(f"a normalization over one element: expected more than 1 value in {tuple(shape)}")


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
        _update(running_mean, mean, momentum, count)
        _update(running_var, variance * count / (count - 1), momentum, count)
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
    if training:
        _require_several(input.shape, [0, *range(2, input.dim())])
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
    if use_input_stats:
        _require_several(input.shape, list(range(2, input.dim())))
    own = list(range(2, input.dim())) if use_input_stats else None
    return _norm(input, running_mean, running_var, weight, bias, own, momentum, eps)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """torch.nn.functional.group_norm and torch.group_norm."""
    batch, channels = input.shape[:2]
    if channels % num_groups:
        raise ValueError(f"{channels} channels are not divisible into {num_groups} groups")
    _require_several(input.shape, list(range(input.dim())), groups=num_groups)
    grouped = computed(input).reshape(batch, num_groups, -1)
    mean, variance = _statistics(grouped, [2])
    plain = _normalized(grouped, mean, variance, None, None, eps).reshape(input.shape)
    axes = (1, -1, *(1,) * (input.dim() - 2))
    scaled = plain if weight is None else plain * weight.reshape(axes)
    return (scaled if bias is None else scaled + bias.reshape(axes)).to(input.dtype)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """torch.nn.functional.layer_norm and torch.layer_norm."""
    inner = tuple(normalized_shape)
    if tuple(input.shape[-len(inner) :]) != inner:
        raise ValueError(f"the last sizes of {tuple(input.shape)} are not those that are normalized, {inner}")
    wide = computed(input)
    mean, variance = _statistics(wide, list(range(-len(inner), 0)))
    plain = _normalized(wide, mean, variance, None, None, eps)
    scaled = plain if weight is None else plain * weight
    return (scaled if bias is None else scaled + bias).to(input.dtype)


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

FORWARD_NORMS: Mapping[Any, Callable[..., Tensor]] = {
    **NORMS,
    functional.group_norm: _group_norm,
    functional.layer_norm: _layer_norm,
    torch.group_norm: _group_norm,
    torch.layer_norm: _layer_norm,
}
