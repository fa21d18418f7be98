"""Where the functions live, and the element types they accept."""

from __future__ import annotations

from typing import TypeVar, Union

from onnxscript import BFLOAT16, DOUBLE, FLOAT, FLOAT16, values

DOMAIN = "convgrad"
OPSET_VERSION = 18  # of the standard operators in the bodies

convgrad_opset = values.Opset(DOMAIN, 1)

# onnxscript reads the bound of a type variable and knows typing.Union, not the | operator.
TFloat = TypeVar("TFloat", bound=Union[FLOAT, DOUBLE, FLOAT16, BFLOAT16])  # noqa: UP007
