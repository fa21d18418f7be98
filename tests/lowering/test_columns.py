"""The forward convolution as one GEMM over the batch, which no catalogue entry covers, and where a step takes it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.emit.onnx import GraphOps
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import CPU, CUDA, columns
from convgrad_export.runtime.session import GradientSession
from convgrad_export.selection.forward_policy import forward_by_columns

from ..cases import CASES, ConvCase


def forward_model(g: ConvGeometry, dtype: ir.DataType) -> ir.Model:
    ops = GraphOps()
    shapes = {"input": ("batch", *g.input_shape[1:]), "weight": g.weight_shape}
    inputs = {n: ir.Value(name=n, type=ir.TensorType(dtype), shape=ir.Shape(s)) for n, s in shapes.items()}
    output = columns.forward(ops, g.with_batch("batch"), inputs["input"], inputs["weight"])
    output.name, output.type = "output", ir.TensorType(dtype)
    output.shape = ir.Shape(("batch", *g.output_shape[1:]))
    graph = ir.Graph(
        list(inputs.values()),
        [output],
        nodes=ops.nodes,
        initializers=ops.initializers,
        opset_imports={"": 13},
        name="forward",
    )
    return ir.Model(graph, ir_version=7)


@pytest.mark.parametrize("case", [c for c in CASES if not c.geometry.transposed], ids=lambda case: case.name)
def test_forward_is_exact_on_integers(case: ConvCase) -> None:
    g = case.geometry
    operands = case.operands("float64", integers=True)
    x, w = torch.from_numpy(operands["input"]), torch.from_numpy(operands["weight"])
    padded = functional.pad(x, [side for pair in reversed(g.pads) for side in pair])
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[g.rank - 1]
    expected = convolution(padded, w, None, g.stride, 0, g.dilation, g.groups).numpy()
    for dtype, array in ((ir.DataType.FLOAT, np.float32), (ir.DataType.DOUBLE, np.float64)):
        session = GradientSession(ir.to_proto(forward_model(g, dtype)), threads=1)
        (result,) = session.run({n: operands[n].astype(array) for n in ("input", "weight")}).values()
        assert result.dtype == array
        assert np.array_equal(result, expected)


def geometry(batch, channels: int, size: int, kernel: int = 3, groups: int = 1) -> ConvGeometry:
    weight = (channels, channels // groups, kernel, kernel)
    return ConvGeometry.from_forward((batch, channels, size, size), weight, 1, kernel // 2, groups=groups)


def test_the_rule_takes_small_images_under_large_weights() -> None:
    assert forward_by_columns(geometry(8, 512, 2), "float32", CPU)
    assert forward_by_columns(geometry("batch", 512, 7), "float32", CPU)
    assert not forward_by_columns(geometry(8, 128, 8), "float32", CPU)
    assert not forward_by_columns(geometry(8, 64, 56), "float32", CPU)
    assert not forward_by_columns(geometry(1, 512, 2), "float32", CPU)  # one sample: Conv is that GEMM already
    assert not forward_by_columns(geometry(8, 512, 2, groups=8), "float32", CPU)
    assert not forward_by_columns(geometry(8, 512, 2), "float32", CUDA)
    assert not forward_by_columns(geometry(8, 512, 2), "float64", CPU)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1, bias=True), nn.Conv2d(8, 8, 3, padding=1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).flatten(1)


@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch"}, "target": {0: "batch"}}])
def test_a_training_step_takes_it_and_shares_the_columns_with_the_weight_gradient(dynamic) -> None:
    torch.manual_seed(0)
    arguments = (torch.rand(4, 3, 2, 2), torch.randint(0, 8, (4,)))
    report = cg.export_training_step(Small(), "cross_entropy", "sgd", arguments, dynamic_shapes=dynamic)
    assert report.errors
    assert "Conv" not in report.operators
    # two convolutions, forward and weight gradient each: the four read two buffers of columns
    gathered = [node for node in report.model.graph if node.op_type == "Gather" and len(node.inputs[1].shape) == 1]
    wide = [node for node in gathered if node.inputs[1].shape.numpy()[0] >= 9]
    assert len(wide) == 2


def test_a_gradient_model_keeps_conv_for_its_constant_weights() -> None:
    report = cg.export_gradient(Small().eval(), torch.rand(4, 3, 2, 2), wrt="x")
    assert report.operators["Conv"] >= 2


@pytest.mark.parametrize("threads", [0, -1, True, 2.0, "4"])
def test_a_number_of_threads_that_is_none_is_refused(threads) -> None:
    for call in (
        lambda: cg.build_model("conv2d_weight", input_shape=(8, 4, 5, 5), weight_shape=(4, 4, 3, 3), threads=threads),
        lambda: cg.export(Small(), torch.rand(4, 3, 2, 2), threads=threads),
        lambda: cg.export_training_step(Small(), "mse", "sgd", (torch.rand(4, 3, 2, 2),) * 2, threads=threads),
    ):
        with pytest.raises(cg.ArgumentTypeError, match="threads is"):
            call()
