"""Weight gradient of a three-dimensional convolution, its depth taps apart from the taps of a plane.

A depth tap pairs whole planes of grad_output with whole planes of the input, so it can be had by a Gather of planes on
grad_output's side, and only the taps of a plane need slices of the input: 3 copies of grad_output and 9 of the input
for a 3x3x3 kernel instead of 27 of the input. Pairs in which the tap meets padding alone are left out.

Operands: grad_output (N, M, *O), input (N, C, *I). Result: (M, C/G, *K).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from ..depth_planes import reaching_planes
from ..geometry import ConvGeometry
from .blocks import Ops, Value, extend, ints, pad, reshape, slices, stack, tap_slices, total
from .columns import too_many
from .depth import planes_by_taps, used_taps, why_not

_WORTH_SPLITTING = 1.1  # products of whole planes over those needed, from which on planes are told apart by their taps


def depth_taps(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """Depth taps by Gathers of grad_output's planes; one GEMM for each tap of a plane, with a slice of the input."""
    data = extend(op, input, g.read_windows()[1:], g.input_size[1:], first_axis=3)
    data = op.Transpose(data, perm=[1, 2, 0, 3, 4])
    grad = reshape(op, grad_output, [-1, g.out_channels, g.output_size[0], math.prod(g.output_size[1:])])
    grad = op.Transpose(grad, perm=[1, 2, 0, 3])

    def parts(planes: Value) -> Iterator[Value]:
        return tap_slices(op, g, planes, 3, slice(1, None))

    return _by_planes(op, g, grad, data, parts)


def depth_taps_gathered(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """`depth_taps` with the batch innermost: a Gather of runs over the batch for each tap of a plane."""
    places = math.prod(g.input_size[1:])
    index = [_places(g, tap) for tap in itertools.product(*(range(k) for k in g.kernel_size[1:]))]
    data = reshape(op, input, [-1, g.in_channels, g.input_size[0], places])
    data = op.Transpose(data, perm=[1, 2, 3, 0])
    data = _with_zeros(op, data, any(places in entry for entry in index), axis=2)
    grad = reshape(op, grad_output, [-1, g.out_channels, g.output_size[0], math.prod(g.output_size[1:])])
    grad = op.Transpose(grad, perm=[1, 2, 3, 0])

    def parts(planes: Value) -> Iterator[Value]:
        for entry in index:
            yield op.Gather(planes, ints(op, entry), axis=2)

    return _by_planes(op, g, grad, data, parts)


def _by_planes(op: Ops, g: ConvGeometry, grad: Value, data: Value, parts: Callable[[Value], Iterator[Value]]) -> Value:
    """The gradient from operands with channels and depth in front.

    Args:
        grad: (M, depth, rest). data: (C, depth, ...).
        parts: what each tap of a plane reads of some planes of `data`, each (C, planes, rest) in some shape.
    """
    groups = _groups(g)
    none: int = g.output_size[0]
    sources = {
        taps: [reaching_planes(g, plane).get(tap, none) for tap in taps for plane in planes]
        for taps, planes in groups.items()
    }
    grad = _with_zeros(op, grad, any(none in entry for entry in sources.values()), trailing=2)
    per_group = g.in_channels_per_group
    terms: dict[int, list[Value]] = {}
    for taps, planes in groups.items():
        rows = _chosen(op, grad, sources[taps], g.output_size[0])
        rows = reshape(op, rows, [g.groups, len(taps) * g.out_channels_per_group, -1])
        products = []
        for part in parts(_chosen(op, data, planes, g.input_size[0])):
            columns = op.Transpose(reshape(op, part, [g.groups, per_group, -1]), perm=[0, 2, 1])
            products.append(reshape(op, op.MatMul(rows, columns), [g.out_channels, len(taps), 1, per_group]))
        together = stack(op, products, axis=2)
        for index, tap in enumerate(taps):
            one = len(groups) == 1 or len(taps) == 1
            terms.setdefault(tap, []).append(together if one else slices(op, together, [index], [index + 1], 1))
    first, last = _tap_range(g)
    if len(groups) == 1:
        result = terms[first][0]
    else:
        result = stack(op, [total(op, terms[tap]) for tap in range(first, last)], axis=1)
    result = op.Transpose(result, perm=[0, 3, 1, 2])  # (M, C/G, last - first, K[1:])
    result = pad(op, result, [first], [g.kernel_size[0] - last], first_axis=2, trailing=1)
    return reshape(op, result, g.weight_shape)


def _groups(g: ConvGeometry) -> dict[tuple[int, ...], list[int]]:
    """Depth taps to the input planes that one set of GEMMs takes together; what a tap does not reach is zero there."""
    groups = {taps: planes for taps, planes in planes_by_taps(g).items() if taps}
    planes = sorted(plane for members in groups.values() for plane in members)
    every = tuple(range(*_tap_range(g)))
    needed = sum(len(taps) * len(members) for taps, members in groups.items())
    if every != tuple(used_taps(g)) or len(every) * len(planes) < _WORTH_SPLITTING * needed:
        return {every: planes}
    return groups


def _tap_range(g: ConvGeometry) -> tuple[int, int]:
    """The first depth tap that reaches any input plane, and the one after the last."""
    used = used_taps(g)
    return used[0], used[-1] + 1


def _places(g: ConvGeometry, tap: Sequence[int]) -> list[int]:
    """Where a tap of a plane reads an input plane, flat, for each output position; one past the last for padding."""
    (height, width), none = g.input_size[1:], math.prod(g.input_size[1:])
    rows, columns = (
        [o * s - lo + d * k for o in range(size)]
        for size, s, lo, d, k in zip(g.output_size[1:], g.stride[1:], g.begin[1:], g.dilation[1:], tap, strict=True)
    )
    inside = range(width)
    return [y * width + x if 0 <= y < height and x in inside else none for y in rows for x in columns]


def _with_zeros(op: Ops, value: Value, wanted: bool, axis: int = 1, trailing: int = 1) -> Value:
    """`value`, with a further entry of zeros at the end of `axis` where that is wanted."""
    return pad(op, value, [0], [1], first_axis=axis, trailing=trailing) if wanted else value


def _chosen(op: Ops, value: Value, planes: list[int], count: int) -> Value:
    """Entries of axis 1, which has `count` of them without any zeros put behind."""
    return value if planes == list(range(count)) else op.Gather(value, ints(op, planes), axis=1)


def gathered_why_not(g: ConvGeometry) -> str | None:
    return why_not(g) or too_many(math.prod(g.kernel_size[1:]) * math.prod(g.output_size[1:]))
