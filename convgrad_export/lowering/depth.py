"""Input gradient of a three-dimensional convolution by two-dimensional kernels.

onnxruntime's Conv and ConvTranspose are slower over three spatial axes than over two, and its Col2Im adds up wrongly.
Here the first spatial axis, the depth, is left to Gathers of whole planes: the depth taps that reach a plane become
further channels of one GEMM, and Col2Im adds up over the other two axes. Depth taps that meet padding alone are left
out: a third of the work at a depth of 2 with 3 taps, two thirds at a depth of 1.

Operands: grad_output (N, M, *O), weight (M, C/G, *K). Result: (N, C, *I).
"""

from __future__ import annotations

import math

from ..depth_planes import all_taps, by_taps, reaching_planes
from ..geometry import ConvGeometry
from .blocks import Ops, Value, columns_to_image, ints, reshape, stack, transpose, zeros_like_batch

_FEW_POSITIONS = 64  # of a plane: a GEMM a sample with fewer columns is slower than one over the batch
_MOST_PAIRS = 1 << 16  # of a plane and a depth tap
_FEW_COLUMNS = 16  # a sample: for so few, turning the weight round costs more than the GEMM loses by not doing it


def planes_by_taps(g: ConvGeometry) -> dict[tuple[int, ...], list[int]]:
    """Input planes by the depth taps that reach them."""
    return by_taps([reaching_planes(g, plane) for plane in range(g.input_size[0])])


def used_taps(g: ConvGeometry) -> list[int]:
    """Depth taps that reach any input plane, in order."""
    return all_taps(planes_by_taps(g))


def why_not(g: ConvGeometry) -> str | None:
    """Reasons against every lowering that takes the depth plane by plane."""
    if g.rank != 3:
        return f"spatial axes: {g.rank}, it needs 3"
    if not g.is_static:
        return "its planes are listed one by one, and a size is open"
    pairs = g.input_size[0] * g.kernel_size[0]
    if pairs > _MOST_PAIRS:
        return f"{pairs} pairs of a plane and a depth tap are too many to list one by one, it takes {_MOST_PAIRS}"
    return None if used_taps(g) else "every depth tap reads padding only"


def plane_col2im(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """Three axes plane by plane: one GEMM over the depth taps that reach a plane, then Col2Im over two axes."""
    per_group, area = g.out_channels_per_group, math.prod(g.output_size[1:])
    # Planes before channels, so that those of several taps lie side by side as channels.
    data = reshape(op, grad_output, [-1, g.groups, per_group, g.output_size[0], area])
    if g.output_size[0] > 1:
        data = op.Transpose(data, perm=[0, 1, 3, 2, 4])
    data = reshape(op, data, [-1, g.groups, g.output_size[0], per_group * area])
    filters = _taps_first(op, g, weight)
    parts, order = [], []
    for taps, planes in planes_by_taps(g).items():
        folded = area < _FEW_POSITIONS  # then planes with the same taps share one GEMM over the batch
        rows = _rows(op, g, filters, taps, folded and area * len(planes) < _FEW_COLUMNS) if taps else None
        for chosen in [planes] if folded or not taps else [[plane] for plane in planes]:
            order += chosen
            if not taps:
                parts.append(zeros_like_batch(op, grad_output, [g.in_channels, len(chosen), *g.input_size[1:]]))
                continue
            received = _received(op, g, data, taps, chosen)
            columns = (_batch_columns if folded else _sample_columns)(op, g, received, rows, len(taps), len(chosen))
            parts.append(_image(op, g, columns, len(chosen)))
    result = stack(op, parts, axis=2)
    if order == sorted(order):
        return result
    return op.Gather(result, ints(op, [order.index(plane) for plane in range(len(order))]), axis=2)


def _taps_first(op: Ops, g: ConvGeometry, weight: Value) -> Value:
    """The weight's used depth taps as (G, taps, M/G * C/G * K[1:])."""
    used = used_taps(g)
    if len(used) < g.kernel_size[0]:  # first, so that less is moved afterwards
        weight = op.Gather(weight, ints(op, used), axis=2)
    per_group, flat = g.out_channels_per_group, math.prod(g.kernel_size[1:])
    if len(used) > 1:
        split = reshape(op, weight, [g.groups, per_group, g.in_channels_per_group, len(used), flat])
        weight = op.Transpose(split, perm=[0, 3, 1, 2, 4])
    return reshape(op, weight, [g.groups, len(used), per_group * g.in_channels_per_group * flat])


def _rows(op: Ops, g: ConvGeometry, filters: Value, taps: tuple[int, ...], fused: bool) -> Value:
    """Left operand of a GEMM for some depth taps: (G, C/G * K[1:], taps * M/G).

    Args:
        fused: leave the transposition to a form that onnxruntime fuses into the MatMul, which then reads the weight
            as it lies. Its GEMM is slower for it, so that this pays for few columns only.
    """
    used, flat = used_taps(g), g.in_channels_per_group * math.prod(g.kernel_size[1:])
    if len(taps) < len(used):
        filters = op.Gather(filters, ints(op, [used.index(tap) for tap in taps]), axis=1)
    deep = len(taps) * g.out_channels_per_group
    if fused:
        return op.Transpose(reshape(op, filters, [g.groups, deep, flat]), perm=[0, 2, 1])
    turned = op.Transpose(reshape(op, filters, [g.groups, deep, flat, 1]), perm=[0, 2, 3, 1])
    return reshape(op, turned, [g.groups, flat, deep])


def _received(op: Ops, g: ConvGeometry, data: Value, taps: tuple[int, ...], planes: list[int]) -> Value:
    """The planes of grad_output that reach input `planes` by `taps`: (N, G, taps * planes, M/G * area)."""
    pairs = [reaching_planes(g, plane) for plane in planes]
    sources = [pair[tap] for tap in taps for pair in pairs]
    return data if sources == list(range(g.output_size[0])) else op.Gather(data, ints(op, sources), axis=2)


def _batch_columns(op: Ops, g: ConvGeometry, data: Value, rows: Value, taps: int, planes: int) -> Value:
    """Columns by one GEMM over the batch and the planes: (N, C, planes, K[1:], area)."""
    per_group, area = g.out_channels_per_group, math.prod(g.output_size[1:])
    split = reshape(op, data, [-1, g.groups, taps, planes, per_group, area])
    together = op.Transpose(split, perm=[1, 2, 4, 0, 3, 5])
    columns = op.MatMul(rows, reshape(op, together, [g.groups, taps * per_group, -1]))
    columns = reshape(op, columns, [g.in_channels, math.prod(g.kernel_size[1:]), -1, planes, area])
    return transpose(op, columns, [2, 0, 3, 1, 4])


def _sample_columns(op: Ops, g: ConvGeometry, data: Value, rows: Value, taps: int, planes: int) -> Value:
    """Columns of one plane by one GEMM a sample: (N, G, C/G * K[1:], area)."""
    area = math.prod(g.output_size[1:])
    return op.MatMul(rows, reshape(op, data, [-1, g.groups, taps * g.out_channels_per_group, planes * area]))


def _image(op: Ops, g: ConvGeometry, columns: Value, planes: int) -> Value:
    """Columns added up over the two axes of each plane: (N, C, planes, *I[1:])."""
    size, kernel = g.input_size[1:], g.kernel_size[1:]
    rows = g.in_channels * planes * math.prod(kernel)
    columns = reshape(op, columns, [-1, rows, math.prod(g.output_size[1:])])
    image = columns_to_image(op, columns, size, kernel, g.stride[1:], g.dilation[1:], g.pads[1:])
    return reshape(op, image, [-1, g.in_channels, planes, *size])
