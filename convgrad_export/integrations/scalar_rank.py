"""One-element operands get the rank of the tensor that they meet, where that tensor has axes of length 1 inside.

onnxruntime 1.32 merges neighbouring axes into one inner loop as long as the smaller operand is broadcast along all of
them. Against an operand of lower rank a trailing axis of length 1 ends the merging at once: a weight (1280, 320, 1, 1)
times a 0-d learning rate is 409,600 loops of one element, 3.9 ms, and 0.04 ms where the rate has shape (1, 1, 1, 1).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

_BROADCASTING = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Sum", "Mean", "Where", "PRelu", "And", "Or", "Xor"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"),
}
Sizes = tuple[int | None, ...]


def raise_scalar_ranks(model: ir.Model, parameters: Collection[str] = ()) -> None:
    """Reshape one-element operands in place; results keep their values and shapes.

    A constant becomes another constant, a runtime value passes through one Reshape; each is shared by all nodes that
    need the same rank. Operands of unknown rank stay as they are.

    Args:
        parameters: initializers that stay themselves, under their names; they are reshaped like runtime values.
    """
    sizes: dict[ir.Value, Sizes] = {}
    raised: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type not in _BROADCASTING or node.domain:
            continue
        operands = [_sizes(value, sizes) for value in node.inputs]
        result = _broadcast(operands)
        if result is None:
            continue
        if len(node.outputs) == 1 and node.outputs[0].shape is None:
            sizes[node.outputs[0]] = result  # translations leave the values between their own nodes without a shape
        if not _ends_merging(result):
            continue
        for index, (value, operand) in enumerate(zip(node.inputs, operands, strict=True)):
            if value is None or operand is None or len(operand) == len(result) or any(size != 1 for size in operand):
                continue
            key = value, len(result)
            if key not in raised:
                raised[key] = _raised(model.graph, value, len(result), node, parameters)
            node.replace_input_with(index, raised[key])


def _sizes(value: ir.Value | None, known: dict[ir.Value, Sizes]) -> Sizes | None:
    if value is None:
        return None
    if value.const_value is not None:
        return tuple(int(size) for size in value.const_value.shape.numpy())
    if value.shape is None:
        return known.get(value)
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _broadcast(operands: Sequence[Sizes | None]) -> Sizes | None:
    """The result's sizes; None inside where a dimension is not known, None for all where a rank is not."""
    ranked = [operand for operand in operands if operand is not None]
    if len(ranked) != len(operands) or not ranked:
        return None
    rank = max(len(operand) for operand in ranked)
    columns = zip(*((1,) * (rank - len(operand)) + operand for operand in ranked), strict=True)
    return tuple(_merged(column) for column in columns)


def _merged(column: Sequence[int | None]) -> int | None:
    longer = [size for size in column if size is not None and size != 1]
    return longer[0] if longer else None if None in column else 1


def _ends_merging(sizes: Sizes) -> bool:
    """Whether an axis of length 1 follows a longer one."""
    first = next((axis for axis, size in enumerate(sizes) if size != 1), len(sizes))
    return 1 in sizes[first:]


def _raised(graph: ir.Graph, value: ir.Value, rank: int, user: ir.Node, parameters: Collection[str]) -> ir.Value:
    """`value`, which has one element, in shape (1,) * rank; computed before `user` where it is no constant."""
    shape = (1,) * rank
    tensor = value.const_value
    if tensor is not None and value.name not in parameters:
        name = f"{value.name}_rank{rank}"
        constant = ir.tensor(tensor.numpy().reshape(shape), dtype=tensor.dtype, name=name)
        result = ir.Value(name=name, shape=ir.Shape(shape), type=value.type, const_value=constant)
        graph.register_initializer(result)
        return result
    sizes = np.array(shape, np.int64)
    target = ir.Value(
        name=f"constant_{value.name}_ones{rank}",
        shape=ir.Shape([rank]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(sizes),
    )
    graph.register_initializer(target)
    node = ir.node("Reshape", [value, target])
    graph.insert_before(user, node)
    (result,) = node.outputs
    result.name, result.shape, result.type = f"{value.name}_rank{rank}", ir.Shape(shape), value.type
    return result
