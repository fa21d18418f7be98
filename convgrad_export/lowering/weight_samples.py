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
from .blocks import Ops, Value, extend, ints, reshape, slices, stack, tap_slices
from .columns import positions_read, why_not


def sample_matmul(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """One GEMM for each sample and tap of the last axis; the samples' products are added up."""
    positions = math.prod(g.output_size)
    grad = reshape(op, grad_output, [-1, g.groups, g.out_channels_per_group, positions])
    columns = g.in_channels_per_group * _outer_taps(g)
    data = [
        reshape(op, part, [-1, g.groups, columns, positions])
        for part in (_picked(op, g, shifted) for shifted in _shifts(op, g, input))
    ]
    # onnxruntime rearranges a GEMM's right operand, so the larger is the left one. Then either way no product is
    # rearranged but by bringing one axis to the end, which takes a tenth of what three axes in another order take.
    if g.taps == 1 and g.out_channels_per_group > columns:
        product = op.MatMul(grad, op.Transpose(data[0], perm=[0, 1, 3, 2]))
        return reshape(op, op.ReduceSum(product, ints(op, [0]), keepdims=1), g.weight_shape)
    right = op.Transpose(grad, perm=[0, 1, 3, 2])
    sums = [op.ReduceSum(op.MatMul(left, right), ints(op, [0]), keepdims=1) for left in data]
    shape = [g.groups, columns, 1, g.out_channels_per_group]
    together = stack(op, [reshape(op, summed, shape) for summed in sums], axis=2)
    rows = reshape(op, together, [g.groups, columns * g.kernel_size[-1], g.out_channels_per_group])
    return reshape(op, op.Transpose(rows, perm=[0, 2, 1]), g.weight_shape)


def _picked(op: Ops, g: ConvGeometry, shifted: Value) -> Value:
    """The rows that the outer axes' taps read, of what `_shifts` gives."""
    if g.taps > 1 and (_outer_taps(g) > 1 or any(s > 1 for s in g.stride[:-1])):
        return op.Gather(shifted, ints(op, positions_read(g, g.rank - 1)), axis=1)
    return shifted


def _outer_taps(g: ConvGeometry) -> int:
    return math.prod(g.kernel_size[:-1])


def _shifts(op: Ops, g: ConvGeometry, input: Value) -> list[Value]:
    """What each tap of the last axis reads: rows (N*C, rows, O of the last axis), those of all outer taps in order."""
    windows = g.read_windows()
    if g.taps == 1:
        if not any(w.pads for w in windows):
            return [_every_nth(op, g, input)]  # the crop is part of that Slice
        return [_every_nth(op, g, extend(op, input, windows, g.input_size))]
    rows = reshape(op, extend(op, input, windows, g.input_size), [-1, math.prod(g.span[:-1]), g.span[-1]])
    if g.kernel_size[-1] == 1 and g.stride[-1] == 1:
        return [rows]
    return list(tap_slices(op, g, rows, 2, slice(-1, None)))


def _every_nth(op: Ops, g: ConvGeometry, data: Value) -> Value:
    """The positions that a kernel of one tap reads of `data`, which begins where it first reads."""
    stops = [(o - 1) * s + 1 for o, s in zip(g.output_size, g.stride, strict=True)]
    if g.unit_stride and tuple(stops) == g.input_size:
        return data
    return slices(op, data, [0] * g.rank, stops, 2, g.stride)


def sample_matmul_why_not(g: ConvGeometry) -> str | None:
    if reason := why_not(g, g.rank - 1):
        return reason
    if _outer_taps(g) == 1 and g.taps > 1:
        return "the kernel has one tap on every axis but the last, so there are no rows to choose between"
    return None
