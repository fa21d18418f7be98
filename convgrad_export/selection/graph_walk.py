"""The graph that a lowering emits, with every size known: what the cost model and the memory limit look at.

Nothing here knows a formula. A lowering is emitted as for a model, ONNX shape inference fills in the sizes, and the
nodes come back as `Step`s. Transposes that onnxruntime folds into a MatMul are folded here too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..emit.onnx import GradientRequest, emit_model
from ..errors import GeometryError
from ..geometry import ConvGeometry
from ..lowering import CPU, LOWERINGS

Shape = tuple[int, ...]

# The result is the operand's memory under another shape.
_VIEWS = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten"})


@dataclass(frozen=True)
class Tensor:
    """A value of the graph. `buffer` is shared by a value and its views; `item` is bytes an element."""

    buffer: str
    shape: Shape
    item: int
    constant: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * self.item


@dataclass(frozen=True)
class Step:
    """One kernel call. `transposed` tells which operands of a MatMul are read transposed."""

    op_type: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    attributes: Mapping[str, Any]
    constants: tuple[tuple[int, ...] | None, ...]
    transposed: tuple[bool, ...] = ()


@functools.lru_cache(maxsize=4096)
def steps(
    name: str, geometry: ConvGeometry, dtype: str = "float32", provider: str = CPU, opset: int = 18
) -> tuple[Step, ...]:
    """The kernel calls of a lowering on a geometry whose every size is an integer.

    Raises:
        GeometryError: the batch is a name.
    """
    if not isinstance(geometry.batch, int) or not geometry.is_static:
        raise GeometryError(
            f"the size of the intermediate tensors of {geometry.describe()} is open, expected integers only: "
            f"give the largest batch that will be run"
        )
    lowering = LOWERINGS[name]
    model = emit_model(GradientRequest(geometry, {lowering.gradient: lowering}, dtype, opset, provider), "walk")
    return graph_steps(ir.to_proto(model))


def workspace_bytes(
    name: str, geometry: ConvGeometry, dtype: str = "float32", provider: str = CPU, opset: int = 18
) -> int:
    """Most bytes of intermediate tensors alive at once, kernels' own buffers included, operands and result not."""
    calls = steps(name, geometry, dtype, provider, opset)
    made = {step.output.buffer for step in calls}
    last_use = {tensor.buffer: index for index, step in enumerate(calls) for tensor in step.inputs}
    result = calls[-1].output.buffer if calls else ""
    alive: dict[str, int] = {}
    peak = 0
    for index, step in enumerate(calls):
        if step.output.buffer != result:
            alive[step.output.buffer] = step.output.bytes
        peak = max(peak, sum(alive.values()) + kernel_buffer_bytes(step))
        for tensor in step.inputs:
            if last_use[tensor.buffer] == index and tensor.buffer in made:
                alive.pop(tensor.buffer, None)
    return peak


def kernel_buffer_bytes(step: Step) -> int:
    """What onnxruntime's CPU kernel allocates for itself: the columns of one image and group."""
    if step.op_type == "ConvTranspose":
        data, weight = step.inputs[0], step.inputs[1]
        return math.prod(weight.shape[1:]) * math.prod(data.shape[2:]) * data.item
    if step.op_type == "Conv" and expands_whole_image(step):
        return math.prod(step.inputs[1].shape[1:]) * math.prod(step.output.shape[2:]) * step.output.item
    return 0


def expands_whole_image(step: Step) -> bool:
    """MLAS builds all columns of an image before its GEMM when a group has more filters than output positions."""
    filters = step.inputs[1].shape[0] // step.attributes.get("group", 1)
    return not reads_directly(step) and filters > math.prod(step.output.shape[2:])


def reads_directly(step: Step) -> bool:
    """A 1x1 Conv without stride or padding: the image is its own column matrix."""
    attributes = step.attributes
    return (
        math.prod(step.inputs[1].shape[2:]) == 1
        and all(s == 1 for s in attributes.get("strides", ()))
        and not any(attributes.get("pads", ()))
    )


def graph_steps(model: Any) -> tuple[Step, ...]:
    """The kernel calls of any ONNX model whose every size is known to shape inference."""
    import onnx

    return _walk(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)


def _walk(graph: Any) -> tuple[Step, ...]:
    import onnx

    tensors: dict[str, Tensor] = {}
    values: dict[str, tuple[int, ...]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = tuple(dimension.dim_value for dimension in kind.shape.dim)
        item = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        tensors[value.name] = Tensor(value.name, shape, item, False)
    for constant in graph.initializer:
        array = onnx.numpy_helper.to_array(constant)
        tensors[constant.name] = Tensor(constant.name, array.shape, array.itemsize, True)
        if array.dtype.kind == "i" and array.size <= 64:
            values[constant.name] = tuple(int(entry) for entry in array.ravel())
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    folded: dict[str, str] = {}
    result = []
    for node in graph.node:
        name = node.output[0]
        output = tensors[name]
        if node.op_type in _VIEWS or (tensors[node.input[0]].constant and node.op_type == "Reshape"):
            source = tensors[node.input[0]]
            tensors[name] = Tensor(source.buffer, output.shape, output.item, source.constant)
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Transpose" and _folds(attributes["perm"], readers.get(name, []), output.item):
            source = tensors[node.input[0]]
            tensors[name] = Tensor(source.buffer, output.shape, output.item, source.constant)
            folded[name] = node.input[0]
            continue
        result.append(
            Step(
                node.op_type,
                tuple(tensors[entry] for entry in node.input if entry),
                output,
                attributes,
                tuple(values.get(entry) for entry in node.input if entry),
                tuple(entry in folded for entry in node.input if entry),
            )
        )
    return tuple(result)


def _folds(perm: list[int], readers: list[str], item: int) -> bool:
    """onnxruntime's FusedMatMul: float32, the last two axes exchanged, read by nothing but MatMul."""
    rank = len(perm)
    swaps = rank >= 2 and list(perm) == [*range(rank - 2), rank - 1, rank - 2]
    return swaps and item == 4 and bool(readers) and all(reader == "MatMul" for reader in readers)
