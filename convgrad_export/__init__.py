"""Gradients of convolutional networks as standard ONNX graphs.

Names are loaded when first used, so that importing the package needs neither torch nor onnxruntime: a saved model runs
in a process that has onnxruntime and numpy alone.
"""

from __future__ import annotations

import importlib
from typing import Any

from .errors import (
    ArgumentTypeError,
    BenchmarkError,
    CaptureError,
    ConstantGradientError,
    ConvGradError,
    DeviceError,
    DTypeError,
    DynamicShapeError,
    GeometryError,
    MissingDependencyError,
    ModelFileError,
    NonFiniteLossError,
    OutputExistsError,
    OutputPathError,
    ProviderError,
    ServerError,
    ServingConfigError,
    TuningCacheError,
    TuningWarning,
    UnsupportedLoweringError,
    UnsupportedOperatorError,
    VerificationError,
)
from .errors import raise_missing as _raise_missing

__version__ = "0.1.0"

# public name -> module that defines it; None for a module that is itself the public name
_LAZY: dict[str, str | None] = {
    "conv1d_input": "runtime.eager",
    "conv2d_input": "runtime.eager",
    "conv3d_input": "runtime.eager",
    "conv1d_weight": "runtime.eager",
    "conv2d_weight": "runtime.eager",
    "conv3d_weight": "runtime.eager",
    "convolution_backward": "runtime.eager",
    "GradientSession": "runtime.session",
    "CudaOptions": "runtime.cuda_options",
    "ConvGeometry": "geometry",
    "build_model": "build",
    "lowerings": "build",
    "tune": "selection.tune",
    "rewrite_convolution_backward": "integrations.fx_pass",
    "RewriteConvolutionBackwardPass": "integrations.fx_pass",
    "decomposition_table": "integrations.fx_pass",
    "functions": None,
    "torchscript": None,
    "export": "integrations.onnx_export",
    "export_gradient": "integrations.onnx_export",
    "register_torchscript_symbolics": "integrations.torchscript_symbolics",
    "translation_table": "integrations.translation",
    "ExportReport": "integrations.report",
    "export_training_step": "training.step",
    "TrainingSession": "training.session",
}

_MODULES = {"functions": "functions", "torchscript": "integrations.torchscript"}

__all__ = [
    "ArgumentTypeError",
    "BenchmarkError",
    "CaptureError",
    "ConstantGradientError",
    "ConvGradError",
    "DTypeError",
    "DeviceError",
    "DynamicShapeError",
    "GeometryError",
    "MissingDependencyError",
    "ModelFileError",
    "NonFiniteLossError",
    "OutputExistsError",
    "OutputPathError",
    "ProviderError",
    "ServerError",
    "ServingConfigError",
    "TuningCacheError",
    "TuningWarning",
    "UnsupportedLoweringError",
    "UnsupportedOperatorError",
    "VerificationError",
    "__version__",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _LAZY[name]
    try:
        if module is None:
            return importlib.import_module(f".{_MODULES[name]}", __name__)
        value = getattr(importlib.import_module(f".{module}", __name__), name)
    except ImportError as error:
        _raise_missing(error)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
