"""What a model's metadata says about its convolutions, so that a session can compute them in another way.

The graph itself stays standard and complete: a runtime that does not know the entry computes the same results from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..geometry import ConvGeometry

METADATA = "convgrad.convolutions"
FORWARD, INPUT, WEIGHT = "forward", "input", "weight"
_SMALLEST_BLOCK = 8  # channels side by side in the narrowest of onnxruntime's blocked layouts
_DIRECT = ("input.flipped_conv", "input.conv_transpose", "input.col2im")
_OPERANDS = {FORWARD: (2, 3), INPUT: (2, 2), WEIGHT: (2, 2)}


@dataclass(frozen=True)
class ConvolutionEntry:
    """A tensor of the graph that is the result of a convolution, or one of its gradients, in float32.

    Attributes:
        kind: ``"forward"`` (operands input, weight, and perhaps the bias), ``"input"`` (grad_output, weight) or
            ``"weight"`` (grad_output, input).
        result, operands: names in the graph.
        batch: number of samples, None where it is not fixed.
        in_channels, out_channels, groups: of the forward convolution.
        input_size, output_size, kernel_size, stride, dilation: per spatial axis, one or two.
        pads: of the forward convolution, all beginnings and then all ends.
    """

    kind: str
    result: str
    operands: tuple[str, ...]
    batch: int | None
    in_channels: int
    out_channels: int
    groups: int
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...]


def may_replace(geometry: ConvGeometry, lowering: str) -> bool:
    """Whether a session has a better form: than any lowering of a layer in groups, than a direct one of a dense."""
    return geometry.groups > 1 or lowering in _DIRECT


def described(kind: str, geometry: ConvGeometry, result: str, operands: Sequence[str]) -> ConvolutionEntry | None:
    """The entry for a float32 convolution, None for a kind that no session computes in another way."""
    g = geometry
    static = all(isinstance(size, int) for size in (*g.input_size, *g.output_size))
    if g.transposed or g.rank > 2 or not static:
        return None
    depthwise = g.groups > 1 and g.in_channels == g.out_channels == g.groups
    narrow = min(g.in_channels_per_group, g.out_channels_per_group) < _SMALLEST_BLOCK
    if not depthwise and (g.is_pointwise or kind == WEIGHT or (g.groups > 1 and narrow)):
        return None  # no gain was measured
    if kind == FORWARD and any(r >= s for r, s in zip(g.remainder, g.stride, strict=True)):
        return None  # the adjoint of a transposed convolution whose output padding is never read
    return ConvolutionEntry(
        kind,
        result,
        tuple(operands),
        g.batch if isinstance(g.batch, int) else None,
        g.in_channels,
        g.out_channels,
        g.groups,
        tuple(g.input_size),
        tuple(g.output_size),
        tuple(g.kernel_size),
        tuple(g.stride),
        tuple(g.dilation),
        (*(lo for lo, _ in g.pads), *(hi for _, hi in g.pads)),
    )


def to_text(entries: Iterable[ConvolutionEntry]) -> str:
    return json.dumps([asdict(entry) for entry in entries], separators=(",", ":"))


def from_text(text: str | None) -> list[ConvolutionEntry]:
    """The entries of a model file; whatever does not have their form is left out."""
    try:
        found = json.loads(text or "[]")
    except ValueError:
        return []
    entries = (_entry(value) for value in found) if isinstance(found, list) else ()
    return [entry for entry in entries if entry is not None]


def _entry(value: Any) -> ConvolutionEntry | None:
    if not isinstance(value, Mapping) or set(value) != set(ConvolutionEntry.__dataclass_fields__):
        return None
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
    entry = ConvolutionEntry(**fields)
    sizes = (entry.input_size, entry.output_size, entry.kernel_size, entry.stride, entry.dilation, entry.pads)
    rank = len(entry.kernel_size) if isinstance(entry.kernel_size, tuple) else 0
    numbers = [entry.in_channels, entry.out_channels, entry.groups, *([] if entry.batch is None else [entry.batch])]
    for group in sizes:
        if not isinstance(group, tuple) or len(group) != (2 * rank if group is entry.pads else rank):
            return None
        numbers.extend(group)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 31 for n in numbers):
        return None
    names = (entry.result, *entry.operands) if isinstance(entry.operands, tuple) else ()
    lowest, highest = _OPERANDS.get(entry.kind, (0, -1)) if isinstance(entry.kind, str) else (0, -1)
    divided = entry.groups > 0 and not entry.in_channels % entry.groups and not entry.out_channels % entry.groups
    known = rank in (1, 2) and divided and names and lowest <= len(entry.operands) <= highest
    return entry if known and all(isinstance(name, str) and name for name in names) else None
