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
    if not isinstance(g.batch, int) or not g.batch or (g.batch > block and g.batch % block):
        return False
    # Otherwise padding is all that is read.
    return taps_beside_channels(g) and all(size + end > 0 for size, end in zip(g.input_size, g.end, strict=True))


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
    shape = [g.out_channels, g.taps, g.in_channels]
    if parts > 1:
        taps = writer.node("Reshape", [taps, writer.ints(parts, *shape)], f"{stem}.parts")
        taps = writer.node("ReduceSum", [taps, writer.ints(0)], f"{stem}.sum", keepdims=0)
    else:
        taps = writer.node("Reshape", [taps, writer.ints(*shape)], f"{stem}.rows")
    taps = writer.node("Transpose", [taps], f"{stem}.channels_first", perm=[0, 2, 1])
    writer.node("Reshape", [taps, writer.ints(*g.weight_shape)], entry.result)


def _samples_as_channels(writer: BlockedWriter, entry: ConvolutionEntry, stem: str) -> tuple[str, tuple[int, int]]:
    """The input as (1, N, rows, elements of a row), channels innermost in a row, and the Conv's padding of rows."""
    g = entry.geometry
    # Rows that no window reads are cut off here; zeros above and below are the Conv's.
    before, after = [0, *g.begin[1:]], [min(g.end[0], 0), *g.end[1:]]
    data = writer.channels_last(entry.operands[1], g.in_channels, g.input_size)
    if any(before) or any(after):
        data = writer.node("Pad", [data, writer.ints(0, *before, 0, 0, *after, 0)], f"{stem}.padded")
    rows, rest = g.input_size[0] + after[0], math.prod(g.span[1:])
    data = writer.node("Reshape", [data, writer.ints(1, g.batch, rows, rest * g.in_channels)], f"{stem}.image")
    if g.batch >= writer.block:
        data = writer.reorder_input(data, f"{stem}.image_blocked")
    return data, (g.begin[0], max(g.end[0], 0))


def _grad_output_as_kernel(writer: BlockedWriter, entry: ConvolutionEntry, parts: int, stem: str) -> str:
    """grad_output as filters: (M/B, N, positions, B), or (parts * M/B, N/(parts * B), positions, B, B)."""
    g, block = entry.geometry, writer.block
    kernel = writer.block_tensor(entry.operands[0], g.out_channels, g.output_size)
    filters, positions, samples = g.out_channels // block, math.prod(g.output_size), g.batch // parts
    if g.batch < block:
        axes = {"n": g.batch, "m": filters, "p": positions * block}
    else:
        axes = {"t": parts, "n": samples // block, "q": block, "m": filters, "p": positions, "b": block}
    kernel = writer.rearranged(kernel, axes, "tmnpqb", f"{stem}.kernel")
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
    (height, width), size, pads = plane_of(g.input_size), plane_of(g.kernel_size), plane_pads(g.onnx_pads)
    windows = plane_of([k + rest // d for k, rest, d in zip(g.kernel_size, g.remainder, g.dilation, strict=True)])
    if g.stride[-1] == 1 and any(g.pads[-1]) and math.prod(g.output_size) >= _LARGE_IMAGE:
        rows = writer.node("Reshape", [data, writer.ints(-1, height, width, writer.block)], f"{stem}.rows")
        data = writer.node("Pad", [rows, writer.ints(0, 0, g.begin[-1], 0, 0, 0, g.end[-1], 0)], f"{stem}.padded")
        width, pads[1], pads[3], windows[1] = g.span[-1], 0, 0, size[1]
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


def _rows_and_rest(sizes: Sequence[int]) -> list[int]:
    return [sizes[0], math.prod(sizes[1:])]
