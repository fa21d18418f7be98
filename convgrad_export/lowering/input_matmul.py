"""Input gradient of a convolution from MatMul, data movement and additions: runs in every dtype MatMul has.

Operands: grad_output (N, M, *O), weight (M, C/G, *K). Result: (N, C, *I).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..geometry import ConvGeometry
from ..windows import window
from .blocks import Ops, Value, extend, filters_last, pad, reshape, slices, total
from .input_conv import taps_product


def matmul_taps(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """One GEMM for all taps; each tap's plane is spread by the stride, shifted into place and added."""
    per_group = g.in_channels_per_group
    rows = filters_last(op, g, weight)
    if g.taps > 1:  # two moves of whole blocks, or of one axis, instead of one of everything
        split = reshape(op, rows, [g.groups, per_group, g.taps, g.out_channels_per_group])
        rows = op.Transpose(split, perm=[0, 2, 1, 3])
        rows = reshape(op, rows, [g.groups, g.taps * per_group, g.out_channels_per_group])
    positions = math.prod(g.output_size)
    data = reshape(op, grad_output, [-1, g.groups, g.out_channels_per_group, positions])
    planes = op.MatMul(rows, data)
    terms = []
    for index, tap in enumerate(itertools.product(*(range(k) for k in g.kernel_size))):
        windows = [
            window(o * s, lo - d * k, i)
            for o, s, lo, d, k, i in zip(g.output_size, g.stride, g.begin, g.dilation, tap, g.input_size, strict=True)
        ]
        # The window ends behind the last real element or misses the axis: the tap reads padding only.
        if any(w.crop_begin > (o - 1) * s for w, o, s in zip(windows, g.output_size, g.stride, strict=True)) or any(
            w.pad_end == i for w, i in zip(windows, g.input_size, strict=True)
        ):
            continue
        plane = planes
        if g.taps > 1:
            plane = slices(op, planes, [index * per_group], [(index + 1) * per_group], 2)
        plane = reshape(op, plane, [-1, g.in_channels, *g.output_size])
        spread = _spread(op, plane, g.in_channels, g.output_size, g.stride)
        sizes = [o * s for o, s in zip(g.output_size, g.stride, strict=True)]
        terms.append(extend(op, spread, windows, sizes))
    if not terms:  # every tap reads padding only: shift the first plane out of the window altogether
        outside = [window(o, o, i) for o, i in zip(g.output_size, g.input_size, strict=True)]
        plane = slices(op, planes, [0], [per_group], 2)
        terms.append(extend(op, reshape(op, plane, [-1, g.in_channels, *g.output_size]), outside, g.output_size))
    return total(op, terms)


def _spread(op: Ops, value: Value, channels: int, sizes: Sequence[int], stride: Sequence[int]) -> Value:
    """Element o of each spatial axis moved to position s*o, zeros between."""
    if all(s == 1 for s in stride):
        return value
    split = [size for o in sizes for size in (o, 1)]
    end = [amount for s in stride for amount in (0, s - 1)]
    padded = pad(op, reshape(op, value, [-1, channels, *split]), [0] * len(end), end)
    return reshape(op, padded, [-1, channels, *(o * s for o, s in zip(sizes, stride, strict=True))])


def pixel_shuffle(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """Kernels that do not overlap: one GEMM, whose rows are the stride's phases, then a rearrangement."""
    rank = g.rank
    product = taps_product(op, g, grad_output, weight)
    if g.unit_stride:
        blocks = reshape(op, product, [-1, g.in_channels, *g.output_size])
    else:
        split = reshape(op, product, [-1, g.in_channels, *g.kernel_size, *g.output_size])
        gaps = [s - k for s, k in zip(g.stride, g.kernel_size, strict=True)]
        phased = pad(op, split, [0] * rank, gaps, trailing=rank)
        order = [a for pair in zip(range(2 + rank, 2 + 2 * rank), range(2, 2 + rank), strict=True) for a in pair]
        blocks = reshape(
            op,
            op.Transpose(phased, perm=[0, 1, *order]),
            [-1, g.in_channels, *(o * s for o, s in zip(g.output_size, g.stride, strict=True))],
        )
    sizes = [o * s for o, s in zip(g.output_size, g.stride, strict=True)]
    windows = [window(size, lo, i) for size, lo, i in zip(sizes, g.begin, g.input_size, strict=True)]
    return extend(op, blocks, windows, sizes)


def pixel_shuffle_why_not(g: ConvGeometry) -> str | None:
    for axis, (k, s, d) in enumerate(zip(g.kernel_size, g.stride, g.dilation, strict=True)):
        if k > s:
            return f"kernels overlap on spatial axis {axis}: size {k}, stride {s}"
        if k > 1 and d > 1:
            return f"the kernel is dilated on spatial axis {axis}: dilation {d}"
    return None
