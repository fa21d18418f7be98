"""Whether a model can be loaded by onnxruntime-web, the runtime of browsers, and which of its nodes stand against it.

The table `web_operators.json` was measured, not copied: one-node models of every standard operator, at each of its
versions in use from opset 13 on and with each tensor type that its schema allows, loaded by onnxruntime-web 1.30.0 in
Node.js, once by the WebAssembly build (`onnxruntime-web`) and once by the CPU part of the WebGPU build
(`onnxruntime-web/webgpu`), to which that build falls back for what its GPU kernels leave out. The second lacks float64
nearly everywhere, so a model can load on the first and fail on the second. `python -m tests.browser.web_operators`
measures again. What a load does not show is not in it: speed, and results (those of gradient models and of a training
step are compared in tests/browser). An operator version that is not in the table gives a note, no verdict.

Runs without torch and without a browser.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import onnx

from .errors import ArgumentTypeError, ModelFileError, UnsupportedOperatorError, in_one_line, listed
from .files import as_path

WEB, WEBGPU = "web", "webgpu"
TARGETS = (WEB, WEBGPU)
_BUILDS = {WEB: "WebAssembly build", WEBGPU: "WebGPU build"}
_STANDARD = ("", "ai.onnx")
_BUNDLED = ("ai.onnx.ml", "com.microsoft")  # parts of onnxruntime too, but none of their operators was measured
_OPSET_MARK = "convgrad opset "  # in the doc_string of a node that was part of a local function
ANY = ""  # in the table: the operator as a whole, where it has no type parameter to ask for
# 32-bit WebAssembly addresses 4 GiB; onnxruntime's own buffers come on top. Documented, not tried here.
_MEMORY = 4 * 2**30
_NAMES = {"float": "float32", "double": "float64"}
# Types that onnxruntime-web's tensors do not have: a model with such an input or output is refused after loading.
_NO_JAVASCRIPT = {
    *("bfloat16", "complex64", "complex128", "float4e2m1"),
    *("float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz", "float8e8m0"),
}


@dataclass(frozen=True)
class WebProblem:
    """Something that keeps a model from loading.

    Attributes:
        target: ``"web"``: no build loads it; ``"webgpu"``: the WebGPU build does not.
        node: name of the node, or ``"#7 (output y)"`` of one without a name; empty for the model as a whole.
        operator: its type. reason: in words.
    """

    target: str
    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.operator} {self.node!r}: " if self.node else ""
        return f"{where}{self.reason}"


@dataclass
class WebReport:
    """What `check_web` found. `notes` do not keep the model from loading, but the page's author should know them."""

    problems: list[WebProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def against(self, target: str) -> list[WebProblem]:
        """The problems that matter for a target: for ``"web"`` those of every build, for ``"webgpu"`` all."""
        return [problem for problem in self.problems if target == WEBGPU or problem.target == WEB]


@functools.cache
def measured() -> dict[str, Any]:
    """The committed measurement: versions, limits, and operator -> version -> type parameter -> types by verdict."""
    text = resources.files("convgrad_export").joinpath("web_operators.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def check_target(target: str) -> str:
    """The target itself.

    Raises:
        ArgumentTypeError: another one.
    """
    if not isinstance(target, str) or target not in TARGETS:
        raise ArgumentTypeError(f"target is {target!r}, expected one of: {', '.join(TARGETS)}")
    return target


def require_web(model: onnx.ModelProto, target: str) -> list[str]:
    """Refuse a model that the target cannot load; gives the notes of one that it can.

    Raises:
        UnsupportedOperatorError: with every node that stands against it.
    """
    report = check_web(model)
    problems = report.against(check_target(target))
    if problems:
        raise UnsupportedOperatorError(
            f"the model cannot run on onnxruntime-web ({_BUILDS[target]}):", *listed(problems)
        )
    return report.notes


def check_web(model: str | os.PathLike[str] | onnx.ModelProto) -> WebReport:
    """Compare every node of a model, those of subgraphs and local functions included, with the measured table.

    Args:
        model: a file, whose external data is not read, or the model itself.

    Raises:
        ModelFileError: no readable ONNX model.
    """
    proto = model if isinstance(model, onnx.ModelProto) else _read(as_path(model, "model"))
    if not proto.HasField("graph"):  # an empty file is a valid protobuf
        raise ModelFileError(f"{'the model' if proto is model else model} is not an ONNX model: it holds no graph")
    report = WebReport()
    _check_text(proto.graph)
    _check_limits(proto, report)
    if proto.functions:
        proto = _without_functions(proto)
        _check_text(proto.graph)
    try:
        proto = onnx.shape_inference.infer_shapes(proto)
    except Exception as error:  # onnx raises classes of its extension module
        report.notes.append(
            f"types could not be inferred, operators were checked by name where unknown: {in_one_line(error)}"
        )
    opset = _opsets(proto.opset_import).get("", 1)
    _check_values(proto.graph, report)
    indices = []
    for node, label, types in _nodes(proto.graph, {}):
        if _reads_as_meant(node, label, _own_opset(node, opset), opset, report):
            _check_node(node, label, types, opset, report)
        if node.op_type == "MaxPool" and len(node.output) > 1 and node.output[1]:
            indices.append(label)
    if indices:
        report.notes.append(
            "WebGPU accepts MaxPool with an Indices output when it loads a model and fails on the run: name in the "
            f"provider's forceCpuNodeNames: {', '.join(indices)}"
        )
    return report


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Version by domain, the standard one under its short name."""
    return {"" if entry.domain in _STANDARD else entry.domain: entry.version for entry in imports}


def _without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its local functions inlined, as onnxruntime does: their nodes are read by the model's opset.

    onnx's inliner leaves out, without a word, functions that import another version than the model. The nodes are
    marked with the version that their function imports.
    """
    from onnx import inliner

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    versions = _opsets(copy.opset_import)
    for function in copy.functions:
        own = _opsets(function.opset_import)
        for node in _body(function.node):
            node.doc_string = f"{_OPSET_MARK}{own.get('', versions.get('', 1))}"
        for domain in own.keys() - versions.keys():
            copy.opset_import.add(domain=domain, version=own[domain])
        versions = own | versions
    for function in copy.functions:
        for entry in function.opset_import:
            entry.version = versions["" if entry.domain in _STANDARD else entry.domain]
    try:
        return inliner.inline_local_functions(copy)
    except Exception as error:  # onnx raises classes of its extension module
        raise ModelFileError(f"the model's local functions cannot be read: {in_one_line(error)}") from error


def _body(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _body(inner.node)


def _own_opset(node: onnx.NodeProto, otherwise: int) -> int:
    text = node.doc_string if isinstance(node.doc_string, str) else ""  # bytes where it is no UTF-8
    version = text.removeprefix(_OPSET_MARK)
    return int(version) if version != text and version.isdecimal() else otherwise


def _reads_as_meant(node: onnx.NodeProto, label: str, own: int, opset: int, report: WebReport) -> bool:
    """False, with a problem in the report, where a node of a function is none at the model's opset."""
    meant, read = _schema(node, own), _schema(node, opset)
    if meant is None or read is None or meant.since_version == read.since_version:
        return True
    why = f"its function imports opset {own}, but onnxruntime reads it by the model's opset {opset}"
    unknown = [attribute.name for attribute in node.attribute if attribute.name not in read.attributes]
    if unknown or not read.min_input <= len(node.input) <= read.max_input:
        what = f"takes no attribute {unknown[0]!r}" if unknown else f"does not take {len(node.input)} inputs"
        report.problems.append(WebProblem(WEB, label, node.op_type, f"{why}, where {node.op_type} {what}"))
        return False
    report.notes.append(f"{node.op_type} {label!r}: {why}, where the operator may mean something else")
    return True


def _schema(node: onnx.NodeProto, opset: int) -> Any | None:
    """Of a standard operator at an opset, None where there is none."""
    try:
        return onnx.defs.get_schema(node.op_type, max_inclusive_version=opset) if node.domain in _STANDARD else None
    except onnx.defs.SchemaError:
        return None


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)  # whatever its suffix is
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read as an ONNX model: {error.strerror or error}") from error
    except Exception as error:  # protobuf's DecodeError
        raise ModelFileError(f"{path} cannot be read as an ONNX model: {error}") from error


def _check_text(graph: onnx.GraphProto) -> None:
    """protobuf gives bytes for a name that is no UTF-8, which ONNX does not allow."""
    texts = [value.name for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)]
    texts += [entry.value for tensor in graph.initializer for entry in tensor.external_data]
    for node in graph.node:
        texts += [node.op_type, node.domain, node.name, *node.input, *node.output]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _check_text(inner)
    if damaged := [text for text in texts if isinstance(text, bytes)]:
        raise ModelFileError(f"the model is damaged: the name {damaged[0]!r:.80} is no UTF-8")


def _check_limits(proto: onnx.ModelProto, report: WebReport) -> None:
    limits = measured()["limits"]
    for entry in proto.opset_import:
        if entry.domain in _STANDARD and entry.version > limits["opset"]:
            newest = f"onnxruntime-web {measured()['version']} loads up to {limits['opset']}"
            reason = f"opset {entry.version}, {newest}"
            report.problems.append(WebProblem(WEB, "", "", reason))
    if proto.ir_version > limits["ir_version"]:
        reason = f"ONNX IR version {proto.ir_version}, onnxruntime-web reads up to {limits['ir_version']}"
        report.problems.append(WebProblem(WEB, "", "", reason))
    sizes = [_bytes(tensor) for tensor in proto.graph.initializer]
    if sum(sizes) >= _MEMORY:
        reason = f"{sum(sizes):,} bytes of weights, WebAssembly addresses {_MEMORY:,} in all"
        report.problems.append(WebProblem(WEB, "", "", reason))
    files = {
        entry.value
        for tensor in proto.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if files:
        report.notes.append(
            f"weights in {', '.join(sorted(files))}: name the file in InferenceSession.create's externalData option"
        )


def _bytes(tensor: onnx.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length" and entry.value.isdecimal():
            return int(entry.value)
    return tensor.ByteSize()


def _check_values(graph: onnx.GraphProto, report: WebReport) -> None:
    initializers = {tensor.name for tensor in graph.initializer}
    big = []
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            dtype = _type_name(value.type)
            if dtype in _NO_JAVASCRIPT:
                reason = f"the {kind} {value.name!r} is {dtype}, which onnxruntime-web's tensors do not have"
                report.problems.append(WebProblem(WEB, "", "", reason))
            if dtype in ("int64", "uint64") and value.name not in initializers:
                big.append(value.name)
    if big:
        shown = ", ".join(big[:6]) + (f" and {len(big) - 6} more" if len(big) > 6 else "")
        report.notes.append(f"64-bit integers are BigInt64Array or BigUint64Array in JavaScript: {shown}")


def _nodes(graph: onnx.GraphProto, outer: Mapping[str, str]) -> Iterator[tuple[onnx.NodeProto, str, Mapping[str, str]]]:
    """Every node with a label for people and the tensor types known where it stands."""
    types = dict(outer)
    for value in (*graph.input, *graph.value_info, *graph.output):
        if name := _type_name(value.type):
            types[value.name] = name
    for tensor in graph.initializer:
        types[tensor.name] = _element(tensor.data_type)
    for index, node in enumerate(graph.node):
        yield node, node.name or f"#{index} (output {next((o for o in node.output if o), '')})", types
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _nodes(inner, types)


def _type_name(kind: onnx.TypeProto) -> str | None:
    if not kind.HasField("tensor_type") or not kind.tensor_type.elem_type:
        return None
    return _element(kind.tensor_type.elem_type)


def _element(code: int) -> str:
    """Name of an element type; of one that ONNX does not have the number."""
    known = onnx.TensorProto.DataType.DESCRIPTOR.values_by_number.get(code)
    return f"type {code}" if known is None else known.name.lower()


def _check_node(node: onnx.NodeProto, label: str, types: Mapping[str, str], opset: int, report: WebReport) -> None:
    if node.domain in _BUNDLED:
        report.notes.append(f"{node.domain}::{node.op_type} {label!r}: the operators of this domain were not measured")
        return
    if node.domain not in _STANDARD:
        reason = f"the domain {node.domain} is not part of standard ONNX, nothing is known of it in onnxruntime-web"
        report.problems.append(WebProblem(WEB, label, f"{node.domain}::{node.op_type}", reason))
        return
    schema = _schema(node, opset)
    if schema is None or schema.deprecated:
        reason = f"no standard operator at opset {opset}"
        report.problems.append(WebProblem(WEB, label, node.op_type, reason))
        return
    table = measured()["operators"].get(node.op_type, {}).get(str(schema.since_version))
    if table is None:
        report.notes.append(f"{node.op_type} {label!r}: version {schema.since_version} was not measured")
        return
    for parameter, dtype in ((ANY, ANY), *_parameters(schema, node, types).items()):
        verdicts = table.get(parameter, {})
        for verdict, target in (("none", WEB), ("wasm", WEBGPU)):
            if dtype in verdicts.get(verdict, ()):
                what = f" for {_NAMES.get(dtype, dtype)}" if dtype else ""
                reason = f"no kernel{what} in onnxruntime-web's {_missing(verdict)}"
                report.problems.append(WebProblem(target, label, node.op_type, reason))
                return


def _missing(verdict: str) -> str:
    return f"{_BUILDS[WEB]} and {_BUILDS[WEBGPU]}" if verdict == "none" else _BUILDS[WEBGPU]


def _parameters(schema: Any, node: onnx.NodeProto, types: Mapping[str, str]) -> dict[str, str]:
    """Type parameter of the schema -> the tensor type that the node has there, for those that are known."""
    found: dict[str, str] = {}
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for name, formal in zip(names, _repeated(formals, len(names)), strict=False):
            if name in types:
                found.setdefault(formal.type_str, types[name])
    return found


def _repeated(formals: Sequence[Any], count: int) -> list[Any]:
    """The formal parameters, a variadic last one as often as needed."""
    formals = list(formals)
    return formals + formals[-1:] * max(0, count - len(formals))
