"""How long the tensors of a graph live, in one order of its nodes or another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .graph_nodes import VIEWS, reads, shown_by_views


@dataclass
class GraphLives:
    """A graph's nodes by number, in their present order, and the tensors that they make and read.

    Attributes:
        nodes: the onnx.NodeProtos.
        operands: of each node the tensors made by nodes that it reads; a view counts as the tensor that it shows, and
            one of an input as none.
        results: of each node the tensors that it makes; of one that makes a view, none.
        before, after: of each node the nodes whose results or views it reads, and those that read its own.
        readers: of each tensor the nodes that read it or a view of it, the nodes that make views too.
        kept: tensors that are outputs of the graph, or shown by one, and are held to the end.
        size: of each tensor in bytes; 0 for one that is not known.
        shown: by each view, which may be one of another view, the tensor.
    """

    nodes: list[Any]
    operands: list[set[str]] = field(default_factory=list)
    results: list[list[str]] = field(default_factory=list)
    before: list[set[int]] = field(default_factory=list)
    after: list[set[int]] = field(default_factory=list)
    readers: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    kept: set[str] = field(default_factory=set)
    size: dict[str, int] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Any, sizes: Mapping[str, int]) -> GraphLives:
        found = cls(list(graph.node))
        maker: dict[str, int] = {}
        shown = found.shown = shown_by_views(found.nodes)
        found.kept = {value.name for value in graph.output}
        for i, node in enumerate(found.nodes):
            inputs = [name for name in reads(node) if name in maker]
            found.before.append({maker[name] for name in inputs})
            found.after.append(set())
            for j in found.before[i]:
                found.after[j].add(i)
            found.operands.append({shown.get(name, name) for name in inputs} & maker.keys())
            for name in found.operands[-1]:
                found.readers[name].add(i)
            made = [name for name in node.output if name]
            maker.update(dict.fromkeys(made, i))
            if node.op_type in VIEWS:
                if made[0] in found.kept:
                    found.kept.add(shown[made[0]])
                made = []  # that of an input takes no memory either
            found.results.append(made)
            found.size.update((name, sizes.get(name, 0)) for name in made)
        return found

    def made(self, i: int) -> int:
        return sum(self.size[name] for name in self.results[i])

    def read_by(self, group: Collection[int]) -> set[str]:
        """The tensors that nodes read of others than one another."""
        inner = {name for i in group for name in self.results[i]}
        return set().union(*(self.operands[i] for i in group)) - inner

    def freed(self, name: str) -> int:
        """What the last reader of a tensor frees."""
        return 0 if name in self.kept else self.size[name]

    def fullest(self, order: Sequence[int], again: Mapping[str, Collection[int]] | None = None) -> tuple[int, int]:
        """The most bytes that are held at once, and the place in the order where that is.

        Args:
            order: of the nodes' numbers.
            again: of tensors that are made twice, the nodes that read the second one, which is made just before them.
        """
        place = {i: position for position, i in enumerate(order)}
        starting: dict[int, int] = defaultdict(int)
        ending: dict[int, int] = defaultdict(int)
        for i in order:
            for name in self.results[i]:
                late = (again or {}).get(name, ())
                early = [place[j] for j in self.readers.get(name, ()) if j not in late]
                ending[max(early, default=place[i])] += self.freed(name)
                if late:
                    places = [place[j] for j in late]
                    starting[min(places)] += self.size[name]
                    ending[max(places)] += self.size[name]
        held = most = at = 0
        for position, i in enumerate(order):
            held += self.made(i) + starting[position]
            if held > most:
                most, at = held, position
            held -= ending[position]
        return most, at
