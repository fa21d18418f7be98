"""build_model and lowerings: what they put into a model, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry

SHAPES = {"input_shape": (2, 4, 9, 9), "weight_shape": (6, 4, 3, 3)}


def test_the_batch_is_dynamic_by_default_and_fixed_on_request() -> None:
    for dynamic, expected in ((("batch",), "batch"), ((), 2)):
        model = cg.build_model("conv2d_weight", **SHAPES, stride=2, dynamic=dynamic)
        dim = model.graph.input[0].type.tensor_type.shape.dim[0]
        assert (dim.dim_param or dim.dim_value) == expected
        assert [value.name for value in model.graph.input] == ["input", "grad_output"]
        assert [value.name for value in model.graph.output] == ["grad_weight"]


def test_the_same_call_gives_the_same_bytes() -> None:
    first, second = (
        cg.build_model("conv2d_weight", **SHAPES, stride=2).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


def test_metadata_says_what_the_model_is() -> None:
    model = cg.build_model("conv2d_input", **SHAPES, stride=2, padding="valid", dtype="float64")
    metadata = {item.key: item.value for item in model.metadata_props}
    assert metadata["convgrad.op"] == "conv2d_input"
    assert metadata["convgrad.dtype"] == "float64"
    assert metadata["convgrad.lowering"] == "input.matmul_taps"
    arguments = json.loads(metadata["convgrad.geometry"])
    restored = ConvGeometry.from_dict(arguments)
    assert restored == ConvGeometry.from_forward(*SHAPES.values(), 2)


@pytest.mark.parametrize("mask", [(True, False, True), (False, True, False)])
def test_convolution_backward_has_one_output_for_each_gradient_in_the_mask(mask: tuple[bool, ...]) -> None:
    model = cg.build_model("convolution_backward", **SHAPES, output_mask=mask)
    onnx.checker.check_model(model, full_check=True)
    names = ["grad_input", "grad_weight", "grad_bias"]
    expected = [name for name, wanted in zip(names, mask, strict=True) if wanted]
    assert [value.name for value in model.graph.output] == expected


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("conv2d_bias", {}, cg.GeometryError, "expected one of conv1d_input"),
        (3, {}, cg.ArgumentTypeError, "operator_name is 3"),
        ("conv1d_input", {}, cg.GeometryError, "input_shape has 4 dimensions"),
        ("conv2d_input", {"weight_shape": None}, cg.GeometryError, "weight_shape is missing"),
        ("conv2d_input", {"lowering": "input.phase_conv"}, cg.UnsupportedLoweringError, "stride is 1"),
        ("conv2d_input", {"lowering": "weight.im2col"}, cg.UnsupportedLoweringError, "gives none of"),
        ("conv2d_input", {"lowering": "quick"}, cg.UnsupportedLoweringError, "no such lowering"),
        ("conv2d_input", {"opset_version": 99}, cg.UnsupportedLoweringError, "opset_version is 99"),
        ("conv2d_input", {"opset_version": "18"}, cg.ArgumentTypeError, "opset_version is '18'"),
        ("conv2d_input", {"lowering": None}, cg.ArgumentTypeError, "lowering is None"),
        ("conv2d_input", {"max_workspace": "1"}, cg.ArgumentTypeError, "max_workspace is '1'"),
        ("conv2d_input", {"max_workspace": float("nan")}, cg.ArgumentTypeError, "max_workspace is nan"),
        ("conv2d_input", {"dtype": None}, cg.DTypeError, "dtype is None"),
        ("conv2d_input", {"dtype": "complex64"}, cg.DTypeError, "dtype is complex64"),
        ("conv2d_input", {"output_padding": 1}, cg.GeometryError, "output_padding is .*expected 0"),
        (
            "conv2d_input",
            {"output_padding": 1, "dynamic": ("space",)},
            cg.GeometryError,
            "output_padding is .*expected 0",
        ),
        ("conv2d_input", {"inline": False}, cg.UnsupportedLoweringError, "no function to keep"),
        ("conv2d_input", {"inline": "no"}, cg.ArgumentTypeError, "inline is 'no'"),
        ("convolution_backward", {"output_mask": (False,) * 3}, cg.GeometryError, "at least one True"),
        ("convolution_backward", {"output_mask": (True,)}, cg.GeometryError, "three booleans"),
    ],
)
def test_bad_arguments_are_refused(name, changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cg.build_model(name, **(SHAPES | changes))


def test_the_catalogue_is_listed_with_reasons_and_the_choice() -> None:
    plain = cg.lowerings("conv2d_weight")
    assert {entry.name for entry in plain} >= {"weight.swapped_conv", "weight.im2col", "weight.matmul_taps"}
    assert all(entry.why_not is None and not entry.chosen and entry.when for entry in plain)
    asked = {entry.name: entry for entry in cg.lowerings("conv2d_weight", **SHAPES, stride=2)}
    assert asked["weight.flipped_conv"].why_not == "stride is (2, 2), it needs 1"
    assert [entry.name for entry in asked.values() if entry.chosen] == ["weight.im2col"] or any(
        entry.chosen and entry.why_not is None for entry in asked.values()
    )
    with pytest.raises(cg.GeometryError, match="both, or neither"):
        cg.lowerings("conv2d_weight", input_shape=(2, 4, 9, 9))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stride", 2),
        ("padding", [0, 0]),
        ("groups", "x"),
        ("dtype", "float64"),
        ("opset_version", 20),
        ("provider", "cuda"),
    ],
)
def test_the_list_without_shapes_refuses_what_it_would_not_read(name: str, value: object) -> None:
    with pytest.raises(cg.GeometryError, match=f"^{name} is .* without shapes.* leave {name} out"):
        cg.lowerings("conv2d_weight", **{name: value})


def test_dtypes_are_taken_from_numpy_and_torch() -> None:
    import numpy as np
    import torch

    for dtype in ("float16", np.float16, np.dtype("float16"), torch.float16, "half"):
        model = cg.build_model("conv2d_input", **SHAPES, dtype=dtype)
        assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("provider", ["nope", "CPU", "", None, 3, "ExecutionProvider"])
def test_a_provider_that_is_no_provider_is_refused(provider: object) -> None:
    for call in (cg.build_model, cg.lowerings):
        with pytest.raises(cg.ProviderError, match=r"provider is .*expected 'cpu', 'cuda' or"):
            call("conv2d_input", input_shape=(1, 2, 4, 4), weight_shape=(3, 2, 3, 3), provider=provider)  # type: ignore[operator]


def test_short_provider_names_are_the_long_ones() -> None:
    shapes = {"input_shape": (1, 2, 5, 5), "weight_shape": (3, 2, 3, 3), "padding": ((0, 1), (1, 1))}
    for short, name in (("cpu", "CPUExecutionProvider"), ("cuda", "CUDAExecutionProvider")):
        assert cg.build_model("conv2d_input", **shapes, provider=short) == cg.build_model(
            "conv2d_input", **shapes, provider=name
        )


def test_numpys_booleans_and_integers_are_arguments() -> None:
    shapes = {"input_shape": (2, 3, 8), "weight_shape": (4, 3, 3)}
    mask = np.array([False, True, True])
    model = cg.build_model("convolution_backward", **shapes, output_mask=mask, threads=np.int64(1))
    assert [output.name for output in model.graph.output] == ["grad_weight", "grad_bias"]
    assert cg.build_model("conv1d_weight", **shapes, transposed=np.False_, max_error_factor=np.float32(1)).graph.node
    with pytest.raises(cg.ArgumentTypeError, match=r"output_mask\[0\] is 2"):
        cg.build_model("convolution_backward", **shapes, output_mask=(2, 1, 1))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [((True, False, True), cg.GeometryError, "conv1d_weight has one gradient"), ("no", cg.ArgumentTypeError, "'no'")],
)
def test_an_output_mask_without_an_effect_is_refused(mask: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=f"output_mask is .*{message}"):
        cg.build_model("conv1d_weight", input_shape=(2, 3, 8), weight_shape=(4, 3, 3), output_mask=mask)


def test_the_catalogue_alone_takes_no_nonsense_either() -> None:
    with pytest.raises(cg.DTypeError, match="dtype is int8"):
        cg.lowerings("conv2d_weight", dtype="int8")
    with pytest.raises(cg.UnsupportedLoweringError, match="opset_version is 99"):
        cg.lowerings("conv2d_weight", opset_version=99)


def test_a_tensor_is_no_dtype() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(cg.DTypeError, match="dtype is tensor"):
        cg.build_model("conv1d_weight", input_shape=(1, 2, 5), weight_shape=(2, 2, 3), dtype=torch.zeros(2))
