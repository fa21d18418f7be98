"""Models around the canonical functions: any dimension may be dynamic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import onnx
from onnx import helper, inliner

from .. import dtypes
from ..arguments import as_groups, as_shape, as_sizes
from ..errors import GeometryError, UnsupportedLoweringError
from ..functions import DOMAIN, FUNCTIONS
from ..geometry import ConvGeometry
from ..lowering import CPU, compute_dtype
from ..operators import Operator
from .onnx import PRODUCER, ir_version

MIN_OPSET = 15  # Shape with start and end


def emit_dynamic_model(
    op: Operator,
    dtype: str,
    opset: int,
    dynamic: Sequence[str],
    input_shape: Sequence[int] | None,
    weight_shape: Sequence[int] | None,
    *,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    inline: bool,
) -> onnx.ModelProto:
    """A model of one canonical function with torch.nn.grad's inputs.

    Dimensions named in `dynamic` become symbolic, the others are taken from the shapes. float16 and bfloat16 are
    computed in float32.

    Raises:
        GeometryError: a dimension is neither dynamic nor given, or the given ones fit no convolution.
        UnsupportedLoweringError: float64, for which onnxruntime's CPU provider has no ConvTranspose or Conv.
    """
    rank = op.rank or 0
    if opset < MIN_OPSET:
        raise UnsupportedLoweringError(f"opset_version is {opset}, expected at least {MIN_OPSET} for dynamic shapes")
    if dtype == "float64":
        raise UnsupportedLoweringError(
            f"dtype is float64 with dynamic {tuple(dynamic)}: the canonical functions are Conv and ConvTranspose, "
            f"which onnxruntime's CPU provider has in float32 only; build for fixed sizes (dynamic=('batch',)) instead"
        )
    values = {
        "stride": list(as_sizes(stride, rank, "stride", minimum=1)),
        "padding": _symmetric(padding, rank),
        "dilation": list(as_sizes(dilation, rank, "dilation", minimum=1)),
    }
    attributes: dict[str, Any] = {**values, "groups": as_groups(groups)}
    shapes, geometry = _shapes(op, dynamic, input_shape, weight_shape, attributes)
    gradient = op.gradients[0]
    size_name, names = (
        ("input_size", ["input_size", "weight", "grad_output"])
        if gradient == "input"
        else ("weight_size", ["input", "weight_size", "grad_output"])
    )
    code, computed = dtypes.onnx_code(dtype), dtypes.onnx_code(compute_dtype(dtype, CPU))
    nodes, operands = [], []
    for name in names:
        if name == size_name or computed == code:
            operands.append(name)
            continue
        nodes.append(helper.make_node("Cast", [name], [f"{name}_float32"], name=f"Cast_{name}", to=computed))
        operands.append(f"{name}_float32")
    output = f"grad_{gradient}"
    call = helper.make_node(
        op.name,
        operands,
        [output if computed == code else f"{output}_float32"],
        name=op.name,
        domain=DOMAIN,
        **attributes,
    )
    nodes.append(call)
    if computed != code:
        nodes.append(helper.make_node("Cast", call.output, [output], name=f"Cast_{output}", to=code))
    inputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [rank + 2])
        if name == size_name
        else helper.make_tensor_value_info(name, code, shapes[name])
        for name in names
    ]
    graph = helper.make_graph(nodes, op.name, inputs, [helper.make_tensor_value_info(output, code, shapes[gradient])])
    function = FUNCTIONS[op.name].to_function_proto()
    for item in function.opset_import:
        if item.domain == "":
            item.version = opset
    model = helper.make_model(
        graph,
        functions=[function],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        ir_version=max(ir_version(opset), 8),  # local functions came with IR version 8
        producer_name=PRODUCER,
    )
    if inline:
        model = inliner.inline_local_functions(model)
        kept = [item for item in model.opset_import if item.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(kept)
    metadata = {
        "convgrad.op": op.name,
        "convgrad.geometry": json.dumps(geometry.to_dict() if geometry else attributes),
        "convgrad.lowering": f"{gradient}.dynamic",
        "convgrad.dtype": dtype,
        "convgrad.dynamic": ",".join(dynamic),
    }
    helper.set_model_props(model, metadata)
    return model


def _symmetric(padding: Any, rank: int) -> list[int]:
    if isinstance(padding, str) or (
        isinstance(padding, Sequence) and any(isinstance(item, Sequence) for item in padding)
    ):
        raise UnsupportedLoweringError(
            f"padding is {padding!r} with dynamic shapes: torch.nn.grad's signature has one integer per axis; build "
            f"for fixed sizes (dynamic=('batch',)) for uneven or named padding"
        )
    return list(as_sizes(padding, rank, "padding", minimum=0))


def _shapes(
    op: Operator,
    dynamic: Sequence[str],
    input_shape: Sequence[int] | None,
    weight_shape: Sequence[int] | None,
    attributes: dict[str, Any],
) -> tuple[dict[str, list[Any]], ConvGeometry | None]:
    """Declared shape of each tensor, and the geometry where both shapes are given."""
    rank = op.rank or 0
    geometry = None
    if input_shape is not None and weight_shape is not None:
        geometry = ConvGeometry.from_forward(
            input_shape, weight_shape, **attributes, rank=rank, names=("input_shape", "weight_shape")
        )
    given_input = None if input_shape is None else as_shape(input_shape, "input_shape", allow_name=True)
    given_weight = None if weight_shape is None else as_shape(weight_shape, "weight_shape")

    def size(kind: str, name: str, shape: Sequence[Any] | None, axis: int, argument: str) -> Any:
        if kind in dynamic:
            return name
        if shape is None or len(shape) != rank + 2:
            raise GeometryError(
                f"{argument} is {shape}, expected {rank + 2} sizes: {name} is not dynamic, so it must be given"
            )
        return shape[axis]

    batch = size("batch", "batch", given_input, 0, "input_shape")
    channels = size("channels", "in_channels", given_input, 1, "input_shape")
    filters = size("channels", "out_channels", given_weight, 0, "weight_shape")
    per_group = size("channels", "in_channels_per_group", given_weight, 1, "weight_shape")
    space = [size("space", f"input_size_{a}", given_input, a + 2, "input_shape") for a in range(rank)]
    kernel = [size("kernel", f"kernel_size_{a}", given_weight, a + 2, "weight_shape") for a in range(rank)]
    output: list[Any] = [f"output_size_{a}" for a in range(rank)]
    if geometry is not None and "space" not in dynamic and "kernel" not in dynamic:
        output = list(geometry.output_size)
    inputs, weights = [batch, channels, *space], [filters, per_group, *kernel]
    return {"input": inputs, "weight": weights, "grad_output": [batch, filters, *output]}, geometry
