"""float64 convolutions as MatMuls where the catalogue has none: sizes known at run time, or a large output padding.

onnxruntime's CPU provider has no float64 Conv and ConvTranspose. Shapes are read with Shape, so both forms serve every
size. Letters as in `geometry.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from convgrad_export.integrations.dynamic_convolution import DynamicConvolution, crop_to, spatial_shape
from convgrad_export.lowering.blocks import Ops, Value, ints, pad, slices, total

NAMES = {"input": "input.matmul_taps_dynamic", "transposed_input": "input.matmul_gather_dynamic"}


def gathered(op: Ops, g: DynamicConvolution, data: Value, weight: Value) -> Value:
    """The plain convolution of `data` (N, groups * weight.shape[1], *) with `weight`: one GEMM a kernel tap.

    It is the forward pass of a plain layer, and the input gradient of a transposed one.
    """
    rows, columns, *kernel = g.weight_shape
    spatial = range(2, 2 + g.rank)
    data = pad(op, data, g.padding, g.padding)
    # The last position that a tap reads is its first plus (O - 1) * s, and that of the last tap ends the axis.
    extent = [d * (k - 1) for d, k in zip(g.dilation, kernel, strict=True)]
    reach = op.Sub(spatial_shape(op, g, data), ints(op, extent))
    products, sizes = [], None
    for tap in itertools.product(*(range(k) for k in kernel)):
        starts = [d * k for d, k in zip(g.dilation, tap, strict=True)]
        stops = op.Add(reach, ints(op, starts))
        part = op.Slice(data, ints(op, starts), stops, ints(op, spatial), ints(op, g.stride))
        sizes = spatial_shape(op, g, part) if sizes is None else sizes
        products.append(op.MatMul(_tap(op, g, weight, tap, rows, columns), _columns(op, g, part, columns)))
    return op.Reshape(total(op, products), op.Concat(_batch(op, data), ints(op, [rows]), sizes, axis=0))


def scattered(op: Ops, g: DynamicConvolution, data: Value, weight: Value, like: Value | None = None) -> Value:
    """The transposed convolution of `data` (N, weight.shape[0], *): one GEMM a tap, spread, shifted and added.

    It is the forward pass of a transposed layer, and the input gradient of a plain one.

    Args:
        like: A tensor whose spatial sizes the result takes. None for those of a transposed layer.
    """
    rows, columns, *kernel = g.weight_shape
    rank, channels = g.rank, columns * g.groups
    sizes = spatial_shape(op, g, data)
    operand = _columns(op, g, data, rows // g.groups)
    planes = op.Concat(_batch(op, data), ints(op, [channels]), sizes, axis=0)
    wide = op.Mul(sizes, ints(op, g.stride))
    spread_shape = op.Concat(_batch(op, data), ints(op, [channels]), wide, axis=0)
    # Behind the last element the spread leaves s - 1 zeros; an output padding may reach further.
    more = [max(extra - s + 1, 0) for extra, s in zip(g.output_padding, g.stride, strict=True)]
    terms = []
    for tap in itertools.product(*(range(k) for k in kernel)):
        product = op.MatMul(op.Transpose(_tap(op, g, weight, tap, rows, columns), perm=[0, 2, 1]), operand)
        plane = op.Reshape(product, planes)
        if any(s != 1 for s in g.stride):
            split = op.Unsqueeze(plane, ints(op, [3 + 2 * axis for axis in range(rank)]))
            gaps = [amount for s in g.stride for amount in (0, s - 1)]
            plane = op.Reshape(pad(op, split, [0] * (2 * rank), gaps), spread_shape)
        before = [d * k for d, k in zip(g.dilation, tap, strict=True)]
        after = [d * (k - 1) - b + m for d, k, b, m in zip(g.dilation, kernel, before, more, strict=True)]
        terms.append(pad(op, plane, before, after))
    full = total(op, terms)
    if like is not None:
        return crop_to(op, g, full, like, g.padding)
    # (I - 1) * s - 2 * p + d * (K - 1) + 1 + extra elements from p on
    ends = [
        d * (k - 1) + 1 + extra - s - p
        for d, k, extra, s, p in zip(g.dilation, kernel, g.output_padding, g.stride, g.padding, strict=True)
    ]
    return op.Slice(full, ints(op, g.padding), op.Add(wide, ints(op, ends)), ints(op, range(2, 2 + rank)))


def _tap(op: Ops, g: DynamicConvolution, weight: Value, tap: Sequence[int], rows: int, columns: int) -> Value:
    """(groups, rows / groups, columns) of one kernel tap."""
    if any(k > 1 for k in g.weight_shape[2:]):
        weight = slices(op, weight, tap, [k + 1 for k in tap], 2)
    return op.Reshape(weight, ints(op, [g.groups, rows // g.groups, columns]))


def _columns(op: Ops, g: DynamicConvolution, value: Value, channels: int) -> Value:
    """(N, groups, channels, positions). No -1: a batch may be empty."""
    positions = op.ReduceProd(spatial_shape(op, g, value), keepdims=1)
    return op.Reshape(value, op.Concat(_batch(op, value), ints(op, [g.groups, channels]), positions, axis=0))


def _batch(op: Ops, value: Value) -> Value:
    return op.Slice(op.Shape(value), ints(op, [0]), ints(op, [1]), ints(op, [0]))
