"""What a benchmark measures, in which order: distinct geometries of the chosen networks, round robin."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..arguments import as_number
from ..errors import BenchmarkError
from ..geometry import ConvGeometry
from ..reference import FORWARD, INPUT, OPERATIONS, WEIGHT
from .layer import Layer, multiplications
from .networks import NETWORKS


@dataclass
class Item:
    """One operation of one distinct geometry.

    Attributes:
        operation: ``"forward"``, ``"input"`` or ``"weight"``. geometry: with its batch.
        threads: of every contender.
        uses: (network, layer, how often), one for each network that has this geometry.
    """

    operation: str
    geometry: ConvGeometry
    threads: int
    uses: list[tuple[str, str, int]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Text that is the same for the same measurement."""
        return json.dumps([self.operation, self.threads, self.geometry.to_dict()], separators=(",", ":"))


def chosen_layers(networks: Sequence[str], parts: Sequence[str] = ()) -> list[tuple[str, list[Layer]]]:
    """The layers of each network whose ``network/layer`` name contains one of `parts` (all of them without parts).

    Raises:
        BenchmarkError: an unknown network, or a part that no layer contains.
    """
    unknown = [name for name in networks if name not in NETWORKS]
    if unknown:
        raise BenchmarkError(f"networks holds {unknown}, expected names from {', '.join(NETWORKS)}")
    tables = [(name, NETWORKS[name]()) for name in networks or NETWORKS]
    for part in parts:
        if not any(part in f"{name}/{layer.name}" for name, layers in tables for layer in layers):
            raise BenchmarkError(
                f"layers holds {part!r}, which is in no layer's name: names are NETWORK/LAYER, such as "
                f"{tables[0][0]}/{tables[0][1][0].name}"
            )
    if parts:
        tables = [
            (name, [layer for layer in layers if any(part in f"{name}/{layer.name}" for part in parts)])
            for name, layers in tables
        ]
    return [(name, layers) for name, layers in tables if layers]


def items(
    networks: Sequence[str] = (),
    parts: Sequence[str] = (),
    *,
    batches: Sequence[int] = (8,),
    threads: Sequence[int] = (1,),
    operations: Sequence[str] = (INPUT, WEIGHT, FORWARD),
    max_gmac: float | None = None,
) -> list[Item]:
    """The measurements to make, in order: batches and thread counts as given, gradients before forward passes.

    Within those, each network in turn contributes a layer, from all depths early on, so that a run that is cut short
    has seen something of every network's beginning, middle and end.

    Args:
        max_gmac: leave out layers with more than this many multiplications, in 10^9.

    Raises:
        BenchmarkError: an unknown network, layer or operation, a batch or thread count below 1, or layers that are all
            larger than the limit. ArgumentTypeError: a limit that is no number.
    """
    for name, values in (("batch", batches), ("threads", threads)):
        if not values or min(values) < 1 or max(values) >= 2**31:
            raise BenchmarkError(f"{name} is {tuple(values)}, expected integers of at least 1 that fit into 32 bits")
    if max_gmac is not None:
        as_number(max_gmac, "max_gmac", minimum=0)
    unknown = [name for name in operations if name not in OPERATIONS]
    if unknown or not operations:
        raise BenchmarkError(f"operations is {tuple(operations)}, expected some of {', '.join(OPERATIONS)}")
    tables = chosen_layers(networks, parts)
    ordered = list(_round_robin(tables))
    backward = [name for name in operations if name != FORWARD]
    phases = [names for names in (backward, [FORWARD] if FORWARD in operations else []) if names]
    found: dict[str, Item] = {}
    for batch, count, names in itertools.product(batches, threads, phases):
        for network, layer in ordered:
            geometry = layer.geometry(batch)
            if max_gmac is not None and multiplications(geometry) > max_gmac * 1e9:
                continue
            for operation in names:
                item = Item(operation, geometry, count)
                found.setdefault(item.key, item).uses.append((network, layer.name, layer.count))
    if not found:
        raise BenchmarkError(
            f"max_gmac is {max_gmac}, and all of the layers chosen have more: there is nothing to measure"
        )
    return list(found.values())


def _round_robin(tables: Sequence[tuple[str, Sequence[Layer]]]) -> Iterable[tuple[str, Layer]]:
    columns = [[(name, layers[index]) for index in _spread(len(layers))] for name, layers in tables]
    for row in itertools.zip_longest(*columns):
        yield from (entry for entry in row if entry is not None)


def _spread(count: int) -> list[int]:
    """All indices below `count`, the first few far apart: counting with reversed bits (van der Corput)."""
    bits = max(1, (count - 1).bit_length())
    order = (int(f"{index:0{bits}b}"[::-1], 2) for index in range(2**bits))
    return [index for index in order if index < count]
