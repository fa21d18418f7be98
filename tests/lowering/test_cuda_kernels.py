"""Every operator of every lowering has a CUDA kernel in its type, by onnxruntime-gpu's own registry.

`cuda_kernels.json` is that registry, written by ``python -m benchmarks.cuda.placement --registry``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from convgrad_export import dtypes
from convgrad_export.bench.networks import NETWORKS
from convgrad_export.emit.onnx import MAX_OPSET, MIN_OPSET, GradientRequest, emit_model
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import CPU, CUDA, GRADIENTS, LOWERINGS, cuda_kernel, preferred_opset, widened
from convgrad_export.lowering.kernels import CUDA_KERNELS
from convgrad_export.selection.policy import choose

from ..cases import CASES

REGISTRY: dict[str, Any] = json.loads((Path(__file__).parent / "cuda_kernels.json").read_text())
OPSETS = range(MIN_OPSET, MAX_OPSET + 1)


def in_registry(operator: str, dtype: str, opset: int) -> bool:
    """Whether the registry has a CUDA kernel of the version of `operator` that `opset` means."""
    version = onnx.defs.get_schema(operator, opset, "").since_version
    ranges = REGISTRY[operator].get(dtype, [])
    return any(first <= version and (last == 0 or version <= last) for first, last in ranges)


def nodes_off_cuda(geometry: ConvGeometry, lowerings: dict[str, Any], dtype: str, opset: int) -> list[str]:
    """Nodes without a CUDA kernel, or of a kind the provider refuses, of the model onnxruntime would get."""
    model = ir.to_proto(emit_model(GradientRequest(geometry, lowerings, dtype, opset, CUDA), "gradients"))
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    graph = inferred.graph
    typed = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in typed}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    left = []
    for node in graph.node:
        dtype_in = dtypes.from_onnx_code(types[node.input[0]])
        if dtype_in is None:  # shapes: integers, which the provider leaves on the CPU on purpose
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        pads = list(attributes.get("pads", []))
        uneven = node.op_type == "ConvTranspose" and pads[: len(pads) // 2] != pads[len(pads) // 2 :]
        if uneven or not in_registry(node.op_type, dtype_in, opset):
            left.append(f"{node.op_type} {dtype_in}{' uneven' if uneven else ''}")
    return left


@pytest.mark.parametrize("operator", sorted(CUDA_KERNELS))
def test_the_kernel_table_is_the_registry(operator: str) -> None:
    for dtype in dtypes.NAMES:
        for opset in OPSETS:
            if onnx.defs.has(operator, opset, ""):
                assert cuda_kernel(operator, dtype, opset) == in_registry(operator, dtype, opset), (dtype, opset)


def test_the_kernel_table_has_every_operator_that_a_lowering_records() -> None:
    recorded = set()
    for lowering in LOWERINGS.values():
        for case in CASES:
            if lowering.why_not(case.geometry) is None:
                request = GradientRequest(case.geometry.with_batch("batch"), {lowering.gradient: lowering}, "float16")
                recorded |= {node.op_type for node in emit_model(request, "gradient").graph}
    assert recorded <= set(CUDA_KERNELS)
    assert {"ConvTranspose", "MatMul", "Pad", "Col2Im"} <= recorded


@pytest.mark.parametrize("dtype", dtypes.NAMES)
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_cuda_policy_leaves_no_node_of_any_layer_table(network: str, dtype: str) -> None:
    for layer in NETWORKS[network]():
        geometry = layer.geometry(8)
        for opset in sorted({18, preferred_opset(dtype, CUDA)}):
            lowerings = {
                gradient: choose(gradient, geometry, dtype, provider=CUDA, opset=opset) for gradient in GRADIENTS
            }
            assert nodes_off_cuda(geometry, lowerings, dtype, opset) == [], (layer.name, opset)


@pytest.mark.parametrize("dtype", dtypes.NAMES)
@pytest.mark.parametrize("lowering", LOWERINGS.values(), ids=LOWERINGS)
def test_a_lowering_that_applies_on_cuda_leaves_no_node(lowering: Any, dtype: str) -> None:
    applied = 0
    for case in CASES:
        for opset in (13, 18, 22):
            if lowering.why_not(case.geometry, dtype, CUDA, opset) is None:
                applied += 1
                assert nodes_off_cuda(case.geometry, {lowering.gradient: lowering}, dtype, opset) == [], case.name
    refused_everywhere = "Col2Im" in lowering.operators or (lowering.float32_only and dtype == "float64")
    assert (applied == 0) == refused_everywhere


def test_the_check_sees_an_uneven_transposed_convolution_and_a_missing_kernel() -> None:
    uneven = ConvGeometry.from_forward((2, 4, 8, 8), (6, 4, 3, 3), padding=((1, 0), (1, 1)))
    plain = LOWERINGS["input.conv_transpose"]
    assert nodes_off_cuda(uneven, {"input": plain}, "float32", 18) == ["ConvTranspose float32 uneven"]
    assert nodes_off_cuda(uneven, {"input": LOWERINGS["input.col2im"]}, "float32", 18) == ["Col2Im float32"]
    assert "11312" in str(plain.why_not(uneven, "float32", CUDA))
    assert choose("input", uneven, provider=CUDA).name == "input.conv_transpose_crop"


def test_half_types_are_computed_as_such_where_a_result_is_one_sum() -> None:
    conv_transpose, taps = LOWERINGS["input.conv_transpose"], LOWERINGS["weight.depthwise_taps"]
    assert conv_transpose.computes_in("float16", CUDA) == "float16"
    assert conv_transpose.computes_in("bfloat16", CUDA) == "bfloat16"
    assert taps.computes_in("float16", CUDA) == "float32"  # products would be rounded before they are added up
    assert {low.computes_in("float16", CPU) for low in LOWERINGS.values()} == {"float32"}
    assert widened("bfloat16", CUDA, 18) == {"Conv", "ConvTranspose", "Pad"}
    assert widened("bfloat16", CUDA, 22) == {"ConvTranspose", "Pad"}
    assert widened("float16", CUDA, 18) == frozenset()


def test_bfloat16_at_stride_one_is_a_bfloat16_conv_where_there_is_one() -> None:
    geometry = ConvGeometry.from_forward((2, 16, 8, 8), (16, 16, 3, 3), padding=1)
    assert choose("input", geometry, "bfloat16", provider=CUDA, opset=22).name == "input.flipped_conv"
    assert choose("input", geometry, "bfloat16", provider=CUDA, opset=18).name == "input.conv_transpose"
    assert choose("input", geometry, "float16", provider=CUDA, opset=22).name == "input.conv_transpose"
