"""A bounded, least-recently-used cache of sessions for the eager functions."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ..emit.onnx import GradientRequest, emit_model
from ..geometry import ConvGeometry
from ..lowering import Lowering, preferred_opset
from .session import GradientSession

# A session of one operator holds its graph and an arena that grows to its largest run.
MAX_SESSIONS = 128

_lock = threading.Lock()
_sessions: OrderedDict[tuple[Any, ...], GradientSession] = OrderedDict()


def cached_session(
    geometry: ConvGeometry,
    lowerings: Mapping[str, Lowering],
    dtype: str,
    providers: Sequence[tuple[str, dict[str, Any]]],
) -> GradientSession:
    """The session for these gradients of this convolution at any batch size (one with CUDA graphs), made on first use.

    The thread count is torch's own when torch is loaded (torch.set_num_threads is obeyed), else onnxruntime's default.
    """
    threads = thread_count()
    recorded = any(options.get("enable_cuda_graph") == "1" for _, options in providers)
    any_batch = geometry if recorded else _with_any_batch(geometry)  # a CUDA graph has fixed sizes
    names = tuple((gradient, lowering.name) for gradient, lowering in lowerings.items())
    settings = tuple((name, tuple(sorted((k, str(v)) for k, v in options.items()))) for name, options in providers)
    key = (any_batch, names, dtype, settings, threads, os.getpid())
    with _lock:
        if key in _sessions:
            _sessions.move_to_end(key)
            return _sessions[key]
    provider = providers[0][0]
    request = GradientRequest(any_batch, lowerings, dtype, preferred_opset(dtype, provider), provider)
    model = emit_model(request, "convolution_backward")
    session = GradientSession(model, list(providers), threads=threads)
    with _lock:
        _sessions[key] = session
        while len(_sessions) > MAX_SESSIONS:
            _sessions.popitem(last=False)
    return session


@functools.lru_cache(maxsize=4 * MAX_SESSIONS)
def _with_any_batch(geometry: ConvGeometry) -> ConvGeometry:
    return geometry.with_batch("batch")


def clear_sessions() -> None:
    """Drop every cached session and the memory it holds."""
    with _lock:
        _sessions.clear()


def session_count() -> int:
    return len(_sessions)


def thread_count() -> int | None:
    """Of the eager functions' sessions: torch's own when torch is loaded, None for onnxruntime's default."""
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())
