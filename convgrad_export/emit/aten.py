"""Gradients as ATen calls: the recorded ONNX operators are walked, and each is answered by the matching ATen operator.

No formula is written here. A lowering is recorded once per geometry into the same nodes that `emit.onnx` puts into a
model, the canonical functions are the `@script` functions themselves, and the rules in `aten_rules.py` (one per ONNX
operator) turn a node into calls on whatever tensors arrive: real, fake, or proxies of a tracer.

Two kinds of value flow: tensors, and tuples of integers, which are what ONNX's INT64 shape tensors become. A size may
be a `torch.SymInt`; arithmetic on it stays symbolic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from .. import dtypes
from ..functions import FUNCTIONS
from ..geometry import ConvGeometry
from ..lowering import LOWERINGS, Lowering
from ..lowering.blocks import ints
from .aten_rules import RULES, AtenValue, constant
from .onnx import GraphOps

BATCH = "batch"


def run_lowering(lowering: Lowering, geometry: ConvGeometry, grad_output: Any, operand: Any = None) -> Any:
    """One gradient of one convolution as ATen calls.

    Args:
        lowering: a catalogue entry that applies to `geometry`.
        geometry: all sizes but the batch are integers.
        grad_output: (N, M, *O). operand: the weight for an input gradient, the input for a weight gradient.

    Returns:
        The gradient, in the dtype of `grad_output`; contiguous or a view, as the last operator gives it.
    """
    tensors = [value for value in (grad_output, operand) if value is not None]
    dtype = grad_output.dtype
    widened = dtypes.is_half(dtypes.name_of(dtype)) and (
        not lowering.sums_once  # rounding each term to a half type loses more than rounding their sum
        or ("ConvTranspose" in lowering.operators and _adds_in_half(grad_output))
    )
    if widened:
        tensors = [value.to(torch.float32) for value in tensors]
    inputs, nodes, output = _recorded(lowering.name, geometry.with_batch(BATCH))
    result: Any = walk(nodes, dict(zip(inputs, tensors, strict=True)))[output]
    return result.to(dtype) if widened else result


def _adds_in_half(tensor: torch.Tensor) -> bool:
    """PyTorch's CPU kernel for transposed convolutions adds the taps up in the element type itself."""
    return tensor.device.type == "cpu" and dtypes.is_half(dtypes.name_of(tensor.dtype))


@functools.lru_cache(maxsize=1024)
def _recorded(name: str, geometry: ConvGeometry) -> tuple[list[ir.Value], list[ir.Node], ir.Value]:
    """Inputs, nodes and output of a lowering, recorded for any batch."""
    lowering, ops = LOWERINGS[name], GraphOps()
    inputs = [ir.Value(name="grad_output")]
    if lowering.gradient != "bias":
        inputs.append(ir.Value(name="operand"))
    output = lowering.build(ops, geometry, *inputs)
    return inputs, ops.nodes, output


def run_function(name: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """A canonical function of `convgrad_export.functions` as ATen calls; every size may be symbolic.

    Args:
        name: ``"conv1d_input"`` to ``"conv3d_weight"``.
        inputs: as the function's own; the size input is a tuple of integers.
        attributes: ``stride``, ``padding``, ``dilation`` (one integer per axis) and ``groups``.
    """
    function = _function(name)
    if name.endswith("_input") and _adds_in_half(inputs[2]):
        widened = [value.to(torch.float32) if isinstance(value, torch.Tensor) else value for value in inputs]
        return run_function(name, widened, attributes).to(inputs[2].dtype)
    values = dict(zip(function.inputs, inputs, strict=True))
    return walk(function, values, attributes)[function.outputs[0]]


@functools.cache
def _function(name: str) -> ir.Function:
    return ir.serde.deserialize_function(FUNCTIONS[name].to_function_proto())


def run_transposed_input(
    grad_output: Any, weight: Any, input_size: Sequence[Any], attributes: Mapping[str, Any], groups: int
) -> Any:
    """Input gradient of a transposed convolution whose sizes may be symbolic: its Conv, cut to the input's size.

    The cut is needed where output_padding reaches the stride; rows that it added are never read by the first I outputs.
    """
    spatial = len(input_size) - 2
    ops = GraphOps()
    data, kernel, size = (ir.Value(name=name) for name in ("grad_output", "weight", "input_size"))
    full = ops.Conv(
        data,
        kernel,
        strides=list(attributes["stride"]),
        dilations=list(attributes["dilation"]),
        pads=[*attributes["padding"], *attributes["padding"]],
        group=groups,
    )
    axes = ints(ops, range(2, 2 + spatial))
    cut = ops.Slice(full, ints(ops, [0] * spatial), ops.Slice(size, ints(ops, [2]), ints(ops, [2 + spatial])), axes)
    return walk(ops.nodes, {data: grad_output, kernel: weight, size: tuple(input_size)})[cut]


def walk(
    nodes: Iterable[ir.Node], values: dict[ir.Value, AtenValue], attributes: Mapping[str, Any] | None = None
) -> dict[ir.Value, AtenValue]:
    """Run ONNX nodes as ATen calls, in order. `values` holds the inputs and is filled with every result.

    Args:
        attributes: values for attributes that refer to those of an enclosing function.

    Raises:
        KeyError: an operator without a rule (a gap of this package, not of the caller's graph).
    """
    for node in nodes:
        inputs = [None if value is None else _value_of(value, values) for value in node.inputs]
        given = {
            key: attributes[str(attribute.ref_attr_name)] if attribute.is_ref() and attributes else attribute.value
            for key, attribute in node.attributes.items()
        }
        values[node.outputs[0]] = RULES[node.op_type](*inputs, **given)
    return values


def _value_of(value: ir.Value, values: Mapping[ir.Value, AtenValue]) -> AtenValue:
    if value in values:
        return values[value]
    if value.const_value is None:
        raise KeyError(f"{value.name} has no value: the nodes are not in order")
    return constant(value.const_value.numpy())
