"""The forward convolution as one GEMM over the batch, which no catalogue entry covers, and where a step takes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import CPU, CUDA, columns
from convgrad_export.selection.forward_policy import forward_body

from ..cases import CASES, ConvCase
from .forward import assert_forward_is_exact


@pytest.mark.parametrize("case", [c for c in CASES if not c.geometry.transposed], ids=lambda case: case.name)
def test_forward_is_exact_on_integers(case: ConvCase) -> None:
    assert_forward_is_exact(case, columns.forward, ("float32", "float64"))


def geometry(batch, channels: int, size: int, kernel: int = 3, groups: int = 1) -> ConvGeometry:
    weight = (channels, channels // groups, kernel, kernel)
    return ConvGeometry.from_forward((batch, channels, size, size), weight, 1, kernel // 2, groups=groups)


def by_columns(g: ConvGeometry, dtype: str = "float32", provider: str = CPU, factor: float = 1.0) -> bool:
    return forward_body(g, dtype, provider, factor, None) is columns.forward


def test_the_rule_takes_small_images_under_large_weights() -> None:
    assert by_columns(geometry(8, 512, 2))
    assert by_columns(geometry(8, 512, 2), factor=2.0)  # too few tiles for Winograd
    assert by_columns(geometry("batch", 512, 7))
    assert not by_columns(geometry(8, 128, 8))
    assert not by_columns(geometry(8, 64, 56))
    assert not by_columns(geometry(1, 512, 2))  # one sample: Conv is that GEMM already
    assert not by_columns(geometry(8, 512, 2, groups=8))
    assert not by_columns(geometry(8, 512, 2), provider=CUDA)
    assert not by_columns(geometry(8, 512, 2), "float64")


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
