"""Accepting a model: a path, bytes, a ModelProto or an onnx_ir model, checked before onnxruntime sees it.

Model files are untrusted. External data must lie inside the model's own folder; onnx is used for that check when it
is installed, and onnxruntime applies the same rule when it is not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from ..errors import ArgumentTypeError, ModelFileError
from .graph_nodes import subgraphs


class ModelSource(NamedTuple):
    """A model that was checked.

    Attributes:
        content: what to hand to `onnxruntime.InferenceSession`; of a link to a model with weights beside it, the model.
        parsed: the onnx.ModelProto of a file, without external data, as the check read it; None for bytes, and without
            onnx.
    """

    content: Path | bytes
    parsed: Any | None = None


def model_source(model: Any) -> ModelSource:
    """A model of any accepted kind, checked.

    Raises:
        ModelFileError: no such file, one that may not be read, not a protobuf of an ONNX model, or external data
            outside the folder.
        ArgumentTypeError: none of the accepted kinds.
    """
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        try:
            if not path.is_file():
                raise ModelFileError(f"model {path} {'is not a file' if path.exists() else 'does not exist'}")
            parsed = _with_own_data(path)
            return ModelSource(path if parsed is None else _beside_its_data(path, parsed), parsed)
        except OSError as error:  # may not be read, or not be looked at
            raise ModelFileError(f"model {path} cannot be read: {error.strerror or error}") from error
    if isinstance(model, bytes | bytearray):
        return ModelSource(bytes(model))
    if hasattr(model, "SerializeToString"):
        return ModelSource(bytes(model.SerializeToString()))
    onnx_ir = sys.modules.get("onnx_ir")
    if onnx_ir is not None and isinstance(model, onnx_ir.Model):
        return ModelSource(bytes(onnx_ir.to_proto(model).SerializeToString()))
    raise ArgumentTypeError(
        f"model is a {type(model).__name__}, expected a path, bytes, an onnx.ModelProto or an onnx_ir.Model"
    )


def loaded(source: Path | bytes) -> Any | None:
    """The onnx.ModelProto without external data; None without onnx, or where onnxruntime shall say what is wrong."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        return None
    try:
        return onnx.load_model_from_string(source if isinstance(source, bytes) else source.read_bytes())
    except (DecodeError, ValueError):
        return None


def _with_own_data(path: Path) -> Any | None:
    """The onnx.ModelProto of a file that takes data from its own folder only; None without onnx."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        return None
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)  # whatever its suffix is
    except (DecodeError, ValueError) as error:
        raise ModelFileError(f"{path} is not an ONNX model, or is truncated: {error}") from error
    if not model.HasField("graph"):
        raise ModelFileError(f"{path} is not an ONNX model: it holds no graph")
    for name, location in external_locations(model):
        check_location(path, name, location)
    return model


def _beside_its_data(path: Path, model: Any) -> Path:
    """Where a link leads, if the model's data lies there and not beside the link, where onnxruntime looks for it."""
    locations = {location for _, location in external_locations(model)} if path.is_symlink() else set()
    if all((path.parent / location).exists() for location in locations):
        return path
    file = path.resolve()
    return file if all((file.parent / location).exists() for location in locations) else path


def external_locations(model: Any) -> list[tuple[str, str]]:
    """(tensor, file) for each tensor of an onnx.ModelProto with data in another file, wherever in the model it is."""
    found = []
    for tensor in _tensors(model):
        locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
        # protobuf gives bytes for what is no UTF-8.
        found += [(os.fsdecode(tensor.name), os.fsdecode(location)) for location in locations]
    return found


def _tensors(model: Any) -> Iterator[Any]:
    """Every TensorProto: constants of the graph, of its nodes' attributes and subgraphs, and of local functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
        for graph in subgraphs(node):
            yield from _graph_tensors(graph)


def check_location(model_path: Path, tensor_name: str, location: str) -> None:
    """Refuse an external-data location that leaves the model's folder, by its text or through a link, or no name."""
    if "\0" in location:
        raise ModelFileError(
            f"{model_path}: tensor {tensor_name!r} takes its data from {location!r}, which names no file"
        )
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    absolute = PurePosixPath(location).is_absolute() or bool(PureWindowsPath(location).anchor)
    folder = model_path.resolve().parent
    resolved = (folder / location).resolve()
    if absolute or ".." in parts or not resolved.is_relative_to(folder):
        raise ModelFileError(
            f"{model_path}: tensor {tensor_name!r} takes its data from {location!r}, outside the model's folder"
        )
