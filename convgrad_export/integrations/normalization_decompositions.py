"""Batch normalization and weight normalization, forward and backward, in operators that torch.onnx does right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convgrad_export.integrations.half_widening import computed

aten = torch.ops.aten


def _statistics_axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _count_per_channel(x: Tensor) -> Any:
    count: Any = x.shape[0]
    for size in x.shape[2:]:
        count = count * size
    return count


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape([1, -1] + [1] * (like.dim() - 2))


def moved_average(running: Tensor, found: Tensor, momentum: float, count: Any) -> Tensor:
    """A running statistic after a batch of `count` elements a channel: as it was where there are none."""
    moved = (running * (1 - momentum) + found * momentum).to(running.dtype)
    if isinstance(count, int) and count > 0:
        return moved
    return torch.where(torch.scalar_tensor(count, dtype=torch.int64, device=running.device) > 0, moved, running)


def batch_norm_functional(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, saved mean, saved reciprocal deviation, and the running statistics after the call."""
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm: evaluation mode needs running statistics")
        out, mean, rstd = aten._native_batch_norm_legit_no_training(
            x, weight, bias, running_mean, running_var, momentum, eps
        )
        return out, mean, rstd, running_mean, running_var
    axes = _statistics_axes(x)
    wide = computed(x)
    mean = wide.mean(axes)
    centred = wide - _per_channel(mean, x)
    variance = (centred * centred).mean(axes)
    rstd = torch.rsqrt(variance + eps)
    if weight is not None and bias is not None and x.dtype == torch.float32:
        # one pass over x: BatchNormalization in inference mode, given the batch's own statistics
        out = aten._native_batch_norm_legit_no_training(x, weight, bias, mean, variance, momentum, eps)[0]
    else:
        out = centred * _per_channel(rstd if weight is None else rstd * weight, x)
        if bias is not None:
            out = out + _per_channel(bias, x)
    count = _count_per_channel(x)
    if running_mean is not None:
        running_mean = moved_average(running_mean, mean, momentum, count)
    if running_var is not None:
        running_var = moved_average(running_var, variance * count / (count - 1), momentum, count)
    return out.to(x.dtype), mean, rstd, running_mean, running_var


def batch_norm_no_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64 only, where the operator's epsilon would be a float32."""
    if x.dtype != torch.float64:
        return NotImplemented
    scale = torch.rsqrt(running_var + eps)
    out = (x - _per_channel(running_mean, x)) * _per_channel(scale if weight is None else scale * weight, x)
    empty = x.new_empty([0])
    return out if bias is None else out + _per_channel(bias, x), empty, empty


def _native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, rstd, new_mean, new_var = batch_norm_functional(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )
    if training and running_mean is not None and running_var is not None:
        running_mean.copy_(new_mean)  # type: ignore[arg-type]
        running_var.copy_(new_var)  # type: ignore[arg-type]
    return out, mean, rstd


def _batch_norm_no_stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return batch_norm_functional(x, weight, bias, None, None, training, momentum, eps)[:3]


def batch_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_rstd: Tensor | None,
    train: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias); with batch statistics when `train`, with the running ones otherwise."""
    axes = _statistics_axes(x)
    grad, wide = computed(grad_out), computed(x)
    if train:
        mean, rstd = save_mean, save_rstd
    else:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm_backward: evaluation mode needs running statistics")
        mean, rstd = computed(running_mean), torch.rsqrt(computed(running_var) + eps)
    if mean is None or rstd is None:
        raise ValueError("batch_norm_backward: training mode needs the saved statistics")
    scale = rstd if weight is None else rstd * weight
    dx = dweight = dbias = None
    grad_sum = grad.sum(axes) if output_mask[2] or (train and output_mask[0]) else None
    dot = centred = None
    if output_mask[1] or (train and output_mask[0]):
        centred = wide - _per_channel(mean, x)
        dot = (grad * centred).sum(axes)
    if output_mask[0]:
        if train and dot is not None and centred is not None and grad_sum is not None:
            # scale * (grad - mean of grad - slope * centred), where slope is dot * rstd**2 / count; the last two terms
            # in one pass, as a BatchNormalization of mean 0 and variance 1
            share = scale / -_count_per_channel(x)
            zero = torch.zeros_like(share)
            moved = aten._native_batch_norm_legit_no_training(
                centred, dot * rstd * rstd * share, grad_sum * share, zero, zero + 1, 0.0, 0.0
            )[0]
            dx = (grad * _per_channel(scale, x) + moved).to(x.dtype)
        else:
            dx = (grad * _per_channel(scale, x)).to(x.dtype)
    if output_mask[1] and dot is not None:
        dweight = (dot * rstd).to(weight.dtype if weight is not None else x.dtype)
    if output_mask[2]:
        dbias = grad_sum if grad_sum is None else grad_sum.to(weight.dtype if weight is not None else x.dtype)
    return dx, dweight, dbias


def _norm_except(v: Tensor, dim: int) -> Tensor:
    axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    return (v * v).sum(axes, keepdim=True).sqrt() if axes else v.abs()


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """The normalized weight `v * g / |v|`, and |v| over every axis but `dim`."""
    norm = _norm_except(v, dim)
    return v * (g / norm), norm


def weight_norm_interface_backward(
    grad_w: Tensor, saved_v: Tensor, saved_g: Tensor, saved_norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """(dv, dg) of `w = v * g / |v|`."""
    axes = [axis for axis in range(saved_v.dim()) if axis != dim % saved_v.dim()]
    dot = (grad_w * saved_v).sum(axes, keepdim=True) if axes else grad_w * saved_v
    dg = dot / saved_norms
    dv = (grad_w - saved_v * (dot / (saved_norms * saved_norms))) * (saved_g / saved_norms)
    return dv, dg


TABLE: dict[Any, Callable[..., Any]] = {
    aten._native_batch_norm_legit_functional.default: batch_norm_functional,
    aten._native_batch_norm_legit.default: _native_batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_no_stats,
    aten._native_batch_norm_legit_no_training.default: batch_norm_no_training,
    aten.native_batch_norm.default: _native_batch_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten._weight_norm_interface.default: weight_norm_interface,
    aten._weight_norm_interface_backward.default: weight_norm_interface_backward,
}
