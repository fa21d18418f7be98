"""Upsampling as one small matrix product per axis, in place of PyTorch's decomposition into gathers.

The gradient of a gather adds at computed positions (ScatterND with a reduction: opset 16, one thread in onnxruntime);
that of a product with a matrix is a product with its transpose. Row i of an axis' matrix holds the weights with which
output position i reads the input; of antialiased upsampling, those of a wider filter. Repeating by a whole factor is an
expansion, and its gradient a sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .pooling_decompositions import apply_along

_CUBIC = -0.75  # PyTorch's coefficient of bicubic convolution


def _source(
    outputs: Any, size: Any, factor: float | None, align_corners: bool, like: Tensor, offset: float = 0.5
) -> Tensor:
    """Where each of `outputs` positions lies on the input axis, unclamped, in pixels of the input."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    positions = torch.arange(outputs, device=like.device).to(wide)
    if align_corners:
        return positions * ((size - 1) / (outputs - 1)) if outputs != 1 else positions * 0.0
    step = 1.0 / factor if factor else size / outputs
    return (positions + offset) * step - offset


def _hat(distance: Tensor) -> Tensor:
    return torch.relu(1.0 - distance.abs())


def _linear(outputs: Any, size: Any, factor: float | None, align_corners: bool, like: Tensor) -> Tensor:
    source = torch.clamp(_source(outputs, size, factor, align_corners, like), min=0, max=size - 1)
    return _hat(source.unsqueeze(1) - torch.arange(size, device=like.device).unsqueeze(0)).to(like.dtype)


def _cubic(outputs: Any, size: Any, factor: float | None, align_corners: bool, like: Tensor) -> Tensor:
    source = _source(outputs, size, factor, align_corners, like)
    first = source.floor()
    t = source - first
    columns = torch.arange(size, device=like.device).unsqueeze(0)
    matrix: Any = None
    for tap in range(-1, 3):
        distance = (t - tap).abs()
        if tap in (0, 1):
            weight = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1
        else:
            weight = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
        column = torch.clamp(first + tap, min=0, max=size - 1).unsqueeze(1)
        part = (column == columns).to(weight.dtype) * weight.unsqueeze(1)
        matrix = part if matrix is None else matrix + part
    return matrix.to(like.dtype)


def _antialiased(
    weight: Callable[[Tensor], Tensor],
    outputs: Any,
    size: Any,
    factor: float | None,
    align_corners: bool,
    like: Tensor,
) -> Tensor:
    """The matrix of an axis whose filter becomes wider as the axis becomes shorter: it sees every input.

    Args:
        weight: of a distance in pixels, where the axis grows.
    """
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    step: Any = 1.0 / factor if factor else size / outputs
    if align_corners:
        step = (size - 1) / (outputs - 1) if outputs != 1 else 0.0
    if isinstance(step, float):
        reach: Any = max(step, 1.0)
    else:  # of dynamic sizes
        step = torch.scalar_tensor(step, dtype=wide, device=like.device)
        reach = torch.clamp(step, min=1.0)
    centre = (torch.arange(outputs, device=like.device).to(wide) + 0.5) * step  # with aligned corners, too
    pixel = torch.arange(size, device=like.device).to(wide) + 0.5
    weights = weight((pixel.unsqueeze(0) - centre.unsqueeze(1)).abs() / reach)
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


def _cubic_weight(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2, which antialiased upsampling takes; the other takes -3/4."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _lanczos_weight(distance: Tensor) -> Tensor:
    return torch.where(distance < 3, torch.sinc(distance) * torch.sinc(distance / 3), 0.0)


def _nearest(offset: float, outputs: Any, size: Any, factor: float | None, align_corners: bool, like: Tensor) -> Tensor:
    step = 1.0 / factor if factor else size / outputs
    positions = torch.arange(outputs, device=like.device).to(torch.float32)
    column = torch.clamp(torch.floor((positions + offset) * step), max=size - 1)
    columns = torch.arange(size, device=like.device).unsqueeze(0)
    return (column.unsqueeze(1) == columns).to(like.dtype)


def _repeated(x: Tensor, axis: int, times: int) -> Tensor:
    axis = axis % x.dim()
    shape = [*x.shape[: axis + 1], times, *x.shape[axis + 1 :]]
    flat = [*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :]]
    return x.unsqueeze(axis + 1).expand(shape).reshape(flat)


def _whole_factor(size: Any, outputs: Any, factor: float | None) -> int | None:
    """By how much an axis is repeated, if it is by a whole number."""
    if factor is not None:
        return int(factor) if factor == int(factor) and factor >= 1 else None
    if isinstance(size, int) and isinstance(outputs, int) and size and outputs % size == 0:
        return outputs // size
    return None


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": _hat,
    "bicubic": _cubic_weight,
    "lanczos": _lanczos_weight,
}
_MATRICES: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "bilinear": _linear,
    "trilinear": _linear,
    "bicubic": _cubic,
    "nearest": functools.partial(_nearest, 0.0),
    "nearest-exact": functools.partial(_nearest, 0.5),
}


def interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """torch.nn.functional.interpolate. Its own result gives the size (and the errors) and is dropped from the graph."""
    original = torch.nn.functional.interpolate(
        input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
    )
    matrix: Callable[..., Tensor] | None
    if antialias:  # not the operator itself: the bicubic one's gradient knows no dynamic sizes in PyTorch
        matrix = functools.partial(_antialiased, _FILTERS[mode]) if input.dtype.is_floating_point else None
    else:
        matrix = _MATRICES.get(mode)
    if matrix is None:
        return original
    rank = input.dim() - 2
    factors: list[float | None] = [None] * rank
    if scale_factor is not None and not recompute_scale_factor:
        given = scale_factor if isinstance(scale_factor, (list, tuple)) else [scale_factor] * rank
        factors = [float(factor) for factor in given]
    x = input
    for axis, factor in enumerate(factors):
        spatial = axis - rank
        before = x.shape[spatial]
        after = before * int(factor) if factor is not None and factor == int(factor) else original.shape[spatial]
        whole = _whole_factor(before, after, factor) if mode.startswith("nearest") else None
        if whole is not None:
            x = _repeated(x, spatial, whole)
        else:
            x = apply_along(x, matrix(after, before, factor, bool(align_corners), x), spatial)
    return x


def _antialiased_pair(name: str, weight: Callable[[Tensor], Tensor]) -> dict[Any, Callable[..., Tensor]]:
    """Decompositions of an antialiased operator and of its gradient, by overload."""

    def forward(
        x: Tensor, output_size: Any, align_corners: bool, scales_h: float | None = None, scales_w: float | None = None
    ) -> Tensor:
        if not x.dtype.is_floating_point:
            return NotImplemented
        for axis, outputs, factor in ((-2, output_size[0], scales_h), (-1, output_size[1], scales_w)):
            x = apply_along(x, _antialiased(weight, outputs, x.shape[axis], factor, align_corners, x), axis)
        return x

    def backward(
        grad: Tensor,
        output_size: Any,
        input_size: Any,
        align_corners: bool,
        scales_h: float | None = None,
        scales_w: float | None = None,
    ) -> Tensor:
        for axis, outputs, factor in ((-2, output_size[0], scales_h), (-1, output_size[1], scales_w)):
            matrix = _antialiased(weight, outputs, input_size[axis], factor, align_corners, grad)
            grad = apply_along(grad, matrix.t(), axis)
        return grad

    aten = torch.ops.aten
    return {getattr(aten, name).default: forward, getattr(aten, f"{name}_backward").default: backward}


TABLE: dict[Any, Callable[..., Tensor]] = {
    overload: function
    for mode, weight in _FILTERS.items()
    if hasattr(torch.ops.aten, f"_upsample_{mode}2d_aa")  # lanczos from torch 2.13 on
    for overload, function in _antialiased_pair(f"_upsample_{mode}2d_aa", weight).items()
}
