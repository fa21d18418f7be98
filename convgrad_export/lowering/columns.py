"""Convolution and its gradients with one column buffer for the whole batch: for small images under large weights.

onnxruntime's Conv and ConvTranspose run one GEMM a sample and read the whole weight each time. Where a sample has few
output positions, that reading is all they do. Here the batch lies among the positions, so that each of the three is a
single GEMM, in which the weight is used, and its gradient comes out, in the order it is stored in. The forward pass and
the weight gradient read the same columns, and both gradients the same rearranged grad_output: a graph that holds more
than one of them shares those nodes.

Columns are (G, C/G * taps, P), where P runs over the outer output positions, the batch, and the last axis's positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..geometry import ConvGeometry
from .blocks import Ops, Value, extend, ints, reshape, slices, stack, transpose


def forward(op: Ops, g: ConvGeometry, input: Value, weight: Value) -> Value:
    """The convolution itself, (N, M, *O)."""
    rows = reshape(op, weight, [g.groups, g.out_channels_per_group, g.in_channels_per_group * g.taps])
    return _from_rows(op, op.MatMul(rows, _columns(op, g, input)), g.out_channels, g.output_size)


def weight_gradient(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """One GEMM over the batch's columns, whose result needs no rearrangement."""
    columns = op.Transpose(_columns(op, g, input), perm=[0, 2, 1])
    return reshape(op, op.MatMul(_grad_rows(op, g, grad_output), columns), g.weight_shape)


def input_gradient(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """One GEMM over the batch gives every tap's contribution, then Col2Im adds them up sample by sample."""
    rows = reshape(op, weight, [g.groups, g.out_channels_per_group, g.in_channels_per_group * g.taps])
    product = op.MatMul(op.Transpose(rows, perm=[0, 2, 1]), _grad_rows(op, g, grad_output))
    per_sample = _from_rows(op, product, g.in_channels * g.taps, g.output_size)
    columns = reshape(op, per_sample, [-1, g.in_channels * g.taps, math.prod(g.output_size)])
    unit, zero = [1] * (2 - g.rank), [0] * (2 - g.rank)  # one spatial axis is lifted to two, as in input_conv.col2im
    image = op.Col2Im(
        columns,
        ints(op, [*unit, *g.input_size]),
        ints(op, [*unit, *g.kernel_size]),
        strides=[*unit, *g.stride],
        dilations=[*unit, *g.dilation],
        pads=[*zero, *(lo for lo, _ in g.pads), *zero, *(hi for _, hi in g.pads)],
    )
    return image if g.rank == 2 else reshape(op, image, [-1, g.in_channels, *g.input_size])


def _columns(op: Ops, g: ConvGeometry, input: Value) -> Value:
    """What each tap reads of the extended input."""
    outer, last = math.prod(g.kernel_size[:-1]), g.kernel_size[-1]
    data = extend(op, input, g.read_windows(), g.input_size)
    data = _batch_inside(op, data, g.in_channels, math.prod(g.span[:-1]), g.span[-1])
    parts = []
    for tap in range(last):
        start = tap * g.dilation[-1]
        part = data
        if last > 1 or g.stride[-1] > 1:
            stop = start + (g.output_size[-1] - 1) * g.stride[-1] + 1
            part = slices(op, data, [start], [stop], 3, [g.stride[-1]])
        if g.rank > 1 and (outer > 1 or any(s > 1 for s in g.stride[:-1])):
            part = op.Gather(part, ints(op, rows_read(g)), axis=1)
        parts.append(reshape(op, part, [g.in_channels, outer, 1, -1]))
    return reshape(op, stack(op, parts, axis=2), [g.groups, g.in_channels_per_group * g.taps, -1])


def _grad_rows(op: Ops, g: ConvGeometry, grad_output: Value) -> Value:
    """grad_output as (G, M/G, P)."""
    inside = _batch_inside(op, grad_output, g.out_channels, math.prod(g.output_size[:-1]), g.output_size[-1])
    return reshape(op, inside, [g.groups, g.out_channels_per_group, -1])


def _batch_inside(op: Ops, value: Value, channels: int, rows: int, last: int) -> Value:
    """(N, channels, *sizes) as (channels, rows, N, last)."""
    return op.Transpose(reshape(op, value, [-1, channels, rows, last]), perm=[1, 2, 0, 3])


def _from_rows(op: Ops, value: Value, channels: int, sizes: Sequence[int]) -> Value:
    """(G, channels/G, P) as (N, channels, *sizes)."""
    split = reshape(op, value, [channels, math.prod(sizes[:-1]), -1, sizes[-1]])
    return reshape(op, transpose(op, split, [2, 0, 1, 3]), [-1, channels, *sizes])


def rows_read(g: ConvGeometry) -> list[int]:
    """The rows of the span (its outer axes flattened) that each tap of the outer axes reads, in the output's order."""
    numbers = []
    for tap in itertools.product(*(range(k) for k in g.kernel_size[:-1])):
        axes = [
            [d * k + s * o for o in range(size)]
            for d, k, s, size in zip(g.dilation, tap, g.stride, g.output_size, strict=False)
        ]
        for position in itertools.product(*axes):
            row = 0
            for index, size in zip(position, g.span[:-1], strict=True):
                row = row * size + index
            numbers.append(row)
    return numbers


def why_not(g: ConvGeometry) -> str | None:
    return None if g.is_static else "the rows that a tap reads are listed in the graph, which needs fixed sizes"


def input_why_not(g: ConvGeometry) -> str | None:
    return "onnxruntime's Col2Im adds up wrongly over three spatial axes" if g.rank == 3 else None
