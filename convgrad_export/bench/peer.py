"""onnxruntime-training in its own Python, as a contender."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BenchmarkError
from ..geometry import ConvGeometry
from .subprocess_lines import Child

_WORKER = Path(__file__).with_name("ort_training_worker.py")
_MEMORY_FOLDER = Path("/dev/shm")


class OrtTraining:
    """The other environment's worker.

    Args:
        python: the interpreter that has onnxruntime-training.

    Raises:
        BenchmarkError: it cannot be run, or lacks a package.
    """

    def __init__(self, python: str) -> None:
        self._child = Child([python, str(_WORKER)], f"onnxruntime-training ({python})")
        self.version = str(self._child.greeting["version"])
        self.process = int(self._child.greeting["process"])
        self._folder = tempfile.TemporaryDirectory(dir=_MEMORY_FOLDER if _MEMORY_FOLDER.is_dir() else None)

    def prepare(
        self, gradient: str, geometry: ConvGeometry, operands: Mapping[str, np.ndarray], threads: int
    ) -> np.ndarray:
        """Load one gradient of one convolution there and compute it once.

        Raises:
            BenchmarkError: its ConvGrad refuses the convolution.
        """
        if geometry.transposed:
            raise BenchmarkError("ConvGrad is for plain convolutions")
        folder = Path(self._folder.name)
        for name, array in operands.items():
            np.save(folder / f"{name}.npy", array)
        self._ask(
            {
                "command": "prepare",
                "folder": str(folder),
                "gradient": gradient,
                "threads": threads,
                "attributes": {
                    "strides": list(geometry.stride),
                    "pads": geometry.onnx_pads,
                    "dilations": list(geometry.dilation),
                    "group": geometry.groups,
                    "kernel_shape": list(geometry.kernel_size),
                },
            }
        )
        return np.asarray(np.load(folder / "result.npy"))

    def turn(self, repeats: int) -> float:
        """Seconds of that many calls, by the other process's clock."""
        return float(self._ask({"command": "time", "repeats": repeats})["seconds"])

    def release(self) -> None:
        """Drop the prepared gradient and its operands."""
        self._ask({"command": "release"})
        for path in Path(self._folder.name).iterdir():
            path.unlink()

    def close(self) -> None:
        self._child.close()
        self._folder.cleanup()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._child.ask(request)
        if "error" in answer:
            raise BenchmarkError(f"onnxruntime-training: {answer['error']}")
        return answer
