"""Running a session on torch's CUDA tensors: results in torch's memory, ordered by events, no waiting on the host."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import DynamicShapeError
from .cuda_stream import TorchStream, torch_stream
from .providers import onnxruntime
from .tensors import TensorView, onnx_type


def stream_for(settings: dict[str, Any]) -> TorchStream | None:
    """A stream for a session with these options, written into them; None if they name one, or without torch."""
    if "user_compute_stream" in settings:
        return None
    stream = torch_stream(int(settings.get("device_id", 0)))
    if stream is not None:
        settings["user_compute_stream"] = str(stream.pointer)
    return stream


def unsynchronised() -> Any:
    """Run options with which onnxruntime returns when the work is queued."""
    options = onnxruntime().RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


class CudaRun:
    """Runs `session`, whose stream is `stream`.

    Args:
        settings: the CUDA provider's options; with ``enable_cuda_graph`` all inputs and outputs keep one address,
            which a recorded graph needs.

    Raises:
        DynamicShapeError: ``enable_cuda_graph`` for a model with a size that is not fixed.
    """

    def __init__(self, session: Any, stream: TorchStream, settings: Mapping[str, Any]) -> None:
        self._session, self._stream = session, stream
        self._outputs = {value.name: value for value in session.get_outputs()}
        self._options = unsynchronised()
        self._graph = str(settings.get("enable_cuda_graph", "0")) == "1"
        if self._graph:
            for value in (*session.get_inputs(), *session.get_outputs()):
                if not all(isinstance(size, int) for size in value.shape):
                    raise DynamicShapeError(
                        f"enable_cuda_graph needs fixed sizes, and {value.name} has the shape {tuple(value.shape)}: "
                        "build the model with dynamic=(), or leave the option out"
                    )
        self._fixed: dict[str, Any] = {}
        self._lock = threading.Lock()

    def takes(self, views: Iterable[TensorView]) -> bool:
        """Whether every input lies on the session's device."""
        values = list(views)
        return bool(values) and all(
            view.device_type == "cuda" and view.device_index == self._stream.device_index for view in values
        )

    def run(
        self,
        names: Sequence[str],
        views: Mapping[str, TensorView],
        codes: Mapping[str, int],
        sizes: Mapping[str, int],
    ) -> list[Any]:
        """Tensors for the outputs `names`; `sizes` are the values of the model's named sizes."""
        shapes = {name: self._shape(name, sizes) for name in names}
        with self._lock:
            if self._graph:
                return self._replay(names, views, codes)
            if any(shape is None for shape in shapes.values()):
                return self._run_then_wait(names, views, codes)
            results = {name: self._empty(name, shape) for name, shape in shapes.items() if shape is not None}
            self._launch(views, codes, results)
            return [results[name] for name in names]

    def _launch(self, views: Mapping[str, TensorView], codes: Mapping[str, int], results: Mapping[str, Any]) -> None:
        binding = self._bound(views, codes)
        for name, result in results.items():
            code, _ = onnx_type(self._outputs[name].type)
            binding.bind_output(name, "cuda", self._stream.device_index, code, list(result.shape), result.data_ptr())
        self._stream.before_run()
        self._session.run_with_iobinding(binding, self._options)
        self._stream.after_run()
        for value in (*(view.owner for view in views.values()), *results.values()):
            self._stream.hold(value)

    def _replay(self, names: Sequence[str], views: Mapping[str, TensorView], codes: Mapping[str, int]) -> list[Any]:
        """Through memory that never moves: a recorded graph reads and writes the addresses of its first run."""
        if not self._fixed:
            for name, view in views.items():
                self._fixed[name] = view.owner.clone()
            for name in self._outputs:
                self._fixed[name] = self._empty(name, tuple(self._outputs[name].shape))
        self._stream.after_run()  # the memory may still be in use by a run that another stream asked for
        for name, view in views.items():
            self._fixed[name].copy_(view.owner)
        fixed = {name: view._replace(owner=self._fixed[name]) for name, view in views.items()}
        self._launch(fixed, codes, {name: self._fixed[name] for name in self._outputs})
        results = [self._fixed[name].clone() for name in names]
        self._stream.before_run()  # the next replay must not overtake the copies
        return results

    def _run_then_wait(
        self, names: Sequence[str], views: Mapping[str, TensorView], codes: Mapping[str, int]
    ) -> list[Any]:
        """Results of sizes known only afterwards lie in onnxruntime's memory; torch gets it when all is done."""
        binding = self._bound(views, codes)
        for name in names:
            binding.bind_output(name, "cuda", self._stream.device_index)
        self._stream.before_run()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return [sys.modules["torch"].from_dlpack(value) for value in binding.get_outputs()]

    def _bound(self, views: Mapping[str, TensorView], codes: Mapping[str, int]) -> Any:
        binding = self._session.io_binding()
        for name, view in views.items():
            binding.bind_input(name, "cuda", view.device_index, codes[name], view.shape, view.pointer)
        return binding

    def _shape(self, name: str, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
        """An output's shape, None where a size is in no input or is zero (no memory to write to)."""
        shape = tuple(sizes.get(size) if isinstance(size, str) else size for size in self._outputs[name].shape)
        return shape if all(shape) else None  # type: ignore[return-value]

    def _empty(self, name: str, shape: tuple[int, ...]) -> Any:
        torch = sys.modules["torch"]
        _, dtype = onnx_type(self._outputs[name].type)
        return torch.empty(shape, dtype=getattr(torch, dtype), device=f"cuda:{self._stream.device_index}")
