"""What a server has to know of a model: its tensors, whether it has a batch dimension, and which files belong to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import DTypeError, ModelFileError
from ..runtime.model_source import external_locations, model_source

# TensorProto code -> numpy's name, ModelConfig's name, the Open Inference Protocol's name, bytes of one element
_TYPES: dict[int, tuple[str, str, str, int]] = {
    1: ("float32", "TYPE_FP32", "FP32", 4),
    2: ("uint8", "TYPE_UINT8", "UINT8", 1),
    3: ("int8", "TYPE_INT8", "INT8", 1),
    4: ("uint16", "TYPE_UINT16", "UINT16", 2),
    5: ("int16", "TYPE_INT16", "INT16", 2),
    6: ("int32", "TYPE_INT32", "INT32", 4),
    7: ("int64", "TYPE_INT64", "INT64", 8),
    9: ("bool", "TYPE_BOOL", "BOOL", 1),
    10: ("float16", "TYPE_FP16", "FP16", 2),
    11: ("float64", "TYPE_FP64", "FP64", 8),
    12: ("uint32", "TYPE_UINT32", "UINT32", 4),
    13: ("uint64", "TYPE_UINT64", "UINT64", 8),
    16: ("bfloat16", "TYPE_BF16", "BF16", 2),
}

Dimension: TypeAlias = "int | str | None"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. A dimension is a size, the name of one, or None when the model says nothing."""

    name: str
    code: int
    shape: tuple[Dimension, ...]

    @property
    def dtype(self) -> str:
        """numpy's name of the element type (ml_dtypes' for bfloat16)."""
        return _TYPES[self.code][0]

    @property
    def config_type(self) -> str:
        """The name in Triton's config.pbtxt, ``TYPE_FP32``."""
        return _TYPES[self.code][1]

    @property
    def protocol_type(self) -> str:
        """The name in the Open Inference Protocol, ``FP32``."""
        return _TYPES[self.code][2]

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    def sizes(self) -> list[int]:
        """The shape with -1 for everything that is not fixed."""
        return [size if isinstance(size, int) else -1 for size in self.shape]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join('?' if size is None else str(size) for size in self.shape)})"


@dataclass(frozen=True)
class ModelSignature:
    """A model file's inputs and outputs, and the files with its external data, relative to its folder."""

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    external_files: tuple[str, ...]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return (*self.inputs, *self.outputs)

    def why_no_batch(self) -> str | None:
        """None when the first dimension of every input and output is one and the same named size; else what is not so.

        A gradient with respect to a weight has no batch, though its operands have: two clients' requests must never be
        summed into one answer.
        """
        names = set()
        for tensor in self.tensors:
            first = tensor.shape[0] if tensor.shape else 1
            if not isinstance(first, str):
                return f"{tensor} has no named first dimension"
            names.add(first)
        return None if len(names) == 1 else f"the first dimensions have different names: {', '.join(sorted(names))}"


def read_signature(path: str | os.PathLike[str]) -> ModelSignature:
    """Read a model file, without its weights.

    Raises:
        ModelFileError: missing, truncated, no inputs or outputs, or external data missing or outside the folder.
        DTypeError: an input or output that is no dense tensor of numbers.
    """
    source, model = model_source(Path(path))
    assert isinstance(source, Path)
    assert model is not None  # onnx is a dependency
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_tensor(source, value) for value in model.graph.input if value.name not in held)
    outputs = tuple(_tensor(source, value) for value in model.graph.output)
    for kind, tensors in (("inputs", inputs), ("outputs", outputs)):
        if not tensors:
            raise ModelFileError(f"{source} has no {kind}: there is nothing to serve")
    files = {location for _, location in external_locations(model)}
    for name in sorted(files):
        if not (source.parent / name).is_file():
            raise ModelFileError(
                f"{source} takes weights from {name}, which is not beside it: copy both files together"
            )
    return ModelSignature(source, inputs, outputs, tuple(sorted(files)))


def _tensor(path: Path, value: Any) -> TensorSpec:
    if not value.type.HasField("tensor_type") or value.type.tensor_type.elem_type not in _TYPES:
        known = ", ".join(names[0] for names in _TYPES.values())
        raise DTypeError(f"{path}: {value.name} is {_kind(value.type)}, servers take tensors of {known}")
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise ModelFileError(
            f"{path}: {value.name} declares no shape; export it with one, or run shape inference first"
        )
    shape = tuple(
        # older exporters write a dynamic size as -1, and onnxruntime takes any negative one for that
        (size.dim_value if size.dim_value >= 0 else None) if size.HasField("dim_value") else (size.dim_param or None)
        for size in tensor.shape.dim
    )
    return TensorSpec(value.name, tensor.elem_type, shape)


def _kind(declared: Any) -> str:
    """A declared type that no server takes, in words."""
    import onnx

    kind = (declared.WhichOneof("value") or "value of no type").removesuffix("_type").replace("_", " ")
    if not declared.HasField("tensor_type"):
        return f"a {kind}"
    code = declared.tensor_type.elem_type
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    return f"a tensor of {names.get(code, f'the unknown element type {code}')}"


def concrete_shape(tensor: TensorSpec, sizes: dict[str, int], skip: int = 0) -> tuple[int, ...] | None:
    """The shape after its first `skip` dimensions with `sizes` filled in; None while something is still unknown."""
    result = []
    for size in tensor.shape[skip:]:
        value = sizes.get(size) if isinstance(size, str) else size
        if value is None:
            return None
        result.append(value)
    return tuple(result)


def unknown_sizes(tensors: Sequence[TensorSpec], sizes: dict[str, int], skip: int = 0) -> list[str]:
    """Names (``?`` for a nameless one) of the dimensions that `concrete_shape` cannot fill in, each once, in order."""
    names: dict[str, None] = {}
    for tensor in tensors:
        for size in tensor.shape[skip:]:
            if not isinstance(size, int) and (size is None or size not in sizes):
                names[size or "?"] = None
    return list(names)
