"""Sums of slices become slices of sums: the gradients of tensors that several concatenations read.

A dense block concatenates all features before it at every layer, so the gradient of a layer's features is a sum over
the later concatenations' gradients, each sliced there. That is a Slice and an Add for every pair of layers: of
DenseNet-121's 11,600 nodes, 1,070. Where neighbouring slices of two tensors are added in the same arrangement, the
tensors are added whole and the sum is sliced; after that the next concatenation's gradient finds slices of one tensor
again. The additions are the same ones in the same order, so results agree bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import torch

from .fx_nodes import call

aten = torch.ops.aten
Node = torch.fx.Node


@dataclasses.dataclass(frozen=True)
class _Part:
    """``source[..., start:stop, ...]`` along `axis`."""

    source: Node
    axis: int
    start: int
    stop: int


def slice_sums(graph: torch.fx.Graph) -> None:
    """Rewrite `graph` in place. Nodes have fake tensors in ``meta["val"]``; so have the new ones."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    changed = False
    for node in list(graph.nodes):
        # Sums in which `node` is the later of the two tensors; the earlier one may be a sum that this loop made.
        for sums in _arrangements(node, position):
            for run in _runs(sums):
                _add_whole(graph, run, position)
                changed = True
    if changed:
        graph.eliminate_dead_code()


def _arrangements(later: Node, position: dict[Node, int]) -> list[list[tuple[_Part, _Part, Node]]]:
    """Sums of a part of an earlier tensor and a part of `later`, those together that lie to one another alike."""
    found: dict[tuple[Node, int, int], list[tuple[_Part, _Part, Node]]] = defaultdict(list)
    for piece in later.users:
        part = _part(piece)
        if part is None or part.source is not later:
            continue
        for total in piece.users:
            other = _other_operand(total, piece)
            earlier = None if other is None else _part(other)
            if (
                earlier is not None
                and earlier.axis == part.axis
                and position[earlier.source] < position[later]
                and _alike(earlier.source, later, part.axis)
                and earlier.stop - earlier.start == part.stop - part.start
            ):
                found[earlier.source, part.axis, earlier.start - part.start].append((earlier, part, total))
    return list(found.values())


def _runs(sums: list[tuple[_Part, _Part, Node]]) -> list[list[tuple[_Part, _Part, Node]]]:
    """Divide into runs of neighbouring parts, and leave single ones out: they have nothing to gain."""
    runs: list[list[tuple[_Part, _Part, Node]]] = []
    for item in sorted(sums, key=lambda item: (item[1].start, item[1].stop)):
        if runs and runs[-1][-1][1].stop == item[1].start:
            runs[-1].append(item)
        else:
            runs.append([item])
    return [run for run in runs if len(run) > 1]


def _add_whole(graph: torch.fx.Graph, run: list[tuple[_Part, _Part, Node]], position: dict[Node, int]) -> None:
    first = min((total for _, _, total in run), key=position.__getitem__)
    with graph.inserting_before(first):
        operands = []
        for parts in ([earlier for earlier, _, _ in run], [later for _, later, _ in run]):
            whole = dataclasses.replace(parts[0], start=parts[0].start, stop=parts[-1].stop)
            operands.append(_slice(graph, whole, first, position))
        total = _call(graph, aten.add.Tensor, (*operands,), first, position)
        for _, part, node in run:
            piece = dataclasses.replace(
                part, source=total, start=part.start - run[0][1].start, stop=part.stop - run[0][1].start
            )
            node.replace_all_uses_with(_slice(graph, piece, node, position))
    for _, _, node in run:
        graph.erase_node(node)


def _slice(graph: torch.fx.Graph, part: _Part, like: Node, position: dict[Node, int]) -> Node:
    if (part.start, part.stop) == (0, part.source.meta["val"].shape[part.axis]):
        return part.source
    return _call(graph, aten.slice.Tensor, (part.source, part.axis, part.start, part.stop), like, position)


def _call(graph: torch.fx.Graph, target: Any, args: tuple[Any, ...], like: Node, position: dict[Node, int]) -> Node:
    """A call of tensors that has the position of the last one."""
    node = call(graph, target, args, like=like)
    position[node] = max(position[argument] for argument in args if isinstance(argument, Node))
    return node


def _part(node: Node) -> _Part | None:
    """What a slice with known bounds takes, in steps of 1 along an axis of known size."""
    if node.target is not aten.slice.Tensor or node.kwargs:
        return None
    arguments: list[Any] = [*node.args, *(None, 0, None, None, 1)[len(node.args) :]]
    source, axis, start, stop, step = arguments
    if not isinstance(source, Node) or not isinstance(axis, int) or step != 1:
        return None
    shape = source.meta["val"].shape
    axis %= len(shape)
    size = shape[axis]
    start, stop = 0 if start is None else start, size if stop is None else stop
    if not all(isinstance(value, int) for value in (size, start, stop)):
        return None
    start, stop, _ = slice(start, stop).indices(size)
    return _Part(source, axis, start, stop) if start < stop else None


def _other_operand(total: Node, piece: Node) -> Node | None:
    if total.target is not aten.add.Tensor or total.kwargs or len(total.args) != 2:
        return None
    a, b = total.args
    other = b if a is piece else a
    return other if isinstance(other, Node) and other is not piece else None


def _alike(a: Node, b: Node, axis: int) -> bool:
    """Whether two tensors can be added but for their sizes along `axis`, without broadcasting or promotion."""
    x, y = a.meta["val"], b.meta["val"]
    return (
        x.dtype == y.dtype
        and x.dim() == y.dim()
        and all(i == axis or _same_size(p, q) for i, (p, q) in enumerate(zip(x.shape, y.shape, strict=True)))
    )


def _same_size(a: Any, b: Any) -> bool:
    """Equal without asking the shape environment, which would add a guard."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)
