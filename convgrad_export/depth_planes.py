"""Which planes a convolution over three axes connects along its first axis, the depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .geometry import ConvGeometry

Pairs = dict[int, int]


def read_planes(g: ConvGeometry, plane: int) -> Pairs:
    """Depth tap to the input plane that an output plane reads by it; taps that meet padding are absent."""
    first = plane * g.stride[0] - g.begin[0]
    planes = {tap: first + tap * g.dilation[0] for tap in range(g.kernel_size[0])}
    return {tap: source for tap, source in planes.items() if 0 <= source < g.input_size[0]}


def reaching_planes(g: ConvGeometry, plane: int) -> Pairs:
    """Depth tap to the plane of grad_output that it connects with an input plane; taps that meet none are absent."""
    pairs = {}
    for tap in range(g.kernel_size[0]):
        source, rest = divmod(plane + g.begin[0] - g.dilation[0] * tap, g.stride[0])
        if rest == 0 and 0 <= source < g.output_size[0]:
            pairs[tap] = source
    return pairs


def by_taps(pairs: Sequence[Pairs]) -> dict[tuple[int, ...], list[int]]:
    """The planes, which `pairs` lists in order, by the depth taps that connect them."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for plane, pair in enumerate(pairs):
        groups.setdefault(tuple(pair), []).append(plane)
    return groups


def all_taps(pairs: Iterable[Iterable[int]]) -> list[int]:
    """Depth taps that connect any plane, in order."""
    return sorted({tap for pair in pairs for tap in pair})
