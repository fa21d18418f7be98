"""How much memory the tensors of a model take: to decide which to hold, never what is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .graph_nodes import VIEWS

# Operators whose result holds what their first input holds, in another arrangement or as it lies.
_AS_LARGE = {"Transpose", "ReorderInput", "ReorderOutput", *VIEWS}
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Sqrt", "Exp", "Neg", "Clip", "Pad"}
_ANY_SIZE = 8  # of a dimension that is free, such as the batch


def declared_bytes(graph: Any) -> dict[str, int]:
    """Of an onnx.GraphProto, what it says itself of its inputs, outputs and inner tensors.

    Free dimensions are taken as 8; a tensor without a shape is absent.
    """
    values = [*graph.input, *graph.value_info, *graph.output]
    sizes = {value.name: _bytes(value.type.tensor_type) for value in values}
    return {name: size for name, size in sizes.items() if size is not None}


def _bytes(kind: Any) -> int | None:
    import onnx

    if not kind.HasField("shape"):
        return None
    try:
        width = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    except (KeyError, ValueError):  # texts
        return None
    return int(width * math.prod(dim.dim_value if dim.HasField("dim_value") else _ANY_SIZE for dim in kind.shape.dim))


def completed_bytes(graph: Any, known: Mapping[str, int]) -> dict[str, int]:
    """Of a graph that onnxruntime has optimized: the tensors that it has added are rearrangements of known ones.

    Args:
        graph: an onnx.GraphProto in topological order. known: of the graph as it was before.
    """
    sizes = dict(known)
    for node in reversed(graph.node):  # what is reordered to a known tensor
        if node.op_type in _AS_LARGE and node.output[0] in sizes:
            sizes.setdefault(node.input[0], sizes[node.output[0]])
    for node in graph.node:
        if node.op_type in _AS_LARGE and node.input[0] in sizes:
            sizes.setdefault(node.output[0], sizes[node.input[0]])
        elif node.op_type in _ELEMENTWISE:
            found = [sizes[name] for name in node.input if name in sizes]
            if found:
                sizes.setdefault(node.output[0], max(found))
    return sizes
