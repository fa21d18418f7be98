"""Input gradient of a transposed convolution: a plain convolution of grad_output.

Operands: grad_output (N, M, *O), weight (C, M/G, *K). Result: (N, C, *I).
"""

from __future__ import annotations

import itertools
import math

from ..geometry import ConvGeometry
from .blocks import Ops, Value, conv_operand, extend, reshape, slices, stack, transpose


def conv(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """One Conv with the operator's own weight; rows that output_padding added are not read."""
    data, pads = conv_operand(op, grad_output, g.read_windows(), g.output_size)
    return op.Conv(data, weight, strides=list(g.stride), dilations=list(g.dilation), pads=pads, group=g.groups)


def im2col(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """One GEMM over the slices of grad_output that each tap reads."""
    data = extend(op, grad_output, g.read_windows(), g.output_size)
    positions = math.prod(g.input_size)
    columns = []
    for tap in itertools.product(*(range(k) for k in g.kernel_size)):
        starts = [d * k for d, k in zip(g.dilation, tap, strict=True)]
        stops = [b + (i - 1) * s + 1 for b, i, s in zip(starts, g.input_size, g.stride, strict=True)]
        part = data
        if not (g.is_pointwise and g.unit_stride):
            part = slices(op, data, starts, stops, 2, g.stride)
        columns.append(reshape(op, part, [-1, g.groups, g.out_channels_per_group, positions]))
    grouped = reshape(op, weight, [g.groups, g.in_channels_per_group, g.out_channels_per_group, *g.kernel_size])
    rows = reshape(
        op,
        transpose(op, grouped, [0, 1, *range(3, 3 + g.rank), 2]),
        [g.groups, g.in_channels_per_group, g.taps * g.out_channels_per_group],
    )
    return reshape(op, op.MatMul(rows, stack(op, columns, axis=2)), [-1, g.in_channels, *g.input_size])
