"""Means of no elements: NaN in PyTorch, where onnxruntime's are 0. A dynamic size may be 0 when the model runs.

Batch normalization's statistics stay as they are: PyTorch leaves the running ones alone where a batch is empty, and a
NaN would be in those of all batches that follow.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch

from .fx_nodes import call

aten = torch.ops.aten
Node = torch.fx.Node


def nan_of_no_elements(graph: torch.fx.Graph) -> None:
    """Fill means over dynamic sizes with NaN where one of these is 0, in place.

    Args:
        graph: ATen operators with values in ``meta["val"]``.
    """
    for node in list(graph.nodes):
        axes = _open_axes(node)
        if not axes or "batch_norm" in str(node.meta.get("original_aten")):
            continue
        users = list(node.users)
        with graph.inserting_before(node.next):
            sizes = [call(graph, aten.sym_size.int, (node.args[0], axis), like=node) for axis in axes]
            count = functools.reduce(lambda a, b: call(graph, operator.mul, (a, b), like=node), sizes)
            # By hand: PyTorch's own function would make a number of the size.
            number = graph.call_function(aten.scalar_tensor.default, (count,), {"dtype": torch.int64})
            number.meta = {**count.meta, "val": node.meta["val"].new_empty((), dtype=torch.int64)}
            empty = call(graph, aten.eq.Scalar, (number, 0), like=node)
            filled = call(graph, aten.masked_fill.Scalar, (node, empty, math.nan), like=node)
        for user in users:
            user.replace_input_with(node, filled)


def _open_axes(node: Node) -> list[int]:
    """The axes over which a node takes a mean of its first argument and whose size is open; one of each size."""
    if node.target not in (aten.mean.default, aten.mean.dim):
        return []
    tensor: Any = node.args[0]
    axes: Any = node.args[1] if node.target is aten.mean.dim else None
    shape = tensor.meta["val"].shape
    found: dict[Any, int] = {}
    for axis in axes or range(len(shape)):
        axis %= len(shape)  # sym_size from the end has a wrong translation
        if not isinstance(shape[axis], int):
            found.setdefault(shape[axis].node.expr, axis)
    return list(found.values())
