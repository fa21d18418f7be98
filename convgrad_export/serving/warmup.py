"""Warm-up samples: requests that Triton sends to a model before it calls it ready."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ModelFileError, ServingConfigError
from ..files import read_arrays
from .signature import ModelSignature, TensorSpec, concrete_shape, unknown_sizes

KINDS = ("none", "zero", "random")


@dataclass(frozen=True)
class WarmupInput:
    """`kind` is "zero", "random" or "file"; `data` are the bytes of the file, row-major, for all rows of the batch."""

    tensor: TensorSpec
    dims: tuple[int, ...]
    kind: str
    file: str = ""
    data: bytes = b""


@dataclass(frozen=True)
class WarmupSample:
    """One request: `batch_size` is 0 for a model without a batch dimension."""

    name: str
    batch_size: int
    inputs: tuple[WarmupInput, ...]


def warmup_samples(
    warmup: str | Path, signature: ModelSignature, max_batch_size: int, sizes: dict[str, int]
) -> list[WarmupSample]:
    """The samples for one choice of `ServingOptions.warmup`.

    "zero" and "random" make one request of one row; integers and booleans are zero in both, since most integers are no
    valid class. An .npz gives the data itself.

    Raises:
        ServingConfigError: a size that is not known, or arrays that do not fit the model.
    """
    if isinstance(warmup, str) and warmup in KINDS:
        if warmup == "none":
            return []
        skip = 1 if max_batch_size else 0
        if unknown := unknown_sizes(signature.inputs, sizes, skip):
            raise ServingConfigError(
                f"warm-up data needs the sizes of {', '.join(unknown)}: give them as --size NAME=VALUE, or an .npz file"
            )
        inputs = tuple(
            WarmupInput(t, concrete_shape(t, sizes, skip) or (), warmup if t.is_float else "zero")
            for t in signature.inputs
        )
        return [WarmupSample(warmup, min(1, max_batch_size), inputs)]
    return [_from_file(Path(warmup), signature, max_batch_size)]


def _from_file(path: Path, signature: ModelSignature, max_batch_size: int) -> WarmupSample:
    try:
        arrays = read_arrays(path)
    except ModelFileError as error:
        raise ServingConfigError(
            f"warm-up is {str(path)!r}, expected one of {', '.join(KINDS)}, or an .npz file that can be read: {error}"
        ) from error
    expected = [tensor.name for tensor in signature.inputs]
    if set(arrays) != set(expected):
        raise ServingConfigError(
            f"{path} holds {', '.join(arrays) or 'nothing'}, expected one array for each of {expected}"
        )
    batch = next(iter(arrays.values())).shape[:1] if max_batch_size else (0,)
    inputs = []
    for tensor in signature.inputs:
        array = arrays[tensor.name]
        bits = tensor.dtype == "bfloat16" and array.dtype.name in ("uint16", "void16")  # numpy has no such type
        if array.dtype.name != tensor.dtype and not bits:
            raise ServingConfigError(f"{path}: {tensor.name} is {array.dtype}, expected {tensor.dtype}")
        fits = len(array.shape) == len(tensor.shape) and all(
            not isinstance(want, int) or want == got for want, got in zip(tensor.shape, array.shape, strict=True)
        )
        if not fits or (max_batch_size and array.shape[:1] != batch):
            raise ServingConfigError(f"{path}: {tensor.name} has shape {array.shape}, expected {tensor}, rows alike")
        data = np.ascontiguousarray(array).tobytes()
        # The name says what is in the file, so that another sample never changes a file a running server may read.
        file = f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
        inputs.append(WarmupInput(tensor, array.shape[1:] if max_batch_size else array.shape, "file", file, data))
    rows = int(batch[0])
    if max_batch_size and not 1 <= rows <= max_batch_size:
        raise ServingConfigError(f"{path} holds {rows} rows, expected 1 to max_batch_size, {max_batch_size}")
    return WarmupSample(path.stem, rows, tuple(inputs))
