"""Python numbers in torch.onnx's translations of float64 calls, kept in float64.

Many translations take a number (`alpha` of an addition, the value of a masked_fill, pi in deg2rad) through a float32
constant and a Cast. Here a translation of a float64 call runs under an evaluator that hands its operators on to
torch.onnx's own, with such numbers as float64 constants.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator
from onnxscript import opset18 as op

from convgrad_export.integrations.float64_decompositions import is_rounded

_Arguments = Sequence[Any]


def keep_in_float64(registry: Any, graph: torch.fx.Graph) -> None:
    """Replace torch.onnx's translations of the operators that `graph` calls on float64 tensors.

    Args:
        registry: An ONNXRegistry of the caller's own. Entries that were registered as custom ones stay as they are.
        graph: Its nodes with values in ``meta["val"]``.
    """
    targets = {node.target for node in graph.nodes if node.op == "call_function" and _is_float64(node)}
    for key in {target.name() if isinstance(target, torch._ops.OpOverload) else target for target in targets}:
        entries = registry.functions.get(key, [])
        registry.functions[key] = [
            entry if entry.is_custom else dataclasses.replace(entry, onnx_function=_exact(entry.onnx_function))
            for entry in entries
        ]


def _is_float64(node: torch.fx.Node) -> bool:
    values = [node.meta.get("val"), *(argument.meta.get("val") for argument in node.all_input_nodes)]
    tensors = [item for value in values for item in (value if isinstance(value, (tuple, list)) else [value])]
    return any(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 for tensor in tensors)


def _exact(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function, updated=())
    def translated(*args: Any, **kwargs: Any) -> Any:
        inner = evaluator.default()
        kind = _ExactEval if hasattr(inner, "eval") else _Exact
        with evaluator.default_as(kind(inner)):
            return function(*args, **kwargs)

    return translated


def _constant(value: float) -> Any:
    return op.Constant(value=ir.to_proto(ir.tensor(value, dtype=ir.DataType.DOUBLE)))


class _Exact(evaluator.Evaluator):
    """Hands everything on to `inner`; numbers on their way to float64 as float64 constants."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def eval_op(self, operator: Any, args: _Arguments, kwargs: Mapping[str, Any]) -> Any:
        return self._evaluated(operator.name, args, kwargs, functools.partial(self._inner.eval_op, operator))

    def eval_function(self, function: Any, args: _Arguments, kwargs: Mapping[str, Any]) -> Any:
        given = inspect.signature(function.function).bind(*args, **kwargs)
        rounded = [name for name, value in given.arguments.items() if is_rounded(value)]
        if rounded and any(getattr(value, "dtype", None) == ir.DataType.DOUBLE for value in given.arguments.values()):
            attributes = [key for key, value in function.op_signature.params_map.items() if value.is_attribute()]
            given.arguments.update({key: _constant(given.arguments[key]) for key in rounded if key not in attributes})
            args, kwargs = given.args, given.kwargs
        return self._inner.eval_function(function, args, kwargs)

    def _evaluated(
        self, name: str, args: _Arguments, kwargs: Mapping[str, Any], evaluate: Callable[[_Arguments, Any], Any]
    ) -> Any:
        if name in ("Cast", "CastLike") and args and is_rounded(args[0]):
            args = [_constant(args[0]), *args[1:]]
        if name == "Gemm" and args[0].dtype == ir.DataType.DOUBLE:
            factors = {key: kwargs[key] for key in ("alpha", "beta") if is_rounded(kwargs.get(key))}
            if factors:
                return _scaled_gemm(args, {key: value for key, value in kwargs.items() if key not in factors}, factors)
        return evaluate(args, kwargs)


class _ExactEval(_Exact):
    """The same for evaluators that take a schema, as PyTorch's does up to 2.13 at least."""

    def eval(self, schema: Any, args: _Arguments, kwargs: Mapping[str, Any]) -> Any:
        return self._evaluated(schema.name, args, kwargs, functools.partial(self._inner.eval, schema))


def _scaled_gemm(args: _Arguments, kwargs: Mapping[str, Any], factors: Mapping[str, float]) -> Any:
    """`alpha * a @ b + beta * c`; Gemm's own attributes are float32."""
    a, b, *c = args
    if "alpha" in factors:
        a = op.Mul(a, factors["alpha"])
    if "beta" in factors and c and c[0] is not None:
        c = [op.Mul(c[0], factors["beta"])]
    return op.Gemm(a, b, *c, **kwargs)
