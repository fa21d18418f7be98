"""A bounded, least-recently-used cache of sessions for the eager functions."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ..emit.onnx import GradientRequest, emit_model
from ..geometry import ConvGeometry
from ..lowering import CPU, Lowering, preferred_opset
from .blocked import takes_layout
from .convolution_entries import WEIGHT, ConvolutionEntry, described_gradients
from .formula import write_entries
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
    any_form: bool,
) -> GradientSession:
    """The session for these gradients of this convolution, made on first use.

    It takes any batch size, but for one with CUDA graphs, and for a weight gradient in onnxruntime's blocked layout.

    Args:
        any_form: the session may compute them in another way than by the lowerings.

    The thread count is torch's own when torch is loaded (torch.set_num_threads is obeyed), else onnxruntime's default.
    """
    threads = thread_count()
    recorded = any(options.get("enable_cuda_graph") == "1" for _, options in providers)
    names = tuple((gradient, lowering.name) for gradient, lowering in lowerings.items())
    settings = tuple((name, tuple(sorted((k, str(v)) for k, v in options.items()))) for name, options in providers)
    layout = any_form and dtype == "float32" and providers[0][0] == CPU
    # A CUDA graph has fixed sizes.
    emitted, entries = (geometry, ()) if recorded else _emitted(geometry, names, threads, layout)
    key = (emitted, names, bool(entries), dtype, settings, threads, os.getpid())
    with _lock:
        if key in _sessions:
            _sessions.move_to_end(key)
            return _sessions[key]
    provider = providers[0][0]
    request = GradientRequest(emitted, lowerings, dtype, preferred_opset(dtype, provider), provider)
    model = emit_model(request, "convolution_backward")
    proto = ir.to_proto(model)
    write_entries(proto, entries)
    session = GradientSession(proto, list(providers), threads=threads)
    with _lock:
        _sessions[key] = session
        while len(_sessions) > MAX_SESSIONS:
            _sessions.popitem(last=False)
    return session


@functools.lru_cache(maxsize=4 * MAX_SESSIONS)
def _emitted(
    geometry: ConvGeometry, lowerings: tuple[tuple[str, str], ...], threads: int | None, layout: bool
) -> tuple[ConvGeometry, tuple[ConvolutionEntry, ...]]:
    """What the model is made for, and what of it the session may compute in another way, if it may at all."""
    any_batch = geometry.with_batch("batch")
    if not layout:
        return any_batch, ()
    names = dict(lowerings)
    entries = described_gradients(geometry, names)
    if any(entry.kind == WEIGHT and takes_layout(entry, threads) for entry in entries):
        return geometry, tuple(entries)
    return any_batch, tuple(described_gradients(any_batch, names))


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
