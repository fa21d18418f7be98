"""Weight gradient of a depthwise convolution as GEMMs over whole rows.

A depthwise kernel has too few products a channel to fill a GEMM. Here the last axis is treated as a matrix dimension
instead: for one channel and one row tap, all pairs of a row of grad_output with a row of the input form a small matrix,
whose diagonals are the kernel's columns. More multiplications than needed, but all of them inside a GEMM; rows are cut
into blocks so that the surplus stays bounded.

Operands: grad_output (N, M, *O), input (N, C, *I), in C groups of M/C filters. Result: (M, 1, *K).
"""

from __future__ import annotations

import itertools
import math

from ..geometry import ConvGeometry
from ..windows import window
from .blocks import Ops, Value, extend, ints, pad, reshape, slices, stack

_LONGEST_BLOCK = 32


def _blocks(length: int) -> tuple[int, int]:
    """(number, length) of equal blocks that cover an axis with the least surplus."""
    count = math.ceil(length / _LONGEST_BLOCK)
    return count, math.ceil(length / count)


def _cut(op: Ops, value: Value, axis: int, count: int, step: int, length: int) -> Value:
    """Overlapping blocks of the last axis as a new axis before it."""
    if count == 1:
        return op.Unsqueeze(value, ints(op, [axis]))
    parts = [slices(op, value, [j * step], [j * step + length], axis) for j in range(count)]
    return op.Concat(*(op.Unsqueeze(part, ints(op, [axis])) for part in parts), axis=axis)


def weight_rows(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """Rows of grad_output times rows of the input, a GEMM a channel and row tap; the diagonals are the taps."""
    rank, stride, multiplier = g.rank, g.stride[-1], g.out_channels_per_group
    count, block = _blocks(g.output_size[-1])
    width = (block - 1) * stride + g.extent[-1]
    outer_sizes = list(g.output_size[:-1])

    # (N, G, Mg, *outer, count, block) -> (G, N, *outer, count, Mg, block): positions before the two matrix axes
    grad = reshape(op, grad_output, [-1, g.groups, multiplier, *g.output_size])
    grad = pad(op, grad, [0], [count * block - g.output_size[-1]], first_axis=2 + rank)
    grad = reshape(op, grad, [-1, g.groups, multiplier, *outer_sizes, count, block])
    grad = op.Transpose(grad, perm=[1, 0, *range(3, 3 + rank), 2, 3 + rank])
    lines = op.Transpose(reshape(op, grad, [g.groups, -1, multiplier * block]), perm=[0, 2, 1])

    span = [*g.span[:-1], (count - 1) * block * stride + width]
    windows = [window(i, -lo, f) for i, lo, f in zip(g.input_size, g.begin, span, strict=True)]
    data = op.Transpose(extend(op, input, windows, g.input_size), perm=[1, 0, *range(2, 2 + rank)])
    data = _cut(op, data, 1 + rank, count, block * stride, width)
    products = []
    for tap in itertools.product(*(range(k) for k in g.kernel_size[:-1])):
        part = data
        if rank > 1:
            starts = [d * k for d, k in zip(g.dilation, tap, strict=False)]
            stops = [b + (o - 1) * s + 1 for b, o, s in zip(starts, outer_sizes, g.stride, strict=False)]
            part = slices(op, data, starts, stops, 2, g.stride[:-1])
        product = op.MatMul(lines, reshape(op, part, [g.groups, -1, width]))
        products.append(reshape(op, product, [g.out_channels, 1, block * width]))
    return _diagonals(op, g, stack(op, products, axis=1), block, width)


def _diagonals(op: Ops, g: ConvGeometry, matrices: Value, block: int, width: int) -> Value:
    """Sum each matrix (block, width) along ``column = stride * row + dilation * k``.

    Rows of ``width + stride`` elements over the same memory shift row x by ``stride * x``: diagonals become columns.
    """
    stride, outer = g.stride[-1], math.prod(g.kernel_size[:-1])
    longer = pad(op, matrices, [0], [block * stride], first_axis=2)
    skewed = reshape(op, longer, [g.out_channels, outer, block, width + stride])
    taps = slices(op, skewed, [0], [g.extent[-1]], 3, [g.dilation[-1]])
    return reshape(op, op.ReduceSum(taps, ints(op, [2]), keepdims=0), g.weight_shape)
