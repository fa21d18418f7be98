"""Depthwise convolutions as one matrix a channel: the forward form, where "auto" takes it, what a step shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import CPU, CUDA, image_matmul
from convgrad_export.selection.forward_policy import forward_body
from convgrad_export.selection.policy import choose

from ..cases import CASES, ConvCase
from .forward import assert_forward_is_exact

DEPTHWISE = [c for c in CASES if not c.geometry.transposed and image_matmul.why_not(c.geometry) is None]


@pytest.mark.parametrize("case", DEPTHWISE, ids=lambda case: case.name)
def test_forward_is_exact_on_integers(case: ConvCase) -> None:
    assert_forward_is_exact(case, image_matmul.forward, ("float32",))


def test_the_cases_have_a_channel_multiplier() -> None:
    assert any(case.geometry.out_channels > case.geometry.in_channels > 1 for case in DEPTHWISE)


def geometry(batch, channels: int, size: int, kernel: int = 3, stride: int = 1, multiplier: int = 1) -> ConvGeometry:
    weight = (channels * multiplier, 1, kernel, kernel)
    return ConvGeometry.from_forward(
        (batch, channels, size, size), weight, stride, padding=kernel // 2, groups=channels
    )


def taken(g: ConvGeometry, **arguments) -> tuple[bool, bool, bool]:
    forward = forward_body(g, "float32", arguments.get("provider", CPU), 1.0, arguments.get("threads"))
    chosen = [choose(gradient, g, **arguments).name for gradient in ("input", "weight")]
    return (forward is image_matmul.forward, *(name.endswith(".image_matmul") for name in chosen))


@pytest.mark.parametrize("threads", [1, 2, None])
def test_auto_takes_small_images(threads) -> None:
    for g in (geometry(8, 960, 2), geometry("batch", 576, 4, stride=2), geometry(8, 768, 7, kernel=7)):
        assert taken(g, threads=threads) == (True, True, True)
    for g in (geometry(8, 144, 16), geometry(1, 960, 7), geometry(8, 96, 112, stride=2)):
        assert taken(g, threads=threads) == (False, False, False)


def test_auto_leaves_a_constant_weight_another_provider_and_another_type() -> None:
    g = geometry(8, 960, 2)
    assert taken(g, provider=CUDA) == (False, False, False)
    assert choose("input", g, constant_weight=True).name == "input.flipped_conv"
    for gradient in ("input", "weight"):
        assert choose(gradient, g, "float64").name != f"{gradient}.image_matmul"


def test_large_images_are_refused_with_the_reason() -> None:
    with pytest.raises(cg.UnsupportedLoweringError, match="its constant would have"):
        choose("input", geometry(8, 32, 56), lowering="input.image_matmul")
    with pytest.raises(cg.UnsupportedLoweringError, match="2 input channels"):
        choose(
            "weight", ConvGeometry.from_forward((1, 4, 4, 4), (4, 2, 3, 3), groups=2), lowering="weight.image_matmul"
        )


class Depthwise(nn.Module):
    def __init__(self, multiplier: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 6 * multiplier, 3, padding=1, groups=6)
        self.second = nn.Conv2d(6 * multiplier, 6 * multiplier, 3, 2, padding=1, groups=6 * multiplier)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).mean((2, 3))


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch"}, "target": {0: "batch"}}])
def test_a_training_step_makes_each_matrix_once(dynamic, multiplier: int) -> None:
    torch.manual_seed(0)
    arguments = (torch.rand(4, 6, 4, 4), torch.randint(0, 6, (4,)))
    module = Depthwise(multiplier)
    report = cg.export_training_step(module, "cross_entropy", "sgd", arguments, dynamic_shapes=dynamic)
    assert report.errors
    assert "Conv" not in report.operators
    # Forward and gradients of two layers without the first's input gradient: five products, two sums of a tap's pairs,
    # and two matrices.
    assert report.operators["MatMul"] == 9
