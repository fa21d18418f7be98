"""One emitted gradient on onnxruntime, for timing: operands bound once, nothing in a call but the run itself."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .. import dtypes
from ..emit.onnx import GradientRequest, emit_model
from ..errors import ProviderError, UnsupportedLoweringError, raise_missing
from ..geometry import ConvGeometry
from ..lowering import CPU, CUDA, LOWERINGS, preferred_opset
from ..session_memory import free_early


class Runner:
    """A session for one lowering at any batch size.

    Args:
        name: of the lowering. geometry: its batch does not matter. threads: of the intra-op pool.

    Raises:
        MissingDependencyError: no onnxruntime. Whatever onnxruntime raises for a graph that it cannot load.
    """

    def __init__(
        self, name: str, geometry: ConvGeometry, dtype: str = "float32", provider: str = CPU, threads: int = 1
    ) -> None:
        lowering = LOWERINGS[name]
        self.gradient = lowering.gradient
        opset = preferred_opset(dtype, provider)
        request = GradientRequest(geometry.with_batch("batch"), {self.gradient: lowering}, dtype, opset, provider)
        model = ir.to_proto(emit_model(request, "candidate"))
        self._device = "cuda" if provider == CUDA else "cpu"
        self._session = open_session(model.SerializeToString(), provider, threads)
        self._names = [value.name for value in self._session.get_inputs()]
        self._binding: Any = None

    def bind(self, values: Mapping[str, Any]) -> None:
        """Take operands (from `place`) for the calls that follow."""
        self._binding = self._session.io_binding()
        for name in self._names:
            self._binding.bind_ortvalue_input(name, values[name])
        self._binding.bind_output(f"grad_{self.gradient}", self._device)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def result(self) -> np.ndarray:
        """Of one more run."""
        self.run()
        value = self._binding.get_outputs()[0]
        if value.element_type() != dtypes.onnx_code("bfloat16"):
            return np.asarray(value.numpy())
        if value.device_name() != "cpu":  # onnxruntime hands numpy no bfloat16: copy its memory
            raise UnsupportedLoweringError("bfloat16 results can be checked on the CPU provider only")
        array = np.empty(tuple(value.shape()), dtypes.numpy_dtype("bfloat16"))
        ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
        return array


def onnxruntime_with(provider: str) -> Any:
    """The onnxruntime module.

    Raises:
        MissingDependencyError: it is not installed. ProviderError: it was built without the provider.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise_missing(error)
    if provider not in (available := onnxruntime.get_available_providers()):
        raise ProviderError(f"provider {provider} is not in this onnxruntime, which has {', '.join(available)}")
    return onnxruntime


def open_session(model: bytes, provider: str, threads: int, *, arena: bool = True) -> Any:
    """A session as `GradientSession` opens it, but that its threads stop spinning after a call.

    They would take a core from the next session otherwise.

    Args:
        arena: False has every tensor allocated and freed by itself, so that the peak of memory can be read.

    Raises:
        MissingDependencyError: no onnxruntime. ProviderError: the provider is missing or did not start.
    """
    onnxruntime = onnxruntime_with(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = arena
    if provider == CPU:
        free_early(options)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    active = session.get_providers()
    if active[0] != provider:  # the times of another would be kept as its own
        raise ProviderError(f"provider {provider} could not start, onnxruntime fell back to {', '.join(active)}")
    return session


def place(operands: Mapping[str, np.ndarray], dtype: str, provider: str) -> dict[str, Any]:
    """Operands as onnxruntime values in `dtype` on the provider's device."""
    import onnxruntime

    device = "cuda" if provider == CUDA else "cpu"
    placed = {}
    for name, array in operands.items():
        converted = np.ascontiguousarray(array, dtypes.numpy_dtype(dtype))
        if dtype == "bfloat16":  # numpy has no such type of its own: hand the bits over
            placed[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                converted.view(np.uint16), dtypes.onnx_code(dtype)
            )
        else:
            placed[name] = onnxruntime.OrtValue.ortvalue_from_numpy(converted, device, 0)
    return placed


def available_bytes() -> int | None:
    """Memory that can be taken without swapping; None where the kernel does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    return None
