"""Convolutions over three spatial axes, and their input gradients, by the blocked layout's two-dimensional Conv.

The layout has no third axis. So the depth is left to Gathers of whole planes, and the depth taps that reach a plane
become further channels of one Conv over the other two axes: planes with the same taps are its samples. Taps that meet
padding alone are left out, a third of the work at a depth of 2 with 3 taps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..depth_planes import Pairs, all_taps, by_taps, reaching_planes, read_planes
from .blocked_kernels import dense_kernel
from .convolution_entries import INPUT, ConvolutionEntry

if TYPE_CHECKING:
    from .blocked_writer import BlockedWriter


def plane_pairs(entry: ConvolutionEntry) -> list[Pairs]:
    """For every plane of the result, the depth taps that reach it and the operand's plane that each of them reads."""
    g = entry.geometry
    if entry.kind == INPUT:
        return [reaching_planes(g, plane) for plane in range(g.input_size[0])]
    return [read_planes(g, plane) for plane in range(g.output_size[0])]


def write_volume(writer: BlockedWriter, entry: ConvolutionEntry) -> None:
    """The nodes that compute the entry's result; every plane of it is reached by some tap."""
    g, operand, pairs = entry.geometry, entry.operands[0], plane_pairs(entry)
    if entry.kind == INPUT:
        read, written, sizes, results = g.out_channels, g.in_channels, g.output_size, g.input_size
    else:
        read, written, sizes, results = g.in_channels, g.out_channels, g.input_size, g.output_size
    used = all_taps(pairs)
    by_tap = writer.ints(written // writer.block, len(used), -1)
    weight = writer.node("Reshape", [dense_kernel(writer, entry, used), by_tap], f"{entry.result}.weight.by_taps")
    planes = _planes(writer, operand, read, list(sizes))
    parts, order = [], []
    for number, (taps, chosen) in enumerate(by_taps(pairs).items()):
        stem = f"{entry.result}.planes{number}"
        sources, data = [pairs[plane][tap] for plane in chosen for tap in taps], planes
        if sources != list(range(sizes[0])):
            data = writer.node("Gather", [planes, writer.ints(*sources)], f"{stem}.gathered", axis=1)
        data = writer.node("Reshape", [data, writer.ints(-1, len(taps) * read, *sizes[1:])], f"{stem}.read")
        filters = weight
        if len(taps) < len(used):
            places = writer.ints(*(used.index(tap) for tap in taps))
            filters = writer.node("Gather", [weight, places], f"{stem}.taps", axis=1)
        shape = writer.ints(written, len(taps) * read, *g.kernel_size[1:])
        filters = writer.node("Reshape", [filters, shape], f"{stem}.weight")
        image = writer.convolve(entry, [data, filters, *entry.operands[2:]], f"{stem}.images")
        parts.append(writer.node("Reshape", [image, writer.ints(-1, len(chosen), written, *results[1:])], stem))
        order += chosen
    value = writer.node("Concat", parts, f"{entry.result}.joined", axis=1) if len(parts) > 1 else parts[0]
    if order != sorted(order):
        places = writer.ints(*(order.index(plane) for plane in range(len(order))))
        value = writer.node("Gather", [value, places], f"{entry.result}.in_order", axis=1)
    writer.node("Transpose", [value], entry.result, perm=[0, 2, 1, 3, 4])


def _planes(writer: BlockedWriter, name: str, channels: int, size: list[int]) -> str:
    """(N, channels, *size) as (N, planes, elements), every plane in the blocked layout."""
    result = f"{name}.blocked_planes"
    if writer.once(result):
        apart = writer.node("Transpose", [name], f"{name}.planes_first", perm=[0, 2, 1, 3, 4])
        images = writer.node("Reshape", [apart, writer.ints(-1, channels, *size[1:])], f"{name}.planes")
        blocked = writer.reorder_input(images, f"{name}.planes_blocked")
        writer.node("Reshape", [blocked, writer.ints(-1, size[0], channels * math.prod(size[1:]))], result)
    return result
