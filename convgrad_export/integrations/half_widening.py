"""float16 and bfloat16 graphs for runtimes without half kernels: operators compute in float32 and round.

onnxruntime's CPU provider has no bfloat16 kernel for most operators, and no float16 kernel for a few. Here a call takes
its half operands widened to float32, and its results are rounded back, so every value that eager rounds is rounded at
the same place, and sums accumulate in float32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import map_arg

from .fx_nodes import call, in_mode

HALF = (torch.float16, torch.bfloat16)
WIDENED = "bfloat16 is computed in float32 and rounded after each operator: no runtime needs kernels"  # for reports
_CONVERSION = torch.ops.aten._to_copy.default
_EXTREMES = (torch.ops.aten.amax.default, torch.ops.aten.amin.default)
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.unsqueeze.default)
_ADDING = {torch.ops.aten.scatter_add.default, torch.ops.aten.scatter_reduce.two, torch.ops.aten.index_put.default}


def computed(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the type that PyTorch's kernels compute in: float32 for the half types."""
    return tensor.to(torch.float32) if tensor.dtype in HALF else tensor


def has_bfloat16(graph_module: torch.fx.GraphModule) -> bool:
    """Most operators take bfloat16 from opset 22 on only, and onnxruntime's CPU provider has no kernels for it."""
    values = [node.meta.get("val") for node in graph_module.graph.nodes]
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in values)


def lacks_float16(node: torch.fx.Node) -> bool:
    """Whether a call has no float16 form: to be passed to `widen_half`.

    onnxruntime's CPU provider adds up scattered values in wider types only. ONNX's LayerNormalization gives its
    statistics, which the gradient reads, in float32; torch.onnx declares them as float16.
    """
    if node.target is torch.ops.aten.native_layer_norm.default:
        return any(user.target is operator.getitem and user.args[1] != 0 and user.users for user in node.users)
    return node.target in _ADDING


def compare_extremes_in_float32(graph_module: torch.fx.GraphModule) -> bool:
    """Rewrite, in place, where the gradients of amax and amin look for the elements that are the extreme, in float16.

    onnxruntime's CPU provider computes most of float16 in float32, and rounds less often than the graph says: an
    element that stays in float32 equals no extreme that was rounded, and a gradient that is shared among none is NaN.
    Here both sides of the comparison come from one float32 tensor. Returns whether anything changed.
    """
    changed = False
    comparisons: list[Any] = [n for n in graph_module.graph.nodes if n.target is torch.ops.aten.eq.Tensor]
    for node in comparisons:
        for extreme, value in (node.args, node.args[::-1]):
            found = _behind_views(extreme)
            if found is None or found.args[0] is not value or value.meta["val"].dtype != torch.float16:
                continue
            kept = in_mode(found.target, value.meta["val"], *_axes(found), True).shape
            if list(map(str, extreme.meta["val"].shape)) != list(map(str, kept)):  # the user's own, along other axes
                continue
            with graph_module.graph.inserting_before(node):
                wide = _converted(graph_module.graph, value, torch.float32)
                again = call(graph_module.graph, found.target, (wide, *_axes(found), True), like=wide)
            node.args, changed = (again, wide), True
            break
    if changed:
        graph_module.graph.lint()
        graph_module.recompile()
    return changed


def _behind_views(node: Any) -> Any:
    """The node of the amax or amin that a tensor is a view of; None for any other."""
    while isinstance(node, torch.fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return node if isinstance(node, torch.fx.Node) and node.target in _EXTREMES else None


def _axes(extreme: Any) -> tuple[Any, ...]:
    return (extreme.args[1] if len(extreme.args) > 1 else [],)  # none are all


def widen_half(graph_module: torch.fx.GraphModule, only: Callable[[torch.fx.Node], bool] | None = None) -> bool:
    """Rewrite the graph in place; its inputs and outputs keep their dtypes. Returns whether anything changed.

    Args:
        only: Says which calls to rewrite; None for all of them.
    """
    graph = graph_module.graph
    if not any(_has_half(node.meta.get("val")) for node in graph.nodes):
        return False
    changed = only is None
    widened: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target in (_CONVERSION, operator.getitem):
            continue
        if only is not None and not only(node):
            continue
        if not _has_half(node.meta.get("val")) and not any(_is_half(a.meta.get("val")) for a in node.all_input_nodes):
            continue
        _widen(graph, node, widened)
        changed = True
    if changed:
        graph.lint()
        graph_module.recompile()
    return changed


def _widen(graph: torch.fx.Graph, node: torch.fx.Node, widened: dict[torch.fx.Node, torch.fx.Node]) -> None:
    for argument in node.all_input_nodes:
        if _is_half(argument.meta.get("val")) and argument not in widened:
            with graph.inserting_before(node):
                widened[argument] = _converted(graph, argument, torch.float32)
    node.args = map_arg(node.args, lambda a: widened.get(a, a))
    kwargs = dict(map_arg(node.kwargs, lambda a: widened.get(a, a)))
    if kwargs.get("dtype") in HALF:
        kwargs["dtype"] = torch.float32
    node.kwargs = kwargs
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        if _is_half(value):
            _round_results(graph, node, value)
        return
    # Several results: each is rounded where it is taken out.
    for user in [user for user in node.users if user.target is operator.getitem]:
        if _is_half(user.meta.get("val")):
            _round_results(graph, user, user.meta["val"])
    if isinstance(value, (tuple, list)):
        node.meta["val"] = type(value)(_as_float32(item) if _is_half(item) else item for item in value)


def _round_results(graph: torch.fx.Graph, node: torch.fx.Node, value: Any) -> None:
    with graph.inserting_after(node):
        rounded = graph.call_function(_CONVERSION, (node,), {"dtype": value.dtype})
    rounded.meta = {**node.meta, "val": value}
    node.meta["val"] = _as_float32(value)
    node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)


def _converted(graph: torch.fx.Graph, node: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
    copy = graph.call_function(_CONVERSION, (node,), {"dtype": dtype})
    copy.meta = {key: value for key, value in node.meta.items() if key != "tensor_meta"}
    copy.meta["val"] = _as_float32(node.meta["val"])
    return copy


def _as_float32(value: Any) -> Any:
    return in_mode(torch.Tensor.to, value, torch.float32)


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in HALF


def _has_half(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_half(item) for item in value)
    return _is_half(value)
