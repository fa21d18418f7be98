"""The few steps that lowerings are put together from. `op` is anything that records or runs ONNX operators by name.

Two recorders are in use: `emit.onnx.GraphOps` (an onnx_ir graph) and onnxscript's opset objects inside torch.onnx.
Every step here emits single-output operators of opset 13 with the same meaning up to the newest opset.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..geometry import ConvGeometry
from ..windows import Window

Value = Any  # a graph value of whatever recorder `op` is


class Ops(Protocol):
    """Calls ONNX operators by name: inputs positionally, attributes by keyword."""

    def __getattr__(self, op_type: str) -> Any: ...


def ints(op: Ops, values: Sequence[int]) -> Value:
    return op.Constant(value_ints=[int(value) for value in values])


def floats(op: Ops, array: Any) -> Value:
    """A float32 constant from a numpy array of any shape."""
    flat = op.Constant(value_floats=[float(value) for value in array.ravel()])
    return flat if array.ndim == 1 else op.Reshape(flat, ints(op, array.shape))


def reshape(op: Ops, value: Value, shape: Sequence[int]) -> Value:
    """`shape` has no zeros; one entry, the one that holds the batch, is -1."""
    return op.Reshape(value, ints(op, shape))


def transpose(op: Ops, value: Value, perm: Sequence[int]) -> Value:
    if list(perm) == sorted(perm):
        return value
    return op.Transpose(value, perm=list(perm))


def slices(
    op: Ops,
    value: Value,
    starts: Sequence[int],
    stops: Sequence[int],
    first_axis: int,
    steps: Sequence[int] | None = None,
) -> Value:
    """`value[..., start:stop:step, ...]` on consecutive axes from `first_axis`."""
    axes = range(first_axis, first_axis + len(starts))
    inputs = [ints(op, starts), ints(op, stops), ints(op, axes)]
    if steps is not None and any(step != 1 for step in steps):
        inputs.append(ints(op, steps))
    return op.Slice(value, *inputs)


def tap_slices(op: Ops, g: ConvGeometry, value: Value, first_axis: int, axes: slice = slice(None)) -> Iterator[Value]:
    """What each kernel tap of the spatial axes `axes` reads of an extended `value`, in row-major tap order.

    Args:
        first_axis: the axis of `value` that the first of them is.
    """
    stride, sizes = g.stride[axes], g.output_size[axes]
    for tap in itertools.product(*(range(k) for k in g.kernel_size[axes])):
        starts = [d * k for d, k in zip(g.dilation[axes], tap, strict=True)]
        stops = [b + (o - 1) * s + 1 for b, o, s in zip(starts, sizes, stride, strict=True)]
        yield slices(op, value, starts, stops, first_axis, stride)


def filters_last(op: Ops, g: ConvGeometry, weight: Value) -> Value:
    """The weight (M, C/G, *K) as (G, C/G * taps, M/G)."""
    rows = reshape(op, weight, [g.groups, g.out_channels_per_group, g.in_channels_per_group * g.taps])
    return op.Transpose(rows, perm=[0, 2, 1])


def taps_last(op: Ops, value: Value, shape: Sequence[int]) -> Value:
    """(G, taps, columns, rows) as (G, rows, columns, taps).

    onnxruntime copies whole blocks, or brings one axis to the end, ten times as fast as it reverses three axes.

    Args:
        shape: the four sizes of `value`.
    """
    groups, taps, columns, rows = shape
    if taps > 1:
        value = op.Transpose(reshape(op, value, shape), perm=[0, 2, 1, 3])
    return op.Transpose(reshape(op, value, [groups, columns * taps, rows]), perm=[0, 2, 1])


def reversed_taps(op: Ops, value: Value, shape: Sequence[int]) -> Value:
    """(rows, taps, columns) with the taps in reverse order; a Gather copies whole columns, a Slice single elements.

    Args:
        shape: the three sizes of `value`.
    """
    taps = shape[1]
    value = reshape(op, value, shape)
    return op.Gather(value, ints(op, range(taps - 1, -1, -1)), axis=1) if taps > 1 else value


def reverse(op: Ops, value: Value, first_axis: int, sizes: Sequence[int]) -> Value:
    """Each axis from `first_axis` on in reverse order; axes of size 1 are left alone."""
    axes = [first_axis + index for index, size in enumerate(sizes) if size > 1]
    if not axes:
        return value
    # The end of a reversed Slice lies one before the first element; INT64_MIN + 1 is clamped to it everywhere.
    count = len(axes)
    return op.Slice(
        value, ints(op, [-1] * count), ints(op, [-(2**63) + 1] * count), ints(op, axes), ints(op, [-1] * count)
    )


def crop(op: Ops, value: Value, windows: Sequence[Window], sizes: Sequence[int], first_axis: int = 2) -> Value:
    if not any(window.crops for window in windows):
        return value
    stops = [size - window.crop_end for window, size in zip(windows, sizes, strict=True)]
    return slices(op, value, [window.crop_begin for window in windows], stops, first_axis)


def pad(
    op: Ops, value: Value, begin: Sequence[int], end: Sequence[int], first_axis: int = 2, trailing: int = 0
) -> Value:
    """Zeros before and after consecutive axes from `first_axis`; `trailing` axes behind them stay as they are."""
    if not any(begin) and not any(end):
        return value
    before, after = [0] * first_axis, [0] * trailing
    return op.Pad(value, ints(op, [*before, *begin, *after, *before, *end, *after]))


def extend(
    op: Ops, value: Value, windows: Sequence[Window], sizes: Sequence[int], first_axis: int = 2, trailing: int = 0
) -> Value:
    """The zero-extended ranges `windows` of the axes from `first_axis` on, which have `sizes` elements."""
    cropped = crop(op, value, windows, sizes, first_axis)
    return pad(op, cropped, [w.pad_begin for w in windows], [w.pad_end for w in windows], first_axis, trailing)


def conv_operand(op: Ops, value: Value, windows: Sequence[Window], sizes: Sequence[int]) -> tuple[Value, list[int]]:
    """`extend` split between explicit crops and the `pads` attribute of a Conv that follows.

    A window without any element of the axis is padded explicitly: a Conv over an empty axis is left to no runtime.
    """
    cropped = crop(op, value, windows, sizes)
    begin, end = [w.pad_begin for w in windows], [w.pad_end for w in windows]
    empty = any(w.crop_begin + w.crop_end >= size for w, size in zip(windows, sizes, strict=True))
    if empty:
        return pad(op, cropped, begin, end), [0] * (2 * len(windows))
    return cropped, [*begin, *end]


def operand_sizes(pads: Sequence[int], windows: Sequence[Window], sizes: Sequence[int]) -> list[int]:
    """Sizes of `conv_operand`'s value, whose other result is `pads`: it is padded already where that is all zeros."""
    left = [size - w.crop_begin - w.crop_end for size, w in zip(sizes, windows, strict=True)]
    if any(pads):
        return left
    return [size + w.pad_begin + w.pad_end for size, w in zip(left, windows, strict=True)]


def zeros_like_batch(op: Ops, value: Value, shape: Sequence[int]) -> Value:
    """Zeros of shape (N, *shape), N and the element type taken from `value`, whatever `value` holds."""
    empty = op.Slice(value, ints(op, [0]), ints(op, [0]), ints(op, [1]))  # (N, 0, ...): no element, so no NaN
    batch = op.Slice(op.Shape(value), ints(op, [0]), ints(op, [1]), ints(op, [0]))
    zero = op.ReduceSum(op.Reshape(empty, ints(op, [-1])), keepdims=1)
    return op.Expand(zero, op.Concat(batch, ints(op, shape), axis=0))


def columns_to_image(
    op: Ops,
    columns: Value,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pads: Sequence[tuple[int, int]],
) -> Value:
    """Columns (N, C * taps, positions) added up into (N, C, *size), over one axis (then (N, C, 1, size)) or two.

    onnxruntime 1.32 has one Col2Im for two spatial axes and another, wrong for most geometries, otherwise: one axis is
    lifted to two.
    """
    unit, zero = [1] * (2 - len(size)), [0] * (2 - len(size))
    return op.Col2Im(
        columns,
        ints(op, [*unit, *size]),
        ints(op, [*unit, *kernel]),
        strides=[*unit, *stride],
        dilations=[*unit, *dilation],
        pads=[*zero, *(lo for lo, _ in pads), *zero, *(hi for _, hi in pads)],
    )


def total(op: Ops, terms: Sequence[Value]) -> Value:
    return terms[0] if len(terms) == 1 else op.Sum(*terms)


def stack(op: Ops, terms: Sequence[Value], axis: int) -> Value:
    """Concat along an axis that every term already has."""
    return terms[0] if len(terms) == 1 else op.Concat(*terms, axis=axis)


def strided_why_not(g: ConvGeometry) -> str | None:
    """The reason against a formula for stride 1."""
    return None if g.unit_stride else f"stride is {g.stride}, it needs 1"


def dense_why_not(g: ConvGeometry) -> str | None:
    """The reason against a formula for depthwise convolutions."""
    channels = g.in_channels_per_group
    return None if channels == 1 else f"{channels} input channels a group, it needs 1"
