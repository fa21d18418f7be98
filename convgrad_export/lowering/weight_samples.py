"""Weight gradient sample by sample: no operand is transposed, and a kernel's rows are picked by a Gather.

A weight gradient over the whole batch as one GEMM needs both operands with the channels first. One GEMM a sample reads
them as they are, in parallel where there are threads; only the small products are added. Shifting along the last axis
moves every element, so a Slice does that once per tap of that axis. The other axes' taps then are whole rows of the
shifted image, which a Gather copies: onnxruntime divides a Gather between its threads, a Slice it runs on one.

Operands: grad_output (N, M, *O), input (N, C, *I). Result: (M, C/G, *K).
"""

from __future__ import annotations

import math

from ..geometry import ConvGeometry
from .blocks import Ops, Value, extend, ints, reshape, stack, tap_slices, transpose
from .columns import positions_read, why_not


def sample_matmul(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """One GEMM for each sample and tap of the last axis; the samples' products are added up."""
    positions = math.prod(g.output_size)
    data = reshape(op, extend(op, input, g.read_windows(), g.input_size), [-1, math.prod(g.span[:-1]), g.span[-1]])
    right = reshape(op, grad_output, [-1, g.groups, g.out_channels_per_group, positions])
    right = op.Transpose(right, perm=[0, 1, 3, 2])
    products = []
    for shifted in _shifts(op, g, data):
        picked = shifted
        if _outer_taps(g) > 1 or any(s > 1 for s in g.stride[:-1]):
            picked = op.Gather(shifted, ints(op, positions_read(g, g.rank - 1)), axis=1)
        columns = reshape(op, picked, [-1, g.groups, g.in_channels_per_group * _outer_taps(g), positions])
        products.append(op.ReduceSum(op.MatMul(columns, right), ints(op, [0]), keepdims=1))
    # for each tap of the last axis (1, G, C/G * outer taps, M/G)
    ordered = transpose(op, stack(op, products, axis=0), [1, 3, 2, 0])
    return reshape(op, ordered, g.weight_shape)


def _outer_taps(g: ConvGeometry) -> int:
    return math.prod(g.kernel_size[:-1])


def _shifts(op: Ops, g: ConvGeometry, data: Value) -> list[Value]:
    """`data` (N*C, rows, span of the last axis) as each tap of the last axis reads it."""
    if g.kernel_size[-1] == 1 and g.stride[-1] == 1:
        return [data]
    return list(tap_slices(op, g, data, 2, slice(-1, None)))


def sample_matmul_why_not(g: ConvGeometry) -> str | None:
    if reason := why_not(g):
        return reason
    if _outer_taps(g) == 1 and g.taps > 1:
        return "the kernel has one tap on every axis but the last, so there are no rows to choose between"
    return None
