"""Weight gradient as one GEMM with the kernel's taps divided between the two operands.

The tap (ky, kx) pairs grad_output at row y with the input at row y + ky, column x + kx. Shifting grad_output down by ky
instead of the input up gives the same pairs, so ky can live on grad_output and kx on the input: for a kernel of K taps
an axis, K shifted copies of each operand replace the K*K copies of im2col, and both small sides of the GEMM are K times
larger. That pays where the channels of a group are few.

Operands: grad_output (N, M, *O), input (N, C, *I). Result: (M, C/G, *K).
"""

from __future__ import annotations

import itertools
import math

from ..geometry import ConvGeometry
from .blocks import Ops, Value, extend, pad, reshape, stack, tap_slices


def shifted_matmul(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """One GEMM of shifted operands: the last axis's taps shift the input, the other axes' taps shift grad_output."""
    lines = stack(op, _grad_output_shifts(op, g, grad_output), axis=1)
    columns = stack(op, _input_shifts(op, g, input), axis=1)
    product = op.MatMul(lines, op.Transpose(columns, perm=[0, 2, 1]))  # (G, outer taps * M/G, last taps * C/G)
    outer, last = math.prod(g.kernel_size[:-1]), g.kernel_size[-1] * g.in_channels_per_group
    split = reshape(op, product, [g.groups, outer, g.out_channels_per_group, last])
    filters = op.Transpose(split, perm=[0, 2, 1, 3])
    rows = op.Transpose(reshape(op, filters, [g.out_channels, g.taps, g.in_channels_per_group]), perm=[0, 2, 1])
    return reshape(op, rows, g.weight_shape)


def _input_shifts(op: Ops, g: ConvGeometry, input: Value) -> list[Value]:
    """The extended input seen by each tap of the last axis: (G, C/G, N * rows * last output size)."""
    rank = g.rank
    data = reshape(
        op,
        extend(op, input, g.read_windows(), g.input_size),
        [-1, g.groups, g.in_channels_per_group, *g.span],
    )
    data = op.Transpose(data, perm=[1, 2, 0, *range(3, 3 + rank)])
    return [
        reshape(op, part, [g.groups, g.in_channels_per_group, -1])
        for part in tap_slices(op, g, data, 2 + rank, slice(-1, None))
    ]


def _grad_output_shifts(op: Ops, g: ConvGeometry, grad_output: Value) -> list[Value]:
    """grad_output placed among the rows of the extended input for each tap of the outer axes: (G, M/G, N*rows*O)."""
    rank, rows = g.rank, g.span[:-1]
    grad = reshape(op, grad_output, [-1, g.groups, g.out_channels_per_group, *g.output_size])
    grad = op.Transpose(grad, perm=[1, 2, 0, *range(3, 3 + rank)])
    placed = []
    for taps in itertools.product(*(range(k) for k in g.kernel_size[:-1])):
        begin = [d * k for d, k in zip(g.dilation, taps, strict=False)]
        end = [r - b - o for r, b, o in zip(rows, begin, g.output_size, strict=False)]
        part = pad(op, grad, begin, end, first_axis=3, trailing=1)
        placed.append(reshape(op, part, [g.groups, g.out_channels_per_group, -1]))
    return placed


def shifted_matmul_why_not(g: ConvGeometry) -> str | None:
    if g.rank == 1:
        return "there is one spatial axis, so there is nothing to divide"
    if any(s != 1 for s in g.stride[:-1]):
        return f"stride is {g.stride}, it needs 1 on every axis but the last"
    if math.prod(g.kernel_size[:-1]) == 1:
        return "the kernel has one tap on every axis but the last, so there is nothing to divide"
    return None
