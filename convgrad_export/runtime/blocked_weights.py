"""Weight gradients as one Conv in the blocked layout, whose kernel is grad_output.

Depthwise, sample and channel together are the channels of that Conv. Dense, the samples are, which are summed over,
and the input's channels lie on its last axis beside the taps (`lowering/weight_channels_last.py` has the formula):
fewer samples than a block has channels are read as they lie, otherwise blocks of channels are blocks of samples.

Zeros beside the rows are written into the operand: onnxruntime's kernel computes positions whose windows leave a row
one by one, and a weight gradient has few others, for its positions are the taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..geometry import ConvGeometry
from .convolution_entries import ConvolutionEntry, plane_of, plane_pads, taps_beside_channels

if TYPE_CHECKING:
    from .blocked_writer import BlockedWriter

_LARGE_IMAGE = 100  # positions of grad_output from which on the Conv is most of a depthwise gradient


def fills_blocks(g: ConvGeometry, block: int) -> bool:
    """Whether a dense layer's samples can be a Conv's channels."""
    if not isinstance(g.batch, int) or not (0 < g.batch < block or (g.batch > 0 and g.batch % block == 0)):
        return False
    # Otherwise padding is all that is read.
    return taps_beside_channels(g) and all(size + _margins(g, i)[1] > 0 for i, size in enumerate(g.input_size))


def write_dense_weight(writer: BlockedWriter, entry: ConvolutionEntry) -> None:
    """The nodes that compute the entry's result, (M, C, *K) of a geometry that fills blocks."""
    g, stem = entry.geometry, f"{entry.result}.weight_gradient"
    # Two sums, of half the samples each: the Conv's rows alone, one for each of the kernel's, divide badly by two.
    parts = 2 if g.batch % (2 * writer.block) == 0 else 1
    data, pads = _samples_as_channels(writer, entry, stem)
    conv = writer.conv(
        [data, _grad_output_as_kernel(writer, entry, parts, stem)],
        f"{stem}.blocked",
        group=parts,
        kernel_shape=_rows_and_rest(g.output_size),
        strides=[g.dilation[0], 1],
        dilations=[g.stride[0], g.stride[1] * g.in_channels if g.rank == 2 else 1],
        pads=[pads[0], 0, pads[1], 0],
    )
    taps = writer.reorder_output(conv, f"{stem}.taps", g.out_channels * parts)
    shape = writer.ints(parts, g.out_channels, math.prod(g.kernel_size), g.in_channels)
    taps = writer.node("Reshape", [taps, shape], f"{stem}.parts")
    taps = writer.node("ReduceSum", [taps, writer.ints(0)], f"{stem}.sum", keepdims=0)
    taps = writer.node("Transpose", [taps], f"{stem}.channels_first", perm=[0, 2, 1])
    writer.node("Reshape", [taps, writer.ints(*g.weight_shape)], entry.result)


def _samples_as_channels(writer: BlockedWriter, entry: ConvolutionEntry, stem: str) -> tuple[str, tuple[int, int]]:
    """The input as (1, N, rows, elements of a row), channels innermost in a row, and the Conv's padding of rows."""
    g = entry.geometry
    margins = [_margins(g, axis) for axis in range(g.rank)]
    begin, end = margins[0]
    margins[0] = 0, min(end, 0)  # rows that no window reads are cut off; zeros above and below are the Conv's
    data = writer.channels_last(entry.operands[1], g.in_channels, g.input_size)
    if any(any(pair) for pair in margins):
        amounts = writer.ints(0, *(before for before, _ in margins), 0, 0, *(after for _, after in margins), 0)
        data = writer.node("Pad", [data, amounts], f"{stem}.padded")
    rows, rest = _rows_and_rest([size + sum(pair) for size, pair in zip(g.input_size, margins, strict=True)])
    data = writer.node("Reshape", [data, writer.ints(1, g.batch, rows, rest * g.in_channels)], f"{stem}.image")
    if g.batch >= writer.block:
        data = writer.reorder_input(data, f"{stem}.image_blocked")
    return data, (begin, max(end, 0))


def _grad_output_as_kernel(writer: BlockedWriter, entry: ConvolutionEntry, parts: int, stem: str) -> str:
    """grad_output as filters: (M/B, N, positions, B), or (parts * M/B, N/(parts * B), positions, B, B)."""
    g, block = entry.geometry, writer.block
    kernel = writer.block_tensor(entry.operands[0], g.out_channels, g.output_size)
    filters, positions, samples = g.out_channels // block, math.prod(g.output_size), g.batch // parts
    if g.batch < block:
        axes, perm = [g.batch, filters, positions * block], [1, 0, 2]
    else:
        axes, perm = [parts, samples // block, block, filters, positions, block], [0, 3, 1, 4, 2, 5]
    moved = [axis for axis in perm if axes[axis] > 1]
    if moved != sorted(moved):
        kernel = writer.node("Reshape", [kernel, writer.ints(*axes)], f"{stem}.kernel_axes")
        kernel = writer.node("Transpose", [kernel], f"{stem}.kernel_blocks", perm=perm)
    shape = writer.ints(parts * g.out_channels, samples, *_rows_and_rest(g.output_size))
    return writer.node("Reshape", [kernel, shape], f"{stem}.kernel")


def write_depthwise_weight(writer: BlockedWriter, entry: ConvolutionEntry) -> None:
    """Result element k of channel (n, c) is the sum over grad_output of input, k dilations on: a Conv.

    Stride and dilation change places. A last window that the forward convolution left out is cut off.
    """
    g = entry.geometry
    grad_output, x = entry.operands
    together = int(g.batch) * g.in_channels
    stem = f"{entry.result}.weight_gradient"
    data = writer.block_tensor(x, g.in_channels, g.input_size)
    (height, width), size, windows = plane_of(g.input_size), plane_of(g.kernel_size), _windows(g)
    pads = plane_pads(g.onnx_pads)
    if g.stride[-1] == 1 and any(g.pads[-1]) and math.prod(g.output_size) >= _LARGE_IMAGE:
        before, after = _margins(g, g.rank - 1)
        rows = writer.node("Reshape", [data, writer.ints(-1, height, width, writer.block)], f"{stem}.rows")
        data = writer.node("Pad", [rows, writer.ints(0, 0, before, 0, 0, 0, after, 0)], f"{stem}.padded")
        width, pads[1], pads[3], windows[1] = before + width + after, 0, 0, size[1]
    data = writer.node("Reshape", [data, writer.ints(1, together, height, width)], f"{stem}.image")
    kernel = writer.block_tensor(grad_output, g.in_channels, g.output_size)
    kernel = writer.node("Reshape", [kernel, writer.ints(together, 1, *plane_of(g.output_size))], f"{stem}.kernel")
    conv = writer.conv(
        [data, kernel],
        f"{stem}.blocked",
        group=together,
        kernel_shape=plane_of(g.output_size),
        strides=plane_of(g.dilation),
        dilations=plane_of(g.stride),
        pads=pads,
    )
    taps = writer.reorder_output(conv, f"{stem}.taps", together)
    if windows != size:
        taps = writer.node("Slice", [taps, writer.ints(0, 0), writer.ints(*size), writer.ints(2, 3)], f"{stem}.cut")
    shape = writer.ints(int(g.batch), g.in_channels, 1, *g.kernel_size)
    samples = writer.node("Reshape", [taps, shape], f"{stem}.samples")
    writer.node("ReduceSum", [samples, writer.ints(0)], entry.result, keepdims=0)


def _margins(g: ConvGeometry, axis: int) -> tuple[int, int]:
    """Zeros before and after an axis of the input, so that it ends where the last window does; negative: cut off."""
    needed = (g.output_size[axis] - 1) * g.stride[axis] + g.extent[axis]
    return g.begin[axis], needed - g.input_size[axis] - g.begin[axis]


def _rows_and_rest(sizes: Sequence[int]) -> list[int]:
    return [sizes[0], math.prod(sizes[1:])]


def _windows(g: ConvGeometry) -> list[int]:
    """Positions that the Conv of a depthwise gradient has; the first of them are the kernel's."""
    padded = [lo + size + hi for size, (lo, hi) in zip(g.input_size, g.pads, strict=True)]
    spans = [s * (o - 1) + 1 for s, o in zip(g.stride, g.output_size, strict=True)]
    counts = [(p - e) // d + 1 for p, e, d in zip(padded, spans, g.dilation, strict=True)]
    return plane_of(counts)
