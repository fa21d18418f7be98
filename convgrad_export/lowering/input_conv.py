"""Input gradient of a convolution as Conv and ConvTranspose.

Operands, everywhere in this module: grad_output (N, M, *O), weight (M, C/G, *K). Result: (N, C, *I).
"""

from __future__ import annotations

import itertools
import math

from ..geometry import ConvGeometry
from ..windows import Phase, window
from .blocks import (
    Ops,
    Value,
    columns_to_image,
    conv_operand,
    crop,
    extend,
    filters_last,
    reshape,
    reverse,
    reversed_taps,
    slices,
    stack,
    transpose,
    zeros_like_batch,
)

_MAX_PHASES = 64


def conv_transpose(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """One ConvTranspose with the forward's pads; output_padding restores the rows the forward stride skipped."""
    pads = g.onnx_pads
    return op.ConvTranspose(
        grad_output,
        weight,
        strides=list(g.stride),
        dilations=list(g.dilation),
        pads=pads,
        output_padding=list(g.remainder),
        group=g.groups,
    )


def conv_transpose_crop(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """ConvTranspose without pads, then an explicit crop and extension: for providers that refuse uneven pads."""
    full = op.ConvTranspose(grad_output, weight, strides=list(g.stride), dilations=list(g.dilation), group=g.groups)
    return extend(op, full, g.write_windows(), g.span)


def channel_first_weight(op: Ops, g: ConvGeometry, weight: Value) -> Value:
    """(M, C/G, *K) as (C, M/G, *K): channels and filters exchanged inside each group."""
    kernel = g.kernel_size
    spatial = range(2, 2 + g.rank)
    if g.groups == 1:
        return transpose(op, weight, [1, 0, *spatial])
    grouped = reshape(op, weight, [g.groups, g.out_channels_per_group, g.in_channels_per_group, *kernel])
    exchanged = op.Transpose(grouped, perm=[0, 2, 1, *(axis + 1 for axis in spatial)])
    return reshape(op, exchanged, [g.in_channels, g.out_channels_per_group, *kernel])


def flipped_weight(op: Ops, g: ConvGeometry, weight: Value) -> Value:
    """(M, C/G, *K) as (C, M/G, *K), the kernel reversed."""
    pairs = g.out_channels_per_group * g.in_channels_per_group
    if g.taps == 1 or pairs == 1:  # nothing to reverse, or nothing to exchange
        return reverse(op, channel_first_weight(op, g, weight), 2, g.kernel_size)
    backwards = reversed_taps(op, filters_last(op, g, weight), [g.in_channels, g.taps, g.out_channels_per_group])
    ordered = op.Transpose(backwards, perm=[0, 2, 1])
    return reshape(op, ordered, [g.in_channels, g.out_channels_per_group, *g.kernel_size])


def flipped_conv(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """Stride 1: a Conv of grad_output with the reversed kernel, padded by ``E-1-lo`` (cropped if negative)."""
    data, pads = conv_operand(op, grad_output, g.flipped_windows(), g.output_size)
    flipped = flipped_weight(op, g, weight)
    return op.Conv(data, flipped, pads=pads, dilations=list(g.dilation), group=g.groups)


def phase_conv(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """One small Conv for each input position modulo the stride, then the results interleaved.

    No multiplication with inserted zeros: each tap of the kernel is used in exactly one phase.
    """
    exchanged = channel_first_weight(op, g, weight)
    counts = [math.ceil(i / s) for i, s in zip(g.input_size, g.stride, strict=True)]
    axes = [g.phases(axis) for axis in range(g.rank)]
    parts = [_one_phase(op, g, grad_output, exchanged, phases, counts) for phases in itertools.product(*axes)]
    together = reshape(op, stack(op, parts, axis=1), [-1, *g.stride, g.in_channels, *counts])
    rank = g.rank
    order = [axis for pair in zip(range(rank + 2, 2 * rank + 2), range(1, rank + 1), strict=True) for axis in pair]
    interleaved = op.Transpose(together, perm=[0, rank + 1, *order])
    sizes = [n * s for n, s in zip(counts, g.stride, strict=True)]
    full = reshape(op, interleaved, [-1, g.in_channels, *sizes])
    return crop(op, full, [window(size, 0, i) for size, i in zip(sizes, g.input_size, strict=True)], sizes)


def _one_phase(
    op: Ops,
    g: ConvGeometry,
    grad_output: Value,
    exchanged: Value,
    phases: tuple[Phase | None, ...],
    counts: list[int],
) -> Value:
    reached = [phase for phase in phases if phase is not None]
    if len(reached) < g.rank:
        return zeros_like_batch(op, grad_output, [g.in_channels, *counts])
    windows = [
        window(o, p.base - (p.taps - 1) * p.dilation, n + (p.taps - 1) * p.dilation)
        for o, p, n in zip(g.output_size, reached, counts, strict=True)
    ]
    starts = [p.tap_first + (p.taps - 1) * p.tap_step for p in reached]
    stops = [p.tap_first - 1 if p.tap_first > 0 else -(2**63) + 1 for p in reached]
    kernel = slices(op, exchanged, starts, stops, 2, [-p.tap_step for p in reached])
    data, pads = conv_operand(op, grad_output, windows, g.output_size)
    return op.Conv(data, kernel, pads=pads, dilations=[p.dilation for p in reached], group=g.groups)


def phase_conv_why_not(g: ConvGeometry) -> str | None:
    count = math.prod(g.stride)
    if count == 1:
        return "stride is 1: there is a single phase, which is input.flipped_conv"
    if count > _MAX_PHASES:
        return f"stride {g.stride} has {count} phases, more than {_MAX_PHASES}"
    return None


def col2im(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """One GEMM that gives every tap's contribution as a column, then Col2Im adds the columns up."""
    product = taps_product(op, g, grad_output, weight)
    return add_columns(op, g, reshape(op, product, [-1, g.in_channels * g.taps, math.prod(g.output_size)]))


def taps_product(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """Every tap's contribution by one GEMM a sample: (N, G, C/G * taps, positions)."""
    data = reshape(op, grad_output, [-1, g.groups, g.out_channels_per_group, math.prod(g.output_size)])
    # Not the operand as it comes from the Transpose: fused with it, the product would turn the weight for each sample.
    rows = filters_last(op, g, weight)
    rows = reshape(op, rows, [1, g.groups, g.in_channels_per_group * g.taps, g.out_channels_per_group])
    return op.MatMul(rows, data)


def add_columns(op: Ops, g: ConvGeometry, columns: Value) -> Value:
    """Every tap's contribution (N, C * taps, positions), one or two spatial axes, added up into the input gradient."""
    image = columns_to_image(op, columns, g.input_size, g.kernel_size, g.stride, g.dilation, g.pads)
    return image if g.rank == 2 else reshape(op, image, [-1, g.in_channels, *g.input_size])


def col2im_why_not(g: ConvGeometry) -> str | None:
    """The reason against `add_columns`, see `blocks.columns_to_image`."""
    return "onnxruntime's Col2Im adds up wrongly over three spatial axes" if g.rank == 3 else None
