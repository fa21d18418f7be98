"""Numbers computed from dynamic sizes, as tensors: torch.onnx's translations take Python numbers only in many places.

The gradient of a variance over a dynamic axis is one: it multiplies by 2 / (n - 1).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

_TENSOR_FORM = {
    **{getattr(aten, name).Scalar: getattr(aten, name).Tensor for name in ("add", "sub", "rsub", "mul", "div")},
    **{getattr(aten, name).Scalar: getattr(aten, name).Tensor for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    aten.masked_fill.Scalar: aten.masked_fill.Tensor,
    aten.fill.Scalar: aten.fill.Tensor,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.pow.Scalar: aten.pow.Tensor_Tensor,
}
_TENSOR_TAKES = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
}


def scalars_to_tensors(graph: torch.fx.Graph) -> None:
    """Give operators 0-d tensors in place of symbolic numbers, in place, where a translation would refuse or round.

    Args:
        graph: ATen operators with values in ``meta["val"]``.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not (node.target in _TENSOR_FORM or node.target in _TENSOR_TAKES):
            continue
        kinds = (torch.SymInt, torch.SymFloat) if node.target in _TENSOR_FORM else (torch.SymFloat,)
        symbolic = [isinstance(a, torch.fx.Node) and isinstance(a.meta.get("val"), kinds) for a in node.args]
        if not any(symbolic):
            continue
        tensors = [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
        dtype = next((t.dtype for t in tensors if t.dtype != torch.bool), torch.float32)
        if not dtype.is_floating_point:
            continue
        with graph.inserting_before(node):
            node.args = tuple(
                _tensor(graph, a, dtype) if found else a for a, found in zip(node.args, symbolic, strict=True)
            )
        node.target = _TENSOR_FORM.get(node.target, node.target)


def _tensor(graph: torch.fx.Graph, value: Any, dtype: torch.dtype) -> torch.fx.Node:
    """A 0-d tensor of `dtype`; quotients are taken in that type, for torch.onnx divides symbolic numbers in float32."""
    form = _ARITHMETIC.get(value.target) if isinstance(value, torch.fx.Node) else None
    if form is not None and isinstance(value.meta.get("val"), torch.SymFloat):
        result = graph.call_function(form, tuple(_tensor(graph, a, dtype) for a in value.args))
    else:
        result = graph.call_function(aten.scalar_tensor.default, (value,), {"dtype": dtype})
    result.meta["val"] = torch.empty((), dtype=dtype, device="meta")
    return result
