"""A session on the CPU that runs its nodes in an order of ours (`lifetimes.py`).

onnxruntime optimizes a model first and orders the nodes that come out. So the model is loaded twice: once to be
optimized and written to a file, and that file again, its nodes reordered, not optimized any more, with the priority
order: among the nodes that can run it takes the first of the file. The optimized model fits this machine alone and is
gone before the call returns. ResNet-50's training step, 4,300 nodes, loads in 1.3 s for 0.9.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelFileError
from .lifetimes import order_lives
from .model_source import loaded
from .providers import onnxruntime, open_session
from .tensor_bytes import completed_bytes


class CannotAddNodesError(Exception):
    """The optimized model is not at hand; told to callers within the package."""


_LARGEST = 1 << 28  # bytes of a model that is written and read once more
_MOST = 0.9  # share of the tensors whose size has to be known: where others hide, what seems to free memory may not


def open_ordered_session(
    source: bytes,
    make_options: Callable[[], Any],
    providers: Sequence[tuple[str, Mapping[str, Any]]],
    what: str,
    sizes: Mapping[str, int],
    add: Callable[[Any], None] | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession`, as `open_session` gives it, in which tensors live shorter.

    In onnxruntime's own order where no better one is found, no file can be written, or the model is over 256 MiB.

    Args:
        source: the model's bytes.
        make_options: gives `onnxruntime.SessionOptions`; each session needs its own.
        providers, what: as in `open_session`.
        sizes: of the model's tensors in bytes, those that are known.
        add: puts further nodes into the optimized onnx.GraphProto once its nodes have their order.

    Raises:
        CannotAddNodesError: the model cannot be written and loaded again, so that `add` has no model to change.
        ModelFileError, ProviderError: as `open_session`.
    """
    loaded_once = None if len(source) > _LARGEST else _optimized(source, make_options(), providers, what)
    if add and (loaded_once is None or loaded_once[1] is None):
        raise CannotAddNodesError
    if loaded_once is None:
        return open_session(source, make_options(), providers, what)
    session, model = loaded_once
    shorter = model is not None and _shorten(model.graph, sizes)
    if add and model is not None:
        add(model.graph)
    elif not shorter or model is None:
        return session
    source = model.SerializeToString()
    del session, model, loaded_once
    ort, options = onnxruntime(), make_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    return open_session(source, options, providers, what)


def _optimized(
    source: bytes, options: Any, providers: Sequence[tuple[str, Mapping[str, Any]]], what: str
) -> tuple[Any, Any | None] | None:
    """A session, and the onnx.ModelProto that it has made of the model, None of one that is too large.

    None where there is no place for a file, or onnxruntime fails: of a full disk it speaks as of a bad model.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="convgrad-") as folder:
            path = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(path)
            session = open_session(source, options, providers, what)
            return session, loaded(path) if path.stat().st_size <= _LARGEST else None
    except (OSError, ModelFileError):
        return None


def _shorten(graph: Any, sizes: Mapping[str, int]) -> bool:
    """Reorder an optimized graph; whether its tensors live shorter now."""
    known = completed_bytes(graph, sizes)
    names = [name for node in graph.node for name in node.output if name]
    return sum(name in known for name in names) > _MOST * len(names) and order_lives(graph, known)
