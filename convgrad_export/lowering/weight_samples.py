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
from .blocks import Ops, Value, extend, ints, reshape, slices, stack, tap_slices, transpose
from .columns import positions_read, why_not

_FEW_POSITIONS = 2048  # of all samples; with more of them the GEMM takes longer than the result's rearrangement


def sample_matmul(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """One GEMM for each sample and tap of the last axis; the samples' products are added up."""
    positions = math.prod(g.output_size)
    grad = reshape(op, grad_output, [-1, g.groups, g.out_channels_per_group, positions])
    filters_first = _filters_first(g)
    products = []
    for shifted in _shifts(op, g, input):
        picked = shifted
        if g.taps > 1 and (_outer_taps(g) > 1 or any(s > 1 for s in g.stride[:-1])):
            picked = op.Gather(shifted, ints(op, positions_read(g, g.rank - 1)), axis=1)
        columns = reshape(op, picked, [-1, g.groups, g.in_channels_per_group * _outer_taps(g), positions])
        if filters_first:
            product = op.MatMul(grad, op.Transpose(columns, perm=[0, 1, 3, 2]))
        else:
            product = op.MatMul(columns, op.Transpose(grad, perm=[0, 1, 3, 2]))
        products.append(op.ReduceSum(product, ints(op, [0]), keepdims=1))
    # for each tap of the last axis (1, G, C/G * outer taps, M/G), or those two the other way round
    ordered = transpose(op, stack(op, products, axis=0), [1, 2, 3, 0] if filters_first else [1, 3, 2, 0])
    return reshape(op, ordered, g.weight_shape)


def _filters_first(g: ConvGeometry) -> bool:
    """Whether grad_output is the GEMM's left operand.

    The result then is in the weight's order but for the last axis, which is brought to its place ten times as fast as
    three axes are. But onnxruntime rearranges the right operand before it multiplies, so the larger should be the left.
    """
    columns = g.in_channels_per_group * _outer_taps(g)
    if g.taps == 1:
        return g.out_channels_per_group > columns
    few = isinstance(g.batch, int) and g.batch * math.prod(g.output_size) <= _FEW_POSITIONS
    return few and columns >= g.out_channels_per_group


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
    if all(s == 1 for s in g.stride) and tuple(stops) == g.input_size:
        return data
    return slices(op, data, [0] * g.rank, stops, 2, g.stride)


def sample_matmul_why_not(g: ConvGeometry) -> str | None:
    if reason := why_not(g):
        return reason
    if _outer_taps(g) == 1 and g.taps > 1:
        return "the kernel has one tap on every axis but the last, so there are no rows to choose between"
    return None
