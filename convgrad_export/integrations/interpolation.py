"""Upsampling as one small matrix product per axis, in place of PyTorch's decomposition into gathers.

The gradient of a gather adds at computed positions (ScatterND with a reduction: opset 16, one thread in onnxruntime);
that of a product with a matrix is a product with its transpose. Row i of an axis' matrix holds the weights with which
output position i reads the input. Repeating by a whole factor is an expansion, and its gradient a sum.
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
    if antialias or mode not in _MATRICES:
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
            x = apply_along(x, _MATRICES[mode](after, before, factor, bool(align_corners), x), spatial)
    return x
