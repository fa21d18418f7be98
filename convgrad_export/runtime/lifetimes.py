"""An order of a graph's nodes in which tensors live shorter, for a session that runs them in the graph's order.

What onnxruntime's search (`execution_order.py`) leaves until somebody asks for it is often what would free memory: a
bias gradient is a few numbers, and until it is computed a layer's whole gradient is held; a mask takes a quarter of the
activation that it is made of. Such nodes move to the first place where their operands are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .graph_nodes import VIEWS, reads

_LARGEST_GROUP = 8


@dataclass
class _Graph:
    """A graph's nodes by number, in their present order.

    Attributes:
        nodes: the onnx.NodeProtos.
        operands: of each node the tensors made by nodes that it reads; a view counts as the tensor that it shows.
        results: of each node the tensors that it makes; of one that makes a view, none.
        before, after: of each node the nodes whose results or views it reads, and those that read its own.
        readers: of each tensor the nodes that read it or a view of it, the nodes that make views too.
        kept: tensors that are outputs of the graph, or shown by one, and are held to the end.
        size: of each tensor in bytes; 0 for one that is not known.
    """

    nodes: list[Any]
    operands: list[set[str]] = field(default_factory=list)
    results: list[list[str]] = field(default_factory=list)
    before: list[set[int]] = field(default_factory=list)
    after: list[set[int]] = field(default_factory=list)
    readers: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    kept: set[str] = field(default_factory=set)
    size: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Any, sizes: Mapping[str, int]) -> _Graph:
        found = cls(list(graph.node))
        maker: dict[str, int] = {}
        shown: dict[str, str] = {}  # by a view, which may be one of another view
        found.kept = {value.name for value in graph.output}
        for i, node in enumerate(found.nodes):
            inputs = [name for name in reads(node) if name in maker]
            found.before.append({maker[name] for name in inputs})
            found.after.append(set())
            for j in found.before[i]:
                found.after[j].add(i)
            found.operands.append({shown.get(name, name) for name in inputs})
            for name in found.operands[-1]:
                found.readers[name].add(i)
            made = [name for name in node.output if name]
            maker.update(dict.fromkeys(made, i))
            if node.op_type in VIEWS and node.input[0] in maker:
                shown[made[0]] = shown.get(node.input[0], node.input[0])
                if made[0] in found.kept:
                    found.kept.add(shown[made[0]])
                made = []
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


def order_lives(graph: Any, sizes: Mapping[str, int]) -> bool:
    """Put an onnx.GraphProto's nodes in the order, of those tried, that holds the fewest bytes at its fullest moment.

    Args:
        graph: in topological order; it keeps the present one where none is better.
        sizes: of its tensors in bytes.

    Returns:
        Whether it has another order now.
    """
    known = _Graph.of(graph, sizes)
    present = list(range(len(known.nodes)))
    branches = _branches(known)
    tried = [present]
    for chosen in ([branch for branch in branches if branch.frees], branches):
        tried.append(_early_nodes(known, _early_branches(known, chosen)))
    best = min(tried, key=lambda order: _peak(known, order))
    place = {id(known.nodes[i]): position for position, i in enumerate(best)}
    graph.node.sort(key=lambda node: place[id(node)])
    return best is not present


@dataclass
class _Branch:
    """Nodes that one result alone is computed by, one that nothing else needs: a gradient, in a training step.

    Attributes:
        members: their numbers, in order.
        start: the number of the last node before them whose result they read; -1 where they read none.
        frees: whether what they read and nobody reads after them is more than what they leave.
    """

    members: list[int]
    start: int
    frees: bool


def _branches(graph: _Graph) -> list[_Branch]:
    count, after = len(graph.nodes), graph.after
    gathered = {i for i in range(count) if not after[i] and graph.nodes[i].op_type == "Concat"}
    ends: list[int | None] = [None] * count
    for i in reversed(range(count)):
        if not after[i] or after[i] <= gathered:
            ends[i] = i
        else:
            found = {ends[j] for j in after[i]}
            ends[i] = found.pop() if len(found) == 1 else None
    members: dict[int, list[int]] = defaultdict(list)
    for i, end in enumerate(ends):
        if end is not None:
            members[end].append(i)
    shared = {name: len({ends[i] for i in readers} - {None}) for name, readers in graph.readers.items()}
    branches = []
    for end, nodes in members.items():
        own = set(nodes)
        start = max((j for i in nodes for j in graph.before[i] if j not in own), default=-1)
        freed = sum(graph.freed(name) / shared[name] for name in graph.read_by(nodes))
        branches.append(_Branch(nodes, start, freed > graph.made(end)))
    return branches


def _early_branches(graph: _Graph, branches: Sequence[_Branch]) -> list[int]:
    """The order with these branches behind the last node before them, those of one node as they are."""
    key = {i: (i, 0) for i in range(len(graph.nodes))}
    key.update({i: (branch.start, 1) for branch in branches for i in branch.members})
    return sorted(key, key=lambda i: (*key[i], i))


def _early_nodes(graph: _Graph, order: Sequence[int]) -> list[int]:
    """The order with each node that frees more than it makes, and what it alone reads, at the first place for it.

    A mask moves to its activation, the slope of an activation to what it is computed of.
    """
    place = {i: position for position, i in enumerate(order)}
    moved: dict[int, int] = {}
    for i in order:
        group = _alone_for(graph, i)
        last = max((place[j] for member in group for j in graph.before[member] - group), default=-1)
        freed = 0
        for name in graph.read_by(group):
            others = max((place[j] for j in graph.readers[name] - group), default=-1)
            if others < place[i]:
                freed += graph.freed(name)
                last = max(last, others)
        if graph.made(i) < freed:
            moved.update((member, min(last, moved.get(member, last))) for member in group if last < place[member])
    return sorted(order, key=lambda i: (moved.get(i, place[i]), i in moved, place[i]))


def _alone_for(graph: _Graph, end: int) -> set[int]:
    """A node and the nodes that are there for it alone, a few of them."""
    group, waiting = {end}, [end]
    while waiting and len(group) < _LARGEST_GROUP:
        for j in sorted(graph.before[waiting.pop()], reverse=True):
            if j not in group and graph.after[j] <= group:
                group.add(j)
                waiting.append(j)
    return group


def _peak(graph: _Graph, order: Sequence[int]) -> int:
    place = {i: position for position, i in enumerate(order)}
    ending: dict[int, int] = defaultdict(int)
    for i in order:
        for name in graph.results[i]:
            ending[max((place[j] for j in graph.readers.get(name, ())), default=place[i])] += graph.freed(name)
    held = fullest = 0
    for position, i in enumerate(order):
        held += graph.made(i)
        fullest = max(fullest, held)
        held -= ending[position]
    return fullest
