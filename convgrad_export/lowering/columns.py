"""Convolution and its gradients with one column buffer for the whole batch: for small images under large weights.

onnxruntime's Conv and ConvTranspose run one GEMM a sample and read the whole weight each time. Where a sample has few
output positions, that reading is all they do. Here the batch lies among the positions, so that each of the three is a
single GEMM, in which the weight is used, and its gradient comes out, in the order it is stored in. The forward pass and
the weight gradient read the same columns, and both gradients the same rearranged grad_output: a graph that holds more
than one of them shares those nodes.

Columns are (G, C/G * taps, P), where P runs over the output positions, and within each over the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..geometry import ConvGeometry
from .blocks import Ops, Value, extend, filters_last, ints, reshape
from .input_conv import add_columns

_MOST_POSITIONS = 1 << 22  # 32 MiB of the model


def forward(op: Ops, g: ConvGeometry, input: Value, weight: Value) -> Value:
    """The convolution itself, (N, M, *O)."""
    if is_one_window(g):
        product = op.MatMul(_sample_rows(op, g, input), op.Transpose(_filters(op, g, weight), perm=[1, 0]))
        return reshape(op, product, [-1, g.out_channels, *g.output_size])
    return _from_rows(op, op.MatMul(_weight_rows(op, g, weight), _columns(op, g, input)), g.out_channels, g.output_size)


def weight_gradient(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """One GEMM over the batch's columns, whose result needs no rearrangement."""
    if is_one_window(g):
        rows = op.Transpose(reshape(op, grad_output, [-1, g.out_channels]), perm=[1, 0])
        return reshape(op, op.MatMul(rows, _sample_rows(op, g, input)), g.weight_shape)
    columns = op.Transpose(_columns(op, g, input), perm=[0, 2, 1])
    return reshape(op, op.MatMul(_grad_rows(op, g, grad_output), columns), g.weight_shape)


def input_gradient(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """One GEMM over the batch gives every tap's contribution, then Col2Im adds them up sample by sample."""
    if is_one_window(g):
        product = op.MatMul(reshape(op, grad_output, [-1, g.out_channels]), _filters(op, g, weight))
        return reshape(op, product, [-1, g.in_channels, *g.input_size])
    product = op.MatMul(filters_last(op, g, weight), _grad_rows(op, g, grad_output))
    per_sample = _from_rows(op, product, g.in_channels * g.taps, g.output_size)
    return add_columns(op, g, reshape(op, per_sample, [-1, g.in_channels * g.taps, math.prod(g.output_size)]))


def is_one_window(g: ConvGeometry) -> bool:
    """Each filter reads a whole sample once, as in a linear layer: samples are rows as they lie, and so are filters."""
    if not g.is_static or g.groups > 1 or g.kernel_size != g.input_size or any(lo or hi for lo, hi in g.pads):
        return False
    return all(k == 1 or d == 1 for k, d in zip(g.kernel_size, g.dilation, strict=True))


def _sample_rows(op: Ops, g: ConvGeometry, input: Value) -> Value:
    return reshape(op, input, [-1, g.in_channels * g.taps])


def _filters(op: Ops, g: ConvGeometry, weight: Value) -> Value:
    return reshape(op, weight, [g.out_channels, g.in_channels * g.taps])


def _weight_rows(op: Ops, g: ConvGeometry, weight: Value) -> Value:
    """The weight as it lies, (G, M/G, C/G * taps)."""
    return reshape(op, weight, [g.groups, g.out_channels_per_group, g.in_channels_per_group * g.taps])


def _columns(op: Ops, g: ConvGeometry, input: Value) -> Value:
    """What each tap reads of the extended input: one Gather, whose blocks are the batch, or one sample's channels."""
    # With the batch last, what is cropped and padded are longer runs.
    data = reshape(op, _batch_last(op, input, g.in_channels, g.input_size), [g.in_channels, *g.input_size, -1])
    data = extend(op, data, g.read_windows(), g.input_size, first_axis=1, trailing=1)
    data = reshape(op, data, [g.in_channels, math.prod(g.span), -1])
    if g.taps > 1 or not g.unit_stride:
        picked = ints(op, positions_read(g))
        if g.is_one_sample:  # blocks of one number: with the channels last, a block is all of them
            rows = op.Transpose(reshape(op, data, [g.in_channels, math.prod(g.span)]), perm=[1, 0])
            data = op.Transpose(op.Gather(rows, picked, axis=0), perm=[1, 0])
        else:
            data = op.Gather(data, picked, axis=1)
    return reshape(op, data, [g.groups, g.in_channels_per_group * g.taps, -1])


def _grad_rows(op: Ops, g: ConvGeometry, grad_output: Value) -> Value:
    """grad_output as (G, M/G, P)."""
    last = _batch_last(op, grad_output, g.out_channels, g.output_size)
    return reshape(op, last, [g.groups, g.out_channels_per_group, -1])


def _batch_last(op: Ops, value: Value, channels: int, sizes: Sequence[int]) -> Value:
    """(N, channels, *sizes) as (channels, positions, N)."""
    return op.Transpose(reshape(op, value, [-1, channels, math.prod(sizes)]), perm=[1, 2, 0])


def _from_rows(op: Ops, value: Value, channels: int, sizes: Sequence[int]) -> Value:
    """(G, channels/G, P) as (N, channels, *sizes)."""
    split = reshape(op, value, [channels, math.prod(sizes), -1])
    return reshape(op, op.Transpose(split, perm=[2, 0, 1]), [-1, channels, *sizes])


def positions_read(g: ConvGeometry, axes: int | None = None) -> list[int]:
    """Where the first `axes` axes' taps read in the span, those axes flattened: by tap, then by output position."""
    axes = g.rank if axes is None else axes
    numbers = []
    for tap in itertools.product(*(range(k) for k in g.kernel_size[:axes])):
        steps = [
            [d * k + s * o for o in range(size)]
            for d, k, s, size in zip(g.dilation, tap, g.stride, g.output_size, strict=False)
        ]
        for position in itertools.product(*steps):
            number = 0
            for index, size in zip(position, g.span[:axes], strict=True):
                number = number * size + index
            numbers.append(number)
    return numbers


def why_not(g: ConvGeometry, axes: int | None = None) -> str | None:
    """The reason against `positions_read`."""
    if not g.is_static:
        return "the rows that a tap reads are listed in the graph, which needs fixed sizes"
    return too_many(math.prod(g.kernel_size[:axes]) * math.prod(g.output_size[:axes]))


def too_many(positions: int) -> str | None:
    """The reason against a graph that lists so many positions."""
    most = _MOST_POSITIONS
    return f"the graph would list {positions} positions, more than {most}" if positions > most else None
