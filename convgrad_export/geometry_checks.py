"""Whether shapes and attributes belong together: each check raises one GeometryError that gives both sides.

Used by `ConvGeometry`'s constructors alone. A size may be symbolic, as in `geometry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from .arguments import LARGEST
from .errors import GeometryError

Size: TypeAlias = Any  # int, or a tracer's symbolic integer
Sizes: TypeAlias = tuple[Size, ...]


def shown(shape: Sequence[Size]) -> str:
    """``(2, 3, 8)``: a shape as error messages write it."""
    return "(" + ", ".join(str(size) for size in shape) + ")"


def check_ranks(input_shape: Sizes, weight_shape: Sizes, rank: int | None, names: tuple[str, str]) -> int:
    """The number of spatial axes: `rank` where the caller demands one, else 1 to 3."""
    for shape, name in ((input_shape, names[0]), (weight_shape, names[1])):
        spatial = len(shape) - 2
        if rank is not None and spatial != rank:
            raise GeometryError(
                f"{name} has {len(shape)} dimensions {shown(shape)}, expected {rank + 2}: (batch or output channels, "
                f"channels, {rank} spatial). Add the batch dimension to an unbatched tensor."
            )
        if not 1 <= spatial <= 3:
            raise GeometryError(
                f"{name} has {len(shape)} dimensions {shown(shape)}, expected 3, 4 or 5 "
                f"(a convolution over 1, 2 or 3 spatial axes)"
            )
    if len(input_shape) != len(weight_shape):
        raise GeometryError(
            f"{names[0]} {shown(input_shape)} and {names[1]} {shown(weight_shape)} have different numbers of dimensions"
        )
    return len(input_shape) - 2


def check_channels(
    input_shape: Sizes, weight_shape: Sizes, groups: int, transposed: bool, names: tuple[str, str]
) -> None:
    """Every size but the batch is positive, and the channels agree with the weight and the groups."""
    for axis, size in enumerate(weight_shape):
        if size < 1:
            raise GeometryError(
                f"{names[1]} dimension {axis} is {size}, expected at least 1; shape {shown(weight_shape)}"
            )
    for axis, size in enumerate(input_shape[1:], start=1):
        if size < 1:
            raise GeometryError(
                f"{names[0]} dimension {axis} is {size}, expected at least 1; shape {shown(input_shape)}"
            )
    channels, first, second = input_shape[1], weight_shape[0], weight_shape[1]
    if first % groups != 0:
        raise GeometryError(f"groups is {groups}, expected a divisor of {names[1]} dimension 0, which is {first}")
    if transposed:
        _check_storable(f"the output's channels, groups {groups} times {second} of {names[1]},", second * groups)
    if transposed and channels != first:
        raise GeometryError(
            f"{names[0]} has {channels} channels, expected {first}, dimension 0 of the transposed {names[1]} "
            f"{shown(weight_shape)}"
        )
    if not transposed and channels != second * groups:
        raise GeometryError(
            f"{names[0]} has {channels} channels, expected {second * groups}: groups {groups} times {second}, "
            f"dimension 1 of {names[1]} {shown(weight_shape)}"
        )


def check_output_padding(
    output_padding: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], transposed: bool
) -> None:
    """0 for a plain convolution; below the larger of stride and dilation for a transposed one."""
    for axis, (extra, s, d) in enumerate(zip(output_padding, stride, dilation, strict=True)):
        if extra and not transposed:
            raise GeometryError(f"output_padding is {output_padding}, expected 0: only a transposed convolution has it")
        if extra >= max(s, d) and transposed:
            raise GeometryError(
                f"output_padding on spatial axis {axis} is {extra}, expected less than the larger of stride {s} and "
                f"dilation {d}"
            )


def output_size_of_axis(
    axis: int, size: Size, k: Size, s: int, pads: tuple[Size, Size], d: int, extra: int, transposed: bool
) -> Size:
    """O along one axis, at least 1; `extra` is the output_padding."""
    lo, hi = pads
    extent = d * (k - 1) + 1
    if transposed:
        span = (size - 1) * s + extent
        output = span - lo - hi + extra
        if output < 1:
            raise GeometryError(
                f"spatial axis {axis}: the output would have {output} elements, expected at least 1; input {size}, "
                f"kernel {k}, stride {s}, padding {pads}, dilation {d}, output_padding {extra}"
            )
        _check_storable(f"spatial axis {axis}: the size of the uncut output", span + extra)
        return output
    padded = size + lo + hi
    _check_storable(f"spatial axis {axis}: the size of the padded input", padded)
    if padded < extent:
        raise GeometryError(
            f"spatial axis {axis}: the kernel spans {extent} elements (size {k}, dilation {d}), more than the padded "
            f"input's {padded} (size {size}, padding {pads}); pad more or take a smaller kernel"
        )
    return (padded - extent) // s + 1


def _check_storable(what: str, count: Size) -> None:
    """A derived size fits into the integers of a graph, as the given ones do."""
    if isinstance(count, int) and count > LARGEST:
        raise GeometryError(f"{what} would be {count}, expected at most {LARGEST}: ONNX stores 64-bit integers")
