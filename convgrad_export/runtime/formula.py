"""Fingerprints of the formulas between an entry's operands and its result (`convolution_entries.py`).

An entry names tensors. An editor that puts a node behind an input, or in front of an output, keeps these names, and a
session that went by them would leave that node out. So an entry also holds a hash of everything between operands and
result: operators, attributes, constants, and what reads what, not the names. It is written with the finished graph, and
computed again from the graph that is loaded; where the two differ the file's own nodes run.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..geometry import ConvGeometry
from .convolution_entries import FORWARD, INPUT, METADATA, WEIGHT, ConvolutionEntry, to_text

_FLOAT, _STRING = 1, 8  # TensorProto.DataType
_MOST_NODES = 2000  # the longest formula of the catalogue has some hundred
_STANDARD = ("", "ai.onnx")
# AttributeProto.AttributeType: FLOAT, INT, STRING, TENSOR, FLOATS, INTS, STRINGS; the others hold graphs, or lists.
_TENSOR, _PLAIN = 4, (1, 2, 3, 6, 7, 8)

Producer = Callable[[str], "Any | None"]  # a tensor's name to its NodeProto
Constant = Callable[[str], "bytes | None"]  # a tensor's name to its `constant_digest`


def fingerprint(entry: ConvolutionEntry, opset: int, producer: Producer, constant: Constant) -> str | None:
    """The hash of the formula between the entry's operands and its result.

    Args:
        entry: its names are those of the graph.
        opset: version of the standard operators, on which their meaning depends.
        producer, constant: of a tensor's name, None where a node does not make it, or it is no constant.

    Returns:
        None where the result depends on anything but the operands and constants, or an operator is no standard one.
    """
    digests = {name: f"operand {i}".encode() for i, name in enumerate(entry.operands)}
    digests[""] = b"absent"
    if entry.result in digests:
        return None
    waiting, nodes = [entry.result], 0
    while waiting:
        name = waiting[-1]
        if name in digests:
            waiting.pop()
            continue
        node = producer(name)
        if node is None:
            found = constant(name)
            if found is None:
                return None
            digests[name] = found
            continue
        if missing := [read for read in node.input if read not in digests]:
            nodes += 1
            if nodes > _MOST_NODES or name in missing:
                return None
            waiting.extend(missing)
            continue
        described = _described(node)
        if described is None:
            return None
        inputs = [digests[read] for read in node.input]
        for index, output in enumerate(node.output):
            digests[output] = _hash(*described, str(index).encode(), *inputs)
    return _hash(str(opset).encode(), digests[entry.result]).hex()[:32]


def constant_digest(dtype: int, shape: Sequence[int], content: bytes) -> bytes | None:
    """What a fingerprint holds of a constant; `content` as TensorProto.raw_data has it. None for strings."""
    return None if dtype == _STRING else _hash(b"constant", f"{dtype} {list(shape)}".encode(), content)


def tensor_digest(tensor: Any) -> bytes | None:
    """The same of a TensorProto; None where its values lie in another file, are strings, or do not fit its sizes."""
    from onnx import numpy_helper

    if tensor.external_data or tensor.data_type == _STRING:
        return None
    try:
        content = tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()
    except (ValueError, TypeError, KeyError):  # a damaged file: onnxruntime says what is wrong with it
        return None
    return constant_digest(tensor.data_type, tensor.dims, content)


def _hash(*parts: bytes) -> bytes:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.digest()


def _described(node: Any) -> list[bytes] | None:
    """Operator and attributes; None where they cannot be compared."""
    if node.domain not in _STANDARD:
        return None
    parts = [_encoded(node.op_type), str(len(node.input)).encode(), str(len(node.output)).encode()]
    for attribute in sorted(node.attribute, key=lambda attribute: _encoded(attribute.name)):
        if attribute.ref_attr_name:
            return None
        if attribute.type == _TENSOR:
            digest = tensor_digest(attribute.t)
            if digest is None:
                return None
            parts += [_encoded(attribute.name), digest]
        elif attribute.type in _PLAIN:
            if attribute.doc_string:
                copy = type(attribute)()
                copy.CopyFrom(attribute)
                copy.ClearField("doc_string")
                attribute = copy
            parts.append(attribute.SerializeToString(deterministic=True))
        else:
            return None
    return parts


def _encoded(text: str | bytes) -> bytes:
    """protobuf gives bytes for what is no UTF-8."""
    return text if isinstance(text, bytes) else text.encode()


def write_entries(model: Any, entries: Sequence[ConvolutionEntry]) -> None:
    """Put the entries into the metadata of a finished onnx.ModelProto, each with its fingerprint."""
    formula = _formulas(model)
    found = [replace(entry, formula=text) for entry in entries if (text := formula(entry)) is not None]
    if found:
        model.metadata_props.add(key=METADATA, value=to_text(found))


def intact(model: Any, entries: Sequence[ConvolutionEntry]) -> list[ConvolutionEntry]:
    """The entries whose formula, and whose operands' element types and sizes, an onnx.ModelProto still has."""
    declared = _declared(model.graph, {name for entry in entries for name in (entry.result, *entry.operands)})
    formula = _formulas(model)
    return [entry for entry in entries if _fits(entry, declared) and formula(entry) == entry.formula]


def _formulas(model: Any) -> Callable[[ConvolutionEntry], str | None]:
    """`fingerprint` in the graph of an onnx.ModelProto."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    given = {value.name for value in graph.input}  # an input's constant is a default that a caller may replace
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}
    opset = next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), 0)

    @functools.cache
    def constant(name: str) -> bytes | None:
        return tensor_digest(constants[name]) if name in constants else None

    return lambda entry: fingerprint(entry, opset, makers.get, constant)


def _declared(graph: Any, names: set[str]) -> dict[str, tuple[int, list[int | None]]]:
    """Element type and sizes that the graph states for these tensors, None for a size that is not fixed."""
    found: dict[str, tuple[int, list[int | None]]] = {
        tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in graph.initializer if tensor.name in names
    }
    for values in (graph.value_info, graph.output, graph.input):
        for value in values:
            if value.name in names and value.type.HasField("tensor_type"):
                kind = value.type.tensor_type
                sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
                found[value.name] = (kind.elem_type, sizes)
    return found


def _fits(entry: ConvolutionEntry, declared: Mapping[str, tuple[int, list[int | None]]]) -> bool:
    """Whether the operands are stated to be float32, of the sizes in the entry; the batch may be any but in `WEIGHT`.

    A weight gradient's nodes have it in their shapes.
    """
    result, _ = declared.get(entry.result, (_FLOAT, []))
    if result != _FLOAT:
        return False
    for name, shape in zip(entry.operands, _shapes(entry.kind, entry.geometry), strict=False):
        dtype, sizes = declared.get(name, (0, []))
        if dtype != _FLOAT or len(sizes) != len(shape):
            return False
        if any(want is not None and want != size for want, size in zip(shape, sizes, strict=True)):
            return False
    return True


def _shapes(kind: str, g: ConvGeometry) -> list[tuple[int | None, ...]]:
    """Sizes of the operands, in their order; None for a batch that may differ."""
    batch = g.batch if kind == WEIGHT and isinstance(g.batch, int) else None
    image, result = (batch, *g.input_shape[1:]), (batch, *g.output_shape[1:])
    if kind == FORWARD:
        return [image, g.weight_shape, (g.out_channels,)]
    return [result, g.weight_shape if kind == INPUT else image]
