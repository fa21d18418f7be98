"""Where the functions live, and the element types they accept."""

from __future__ import annotations

from typing import TypeVar

from onnxscript import BFLOAT16, DOUBLE, FLOAT, FLOAT16, values

DOMAIN = "convgrad"
OPSET_VERSION = 18  # of the standard operators in the bodies

convgrad_opset = values.Opset(DOMAIN, 1)

TFloat = TypeVar("TFloat", FLOAT, DOUBLE, FLOAT16, BFLOAT16)
