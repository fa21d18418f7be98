"""Running one lowering of one case on onnxruntime: shared by the tests of lowerings and emitters."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from convgrad_export import GradientSession, dtypes
from convgrad_export.emit.onnx import GradientRequest, emit_model
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import Lowering


def model_of(
    geometry: ConvGeometry, lowering: Lowering, dtype: str = "float32", *, opset: int = 18, any_batch: bool = True
):
    """The ModelProto of one lowering."""
    emitted = geometry.with_batch("batch") if any_batch else geometry
    return ir.to_proto(emit_model(GradientRequest(emitted, {lowering.gradient: lowering}, dtype, opset), "gradient"))


def run_lowering(
    geometry: ConvGeometry,
    lowering: Lowering,
    operands: dict[str, np.ndarray],
    dtype: str = "float32",
    *,
    opset: int = 18,
    any_batch: bool = True,
) -> np.ndarray:
    """The gradient, in `dtype`, from float64 operands that `dtype` can represent."""
    session = GradientSession(model_of(geometry, lowering, dtype, opset=opset, any_batch=any_batch), threads=1)
    feeds = {name: operands[name].astype(dtypes.numpy_dtype(dtype)) for name in session.input_names}
    (result,) = session.run(feeds).values()
    return result
