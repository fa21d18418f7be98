"""The weight of a convolution in the blocked layout, as the Conv that is to run reads it.

An input gradient's Conv takes the kernel reversed, and the channels the other way round. Every step moves whole blocks,
or one axis to an end: for anything else onnxruntime's Transpose and Gather take ten times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .convolution_entries import INPUT, ConvolutionEntry

if TYPE_CHECKING:
    from .blocked_writer import BlockedWriter


def dense_kernel(writer: BlockedWriter, entry: ConvolutionEntry, used: Sequence[int] = (0,)) -> str:
    """(O/B, depth taps, I/B, other taps, B, B), or that many elements of another shape.

    Args:
        used: taps along the first of three axes; with fewer axes there is one.
    """
    g, block, stem, weight = entry.geometry, writer.block, f"{entry.result}.weight", entry.operands[1]
    outputs, inputs = g.out_channels, g.in_channels_per_group
    depth = g.kernel_size[0] if g.rank == 3 else 1
    flat = g.taps // depth
    if entry.kind == INPUT:
        rows = writer.node("Reshape", [weight, writer.ints(outputs * inputs, g.taps)], f"{stem}.flat")
        rows = writer.node("Transpose", [rows], f"{stem}.taps_first", perm=[1, 0])
        order = [tap * flat + inner for tap in used for inner in range(flat - 1, -1, -1)]
        rows = writer.node("Gather", [rows, writer.ints(*order)], f"{stem}.reversed", axis=0)
        blocks = {"g": g.groups, "o": outputs // g.groups // block, "p": block, "i": inputs // block, "q": block}
        return writer.rearranged(rows, {"d": len(used), "k": flat, **blocks}, "gidokpq", stem)
    if len(used) < depth:
        weight = writer.node("Gather", [weight, writer.ints(*used)], f"{stem}.used", axis=2)
    rows = _filters_innermost(writer, weight, outputs, inputs, len(used) * flat, stem)
    axes = {"o": outputs // block, "i": inputs // block, "q": block, "d": len(used), "k": flat, "p": block}
    return writer.rearranged(rows, axes, "odikqp", stem)


def narrow_kernel(writer: BlockedWriter, entry: ConvolutionEntry) -> str:
    """(O/B, I, K, B) of a depthwise layer, or of a forward pass with fewer than B input channels."""
    g, block, stem = entry.geometry, writer.block, f"{entry.result}.weight"
    outputs, inputs = g.out_channels, g.in_channels_per_group
    rows = _filters_innermost(writer, entry.operands[1], outputs, inputs, g.taps, stem)
    if entry.kind == INPUT:
        rows = writer.node("Reshape", [rows, writer.ints(outputs // block, g.taps, block)], f"{stem}.split")
        rows = writer.node("Gather", [rows, writer.ints(*range(g.taps - 1, -1, -1))], f"{stem}.reversed", axis=1)
    return rows


def _filters_innermost(writer: BlockedWriter, weight: str, outputs: int, inputs: int, taps: int, stem: str) -> str:
    """(O, I, K) as (O/B, I, K, B)."""
    image = writer.node("Reshape", [weight, writer.ints(1, outputs, inputs, taps)], f"{stem}.image")
    return writer.reorder_input(image, f"{stem}.lanes")
