"""Memory that several tensors of a training step share, one behind the other, so that one node may take them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..runtime.providers import onnxruntime

_ALIGNMENT = 64  # bytes, a line of the cache


@dataclass(frozen=True)
class FlatTensor:
    """A tensor whose memory others are.

    Attributes:
        name: of the graph's input or output that takes the whole.
        dtype: numpy's name.
        shape: of the whole, as the graph declares it.
        parts: of each tensor in it, by name, its first element and its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)


class FlatMemory:
    """The memory of flat tensors on the CPU, zero at first.

    Attributes:
        whole: OrtValues by the flat tensors' names.
        parts: OrtValues by the names of the tensors in them; they are the same memory.
    """

    def __init__(self, tensors: Iterable[FlatTensor]) -> None:
        make = onnxruntime().OrtValue.ortvalue_from_numpy  # which keeps the array and takes its memory as it is
        self.whole: dict[str, Any] = {}
        self.parts: dict[str, Any] = {}
        for tensor in tensors:
            elements = _zeros(math.prod(tensor.shape), np.dtype(tensor.dtype))
            self.whole[tensor.name] = make(elements.reshape(tensor.shape))
            for name, (start, shape) in tensor.parts.items():
                self.parts[name] = make(elements[start : start + math.prod(shape)].reshape(shape))


def _zeros(count: int, dtype: np.dtype[Any]) -> np.ndarray:
    block = np.zeros(count * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return block[start : start + count * dtype.itemsize].view(dtype)
