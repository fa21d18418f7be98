"""Keeping track of convolutions from the translation to the finished graph.

Passes rename, merge and replace the tensors of a graph. A mark is a node of our own domain between a result and its
readers, which also reads the operands: whatever the passes do to them they do to its inputs. When the graph is finished
the marks are taken out, and what they stood at goes into the metadata (`runtime/convolution_entries.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
import onnx_ir as ir

from convgrad_export.geometry import ConvGeometry
from convgrad_export.runtime.convolution_entries import METADATA, ConvolutionEntry, described, from_text, to_text
from convgrad_export.runtime.formula import constant_digest, fingerprint

_DOMAIN = "convgrad.marks"


@dataclass(frozen=True)
class Mark:
    """A tensor that is the result of a convolution or a gradient of one, and what it is computed from."""

    entry: ConvolutionEntry
    result: ir.Value
    operands: tuple[ir.Value, ...]


def mark(kind: str, geometry: ConvGeometry, dtype: str, result: Any, operands: Sequence[Any]) -> list[Mark]:
    """One mark, or none where no session computes this in another way."""
    entry = described(kind, geometry, "result", ["operand"] * len(operands)) if dtype == "float32" else None
    return [] if entry is None else [Mark(entry, result, tuple(operands))]


def insert_marks(model: ir.Model, marks: Sequence[Mark]) -> None:
    """Put a node behind every marked result."""
    for item in marks:
        producer = item.result.producer()
        if producer is None or producer.graph is not model.graph:
            continue
        node = ir.node(
            "Convolution",
            [item.result, *item.operands],
            attributes={"entry": to_text([item.entry])},
            domain=_DOMAIN,
        )
        behind = node.outputs[0]
        behind.type, behind.shape = item.result.type, item.result.shape
        model.graph.insert_after(producer, node)
        _swap(model.graph, item.result, behind)
        node.replace_input_with(0, item.result)


def _swap(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """`new` in place of `old` for all readers, and as output of the graph under the same name."""
    if old.is_graph_output():
        old.name, new.name = f"{old.name}_marked", old.name
        for i, value in enumerate(graph.outputs):
            if value is old:
                graph.outputs[i] = new
    old.replace_all_uses_with(new)


def remove_marks(model: ir.Model) -> list[Mark]:
    """Take the nodes out again."""
    found = []
    for node in [node for node in model.graph if node.domain == _DOMAIN]:
        result, *operands = node.inputs
        if result is None or any(value is None for value in operands):
            raise AssertionError("a mark lost an input")
        (entry,) = from_text(node.attributes["entry"].as_string())
        _swap(model.graph, node.outputs[0], result)
        model.graph.remove(node, safe=True)
        found.append(Mark(entry, result, tuple(value for value in operands if value is not None)))
    model.opset_imports.pop(_DOMAIN, None)
    return found


def write_metadata(model: ir.Model, marks: Sequence[Mark]) -> None:
    """The entries of all marks whose tensors are still there, under their names, with their formulas' fingerprints.

    To be called with the graph as it will be written; a later change of the nodes makes the entries void.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    opset, entries = model.opset_imports[""], []
    nodes: dict[ir.Node, onnx.NodeProto] = {}

    def producer(name: str) -> onnx.NodeProto | None:
        node = values[name].producer() if name in values else None
        if node is not None and node not in nodes:
            nodes[node] = ir.to_proto(node)
        return None if node is None else nodes[node]

    @functools.cache
    def constant(name: str) -> bytes | None:
        value = values.get(name)
        tensor = None if value is None or value.is_graph_input() else value.const_value
        return None if tensor is None else constant_digest(int(tensor.dtype), tensor.shape.numpy(), tensor.tobytes())

    for item in marks:
        if not all(values.get(value.name) is value for value in (item.result, *item.operands)):
            continue
        operands = tuple(str(value.name) for value in item.operands)
        entry = replace(item.entry, result=str(item.result.name), operands=operands)
        formula = fingerprint(entry, opset, producer, constant)
        if formula is not None:
            entries.append(replace(entry, formula=formula))
    if entries:
        model.metadata_props[METADATA] = to_text(entries)


def rename_in_metadata(model: ir.Model, renamed: Mapping[str, str]) -> None:
    """Let the entries follow tensors that have new names; a formula's fingerprint holds no names."""
    entries = [
        replace(
            entry,
            result=renamed.get(entry.result, entry.result),
            operands=tuple(renamed.get(name, name) for name in entry.operands),
        )
        for entry in from_text(model.metadata_props.get(METADATA))
    ]
    if entries:
        model.metadata_props[METADATA] = to_text(entries)
