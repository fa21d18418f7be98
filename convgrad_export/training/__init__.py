"""Whole training steps as ONNX models, and their execution on onnxruntime.

Exporting (`step`, `artifacts`) needs torch. Running (`session`, `checkpoint`, `api`) needs onnxruntime, numpy and
safetensors only, so nothing is imported here before it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "export_training_step": "step",
    "TrainingStepReport": "step",
    "SGD": "optimizers",
    "Adam": "optimizers",
    "AdamW": "optimizers",
    "RMSprop": "optimizers",
    "CustomOptimizer": "optimizers",
    "TrainingSession": "session",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
