"""New calls in a traced graph, with what later passes read of a node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

Node = torch.fx.Node


def call(graph: torch.fx.Graph, target: Any, args: tuple[Any, ...], *, like: Node) -> Node:
    """`target` of `args` at the insertion point, with its fake tensor, as a part of the module of `like`."""
    node = graph.call_function(target, args)
    node.meta = {key: value for key, value in like.meta.items() if key not in ("val", "tensor_meta")}
    node.meta["val"] = in_mode(target, *pytree.tree_map_only(Node, lambda argument: argument.meta["val"], args))
    return node


def in_mode(function: Callable[..., Any], *args: Any) -> Any:
    """A function of traced values, in the mode that these were traced in."""
    modes = (getattr(value, "fake_mode", None) for value in pytree.tree_leaves(args))
    with next((mode for mode in modes if mode is not None), contextlib.nullcontext()):
        return function(*args)
