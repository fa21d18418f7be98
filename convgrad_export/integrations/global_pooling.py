"""Pooling over a whole dynamic size, as attention blocks and generalized means write it.

ATen's pooling takes numbers for its windows, so `avg_pool2d(x, x.shape[2:])` would fix the size. One window over all
positions is a mean or a maximum of axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def unless_whole(function: Callable[..., Any], rank: int, whole: Callable[..., Any]) -> Callable[..., Any]:
    """Pooling by `function`, or by `whole` where there is one window, as large as an input of dynamic sizes."""

    def pooled(input: Tensor, kernel_size: Any, *args: Any, **options: Any) -> Any:
        result = whole(input, rank, *args, **options) if _is_whole(input, kernel_size, rank) else NotImplemented
        return function(input, kernel_size, *args, **options) if result is NotImplemented else result

    return pooled


def _is_whole(input: Tensor, kernel_size: Any, rank: int) -> bool:
    sizes = list(kernel_size) if isinstance(kernel_size, Sequence) else [kernel_size]
    if len(sizes) != rank or all(isinstance(size, int) for size in sizes):
        return False
    return all(statically_known_true(k == size) for k, size in zip(sizes, input.shape[-rank:], strict=True))


def _is_padded(padding: Any) -> bool:
    return any(padding) if isinstance(padding, Sequence) else bool(padding)


def _average(
    input: Tensor,
    rank: int,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    axes = list(range(-rank, 0))
    if _is_padded(padding):
        return NotImplemented
    if divisor_override is None:
        return input.mean(axes, keepdim=True)
    return input.sum(axes, keepdim=True) / divisor_override


def largest(
    input: Tensor,
    rank: int,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of the last `rank` axes, and where it is in these as one: that of the first of several."""
    if _is_padded(padding):
        return NotImplemented
    values, indices = (each[(..., *[None] * rank)] for each in input.flatten(-rank).max(-1))
    return (values, indices) if return_indices else values


def _largest_and_where(*args: Any, **options: Any) -> Any:
    return largest(*args, **{**options, "return_indices": True})


_functional = torch.nn.functional
GLOBAL: Mapping[Any, Callable[..., Any]] = {
    function: unless_whole(function, rank, whole)
    for function, rank, whole in (
        (_functional.avg_pool1d, 1, _average),
        (_functional.avg_pool2d, 2, _average),
        (_functional.avg_pool3d, 3, _average),
        (_functional.max_pool2d, 2, largest),
        (_functional.max_pool2d_with_indices, 2, _largest_and_where),
        (_functional.max_pool3d, 3, largest),
        (_functional.max_pool3d_with_indices, 3, _largest_and_where),
    )
}
