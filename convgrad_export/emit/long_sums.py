"""Long sums in short steps: parts of an axis first, or the last of neighbouring axes, and then what is left.

onnxruntime's CPU kernels add up neighbouring axes as if they were one, element by element into few accumulators: 8
along the last axis, one where axes before the last are summed, or all. In float32 every addition to a large sum rounds,
and always the same way where the terms are alike: of 8x1x512x512 times one number the sum was 1.7% off, of 65536x16
over the rows 6e-4, where PyTorch adds up in pairs. Steps of a few hundred elements leave 1e-6, and take no longer: 0.17
ms for 1.7, 0.12 for 0.23; 8x64x112x112 over all but the channels 0.74 for 1.0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import onnx_ir as ir

_IN_STEPS = {"ReduceSum", "ReduceMean"}
_TYPES = {ir.DataType.FLOAT, ir.DataType.DOUBLE}  # a half type would round, or overflow, between the steps
_LONGEST = 1024  # additions to one accumulator
_LANES = 8  # accumulators of a sum along the last axis, side by side
_SHORTEST = 16  # elements of a step: shorter rows take longer than they save


@dataclass(frozen=True)
class Step:
    """One sum that leaves the tensor its rank.

    Attributes:
        axes: that are added up, and have size 1 afterwards.
        part: instead, of the one axis so many neighbours at a time.
    """

    axes: tuple[int, ...]
    part: int = 0

    def after(self, sizes: Sequence[int | None]) -> list[int | None]:
        """Sizes of the result; None for one that is not known."""
        left = {axis: 1 if not self.part else (sizes[axis] or 0) // self.part for axis in self.axes}
        return [left.get(axis, size) for axis, size in enumerate(sizes)]


def split_long_sums(graph: ir.Graph) -> None:
    """Put steps before the graph's long sums and means, in place; results keep their shapes.

    What is summed along axes of unknown size is taken to be long; such an axis alone stays one sum. So do sums over
    tensors of unknown rank or type.
    """
    constants: dict[tuple[int, ...], ir.Value] = {}

    def ints(*values: int) -> ir.Value:
        if values not in constants:
            name = f"long_sum.ints.{'.'.join(map(str, values))}"
            tensor = ir.tensor(np.array(values, np.int64), name=name)
            kind, shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(values)])
            constants[values] = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
            graph.register_initializer(constants[values])
        return constants[values]

    for node in list(graph):
        if node.domain or node.op_type not in _IN_STEPS or (value := node.inputs[0]) is None:
            continue
        shape, dtype = _shape(value), _dtype(value)
        axes = None if shape is None or dtype not in _TYPES else _axes(node, len(shape))
        if shape is None or dtype is None or axes is None:
            continue
        dims = list(shape)
        sizes = [size if isinstance(size, int) else None for size in dims]
        for step in steps(sizes, axes):
            data, along = node.inputs[0], step.axes
            if step.part:
                (axis,) = along
                parts = ints(*_divided(sizes, axis, step.part))
                data = _insert(graph, node, ir.node("Reshape", [data, parts]), f"parts{axis}", dtype)
                along = (axis + 1,)
            sizes = step.after(sizes)
            partial = ir.node(node.op_type, [data, ints(*along)], {"keepdims": int(not step.part)})
            result = _insert(graph, node, partial, f"sums{'_'.join(map(str, step.axes))}", dtype)
            result.shape = ir.Shape([dim if size is None else size for dim, size in zip(dims, sizes, strict=True)])
            node.replace_input_with(0, result)


def steps(sizes: Sequence[int | None], axes: Sequence[int]) -> list[Step]:
    """What to add up, one after the other, before what is left of a sum over `axes`; nothing where it is short.

    Args:
        sizes: of the tensor, None for one that is not known.
    """
    found: list[Step] = []
    while 0 not in sizes and (step := _step(sizes, axes)) is not None:
        found.append(step)
        sizes = step.after(sizes)
    return found


def _step(sizes: Sequence[int | None], axes: Sequence[int]) -> Step | None:
    summed = [axis in axes or size == 1 for axis, size in enumerate(sizes)]
    for together, members in groupby(range(len(sizes)), key=summed.__getitem__):
        run = [axis for axis in members if sizes[axis] != 1]
        if not together or not run:
            continue
        longest = _LONGEST * (_LANES if all(summed[run[-1] :]) and not all(summed) else 1)
        if _count(sizes, run) <= longest:
            continue
        for axis in run:
            size = sizes[axis]
            if size is not None and size > longest and _is_divisible(sizes, axis) and (part := _part(size)):
                return Step((axis,), part)
        for start in range(len(run) - 1, 0, -1):
            if _count(sizes, run[start:]) >= _SHORTEST:
                return Step(tuple(run[start:]))
    return None


def _count(sizes: Sequence[int | None], axes: Sequence[int]) -> float:
    return math.prod(math.inf if (size := sizes[axis]) is None else size for axis in axes)


def _part(size: int) -> int:
    """The divisor next to the square root from below or above, 0 where it is too short or too long."""
    below = next(part for part in range(math.isqrt(size), 0, -1) if size % part == 0)
    part = below if below >= _SHORTEST else size // below
    return part if part <= _LONGEST * _LANES else 0


def _is_divisible(sizes: Sequence[int | None], axis: int) -> bool:
    """Whether a Reshape can name the other sizes: those before the axis as they are, and one behind it otherwise."""
    behind = sizes[axis + 1 :].count(None)
    return not behind or (behind == 1 and None not in sizes[:axis])


def _divided(sizes: Sequence[int | None], axis: int, part: int) -> list[int]:
    """The shape with this axis as two, for a Reshape: 0 takes over a size that stands before it, -1 one behind."""
    front = [0 if size is None else size for size in sizes[:axis]]
    behind = [-1 if size is None else size for size in sizes[axis + 1 :]]
    return [*front, (sizes[axis] or 0) // part, part, *behind]


def _insert(graph: ir.Graph, before: ir.Node, node: ir.Node, name: str, dtype: ir.DataType) -> ir.Value:
    graph.insert_before(before, node)
    (result,) = node.outputs
    result.name, result.type = f"{before.outputs[0].name}.{name}", ir.TensorType(dtype)
    return result


def _shape(value: ir.Value) -> ir.Shape | None:
    """Of the tensor; translations leave the result of a Cast without one."""
    node = value.producer()
    if value.shape is None and node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        return node.inputs[0].shape
    return value.shape


def _dtype(value: ir.Value) -> ir.DataType | None:
    node = value.producer()
    if value.dtype is None and node is not None and node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    return value.dtype


def _axes(node: ir.Node, rank: int) -> list[int] | None:
    """What the node sums over; None where that is not known, or nothing."""
    if "axes" in node.attributes:  # before opset 18 those of a mean
        return None
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is None:
        empty = node.attributes.get("noop_with_empty_axes")
        return None if empty is not None and empty.as_int() else list(range(rank))
    tensor = ir.convenience.get_const_tensor(given)
    return None if tensor is None else [int(axis) % rank for axis in tensor.numpy().ravel()]
