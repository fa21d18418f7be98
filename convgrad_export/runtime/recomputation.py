"""Weights in another form, computed again for the backward instead of held from the forward on.

Winograd's convolutions multiply transformed weights, 16 or 36 numbers for 9. Forward and input gradient read the same
ones, and at a step's fullest moment those of all layers would be there: in ResNet-18 more than its activations. The
weights themselves are held anyway, and transforming them once more takes one or two hundredths of the step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .graph_lives import GraphLives
from .graph_nodes import VIEWS, copied, rename, used_nodes

_SMALLEST = 1 << 20  # bytes of a tensor
_TRANSFORMS = ("FusedMatMul", "MatMul", "Transpose", "Gather")
_SUFFIX = ".again"


def made_again(lives: GraphLives, order: Sequence[int], given: Collection[str]) -> dict[str, set[int]]:
    """Tensors to be made twice so that less is held at the fullest moment, and the nodes that read the second one.

    Args:
        order: in which the nodes run.
        given: names of the graph's inputs; what is made of one of them and constants can be made again.
    """
    place = {i: position for position, i in enumerate(order)}
    candidates = {name: i for i in order for name in lives.results[i] if _is_transform(lives, i, given)}
    again: dict[str, set[int]] = {}
    most, at = lives.fullest(order) if candidates else (0, 0)
    while candidates:
        found = dict(again)
        for name, i in candidates.items():
            readers = lives.readers[name]
            late = {j for j in readers if place[j] > at}
            uses, late_uses = (sum(lives.nodes[j].op_type not in VIEWS for j in group) for group in (readers, late))
            if name not in again and place[i] < at and 0 < late_uses < uses:
                found[name] = late
        less, at = lives.fullest(order, found) if len(found) > len(again) else (most, at)
        if less >= most:
            break
        again, most = found, less
    for name in sorted(again, key=lambda name: lives.size[name]):
        fewer = {other: late for other, late in again.items() if other != name}
        if lives.fullest(order, fewer)[0] <= most:
            again = fewer
    return again


def _is_transform(lives: GraphLives, i: int, given: Collection[str]) -> bool:
    node, (name, *others) = lives.nodes[i], lives.results[i] or [""]
    if node.op_type not in _TRANSFORMS or others or lives.operands[i] or name in lives.kept:
        return False
    read = [lives.shown.get(source, source) in given for source in node.input if source]
    plain = all(_views_of(lives, name, lives.nodes[j]) for j in lives.readers[name])
    return read.count(True) == 1 and lives.size[name] >= _SMALLEST and plain


def _views_of(lives: GraphLives, name: str, node: Any) -> list[str]:
    """What of a tensor a node reads itself, not in a subgraph: the tensor or views of it."""
    return [source for source in node.input if lives.shown.get(source, source) == name]


def put_again(graph: Any, lives: GraphLives, order: Sequence[int], again: Mapping[str, Collection[int]]) -> None:
    """Put the nodes in order, with those that make tensors again.

    Args:
        graph: the onnx.GraphProto that `lives` was made of; changed.
    """
    place = {i: position for position, i in enumerate(order)}
    producer = {name: node for node in lives.nodes for name in node.output}
    added: dict[int, list[Any]] = {}
    for name, late in again.items():
        uses = [j for j in late if lives.nodes[j].op_type not in VIEWS]
        new = added.setdefault(min(uses, key=place.__getitem__), [])
        renamed: dict[str, str] = {}
        for j in uses:
            for source in dict.fromkeys(_views_of(lives, name, lives.nodes[j])):
                _copy(source, name, producer, renamed, new)
            rename(lives.nodes[j], renamed)
    nodes = [node for i in order for node in (*added.get(i, ()), lives.nodes[i])]
    kept = [copied(node) for node in used_nodes(nodes, {value.name for value in graph.output})]
    graph.ClearField("node")
    graph.node.extend(kept)


def _copy(source: str, name: str, producer: Mapping[str, Any], renamed: dict[str, str], new: list[Any]) -> None:
    """Add the nodes that make a tensor, or a view of it, under other names."""
    if source in renamed:
        return
    node = copied(producer[source])
    if source != name:
        _copy(node.input[0], name, producer, renamed, new)
        node.input[0] = renamed[node.input[0]]
    renamed[source] = source + _SUFFIX
    node.name, node.output[0] = node.name and node.name + _SUFFIX, renamed[source]
    new.append(node)
