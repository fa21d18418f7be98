"""Graphs made for CUDA in half types give the right numbers: run here by what runs half types on a CPU.

Operands of -1, 0 and 1 on small sizes keep every sum a small integer, exact in both half types, so equality is fair
whatever the runtime accumulates in.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from convgrad_export import GradientSession
from convgrad_export.emit.onnx import GradientRequest, emit_model
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import CUDA, LOWERINGS, preferred_opset

GEOMETRIES = {
    "padded": ConvGeometry.from_forward((2, 3, 6, 5), (4, 3, 3, 3), padding=1),
    "strided": ConvGeometry.from_forward((2, 3, 7, 6), (4, 3, 3, 2), stride=2, padding=1),
    "uneven": ConvGeometry.from_forward((1, 2, 6, 5), (3, 2, 2, 2), padding=((1, 0), (0, 1))),
    "patches": ConvGeometry.from_forward((2, 3, 6, 4), (4, 3, 2, 2), stride=2),
    "depthwise": ConvGeometry.from_forward((2, 4, 6, 6), (4, 1, 3, 3), padding=1, groups=4),
    "volume": ConvGeometry.from_forward((2, 2, 3, 4, 3), (3, 2, 3, 2, 2), padding=1),
    "transposed": ConvGeometry.from_forward((2, 3, 4, 4), (3, 4, 3, 3), 2, 1, transposed=True, output_padding=1),
}
# onnx.reference has no grouped ConvTranspose, and its MatMul of bfloat16 is a Python loop: few cases, small ones.
BFLOAT16 = [
    ("input.conv_transpose", "padded"),
    ("input.conv_transpose_crop", "uneven"),
    ("input.flipped_conv", "padded"),
    ("weight.matmul_taps", "padded"),
    ("weight.matmul_taps", "strided"),
    ("weight.im2col", "uneven"),
    ("weight.depthwise_taps", "depthwise"),
    ("weight.matmul_taps", "transposed"),
    ("bias.reduce_sum", "padded"),
]


def model(name: str, geometry: ConvGeometry, dtype: str, opset: int, provider: str = CUDA) -> onnx.ModelProto:
    lowering = LOWERINGS[name]
    request = GradientRequest(geometry, {lowering.gradient: lowering}, dtype, opset, provider)
    return ir.to_proto(emit_model(request, "gradient"))


def operands(geometry: ConvGeometry) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"grad_output": geometry.output_shape, "input": geometry.input_shape, "weight": geometry.weight_shape}
    return {name: rng.integers(-1, 2, tuple(shape)).astype(np.float32) for name, shape in shapes.items()}


def expected(name: str, geometry: ConvGeometry) -> np.ndarray:
    """The same lowering in float32 for the CPU, which tests of its own hold to PyTorch."""
    session = GradientSession(model(name, geometry, "float32", 18, "CPUExecutionProvider"))
    (result,) = session.run({key: operands(geometry)[key] for key in session.input_names}).values()
    assert 0 < np.abs(result).max() <= 256  # beyond, bfloat16 skips integers
    return result


FLOAT16 = [
    (name, case)
    for name, entry in LOWERINGS.items()
    for case, geometry in GEOMETRIES.items()
    if entry.error_factor == 1.0 and entry.why_not(geometry, "float16", CUDA, 18) is None
]


def test_only_forms_with_col2im_have_no_float16_form_on_cuda() -> None:
    direct = {name for name, entry in LOWERINGS.items() if entry.error_factor == 1.0}
    assert direct - {name for name, _ in FLOAT16} == {"input.col2im", "input.columns", "input.plane_col2im"}


@pytest.mark.parametrize(("name", "case"), FLOAT16)
def test_float16_graphs_for_cuda_are_exact_on_small_integers(name: str, case: str) -> None:
    geometry = GEOMETRIES[case]
    session = GradientSession(model(name, geometry, "float16", 18))
    feeds = {key: operands(geometry)[key].astype(np.float16) for key in session.input_names}
    (result,) = session.run(feeds).values()
    assert result.dtype == np.float16
    assert np.array_equal(result.astype(np.float32), expected(name, geometry))


@pytest.mark.parametrize("opset", [18, preferred_opset("bfloat16", CUDA)])
@pytest.mark.parametrize(("name", "case"), BFLOAT16)
def test_bfloat16_graphs_for_cuda_are_exact_on_small_integers(name: str, case: str, opset: int) -> None:
    geometry = GEOMETRIES[case]
    proto = model(name, geometry, "bfloat16", opset)
    feeds: dict[str, Any] = {
        value.name: operands(geometry)[value.name].astype(ml_dtypes.bfloat16) for value in proto.graph.input
    }
    (result,) = onnx.reference.ReferenceEvaluator(proto).run(None, feeds)
    assert np.array_equal(np.asarray(result).astype(np.float32), expected(name, geometry))


def test_an_operator_without_a_bfloat16_kernel_stands_between_casts() -> None:
    nodes = model("weight.matmul_taps", GEOMETRIES["padded"], "bfloat16", 18).graph.node
    at = [node.op_type for node in nodes].index("Pad")
    assert [node.op_type for node in nodes[at - 1 : at + 2]] == ["Cast", "Pad", "Cast"]
    assert sum(node.op_type == "Cast" for node in nodes) == 2
    assert "MatMul" in {node.op_type for node in nodes}
