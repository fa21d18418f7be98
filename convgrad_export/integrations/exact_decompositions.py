"""Functions whose translation by torch.onnx is right for a part of their arguments only.

log(exp(a) + exp(b)) overflows at 89, and log(1 + x) has no digit left at 1e-8. Verification compares at values like the
example's, and the torch.compile backend compares nothing, so these have to be right by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def log1p(x: Tensor) -> Tensor:
    """log(u) for the rounded u = 1 + x, and to first order what the rounding took away."""
    if not x.dtype.is_floating_point:
        return NotImplemented
    near = x.clamp(-1.0, 1.0)  # beyond, the logarithm alone is exact, and infinities have no rest
    rounded = near + 1.0
    return torch.log(x + 1.0) + (near - (rounded - 1.0)) / rounded.clamp(min=0.5)


def expm1(x: Tensor) -> Tensor:
    """tanh(x/2) (exp(x) + 1), in which nothing cancels."""
    return torch.tanh(x * 0.5) * (torch.exp(x) + 1.0) if x.dtype.is_floating_point else NotImplemented


def _larger_and_distance(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of equal infinities is 0."""
    return torch.maximum(x, y), torch.where(x == y, 0.0, (x - y).abs())


def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """The larger one, plus what the other adds to it."""
    larger, distance = _larger_and_distance(x, y)
    return larger + torch.log1p(torch.exp(-distance))


def logaddexp2(x: Tensor, y: Tensor) -> Tensor:
    larger, distance = _larger_and_distance(x, y)
    return larger + torch.log1p(torch.exp(distance * -math.log(2))) / math.log(2)


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """Each element with the one before it, then with the one two before it, four, eight (Hillis and Steele, 1986)."""
    if x.dim() == 0:
        return x.clone()
    size, behind = x.shape[dim], x.dim() - 1 - dim % x.dim()
    if not isinstance(size, int):
        return NotImplemented
    shift = 1
    while shift < size:
        earlier = aten.constant_pad_nd(x.narrow(dim, 0, size - shift), [0, 0] * behind + [shift, 0], -math.inf)
        x, shift = torch.logaddexp(x, earlier), 2 * shift
    return x


def _read_part(source: Tensor, index: Tensor) -> Tensor:
    """The part of `source` that a scatter reads: PyTorch takes one that is larger than the index."""
    for axis, (size, needed) in enumerate(zip(source.shape, index.shape, strict=True)):
        if isinstance(size, int) and isinstance(needed, int) and size > needed:
            source = source.narrow(axis, 0, needed)
    return source


def _scatter(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rest of what PyTorch takes and ONNX does not: a source that is larger, and numbers without an axis."""

    def scatter(x: Tensor, dim: int, index: Tensor, src: Any) -> Tensor:
        if x.dim() == 0:
            part = src.reshape([1]) if isinstance(src, Tensor) else src
            return operator(x.reshape([1]), 0, index.reshape([1]), part).reshape([])
        part = _read_part(src, index) if isinstance(src, Tensor) else src
        return NotImplemented if part is src else operator(x, dim, index, part)

    return scatter


def remainder(x: Tensor, y: Tensor | float) -> Tensor:
    """From fmod, which is exact; x - floor(x / y) * y is off by the rounding of x, and not below y for large ones."""
    if not x.dtype.is_floating_point or (isinstance(y, Tensor) and y.dtype != x.dtype):
        return NotImplemented
    if isinstance(y, torch.SymFloat):  # computed by the forward: of no sign yet
        y = torch.scalar_tensor(y, dtype=x.dtype, device=x.device)
    rest = torch.fmod(x, y)
    return torch.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


def power(x: Tensor, y: Tensor) -> Tensor:
    """ONNX gives the result the type of the base."""
    common = torch.result_type(x, y)
    return NotImplemented if x.dtype == common else torch.pow(x.to(common), y)


def _of_numbers(operator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def extreme(x: Tensor, y: Tensor) -> Tensor:
        """The larger or the smaller one, or that which is a number; ONNX's Max and Min give NaN."""
        return torch.where(x != x, y, torch.where(y != y, x, operator(x, y)))

    return extreme


def signbit(x: Tensor) -> Tensor:
    """Negative zeros count."""
    negative = x < 0
    return negative | ((x == 0) & (1 / x < 0)) if x.dtype.is_floating_point else negative


def copysign(x: Tensor, y: Tensor | float) -> Tensor:
    if not isinstance(y, Tensor):
        y = torch.full_like(x, y)
    if not (x.dtype.is_floating_point and y.dtype.is_floating_point):
        return NotImplemented
    return torch.where(signbit(y), -x.abs(), x.abs())


def scatter_reduce(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """A mean as sums over counts; ONNX has no such reduction, and torch.onnx writes "none"."""
    part = _read_part(src, index)
    if reduce != "mean":
        options = {"include_self": include_self}
        return NotImplemented if part is src else aten.scatter_reduce.two(x, dim, index, part, reduce, **options)
    start, count = (x, torch.ones_like(x)) if include_self else (x.scatter(dim, index, 0), torch.zeros_like(x))
    total = start.scatter_add(dim, index, part)
    count = count.scatter_add(dim, index, torch.ones_like(part)).clamp(min=1)  # where nothing came, x itself
    return total / count if x.dtype.is_floating_point else torch.floor_divide(total, count)


def _compared(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def of_booleans(x: Tensor, other: float) -> Tensor:
        """The translation makes a boolean of the number: True == 2 would hold."""
        whole = x.dtype == torch.bool and not isinstance(other, (bool, torch.SymBool, float, torch.SymFloat))
        return operator(x.to(torch.int64), other) if whole else NotImplemented

    return of_booleans


_COMPARISONS = (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)

TABLE: dict[Any, Callable[..., Any]] = {
    **{comparison.Scalar: _compared(comparison.Scalar) for comparison in _COMPARISONS},
    aten.log1p.default: log1p,
    aten.expm1.default: expm1,
    aten.special_expm1.default: expm1,
    aten.logaddexp.default: logaddexp,
    aten.logaddexp2.default: logaddexp2,
    aten.logcumsumexp.default: logcumsumexp,
    aten.remainder.Tensor: remainder,
    aten.remainder.Scalar: remainder,
    aten.pow.Tensor_Tensor: power,
    aten.fmax.default: _of_numbers(torch.maximum),
    aten.fmin.default: _of_numbers(torch.minimum),
    aten.signbit.default: signbit,
    aten.copysign.Tensor: copysign,
    aten.copysign.Scalar: copysign,
    aten.scatter.src: _scatter(aten.scatter.src),
    aten.scatter.value: _scatter(aten.scatter.value),
    aten.scatter_add.default: _scatter(aten.scatter_add.default),
    aten.scatter_reduce.two: scatter_reduce,
}
