"""An order of a graph's nodes in which tensors live shorter, for a session that runs them in the graph's order.

What onnxruntime's search (`execution_order.py`) leaves until somebody asks for it is often what would free memory: a
bias gradient is a few numbers, and until it is computed a layer's whole gradient is held; a mask takes a quarter of the
activation that it is made of. Such nodes move to the first place where their operands are there. What still takes much
and is cheap to make is made twice (`recomputation.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from .graph_lives import GraphLives
from .graph_nodes import VIEWS
from .recomputation import made_again, put_again

_LARGEST_GROUP = 8
_WORTH = 0.1  # of all that is held at the fullest moment: less is not worth the time of making tensors twice


_Tried = tuple[int, list[int], dict[str, set[int]]]


def order_lives(graph: Any, sizes: Mapping[str, int]) -> bool:
    """Put an onnx.GraphProto's nodes in the order, of those tried, that holds the fewest bytes at its fullest moment.

    Args:
        graph: in topological order; it keeps the present one where none is better.
        sizes: of its tensors in bytes.

    Returns:
        Whether it has another order now, or nodes that run twice.
    """
    known = GraphLives.of(graph, sizes)
    present = list(range(len(known.nodes)))
    branches = _branches(known)
    tried = [present]
    for chosen in ([branch for branch in branches if branch.frees], branches):
        tried.append(_early_nodes(known, _early_branches(known, chosen)))
    inputs = [value.name for value in graph.input]
    plain: list[_Tried] = [(known.fullest(order)[0], order, {}) for order in tried]
    best = min(plain, key=itemgetter(0))
    again = [made_again(known, order, inputs) for order in tried]
    if any(again):
        found = [(known.fullest(order, twice)[0], order, twice) for order, twice in zip(tried, again, strict=True)]
        less = min(found, key=itemgetter(0))
        held = best[0] + sum(sizes.get(name, 0) for name in inputs)
        best = less if best[0] - less[0] > _WORTH * held else best
    _, order, twice = best
    if twice:
        put_again(graph, known, order, twice)
        return True
    place = {id(known.nodes[i]): position for position, i in enumerate(order)}
    graph.node.sort(key=lambda node: place[id(node)])
    return order is not present


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


def _branches(graph: GraphLives) -> list[_Branch]:
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


def _early_branches(graph: GraphLives, branches: Sequence[_Branch]) -> list[int]:
    """The order with these branches behind the last node before them, those of one node as they are."""
    key = {i: (i, 0) for i in range(len(graph.nodes))}
    key.update({i: (branch.start, 1) for branch in branches for i in branch.members})
    return sorted(key, key=lambda i: (*key[i], i))


def _early_nodes(graph: GraphLives, order: Sequence[int]) -> list[int]:
    """The order with each node that frees more than it makes, and what it alone reads, at the first place for it.

    A mask moves to its activation, the slope of an activation to what it is computed of. Where that frees nothing, the
    node alone: a weight gradient's last transform comes when its product is there.
    """
    place = {i: position for position, i in enumerate(order)}
    moved: dict[int, int] = {}
    for i in order:
        whole = _alone_for(graph, i)
        for group in (whole, _alone_for(graph, i, views_only=True)) if len(whole) > 1 else (whole,):
            last = max((place[j] for member in group for j in graph.before[member] - group), default=-1)
            freed = 0
            for name in graph.read_by(group):
                others = max((place[j] for j in graph.readers[name] - group), default=-1)
                if others < place[i]:
                    freed += graph.freed(name)
                    last = max(last, others)
            if graph.made(i) < freed:
                moved.update((member, min(last, moved.get(member, last))) for member in group if last < place[member])
                break
    return sorted(order, key=lambda i: (moved.get(i, place[i]), i in moved, place[i]))


def _alone_for(graph: GraphLives, end: int, views_only: bool = False) -> set[int]:
    """A node and the nodes that are there for it alone, a few of them, or those of them that make views."""
    group, waiting = {end}, [end]
    while waiting and len(group) < _LARGEST_GROUP:
        for j in sorted(graph.before[waiting.pop()], reverse=True):
            if views_only and graph.nodes[j].op_type not in VIEWS:
                continue
            if j not in group and graph.after[j] <= group:
                group.add(j)
                waiting.append(j)
    return group
