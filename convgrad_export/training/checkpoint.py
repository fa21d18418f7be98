"""Checkpoints: named tensors in one safetensors file, written so that a crash never loses the previous one.

Runs without torch. The format (https://github.com/huggingface/safetensors) holds no code and nothing is executed when a
file is read; a checksum of tensors and texts in its header shows damage that leaves the layout intact.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import as_bool, as_path
from ..errors import ArgumentTypeError, DTypeError, ModelFileError, listed
from ..files import check_output, write_atomically
from ..runtime import tensors
from .checkpoint_file import DTYPES, FORMAT, bytes_of, digest, open_checkpoint


def checkpoint_path(model_path: str | os.PathLike[str]) -> Path:
    """Where the state of a model file lies: ``step.onnx`` has ``step.checkpoint.safetensors``.

    A name without ``.onnx`` is kept whole: ``step.v2`` and ``step.v3`` are two models with two states.
    """
    path = Path(model_path)
    name = path.stem if path.suffix.lower() == ".onnx" else path.name
    return path.with_name(f"{name}.checkpoint.safetensors")


def as_array(value: Any, name: str) -> np.ndarray:
    """An array or tensor as a contiguous array in this machine's byte order, not copied if it is one.

    Raises:
        ArgumentTypeError, DeviceError: more than numbers in memory, or none there, as in `runtime.tensors.view`.
    """
    tensors.check_dense(value, name)
    if tensors.is_torch(value):
        value = tensors.view(value, name).owner.cpu()
        if str(value.dtype) == "torch.bfloat16":
            import ml_dtypes
            import torch

            array: np.ndarray = value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return array
        value = value.numpy()
    array = np.asarray(value)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)


def save_checkpoint(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write named arrays or tensors. The file is complete or, after a crash, the previous one is still there.

    Args:
        state: numpy arrays or torch tensors by name.
        metadata: further text entries of the header.

    Raises:
        OutputExistsError, OutputPathError: as in `convgrad_export.files.write_atomically`; also when the disk is full.
        DTypeError: complex numbers, texts or objects.
        ArgumentTypeError: no path, no mapping, no flag, metadata that are no texts, or a sparse or quantized tensor.
        DeviceError: a tensor on the device "meta", which holds no values.
    """
    from safetensors.numpy import save

    target = check_output(as_path(path, "path"), overwrite=as_bool(overwrite, "overwrite"))
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ArgumentTypeError(
            f"state is a {type(state).__name__}, expected a mapping from names to arrays or tensors"
        )
    texts = _texts(metadata)
    arrays = {name: as_array(value, name) for name, value in state.items()}
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise DTypeError(f"{name} is {array.dtype}, which a checkpoint does not hold")
    header = {**texts, "format": FORMAT}
    header["sha256"] = digest(arrays.items(), lambda name: bytes_of(arrays[name]), header)
    return write_atomically(target, _in_order(save(arrays, metadata=header)), overwrite=overwrite)


def _texts(metadata: Any) -> dict[str, str]:
    """Further entries of the header, which holds texts alone.

    Raises:
        ArgumentTypeError: another type, or the name of an entry of the format's own.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise ArgumentTypeError(f"metadata is a {type(metadata).__name__}, expected texts by name")
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ArgumentTypeError(f"metadata holds {name!r:.40}: {text!r:.40}, expected texts by name")
        if name in ("format", "sha256"):
            raise ArgumentTypeError(f"metadata has the entry {name!r}, which the checkpoint needs itself: rename it")
    return dict(metadata)


def _in_order(file: bytes) -> bytes:
    """The same safetensors file with the entries of its header sorted: the library writes them in random order.

    The layout is eight bytes of header length (little endian), the header as JSON, then the tensors, whose offsets
    count from the end of the header; spaces after the JSON keep the tensors aligned to eight bytes.
    """
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[8 + length :]


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by name.

    Raises:
        ModelFileError: missing, truncated, changed since it was written, or no checkpoint.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the header's text entries; raises as `load_checkpoint`."""
    with open_checkpoint(path) as file:
        return {name: file.read(name) for name in file.tensors}, file.metadata


def check_matches(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], expected: Mapping[str, tuple[str, Any]]
) -> None:
    """Refuse a checkpoint of another model.

    Args:
        arrays: what has a ``dtype`` and a ``shape``, by name.
        expected: dtype and shape by name.

    Raises:
        ModelFileError: names, shapes or dtypes differ; all of them are listed.
    """
    problems = [
        f"{kind}: {', '.join(names[:12])}{f' and {len(names) - 12} more' if len(names) > 12 else ''}"
        for kind, names in (
            ("missing", [name for name in expected if name not in arrays]),
            ("unknown", [name for name in arrays if name not in expected]),
        )
        if names
    ]
    for name, (dtype, shape) in expected.items():
        if name in arrays and (str(arrays[name].dtype) != dtype or tuple(arrays[name].shape) != tuple(shape)):
            got = f"{arrays[name].dtype} {tuple(arrays[name].shape)}"
            problems.append(f"{name}: is {got}, expected {dtype} {tuple(shape)}")
    if problems:
        raise ModelFileError(f"checkpoint {path} does not fit this model:", *listed(problems))
