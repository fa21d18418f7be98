"""The six functions: as function nodes, inlined, with every dimension dynamic."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import convgrad_export as cg
from convgrad_export.functions import DOMAIN, FUNCTIONS

from ..cases import CASES, ConvCase

EVERYTHING = ("batch", "channels", "space", "kernel")
# torch.nn.grad's signature: plain convolutions, one padding per axis
SYMMETRIC = [case for case in CASES if not case.transposed and all(lo == hi for lo, hi in case.geometry.pads)]


def build(case: ConvCase, gradient: str, **options) -> onnx.ModelProto:
    geometry = case.geometry
    return cg.build_model(
        f"conv{geometry.rank}d_{gradient}",
        stride=geometry.stride,
        padding=geometry.begin,
        dilation=geometry.dilation,
        groups=geometry.groups,
        **({"dynamic": EVERYTHING} | options),
    )


def feeds(case: ConvCase, gradient: str, operands: dict[str, np.ndarray], dtype: type = np.float32) -> dict:
    geometry = case.geometry
    tensors = {"grad_output": operands["grad_output"].astype(dtype)}
    if gradient == "input":
        return tensors | {
            "weight": operands["weight"].astype(dtype),
            "input_size": np.array(geometry.input_shape, np.int64),
        }
    return tensors | {
        "input": operands["input"].astype(dtype),
        "weight_size": np.array(geometry.weight_shape, np.int64),
    }


@pytest.mark.parametrize("inline", [True, False], ids=["inlined", "function_node"])
@pytest.mark.parametrize("gradient", ["input", "weight"])
@pytest.mark.parametrize("case", SYMMETRIC, ids=lambda case: case.name)
def test_dynamic_models_agree_exactly_on_integers(case: ConvCase, gradient: str, inline: bool) -> None:
    model = build(case, gradient, inline=inline)
    onnx.checker.check_model(model, full_check=True)
    assert bool(model.functions) is not inline
    operands = case.operands("float32", integers=True)
    reference, _ = case.expected(operands, "float32")[gradient]
    (result,) = cg.GradientSession(model).run(feeds(case, gradient, operands)).values()
    assert result.shape == reference.shape
    assert np.array_equal(result, reference)


@pytest.mark.parametrize("gradient", ["input", "weight"])
def test_one_dynamic_model_serves_every_size(gradient: str) -> None:
    """The same session for other batches, channels, kernels and spatial sizes: only the attributes are fixed."""
    model = cg.build_model(f"conv2d_{gradient}", stride=(2, 1), padding=(1, 0), dynamic=EVERYTHING)
    session = cg.GradientSession(model)
    for n, c, m, size, kernel in [(1, 3, 4, (9, 8), (3, 2)), (5, 1, 7, (12, 5), (1, 4)), (0, 2, 2, (6, 6), (3, 3))]:
        case = ConvCase("any", n, c, m, size, kernel, stride=(2, 1), padding=(1, 0))
        operands = case.operands("float32", integers=True)
        reference, _ = case.expected(operands, "float32")[gradient]
        (result,) = session.run(feeds(case, gradient, operands)).values()
        assert np.array_equal(result, reference)


def test_an_input_size_with_another_remainder_is_obeyed() -> None:
    """With stride 3 several input sizes give one output size; the function fills the rows it is told of."""
    model = cg.build_model("conv1d_input", stride=3, dynamic=EVERYTHING)
    session = cg.GradientSession(model)
    weight, grad_output = np.ones((1, 1, 2), np.float32), np.ones((1, 1, 2), np.float32)
    for size in (5, 6, 7):
        feed = {"input_size": np.array([1, 1, size]), "weight": weight, "grad_output": grad_output}
        (result,) = session.run(feed).values()
        assert result.tolist() == [[[1, 1, 0, 1, 1, 0, 0][:size]]]


@pytest.mark.parametrize("opset", [15, 17, 18, 20, 22, 23])
@pytest.mark.parametrize("inline", [True, False], ids=["inlined", "function_node"])
def test_every_opset_from_15(opset: int, inline: bool) -> None:
    case = next(case for case in CASES if case.name == "mixed2d")
    operands = case.operands("float32", integers=True)
    for gradient in ("input", "weight"):
        model = build(case, gradient, opset_version=opset, inline=inline)
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        assert len(inferred.graph.output[0].type.tensor_type.shape.dim) == 4
        reference, _ = case.expected(operands, "float32")[gradient]
        (result,) = cg.GradientSession(model).run(feeds(case, gradient, operands)).values()
        assert np.array_equal(result, reference)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_computed_in_float32(dtype: str) -> None:
    from convgrad_export import dtypes

    case = next(case for case in CASES if case.name == "mixed2d")
    operands = case.operands(dtype, integers=True)
    for gradient in ("input", "weight"):
        model = build(case, gradient, dtype=dtype)
        reference, _ = case.expected(operands, dtype)[gradient]
        feed = feeds(case, gradient, operands, dtypes.numpy_dtype(dtype))
        (result,) = cg.GradientSession(model).run(feed).values()
        assert np.array_equal(result.astype(np.float64), reference.astype(result.dtype).astype(np.float64))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_have_torch_nn_grads_signature_and_standard_operators_only(name: str) -> None:
    proto = FUNCTIONS[name].to_function_proto()
    assert (proto.name, proto.domain) == (name, DOMAIN)
    size_first = name.endswith("input")
    assert list(proto.input) == (
        ["input_size", "weight", "grad_output"] if size_first else ["input", "weight_size", "grad_output"]
    )
    rank = int(name[4])
    defaults = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in proto.attribute_proto}
    assert defaults == {"stride": [1] * rank, "padding": [0] * rank, "dilation": [1] * rank, "groups": 1}
    assert {node.domain for node in proto.node} == {""}
    assert [item.domain for item in proto.opset_import] == [""]
    assert getattr(cg.functions, name) is FUNCTIONS[name]


def test_partly_dynamic_models_fix_the_other_dimensions() -> None:
    model = cg.build_model(
        "conv2d_weight", input_shape=(2, 3, 8, 8), weight_shape=(4, 3, 3, 3), dynamic=("batch", "space")
    )
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert shapes["input"] == ["batch", 3, "input_size_0", "input_size_1"]
    assert shapes["grad_output"] == ["batch", 4, "output_size_0", "output_size_1"]
    assert [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim] == [4, 3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float64"}, cg.UnsupportedLoweringError, "float32 only"),
        ({"opset_version": 14}, cg.UnsupportedLoweringError, "opset_version is 14, expected at least 15"),
        ({"opset_version": 12}, cg.UnsupportedLoweringError, "expected 13 to"),
        ({"lowering": "input.conv_transpose"}, cg.UnsupportedLoweringError, "expected 'auto'"),
        ({"padding": "same"}, cg.UnsupportedLoweringError, "one integer per axis"),
        ({"transposed": True}, cg.UnsupportedLoweringError, "only the batch can be dynamic"),
        ({"dynamic": ("batch", "space")}, cg.GeometryError, "in_channels is not dynamic, so it must be given"),
        ({"dynamic": ("height",)}, cg.GeometryError, "expected names from"),
        ({"dynamic": "batch"}, cg.ArgumentTypeError, "expected a sequence"),
        ({"dtype": "int8"}, cg.DTypeError, "dtype is int8"),
        ({"stride": (1, 2, 3)}, cg.GeometryError, "stride"),
    ],
)
def test_what_a_dynamic_model_cannot_do_is_said(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cg.build_model("conv2d_input", **({"dynamic": EVERYTHING} | arguments))
