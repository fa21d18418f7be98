"""Large parameters updated chunk by chunk, so that the passes of an update stay in the cache.

Standard ONNX has no operator for a whole AdamW update: there are a dozen passes over a parameter, its gradient and
its moments. A Scan takes them for one chunk after the other. Its chunks are slices of its inputs' and outputs' own
memory, so that nothing is copied, if parameter and state come in as chunks already: the graph's inputs and outputs are
declared as ``(chunks, 1, ..., 1, elements of a chunk)``, and the caller binds the same memory under that shape.

benchmarks/NOTES.md, "Training steps", has the timings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..runtime import graph_nodes
from ..runtime.graph_nodes import copied, rename, subgraphs

ELEMENTWISE = frozenset({
    "Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Clip", "Max", "Min", "Cast", "Pow", "Abs", "Sign", "Where", "Identity"
})  # fmt: skip
VIEWS = (*graph_nodes.VIEWS, "Cast")  # the output may be the input's memory
_LARGE = 1 << 18  # elements of a parameter; up to here the passes find most of it in the cache as it is
CHUNK, _SMALLEST_CHUNK = 1 << 17, 1 << 15  # elements
_SUFFIX = ".chunk"


@dataclass
class Update:
    """The nodes of one parameter's update and the values of its shape."""

    shape: tuple[int, ...]
    nodes: list[Any] = field(default_factory=list)
    values: set[str] = field(default_factory=set)
    whole: bool = False  # something else than an elementwise node reads one of the values


def chunk_updates(model: Any, *, large: int = _LARGE, chunk: int = CHUNK) -> dict[str, tuple[int, ...]]:
    """Put the elementwise updates of large parameters into Scans over chunks, in place.

    Args:
        model: the onnx.ModelProto of an update; the shapes of its inputs are known.
        large: smallest number of elements of a parameter that is divided. chunk: largest number of a chunk.

    Returns:
        Name of each input and output whose declared shape has changed to that shape.
    """
    graph = model.graph
    shapes = fixed_shapes(graph.input)
    updates = updates_of(graph, shapes, large)
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    views: dict[str, tuple[int, ...]] = {}
    for update in updates:
        elements = _chunk_elements(math.prod(update.shape), chunk)
        outputs = [value.name for value in graph.output if value.name in update.values]
        inputs = [name for name in shapes if name in update.values]
        if elements is None or not outputs or any(not types[name] for name in outputs):
            continue
        ones = (1,) * (len(update.shape) - 1)
        _move_into_scan(graph, update.nodes, inputs, outputs, types, (*ones, elements))
        count = math.prod(update.shape) // elements
        views.update(dict.fromkeys((*inputs, *outputs), (count, *ones, elements)))
    for value in (*graph.input, *graph.output):
        if value.name in views:
            del value.type.tensor_type.shape.dim[:]
            for size in views[value.name]:
                value.type.tensor_type.shape.dim.add().dim_value = size
    return views


def fixed_shapes(values: Iterable[Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of onnx.ValueInfoProto by name, without those that are not fixed."""
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            found[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return found


def _chunk_elements(total: int, chunk: int) -> int | None:
    """The largest divisor up to `chunk` that is worth a start of the nodes."""
    smallest = min(_SMALLEST_CHUNK, chunk)
    return next((size for size in range(chunk, smallest - 1, -1) if total % size == 0 and size < total), None)


def updates_of(graph: Any, shapes: Mapping[str, tuple[int, ...]], large: int) -> Iterable[Update]:
    """Groups of elementwise nodes joined by values of one large shape that nothing else reads."""
    owner: dict[str, Update] = {}
    for name, shape in shapes.items():
        if math.prod(shape) >= large:
            owner[name] = Update(shape, values={name})
    single = {name for name, shape in shapes.items() if math.prod(shape) == 1}
    single |= {tensor.name for tensor in graph.initializer if math.prod(tensor.dims) == 1}
    for node in graph.node:
        names = [name for name in node.input if name]
        joined = [owner[name] for name in names if name in owner]
        plain = node.op_type in ELEMENTWISE and next(subgraphs(node), None) is None
        if not joined:
            if names and names[0] in single and (node.op_type in VIEWS or (plain and single.issuperset(names))):
                single.update(node.output)
            continue
        first = joined[0]
        fits = plain and all(name in owner or name in single for name in names)
        if not fits or any(update.shape != first.shape for update in joined):
            for update in joined:
                update.whole = True
            continue
        for other in joined[1:]:
            if other is not first:
                first.nodes.extend(other.nodes)
                first.values |= other.values
                first.whole |= other.whole
                owner.update(dict.fromkeys(other.values, first))
        first.nodes.append(node)
        first.values.update(node.output)
        owner.update(dict.fromkeys(node.output, first))
    found = {id(update): update for update in owner.values() if update.nodes and not update.whole}
    order = {id(node): place for place, node in enumerate(graph.node)}
    for update in found.values():
        update.nodes.sort(key=lambda node: order[id(node)])
    return list(found.values())


def _move_into_scan(
    graph: Any,
    nodes: list[Any],
    inputs: list[str],
    outputs: list[str],
    types: Mapping[str, int],
    shape: tuple[int, ...],
) -> None:
    """Replace the nodes by a Scan, which reads the one-element values from around it."""
    from onnx import helper

    renamed = {name: name + _SUFFIX for name in (*inputs, *outputs)}
    moved = {name for node in nodes for name in node.output}
    body = []
    for node in nodes:
        body.append(copied(node))
        rename(body[-1], renamed)
    infos = {name: helper.make_tensor_value_info(renamed[name], types[name], shape) for name in renamed}
    update = helper.make_graph(body, "update", [infos[name] for name in inputs], [infos[name] for name in outputs])
    scan = helper.make_node(
        "Scan",
        inputs,
        outputs,
        name=f"{outputs[0]}.chunks",
        body=update,
        num_scan_inputs=len(inputs),
    )
    kept = [node for node in graph.node if not moved & set(node.output)]
    graph.ClearField("node")
    graph.node.extend([*kept, scan])
