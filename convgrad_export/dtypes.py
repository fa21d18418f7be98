"""The four element types that convolution gradients are defined on here, by name, for numpy and for ONNX."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from .errors import DTypeError

# name -> (onnx TensorProto code, numpy dtype, unit roundoff)
_TABLE: dict[str, tuple[int, np.dtype[Any], float]] = {
    "float32": (1, np.dtype(np.float32), 2.0**-24),
    "float64": (11, np.dtype(np.float64), 2.0**-53),
    "float16": (10, np.dtype(np.float16), 2.0**-11),
    "bfloat16": (16, np.dtype(ml_dtypes.bfloat16), 2.0**-8),
}
NAMES = tuple(_TABLE)
_ALIASES = {"float": "float32", "double": "float64", "half": "float16"}


def name_of(dtype: Any, argument: str = "dtype") -> str:
    """The canonical name of a numpy, torch or ml_dtypes dtype, or of a string such as ``"float32"``.

    Raises:
        DTypeError: integers, booleans, complex numbers, and floats of other widths.
    """
    if isinstance(dtype, str):
        text = dtype
    elif dtype is None or str(dtype).startswith("torch."):
        text = str(dtype)  # numpy takes None for float64
    else:
        try:
            text = np.dtype(dtype).name
        except (TypeError, ValueError):  # the latter of a tensor
            text = str(dtype)
    text = text.removeprefix("torch.")
    text = _ALIASES.get(text, text)
    if text not in _TABLE:
        raise DTypeError(f"{argument} is {text}, expected one of {', '.join(NAMES)}")
    return text


def onnx_code(name: str) -> int:
    """TensorProto.DataType of a canonical name."""
    return _TABLE[name][0]


def numpy_dtype(name: str) -> np.dtype[Any]:
    return _TABLE[name][1]


def unit_roundoff(name: str) -> float:
    """u: half the distance from 1 to the next larger number."""
    return _TABLE[name][2]


def is_half(name: str) -> bool:
    return name in ("float16", "bfloat16")


def from_onnx_code(code: int) -> str | None:
    """The canonical name for a TensorProto.DataType, None for a type that is not one of the four."""
    return next((name for name, (known, _, _) in _TABLE.items() if known == code), None)
