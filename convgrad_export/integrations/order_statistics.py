"""Medians, k-th values, running extremes, searches and gathers that ONNX lacks, by sorts, comparisons and scatters.

Where there are NaN, PyTorch has rules of its own: a median is NaN, nanmedian leaves them out, the k-th value has them
last, and a running extreme stays NaN. ONNX's TopK has no rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _order(x: Tensor, dim: int) -> Tensor:
    """The positions of the sorted elements, NaN as infinities behind the numbers."""
    return torch.sort(torch.where(x != x, math.inf, x) if x.dtype.is_floating_point else x, dim=dim)[1]


def _of_scalar(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and position in a tensor without axes."""
    return x.clone(), torch.zeros([], dtype=torch.int64, device=x.device)


def _selected(x: Tensor, position: Tensor, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The elements of `x` at positions that have size 1 along `dim`."""
    value = x.gather(dim, position)
    return (value, position) if keepdim else (value.squeeze(dim), position.squeeze(dim))


def median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Values and positions of the lower median, from a sort; of the first NaN where there is one."""
    if x.dim() == 0:
        return _of_scalar(x)
    position = _order(x, dim).narrow(dim, (x.shape[dim] - 1) // 2, 1)
    if x.dtype.is_floating_point:
        missing = (x != x).to(torch.int32)
        position = torch.where(missing.amax(dim, True) > 0, missing.argmax(dim, True), position)
    return _selected(x, position, dim, keepdim)


def _ranked(x: Tensor, rank: Tensor, dim: int) -> Tensor:
    """The position of the element with `rank` others before it: infinities, which sort as NaN do, and then these."""
    position = _order(x, dim).gather(dim, rank)
    if not x.dtype.is_floating_point:
        return position
    missing, infinite = (each.to(torch.int32) for each in (x != x, x == math.inf))
    found = x.gather(dim, position)
    position = torch.where(found != found, infinite.argmax(dim, True), position)
    return torch.where(rank < (1 - missing).sum(dim, True), position, missing.argmax(dim, True))


def nanmedian(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower median of the numbers; NaN where there are none."""
    if x.dim() == 0 or not x.dtype.is_floating_point:
        return median(x, dim, keepdim)
    numbers = (x == x).to(torch.int64).sum(dim, True)
    middle = torch.div((numbers - 1).clamp(min=0), 2, rounding_mode="floor")
    return _selected(x, _ranked(x, middle, dim), dim, keepdim)


def nanmedian_of_all(x: Tensor) -> Tensor:
    flat = x.reshape([-1])
    if flat.dtype.is_floating_point and not isinstance(flat.shape[0], int):
        flat = torch.cat([flat, flat.new_full([1], math.nan)])  # where there is nothing else, the result
    return nanmedian(flat, 0)[0]


def median_of_all(x: Tensor) -> Tensor:
    flat = x.reshape([-1])
    if not flat.dtype.is_floating_point or isinstance(flat.shape[0], int):
        return median(flat, 0)[0]
    return torch.where((flat != flat).any(), math.nan, nanmedian_of_all(flat))


def kth_value(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    if x.dim() == 0:
        return _of_scalar(x)
    rank = torch.full_like(x.narrow(dim, 0, 1), k - 1, dtype=torch.int64)
    return _selected(x, _ranked(x, rank, dim), dim, keepdim)


def _running(exceeds: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    def extreme(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Each element with the one before it, then with the one two before it, four (Hillis and Steele, 1986).

        Of equal ones the last counts, and the last NaN.
        """
        if x.dim() == 0:
            return _of_scalar(x)
        size = x.shape[dim]
        if not isinstance(size, int):
            return NotImplemented
        shape = [1] * x.dim()
        shape[dim] = size
        positions = torch.arange(size, device=x.device).reshape(shape).expand(x.shape)
        shift = 1
        while shift < size:
            earlier, before = (
                torch.cat([each.narrow(dim, 0, shift), each.narrow(dim, 0, size - shift)], dim)
                for each in (x, positions)
            )
            taken = exceeds(earlier, x)
            if x.dtype.is_floating_point:
                taken = taken | ((earlier != earlier) & (x == x))
            x, positions = torch.where(taken, earlier, x), torch.where(taken, before, positions)
            shift *= 2
        return x.clone(), positions.clone()

    return extreme


def search_sorted(
    sorted_sequence: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """The number of elements below each value, by comparing all with all."""
    if sorter is not None:
        sorted_sequence = sorted_sequence.gather(-1, sorter)
    sequence = sorted_sequence if sorted_sequence.dim() == 1 else sorted_sequence.unsqueeze(-2)
    below = sequence <= values.unsqueeze(-1) if right or side == "right" else sequence < values.unsqueeze(-1)
    return below.to(torch.int64).sum(-1).to(torch.int32 if out_int32 else torch.int64)


def put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """The elements of the flattened tensor at `index`, the gradient of `take` among them."""
    flat = aten.index_put(x.reshape([-1]), [index.reshape([-1])], source.reshape([-1]), accumulate)
    return flat.reshape(x.shape)


def masked_scatter_backward(grad: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    """The gradient of the source, of which the mask's elements took one after the other."""
    taken = mask.expand(grad.shape).reshape([-1])
    positions = (taken.to(torch.int64).cumsum(0) - 1).clamp(min=0)
    values = torch.where(taken, grad.reshape([-1]), 0.0)
    return grad.new_zeros([math.prod(sizes)]).scatter_add(0, positions, values).reshape(sizes)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.median.dim: median,
    aten.median.default: median_of_all,
    aten.nanmedian.dim: nanmedian,
    aten.nanmedian.default: nanmedian_of_all,
    aten.kthvalue.default: kth_value,
    aten.cummax.default: _running(torch.gt),
    aten.cummin.default: _running(torch.lt),
    aten.searchsorted.Tensor: search_sorted,
    aten.put.default: put,
    aten.masked_scatter_backward.default: masked_scatter_backward,
}
