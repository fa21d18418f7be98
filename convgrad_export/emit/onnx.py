"""Gradients as ONNX graphs: recording a lowering into onnx_ir, and models and functions around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .. import dtypes
from ..geometry import ConvGeometry
from ..lowering import CPU, Lowering, widened
from .long_sums import split_long_sums

# The IR version an opset came with; newer would shut out older runtimes for nothing.
_IR_VERSION = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 11, 25: 12}
MIN_OPSET, MAX_OPSET = min(_IR_VERSION), 23

PRODUCER = "convgrad_export"


class GraphOps:
    """Records operators by name into nodes of an onnx_ir graph: ``ops.Conv(x, w, group=2)``.

    Equal constants become one initializer. Names count up, so the same calls give the same bytes.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, bytes], ir.Value] = {}

    @property
    def initializers(self) -> list[ir.Value]:
        return list(self._constants.values())

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)

        def record(*inputs: ir.Value | None, **attributes: Any) -> ir.Value:
            return self._record(op_type, inputs, attributes)

        return record

    def _record(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any]) -> ir.Value:
        if op_type == "Constant":
            return self._constant(**attributes)
        node = ir.node(op_type, inputs, attributes=dict(attributes))
        node.outputs[0].name = f"{op_type.lower()}_{len(self.nodes)}"
        node.name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def _constant(
        self, *, value_ints: Sequence[int] | None = None, value_floats: Sequence[float] | None = None
    ) -> ir.Value:
        array = np.array(value_floats, np.float32) if value_ints is None else np.array(value_ints, np.int64)
        key = (array.dtype.char, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            tensor = ir.tensor(array, name=name)
            self._constants[key] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([array.size]), const_value=tensor
            )
        return self._constants[key]


@dataclass(frozen=True)
class GradientRequest:
    """Which gradients of one convolution a graph computes, and how.

    Attributes:
        geometry: the convolution; its batch may be a name.
        lowerings: gradient name (``"input"``, ``"weight"``, ``"bias"``) to lowering, in output order.
        dtype: element type of inputs and outputs.
        opset: version of the standard operators.
        provider: decides the type in which float16 and bfloat16 are computed.
    """

    geometry: ConvGeometry
    lowerings: Mapping[str, Lowering]
    dtype: str = "float32"
    opset: int = 18
    provider: str = CPU


def emit_model(request: GradientRequest, name: str) -> ir.Model:
    """A model with the operands as inputs and one output ``grad_<gradient>`` for each gradient asked for.

    Inputs, each only if needed: ``grad_output`` (N, M, *O), ``input`` (N, C, *I), ``weight``.
    """
    geometry = request.geometry
    shapes = {"grad_output": geometry.output_shape, "input": geometry.input_shape, "weight": geometry.weight_shape}
    needed = operand_names(request.lowerings)
    inputs = {key: _value(key, request.dtype, shapes[key]) for key in needed}
    ops = GraphOps()
    outputs = record_gradients(ops, request, inputs)
    results = {"input": geometry.input_shape, "weight": geometry.weight_shape, "bias": (geometry.out_channels,)}
    for gradient, value in outputs.items():
        value.name = f"grad_{gradient}"
        value.type = ir.TensorType(ir.DataType(dtypes.onnx_code(request.dtype)))
        value.shape = ir.Shape(results[gradient])
    graph = ir.Graph(
        list(inputs.values()),
        list(outputs.values()),
        nodes=ops.nodes,
        initializers=ops.initializers,
        opset_imports={"": request.opset},
        name=name,
    )
    if request.provider == CPU:
        split_long_sums(graph)
    return ir.Model(graph, ir_version=ir_version(request.opset), producer_name=PRODUCER)


def operand_names(gradients: Mapping[str, Any]) -> list[str]:
    """Model inputs for these gradients, in the order of torch.nn.grad's own arguments."""
    names = ["input"] if "weight" in gradients else []
    names += ["weight"] if "input" in gradients else []
    return [*names, "grad_output"]


def record_gradients(ops: Any, request: GradientRequest, operands: Mapping[str, Any]) -> dict[str, Any]:
    """Record every lowering of `request`, each in the type it computes in: Casts at its border where that differs."""
    converted: dict[tuple[str, str], Any] = {}

    def operand(name: str, computed: str) -> Any:
        if computed == request.dtype or name not in operands:
            return operands.get(name)
        if (name, computed) not in converted:
            converted[name, computed] = ops.Cast(operands[name], to=dtypes.onnx_code(computed))
        return converted[name, computed]

    results = {}
    for gradient, lowering in request.lowerings.items():
        computed = lowering.computes_in(request.dtype, request.provider)
        other = {"input": "weight", "weight": "input", "bias": ""}[gradient]
        absent = widened(computed, request.provider, request.opset)
        recorder = WideningOps(ops, computed, absent) if absent else ops
        value = lowering.build(recorder, request.geometry, operand("grad_output", computed), operand(other, computed))
        results[gradient] = ops.Cast(value, to=dtypes.onnx_code(request.dtype)) if computed != request.dtype else value
    return results


class WideningOps:
    """Records into `ops`, the operators without a kernel in the half type `dtype` in float32 between Casts."""

    _VALUE_INPUTS: Mapping[str, int] = {"Pad": 1}  # the others read values only

    def __init__(self, ops: Any, dtype: str, operators: frozenset[str]) -> None:
        self._ops, self._code, self._operators = ops, dtypes.onnx_code(dtype), operators

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        record: Callable[..., Any] = getattr(self._ops, op_type)
        if op_type not in self._operators:
            return record

        def record_widened(*inputs: Any, **attributes: Any) -> Any:
            count = self._VALUE_INPUTS.get(op_type, len(inputs))
            wide = [self._ops.Cast(value, to=dtypes.onnx_code("float32")) for value in inputs[:count]]
            return self._ops.Cast(record(*wide, *inputs[count:], **attributes), to=self._code)

        return record_widened


def ir_version(opset: int) -> int:
    return _IR_VERSION[opset]


def _value(name: str, dtype: str, shape: Sequence[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType(dtypes.onnx_code(dtype))), shape=ir.Shape(shape))
