"""One-element operands beside tensors with trailing axes of length 1: their rank is raised, nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import parser
from torch import nn

import convgrad_export as cg
from convgrad_export.integrations.finishing import CONSTANT, finish
from convgrad_export.integrations.scalar_rank import raise_scalar_ranks

from .onnx_check import session

TEXT = """<ir_version: 9, opset_import: ["" : 18]>
agraph (float[{shape}] x, float rate, bool due) => (float[{shape}] y, float[{shape}] z, bool[{shape}] w)
<float constant_half = {{0.5}}, float[1] constant_two = {{2.0}}> {{
    scaled = Mul(x, rate)
    shifted = Add(constant_half, scaled)
    y = Pow(shifted, constant_two)
    z = Where(due, rate, shifted)
    w = Greater(x, constant_half)
}}"""


def model_of(shape: str) -> ir.Model:
    return ir.from_proto(parser.parse_model(TEXT.format(shape=shape)))


def operand_ranks(proto: onnx.ModelProto) -> list[set[int]]:
    """The ranks of the operands of each elementwise node, from onnx's own shape inference."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*inferred.value_info, *inferred.input)}
    ranks.update({t.name: len(t.dims) for t in inferred.initializer})
    return [{ranks[name] for name in node.input} for node in inferred.node if node.op_type != "Reshape"]


@pytest.mark.parametrize("shape", ["5,3,1,1", "batch,3,1,1", "5,1,3,2", "1,5,1"])
def test_all_operands_get_the_rank_of_the_tensor_and_the_results_stay(shape: str) -> None:
    before = ir.to_proto(model_of(shape))
    model = model_of(shape)
    raise_scalar_ranks(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    rank = shape.count(",") + 1
    assert any(len(ranks) > 1 for ranks in operand_ranks(before))
    assert operand_ranks(after) == [{rank}] * 5
    sizes = [4 if size == "batch" else int(size) for size in shape.split(",")]
    feeds = {
        "x": np.random.default_rng(0).standard_normal(sizes).astype(np.float32),
        "rate": np.array(0.3, np.float32),
        "due": np.array(False),
    }
    for expected, found in zip(session(before).run(None, feeds), session(after).run(None, feeds), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_scalar_is_reshaped_once_for_all_its_users() -> None:
    model = model_of("5,3,1,1")
    raise_scalar_ranks(model)
    reshaped = [node.inputs[0].name for node in model.graph if node.op_type == "Reshape"]
    assert sorted(reshaped) == ["due", "rate"]
    assert sorted(name for name in model.graph.initializers if "rank4" in name) == [
        "constant_half_rank4",
        "constant_two_rank4",
    ]


@pytest.mark.parametrize("shape", ["5,3,2", "1,1,4", "1,1,1", "7"])
def test_tensors_whose_axes_merge_anyway_are_left_alone(shape: str) -> None:
    model = model_of(shape)
    raise_scalar_ranks(model)
    assert ir.to_proto(model) == ir.to_proto(model_of(shape))


def test_a_scalar_parameter_keeps_its_name_and_shape() -> None:
    model = model_of("5,3,1,1")
    raise_scalar_ranks(model, {"constant_half"})
    assert tuple(model.graph.initializers["constant_half"].const_value.shape.numpy()) == ()
    assert sorted(n.inputs[0].name for n in model.graph if n.op_type == "Reshape") == ["constant_half", "due", "rate"]


def test_a_training_step_of_pointwise_convolutions_meets_no_scalar_of_lower_rank() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 3, 1), nn.Flatten())
    batch = torch.randn(2, 4, 1, 1), torch.randn(2, 3)
    report = cg.export_training_step(module, "mse", "adamw", batch)
    proto = ir.to_proto(report.model)
    updates = {f"{name}.updated" for name, p in module.named_parameters() if p.dim() == 4}
    assert updates <= {value.name for value in proto.graph.output}
    shapes = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*shapes.value_info, *shapes.input)}
    sizes.update({t.name: list(t.dims) for t in shapes.initializer})
    sizes.update({v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in shapes.output})
    for node in shapes.node:
        if node.op_type in ("Add", "Sub", "Mul", "Div") and sizes[node.output[0]] in ([6, 4, 1, 1], [3, 6, 1, 1]):
            assert [len(sizes[name]) for name in node.input] == [4, 4], node


def test_finishing_shares_the_raised_constants() -> None:
    model = model_of("5,3,1,1")
    for value in model.graph.initializers.values():
        value.meta[CONSTANT] = True
    model = finish(model)
    floats = [v.const_value for v in model.graph.initializers.values() if v.const_value.dtype == ir.DataType.FLOAT]
    assert [tuple(tensor.shape.numpy()) for tensor in floats] == [(1, 1, 1, 1)] * 2
