"""Weight gradient of a convolution, and the bias gradient.

Operands: grad_output (N, M, *O), input (N, C, *I). Result: (M, C/G, *K). A transposed convolution's weight gradient is
that of its adjoint with the two operands exchanged; the catalogue does the exchange, so nothing here knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..geometry import ConvGeometry
from .blocks import (
    Ops,
    Value,
    conv_operand,
    extend,
    ints,
    operand_sizes,
    reshape,
    reverse,
    stack,
    tap_slices,
    taps_last,
    transpose,
)


def swapped_conv(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """Conv with batch and channels exchanged: the stride dilates grad_output, the dilation strides over the input.

    The textbook form. Groups stand beside the batch, (C/G, G*N, *I), which is right for every group count.
    """
    windows = g.read_windows()
    data, pads = conv_operand(op, input, windows, g.input_size)
    sizes = operand_sizes(pads, windows, g.input_size)
    data = _channels_before_batch(op, data, g.groups, g.in_channels_per_group, sizes)
    kernel = op.Transpose(grad_output, perm=[1, 0, *range(2, 2 + g.rank)])
    result = op.Conv(data, kernel, strides=list(g.dilation), dilations=list(g.stride), pads=pads, group=g.groups)
    return op.Transpose(result, perm=[1, 0, *range(2, 2 + g.rank)])


def flipped_conv(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """Stride 1, operands the other way round: grad_output is the data, the input the kernel, the result is reversed."""
    windows = g.flipped_windows()
    data, pads = conv_operand(op, grad_output, windows, g.output_size)
    sizes = operand_sizes(pads, windows, g.output_size)
    data = _channels_before_batch(op, data, g.groups, g.out_channels_per_group, sizes)
    kernel = op.Transpose(input, perm=[1, 0, *range(2, 2 + g.rank)])
    result = op.Conv(data, kernel, strides=list(g.dilation), pads=pads, group=g.groups)  # (M/G, C, *K), reversed
    spatial = range(3, 3 + g.rank)
    grouped = reshape(op, result, [g.out_channels_per_group, g.groups, g.in_channels_per_group, *g.kernel_size])
    ordered = reshape(op, transpose(op, grouped, [1, 0, 2, *spatial]), g.weight_shape)
    return reverse(op, ordered, 2, g.kernel_size)


def _channels_before_batch(op: Ops, value: Value, groups: int, per_group: int, sizes: list[int]) -> Value:
    """(N, G*c, *sizes) as (c, G*N, *sizes)."""
    spatial = range(2, 2 + len(sizes))
    if groups == 1:
        return op.Transpose(value, perm=[1, 0, *spatial])
    grouped = reshape(op, value, [-1, groups, per_group, *sizes])
    exchanged = op.Transpose(grouped, perm=[2, 1, 0, *(axis + 1 for axis in spatial)])
    return reshape(op, exchanged, [per_group, -1, *sizes])


def im2col(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """One GEMM: grad_output (M/G, N*O) with the slices of the input that each tap reads, (K*C/G, N*O)."""
    columns = stack(op, list(_tap_slices(op, g, input)), axis=1)
    columns = reshape(op, columns, [g.groups, g.taps * g.in_channels_per_group, -1])
    # The columns go first: GEMM kernels pack the right operand, so the narrower one belongs there.
    product = op.MatMul(columns, op.Transpose(_group_rows(op, g, grad_output), perm=[0, 2, 1]))
    ordered = taps_last(op, product, [g.groups, g.taps, g.in_channels_per_group, g.out_channels_per_group])
    return reshape(op, ordered, g.weight_shape)


def matmul_taps(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """One GEMM a tap: no column buffer."""
    rows = _group_rows(op, g, grad_output)
    products = []
    for part in _tap_slices(op, g, input):
        data = reshape(op, part, [g.groups, g.in_channels_per_group, -1])
        product = op.MatMul(rows, op.Transpose(data, perm=[0, 2, 1]))
        products.append(reshape(op, product, [g.out_channels, 1, g.in_channels_per_group]))
    tap_major = reshape(op, stack(op, products, axis=1), [g.out_channels, *g.kernel_size, g.in_channels_per_group])
    return _taps_last(op, g, tap_major)


def depthwise_taps(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """One input channel a group: multiply by the slice that a tap reads, and add up. No GEMM."""
    data = extend(op, input, g.read_windows(), g.input_size)
    multiplier = g.out_channels_per_group
    axes = ints(op, [0, *range(2, 2 + g.rank)]) if multiplier == 1 else ints(op, [0, *range(3, 3 + g.rank)])
    if multiplier > 1:
        grad_output = reshape(op, grad_output, [-1, g.groups, multiplier, *g.output_size])
    sums = []
    for part in _each_tap(op, g, data, first_axis=2):
        factor = part if multiplier == 1 else reshape(op, part, [-1, g.groups, 1, *g.output_size])
        summed = op.ReduceSum(op.Mul(grad_output, factor), axes, keepdims=0)
        sums.append(reshape(op, summed, [g.out_channels, 1]))
    return reshape(op, stack(op, sums, axis=1), g.weight_shape)


def reduce_sum(op: Ops, g: ConvGeometry, grad_output: Value) -> Value:
    """Bias gradient: grad_output added up over the batch and all positions; shape (M,)."""
    return op.ReduceSum(grad_output, ints(op, [0, *range(2, 2 + g.rank)]), keepdims=0)


def _each_tap(op: Ops, g: ConvGeometry, data: Value, first_axis: int) -> Iterator[Value]:
    """What each kernel tap reads of the extended input, in row-major tap order."""
    if g.is_pointwise and g.unit_stride:
        yield data
        return
    yield from tap_slices(op, g, data, first_axis)


def _tap_slices(op: Ops, g: ConvGeometry, input: Value) -> Iterator[Value]:
    """`_each_tap` of the input laid out as (G, C/G, N, ...), so that a group's columns are contiguous."""
    data = extend(op, input, g.read_windows(), g.input_size)
    grouped = reshape(op, data, [-1, g.groups, g.in_channels_per_group, *g.span])
    ordered = op.Transpose(grouped, perm=[1, 2, 0, *range(3, 3 + g.rank)])
    return _each_tap(op, g, ordered, first_axis=3)


def _group_rows(op: Ops, g: ConvGeometry, grad_output: Value) -> Value:
    """grad_output as (G, M/G, N*O)."""
    positions = math.prod(g.output_size)
    grouped = reshape(op, grad_output, [-1, g.groups, g.out_channels_per_group, positions])
    ordered = op.Transpose(grouped, perm=[1, 2, 0, 3])
    return reshape(op, ordered, [g.groups, g.out_channels_per_group, -1])


def _taps_last(op: Ops, g: ConvGeometry, tap_major: Value) -> Value:
    """(M, *K, C/G) as (M, C/G, *K)."""
    if g.taps == 1:
        return reshape(op, tap_major, g.weight_shape)
    return op.Transpose(tap_major, perm=[0, g.rank + 1, *range(1, g.rank + 1)])
