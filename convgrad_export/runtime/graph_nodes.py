"""What rewriting an ONNX graph node by node needs, on protobuf messages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # the output is the input's memory


def subgraphs(node: Any) -> Iterator[Any]:
    """The graphs that a node holds, for example a Scan's body."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def reads(node: Any) -> Iterator[str]:
    """Names that a node reads, from within its subgraphs too."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from reads(inner)


def shown_by_views(nodes: Iterable[Any]) -> dict[str, str]:
    """By the output of each node that makes a view, the tensor that it shows, which is no view itself."""
    shown: dict[str, str] = {}
    for node in nodes:
        if node.op_type in VIEWS:
            shown[node.output[0]] = shown.get(node.input[0], node.input[0])
    return shown


def rename(node: Any, names: Mapping[str, str]) -> None:
    """Give a node's inputs and outputs other names, those that have one."""
    for values in (node.input, node.output):
        for i, name in enumerate(values):
            values[i] = names.get(name, name)


def copied(node: Any) -> Any:
    """A message of its own, such as a NodeProto; one that is taken out of a graph is gone with it."""
    copy = type(node)()
    copy.CopyFrom(node)
    return copy


def renamed(value: Any, name: str) -> Any:
    """A copy of a tensor, or of a value's description, under another name."""
    copy = copied(value)
    copy.name = name
    return copy


def put_nodes(graph: Any, nodes: Iterable[Any], outputs: Collection[str]) -> None:
    """Give the graph these nodes in place of its own, without the constants that neither they nor `outputs` name."""
    kept = list(nodes)
    needed = {name for node in kept for name in reads(node)}.union(outputs)
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, values in (("node", kept), ("initializer", constants)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)


def used_nodes(nodes: Sequence[Any], outputs: Collection[str]) -> list[Any]:
    """The nodes that an output depends on, in their order, which is topological."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(reads(node))
    return kept[::-1]
