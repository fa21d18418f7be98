"""How sessions of onnxruntime hold the memory of intermediate tensors on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any


def free_early(options: Any) -> None:
    """Let a session give back a tensor's memory at its last use.

    By default onnxruntime plans one block for a whole run after it has seen the shapes (``enable_mem_pattern``) and
    keeps a buffer for later tensors of the same shape (``enable_mem_reuse``). The backward of a network has the shapes
    of its forward, so most buffers are kept throughout: 310 MiB against 90 for the input gradient of a DenseNet-121 (4
    images of 128x128), at the same speed (benchmarks/NOTES.md, "Training steps").

    Args:
        options: an `onnxruntime.SessionOptions`, which is changed.
    """
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False


def give_back_freed() -> None:
    """Let glibc give the memory back that loading a model has taken and freed: 10 to 30 MiB of a step's peak.

    Its heap keeps what lies below a block in use, and the sessions are such blocks. Other C libraries are left alone.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):  # no library of the process's own (Windows), or another one
        return
