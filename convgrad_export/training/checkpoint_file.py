"""Reading a checkpoint tensor by tensor, so that a state that fills most of the memory is there once.

safetensors checks the layout (https://github.com/huggingface/safetensors): eight bytes of header length, little endian,
the header as JSON, then the tensors, whose offsets count from the end of the header. The library maps the whole file
into memory when it reads a tensor; here each is read into an array of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ..arguments import as_path
from ..errors import ModelFileError

FORMAT = "convgrad_export.training 2"
_WITHOUT_TEXTS = "convgrad_export.training 1"  # whose checksum is that of the tensors alone
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}


@dataclass(frozen=True)
class StoredTensor:
    """Element type, shape, and the place in the file in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint whose checksum is right.

    Attributes:
        tensors: by name.
        metadata: the header's other text entries.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    _stream: BinaryIO

    def read(self, name: str) -> np.ndarray:
        """The values, in an array of their own."""
        tensor = self.tensors[name]
        array = np.empty(tensor.shape, tensor.dtype)
        content = bytes_of(array)
        self._stream.seek(tensor.offset)
        while content:
            read = self._stream.readinto(content)  # type: ignore[attr-defined]  # an unbuffered file has it
            if not read:
                raise ModelFileError(f"checkpoint {self._stream.name} became shorter while it was read")
            content = content[read:]  # Linux reads less than 2 GiB at a time
        return array


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    content: Any = array.reshape(-1).view(np.uint8)
    return memoryview(content)


def digest(
    tensors: Iterable[tuple[str, Any]], content: Callable[[str], memoryview], texts: Mapping[str, str] | None
) -> str:
    """SHA-256 over names, types, shapes and bytes, and the header's texts, each in the order of the names.

    Args:
        tensors: names, and what has their ``dtype`` and ``shape``.
        content: the bytes of a name.
        texts: the header's further entries; None leaves them out.
    """
    result = hashlib.sha256()
    if texts is not None:
        result.update(json.dumps(sorted(texts.items())).encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        result.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        result.update(content(name))
    return result.hexdigest()


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[CheckpointFile]:
    """A checkpoint file, whose checksum has been compared.

    Raises:
        ModelFileError: missing, truncated, changed since it was written, or no checkpoint.
        ArgumentTypeError: no path.
    """
    source = as_path(path, "checkpoint")
    try:
        if not source.is_file():
            raise ModelFileError(f"checkpoint {source} does not exist or is no file")
        opened = source.open("rb", buffering=0)
    except OSError as error:
        raise ModelFileError(f"checkpoint {source} cannot be read: {error.strerror or error}") from error
    with opened as stream:
        tensors, header = _layout(source, stream)
        wanted, texts = header.pop("sha256", None), dict(header)
        form = header.pop("format", None)
        if form not in (FORMAT, _WITHOUT_TEXTS) or wanted is None:
            raise ModelFileError(
                f"checkpoint {source} was not written by convgrad_export: its header has no {FORMAT!r}"
            )
        file = CheckpointFile(tensors, header, stream)
        covered = texts if form == FORMAT else None
        if digest(tensors.items(), lambda name: bytes_of(file.read(name)), covered) != wanted:
            raise ModelFileError(f"checkpoint {source} is damaged: its contents do not match its checksum")
        yield file


def _layout(source: Path, stream: BinaryIO) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="numpy"):  # refuses sizes and offsets that do not fit one another or the file
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {
            name: StoredTensor(
                np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            )
            for name, entry in entries.items()
        }
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ModelFileError(
            f"checkpoint {source} cannot be read, it is truncated or no safetensors file: {error}"
        ) from error
    return tensors, dict(header.get("__metadata__") or {})
