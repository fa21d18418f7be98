"""What a model's metadata says about its convolutions, so that a session can compute them in another way.

The graph itself stays standard and complete: a runtime that does not know the entry computes the same results from it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConvGradError
from ..geometry import ConvGeometry

METADATA = "convgrad.convolutions"
FORWARD, INPUT, WEIGHT = "forward", "input", "weight"
_SMALLEST_BLOCK = 8  # channels side by side in the narrowest of onnxruntime's blocked layouts
_DIRECT = ("input.flipped_conv", "input.conv_transpose", "input.col2im", "input.plane_col2im")
# Pairs of channels up to which a direct form gains on Winograd's, unless its tiles are another layer's too.
_NARROW = 64 * 96
_WINOGRAD = "winograd"  # in the names of forms with fewer multiplications, whose tiles a graph's layers share
_ANY_BATCH, _LARGEST = "batch", 2**31 - 1
_OPERANDS = {FORWARD: (2, 3), INPUT: (2, 2), WEIGHT: (2, 2)}


@dataclass(frozen=True)
class ConvolutionEntry:
    """A tensor of the graph that is the result of a convolution, or one of its gradients, in float32.

    Attributes:
        kind: ``"forward"`` (operands input, weight, and perhaps the bias), ``"input"`` (grad_output, weight) or
            ``"weight"`` (grad_output, input).
        result, operands: names in the graph.
        geometry: of the forward convolution; not transposed, all sizes but the batch fixed.
        formula: hash of the nodes between operands and result (`formula.py`); empty while the graph is being made.
    """

    kind: str
    result: str
    operands: tuple[str, ...]
    geometry: ConvGeometry
    formula: str = ""


def one_to_one(g: ConvGeometry) -> bool:
    """Depthwise without a channel multiplier."""
    return g.is_depthwise and g.in_channels == g.out_channels


def taps_beside_channels(g: ConvGeometry) -> bool:
    """Whether a dense weight gradient is a Conv whose last axis holds the input's channels and one axis of taps."""
    return g.groups == 1 and (g.rank == 1 or (g.rank == 2 and 1 in (g.dilation[1], g.kernel_size[1])))


def reversed_pads(g: ConvGeometry) -> list[int]:
    """Padding of grad_output, with `stride` - 1 zeros behind each element, that gives a result of the input's size."""
    reach = [e - 1 for e in g.extent]
    begin = [r - pad for r, pad in zip(reach, g.begin, strict=True)]
    spread = [s * size for s, size in zip(g.stride, g.output_size, strict=True)]
    end = [i + r - s - b for i, r, s, b in zip(g.input_size, reach, spread, begin, strict=True)]
    return [*begin, *end]


def plane_of(sizes: Sequence[int]) -> list[int]:
    """The last two axes, the first of size 1 where there is one."""
    return [1, *sizes][-2:]


def plane_pads(pads: Sequence[int]) -> list[int]:
    """The same of all beginnings, then all ends."""
    axes = len(pads) // 2
    return [0] * (axes == 1) + list(pads[:axes][-2:]) + [0] * (axes == 1) + list(pads[axes:][-2:])


def may_replace(kind: str, geometry: ConvGeometry, lowering: str) -> bool:
    """Whether a session has a better form: than any lowering of a layer in groups, than a direct one of a dense."""
    return geometry.groups > 1 or (_WINOGRAD not in lowering if kind == WEIGHT else lowering in _DIRECT)


def described(kind: str, geometry: ConvGeometry, result: str, operands: Sequence[str]) -> ConvolutionEntry | None:
    """The entry for a float32 convolution, None for a kind that no session computes in another way."""
    g = geometry
    static = all(isinstance(size, int) for size in (*g.input_size, *g.output_size))
    if g.transposed or not static or (g.rank == 3 and g.groups > 1):
        return None
    depthwise = one_to_one(g)
    narrow = min(g.in_channels_per_group, g.out_channels_per_group) < _SMALLEST_BLOCK
    if kind == WEIGHT and not (isinstance(g.batch, int) and (depthwise or taps_beside_channels(g))):
        return None
    if not depthwise and (g.is_pointwise or (g.groups > 1 and narrow)):
        return None  # no gain was measured
    if kind == FORWARD and any(r >= s for r, s in zip(g.remainder, g.stride, strict=True)):
        return None  # the adjoint of a transposed convolution whose output padding is never read
    fixed = g if isinstance(g.batch, int) else g.with_batch(_ANY_BATCH)
    return ConvolutionEntry(kind, result, tuple(operands), fixed)


def described_gradients(geometry: ConvGeometry, lowerings: Mapping[str, str]) -> list[ConvolutionEntry]:
    """Of a model that computes gradients of one convolution, what a session may compute in another way.

    Args:
        lowerings: names, by gradient; the model's inputs and outputs are called as `build_model` does.
    """
    found = []
    for gradient, other in ((INPUT, WEIGHT), (WEIGHT, INPUT)):
        name = lowerings.get(gradient)
        narrow = gradient == WEIGHT and geometry.in_channels * geometry.out_channels <= _NARROW
        if name and (narrow or may_replace(gradient, geometry, name)):
            found.append(described(gradient, geometry, f"grad_{gradient}", ("grad_output", other)))
    return [entry for entry in found if entry is not None]


def to_text(entries: Iterable[ConvolutionEntry]) -> str:
    values = [
        {
            "kind": e.kind,
            "result": e.result,
            "operands": list(e.operands),
            "geometry": e.geometry.to_dict(),
            "formula": e.formula,
        }
        for e in entries
    ]
    return json.dumps(values, separators=(",", ":"))


def from_text(text: str | None) -> list[ConvolutionEntry]:
    """The entries of a model file; whatever does not have their form is left out."""
    try:
        found = json.loads(text or "[]")
    except (ValueError, RecursionError):  # the latter from brackets nested thousands deep
        return []
    entries = (_entry(value) for value in found) if isinstance(found, list) else ()
    return [entry for entry in entries if entry is not None]


def _entry(value: Any) -> ConvolutionEntry | None:
    if not isinstance(value, Mapping) or set(value) != set(ConvolutionEntry.__dataclass_fields__):
        return None
    kind, operands, geometry = value["kind"], value["operands"], _geometry(value["geometry"])
    if geometry is None or not isinstance(kind, str) or kind not in _OPERANDS or not isinstance(operands, list):
        return None
    lowest, highest = _OPERANDS[kind]
    names = (value["result"], *operands)
    if not isinstance(value["formula"], str):
        return None
    if not lowest <= len(operands) <= highest or not all(isinstance(name, str) and name for name in names):
        return None
    return ConvolutionEntry(kind, value["result"], tuple(operands), geometry, value["formula"])


def _geometry(value: Any) -> ConvGeometry | None:
    try:
        geometry = ConvGeometry.from_forward(**value)
    except (ConvGradError, TypeError):
        return None
    g = geometry
    sizes = (*g.input_shape[1:], *g.weight_shape, *g.output_size, *g.stride, *g.dilation, *itertools.chain(*g.pads))
    if g.transposed or any(not isinstance(n, int) or n > _LARGEST for n in sizes):
        return None
    return geometry
