"""Numbers computed from sizes or values, as tensors: torch.onnx takes few of them, and hands some on in float32.

The gradient of a variance over a dynamic axis is one: it multiplies by 2 / (n - 1). So is a `loss.item()`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

_BY_SCALAR = ("add", "sub", "rsub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "masked_fill", "fill")
_TENSOR_FORM = {
    **{getattr(aten, name).Scalar: getattr(aten, name).Tensor for name in _BY_SCALAR},
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.pow.Scalar: aten.pow.Tensor_Tensor,
    **{getattr(aten, name).default: getattr(aten, name).Tensor for name in ("clamp", "clamp_min", "clamp_max")},
}
_TENSOR_TAKES = {getattr(aten, name).Tensor for name in ("add", "sub", "mul", "div")}
_TENSOR_TAKES |= {getattr(torch.ops.prims, name).default for name in ("add", "sub", "mul", "div")}
_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
    operator.pow: aten.pow.Tensor_Tensor,
    operator.neg: aten.neg.default,
}


def scalars_to_tensors(graph: torch.fx.Graph) -> None:
    """Give operators 0-d tensors in place of symbolic numbers, in place, where a translation would refuse or round.

    Args:
        graph: ATen operators with values in ``meta["val"]``.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.scalar_tensor.default and _is_float(node.args[0]):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_tensor(graph, node.args[0], node.meta["val"]))
            continue
        if not (node.target in _TENSOR_FORM or node.target in _TENSOR_TAKES):
            continue
        kinds = (torch.SymInt, torch.SymFloat) if node.target in _TENSOR_FORM else (torch.SymFloat,)
        symbolic = [isinstance(a, torch.fx.Node) and isinstance(a.meta.get("val"), kinds) for a in node.args]
        if not any(symbolic):
            continue
        tensors = [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
        like = next((tensor for tensor in tensors if tensor.dtype != torch.bool), node.meta["val"])
        if not like.dtype.is_floating_point and any(_is_float(a) for a in node.args):
            like = node.meta["val"]  # the result has another type than the tensor
            if not like.dtype.is_floating_point:
                continue
            with graph.inserting_before(node):
                node.args = tuple(_in_type(graph, a, like) for a in node.args)
        if node.target is aten.clamp.default:  # both limits of one kind
            symbolic = [found or isinstance(a, (int, float)) for a, found in zip(node.args, symbolic, strict=True)]
        with graph.inserting_before(node):
            node.args = tuple(
                _tensor(graph, a, like) if found else a for a, found in zip(node.args, symbolic, strict=True)
            )
        node.target = _TENSOR_FORM.get(node.target, node.target)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.fx.Node) and isinstance(value.meta.get("val"), torch.SymFloat)


def _in_type(graph: torch.fx.Graph, value: Any, like: torch.Tensor) -> Any:
    """A tensor in the type of `like`; what is none as it is."""
    if not isinstance(value, torch.fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    result = graph.call_function(aten._to_copy.default, (value,), {"dtype": like.dtype})
    result.meta["val"] = value.meta["val"].new_empty(value.meta["val"].shape, dtype=like.dtype)
    return result


def _tensor(graph: torch.fx.Graph, value: Any, like: torch.Tensor) -> torch.fx.Node:
    """A 0-d tensor in the type of `like`; quotients are taken in it, for torch.onnx divides such numbers in float32."""
    form = _ARITHMETIC.get(value.target) if _is_float(value) else None
    if form is not None:
        result = graph.call_function(form, tuple(_tensor(graph, a, like) for a in value.args))
    elif _is_float(value) and value.target is aten._local_scalar_dense.default:
        # The tensor whose value it is: torch.onnx hands the number on in float32.
        number = graph.call_function(aten.reshape.default, (value.args[0], []))
        number.meta["val"] = value.args[0].meta["val"].new_empty(())
        result = graph.call_function(aten._to_copy.default, (number,), {"dtype": like.dtype})
    else:
        result = graph.call_function(aten.scalar_tensor.default, (value,), {"dtype": like.dtype})
    result.meta["val"] = like.new_empty(())
    return result
