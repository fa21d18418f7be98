"""What is known of a run of a training step that breaks off, where parameters change within it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..runtime import tensors
from ..runtime.providers import onnxruntime
from ..tensor_names import LOSS
from .fused_updates import BEGAN


class UpdateGate:
    """Memory of the outputs that a run writes before the first update.

    Args:
        outputs: onnxruntime's descriptions of the first phase's, by name.

    Attributes:
        written: OrtValues to write them to, by name.
    """

    def __init__(self, outputs: Mapping[str, Any]) -> None:
        make = onnxruntime().OrtValue.ortvalue_from_numpy  # which takes the array's memory as it is
        self._loss = np.zeros(outputs[LOSS].shape, tensors.onnx_type(outputs[LOSS].type)[1])
        self._began = np.zeros(1, np.int64)
        self.written = {LOSS: make(self._loss), BEGAN: make(self._began)}

    def close(self) -> None:
        """Before a run."""
        self._loss[...] = 0
        self._began[...] = 1

    @property
    def began(self) -> bool:
        """Whether the run may have written new state."""
        return not self._began.any()

    @property
    def loss(self) -> float:
        """The run's; 0 before it is computed."""
        return float(self._loss.item())
