"""New calls in a traced graph, with what later passes read of a node."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

Node = torch.fx.Node


def call(graph: torch.fx.Graph, target: Any, args: tuple[Any, ...], *, like: Node) -> Node:
    """`target` of `args` at the insertion point, with its fake tensor, as a part of the module of `like`."""
    node = graph.call_function(target, args)
    node.meta = {key: value for key, value in like.meta.items() if key not in ("val", "tensor_meta")}
    values = pytree.tree_map_only(Node, lambda argument: argument.meta["val"], args)
    fake: Any = next(value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor))
    with fake.fake_mode:
        node.meta["val"] = target(*values)
    return node
