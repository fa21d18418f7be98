"""Statistics of concatenations, put together from those of the parts: what batch normalization reads in dense blocks.

Every layer of a dense block normalizes all features before it, whose means and variances the layers before have found:
of the n-th layer's n parts one is new. A channel's statistics do not depend on the channels beside it, so each part has
its own computed once, and those of a concatenation are concatenated. So are the centred features, which the gradient
reads: they need no longer be kept for it, one copy a layer, but are put together again when it comes to them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from .fx_nodes import call

aten = torch.ops.aten
Node = torch.fx.Node
_CHANNELS = 1  # the axis of what batch normalization tells apart


@dataclasses.dataclass(frozen=True)
class _Statistics:
    """Nodes of one tensor x with channels on axis 1.

    Attributes:
        axes: over which the mean is taken, all but the channels.
        mean: per channel, shape [C].
        centred: each ``x - mean``, forward and backward.
        variances: mean squares of `centred`, shape [C].
    """

    axes: list[int]
    mean: Node
    centred: list[Node]
    variances: list[Node]


def concatenated_statistics(graph: torch.fx.Graph) -> None:
    """Rewrite `graph` in place, where at least half of a concatenation's channels are normalized elsewhere too.

    Nodes have fake tensors in ``meta["val"]``; so have the new ones.
    """
    found = {node: statistics for node in graph.nodes if (statistics := _statistics(node)) is not None}
    made_of = {node: _parts(node) for node in found}
    readers = Counter(part for parts in made_of.values() for part in set(parts))
    pieces: dict[Node, tuple[Node, Node, Node]] = {}
    for node, parts in made_of.items():
        shared = sum(_channels(part) for part in parts if readers[part] > 1)
        if parts != [node] and 2 * shared >= _channels(node):
            _put_together(graph, parts, found[node], pieces)
    if pieces:
        graph.eliminate_dead_code()


def _put_together(
    graph: torch.fx.Graph, parts: list[Node], whole: _Statistics, pieces: dict[Node, tuple[Node, Node, Node]]
) -> None:
    """Replace the nodes of a concatenation's statistics; `pieces` holds mean, centred and variance of each part."""
    with graph.inserting_before(whole.mean):
        for part in parts:
            if part not in pieces:
                pieces[part] = _of_part(graph, part, whole)
    means, centred, variances = ([pieces[part][index] for part in parts] for index in range(3))
    replaced = [(whole.mean, means, 0), *((node, variances, 0) for node in whole.variances)]
    for node, tensors, axis in [*replaced, *((node, centred, _CHANNELS) for node in whole.centred)]:
        with graph.inserting_before(node):
            node.replace_all_uses_with(call(graph, aten.cat.default, (tensors, axis), like=node))


def _of_part(graph: torch.fx.Graph, part: Node, whole: _Statistics) -> tuple[Node, Node, Node]:
    """Mean, centred tensor and variance, as they are computed of a tensor that is no concatenation."""
    like, channels = whole.mean, [1, -1, *(1,) * (part.meta["val"].dim() - 2)]
    mean = call(graph, aten.mean.dim, (part, whole.axes), like=like)
    per_channel = call(graph, aten.view.default, (mean, channels), like=like)
    centred = call(graph, aten.sub.Tensor, (part, per_channel), like=like)
    square = call(graph, aten.mul.Tensor, (centred, centred), like=like)
    return mean, centred, call(graph, aten.mean.dim, (square, whole.axes), like=like)


def _statistics(node: Node) -> _Statistics | None:
    """Those that the graph computes of a tensor, by the operators that batch normalization is decomposed into."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return None
    axes = [axis for axis in range(value.dim()) if axis != _CHANNELS]
    means = [user for user in node.users if _is_mean(user, node, axes)]
    if len(means) != 1:
        return None
    (mean,) = means
    centred = [
        difference
        for view in mean.users
        if view.target is aten.view.default and _is_per_channel(view, value)
        for difference in view.users
        if difference.target is aten.sub.Tensor and difference.args == (node, view) and not difference.kwargs
    ]
    variances = [
        user
        for difference in centred
        for square in difference.users
        if square.target is aten.mul.Tensor and square.args == (difference, difference)
        for user in square.users
        if _is_mean(user, square, axes)
    ]
    return _Statistics(axes, mean, centred, variances) if variances else None


def _is_mean(node: Node, source: Node, axes: list[int]) -> bool:
    return node.target is aten.mean.dim and node.args == (source, axes) and not node.kwargs


def _is_per_channel(view: Node, like: torch.Tensor) -> bool:
    """Whether a view of one value a channel broadcasts against `like` along the channels."""
    shape: Any = view.meta["val"].shape
    return len(shape) == like.dim() and all(size == 1 for axis, size in enumerate(shape) if axis != _CHANNELS)


def _parts(node: Node) -> list[Node]:
    """The tensors that a concatenation of channels, of a known number each, is made of; the tensor itself otherwise."""
    tensors: Any = node.args[0] if node.target is aten.cat.default and not node.kwargs else ()
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    rank = node.meta["val"].dim()
    same = all(
        t.meta["val"].dim() == rank and t.meta["val"].dtype == node.meta["val"].dtype and isinstance(_channels(t), int)
        for t in tensors
    )
    if not tensors or axis % rank != _CHANNELS or not same:
        return [node]
    return [part for tensor in tensors for part in _parts(tensor)]


def _channels(node: Node) -> Any:
    return node.meta["val"].shape[_CHANNELS]
