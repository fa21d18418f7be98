"""Winograd's forward form, its parts, what a training step shares, and where "auto" takes it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import convgrad_export as cg
from convgrad_export.accuracy import reference_and_bounds
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import CPU, CUDA, LOWERINGS, winograd
from convgrad_export.selection.forward_policy import forward_body
from convgrad_export.selection.policy import choose

from ..cases import CASES, ConvCase
from ..running import run_lowering
from .forward import assert_forward_is_exact


def forward(op, g, input, weight):
    return winograd.forward(op, g, input, weight, 4)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if not c.geometry.transposed and winograd.why_not(4)(c.geometry) is None],
    ids=lambda case: case.name,
)
def test_forward_is_exact_on_integers(case: ConvCase) -> None:
    assert_forward_is_exact(case, forward, ("float32",))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_of_the_tiles_are_put_together_again(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_parts", lambda g, tiling, tile: parts)
    for name in ("winograd_channels", "winograd_dilated", "winograd_1d_dilated", "winograd_3d"):
        case = next(case for case in CASES if case.name == name)
        assert_forward_is_exact(case, forward, ("float32",))
        operands = case.operands("float32", integers=True)
        expected = case.expected(operands, "float32")
        for gradient in ("input", "weight"):
            lowering = LOWERINGS[f"{gradient}.winograd4"]
            assert np.array_equal(run_lowering(case.geometry, lowering, operands), expected[gradient][0]), name


def geometry(batch, channels: int, size: int, kernel: int = 3, **attributes) -> ConvGeometry:
    weight = (channels, channels // attributes.get("groups", 1), kernel, kernel)
    padding = attributes.get("dilation", 1) * (kernel // 2)
    return ConvGeometry.from_forward((batch, channels, size, size), weight, padding=padding, **attributes)


def test_parts_are_larger_than_the_weight() -> None:
    """Of 64 channels at 56x56 nine; 512 channels at 7x7 hold more in the weight than in the image."""
    for g, parts in ((geometry(8, 64, 56), 9), (geometry(8, 256, 14), 2), (geometry(8, 512, 7), 1)):
        assert winograd._parts(g, winograd._tiling(g.output_size, g, 4), 4) == parts


def names(g: ConvGeometry, **arguments) -> tuple[str, str, bool]:
    body = forward_body(g, "float32", CPU, arguments.get("max_error_factor", 2.0), arguments.get("threads"))
    return (
        choose("input", g, **arguments).name,
        choose("weight", g, **arguments).name,
        isinstance(body, partial) and body.keywords == {"tile": 4},
    )


BOTH = ("input.winograd4", "weight.winograd4", True)


@pytest.mark.parametrize("size", [4, 14, 56])
@pytest.mark.parametrize("dilation", [1, 2])
def test_auto_takes_tiles_of_4_for_dense_layers(size: int, dilation: int) -> None:
    assert names(geometry(8, 64, size, dilation=dilation)) == BOTH
    assert names(geometry("batch", 128, size, dilation=dilation)) == BOTH
    narrow = names(geometry(8, 32, min(size, 28), dilation=dilation), threads=1)
    assert narrow == ("input.winograd4", "weight.channels_last_conv", True)


@pytest.mark.parametrize(
    "g",
    [
        geometry(8, 32, 28),
        geometry(8, 48, 56),
        ConvGeometry.from_forward((8, 16, 8, 8), (256, 16, 3, 3), padding=1),
        geometry(8, 64, 56, stride=2),
        geometry(8, 64, 56, groups=2),
        geometry(8, 64, 56, kernel=1),
        geometry(8, 64, 56, kernel=5),
        geometry(8, 512, 2),
        ConvGeometry.from_forward((8, 48, 1024), (48, 48, 3), padding=1),
        ConvGeometry.from_forward((8, 64, 8, 8, 8), (64, 64, 3, 3, 3), padding=1),
        ConvGeometry.from_forward((8, 128, 1, 8, 8), (128, 128, 3, 3, 3), padding=1),  # two of three taps on padding
        ConvGeometry.from_forward((8, 128, 8, 28, 28), (128, 128, 3, 3, 3), padding=1),  # eight times 26 MB
        ConvGeometry.from_forward((8, 72, 112, 112), (96, 72, 3, 3), padding=1),
    ],
    ids=lambda g: g.describe(),
)
def test_auto_keeps_to_direct_forms_elsewhere(g: ConvGeometry) -> None:
    assert not any("winograd" in name for name in names(g)[:2])
    assert not names(g)[2]


def test_auto_wants_more_channels_of_a_kernel_along_one_axis() -> None:
    for channels, threads, expected in (
        (48, 1, (False, False, False)),
        (96, 1, (False, False, True)),
        (96, 2, (False, False, False)),
        (160, 1, (False, True, True)),
        (192, 2, (True, True, True)),
    ):
        for g in (
            ConvGeometry.from_forward((8, channels, 512), (channels, channels, 3), padding=2, dilation=2),
            ConvGeometry.from_forward((8, channels, 16, 16), (channels, channels, 1, 3), padding=(0, 1)),
        ):
            chosen = names(g, threads=threads)
            assert ("winograd" in chosen[0], "winograd" in chosen[1], chosen[2]) == expected


def test_auto_takes_tiles_of_4_for_volumes() -> None:
    g = ConvGeometry.from_forward((8, 128, 4, 14, 14), (128, 128, 3, 3, 3), padding=1)
    assert names(g) == ("input.winograd4", "weight.winograd4", True)


def test_auto_obeys_the_limit_the_provider_and_a_constant_weight() -> None:
    g = geometry(8, 64, 28)
    assert not any("winograd" in name for name in names(g, max_error_factor=1.0)[:2])
    assert not names(g, max_error_factor=1.0)[2]
    assert names(g, max_error_factor=8.0)[:2] == ("input.winograd6", "weight.winograd6")
    for gradient in ("input", "weight"):
        assert "winograd" not in choose(gradient, g, provider=CUDA, max_error_factor=8.0).name
        assert "winograd" not in choose(gradient, g, "float64").name
    assert choose("input", g, constant_weight=True).name == "input.flipped_conv"
    assert choose("input", geometry(8, 128, 28), constant_weight=True).name == "input.winograd4"


@pytest.mark.parametrize("factor", [0.5, float("nan"), True, "2", None])
def test_a_limit_that_is_none_is_refused(factor) -> None:
    module, x = nn.Conv2d(2, 3, 3), torch.rand(1, 2, 5, 5)
    for call in (
        lambda: cg.build_model(
            "conv2d_weight", input_shape=(8, 4, 5, 5), weight_shape=(4, 4, 3, 3), max_error_factor=factor
        ),
        lambda: cg.export(module, x, max_error_factor=factor),
        lambda: cg.export_gradient(module, x, max_error_factor=factor),
        lambda: cg.export_training_step(module, "mse", "sgd", (x, torch.rand(1, 3, 3, 3)), max_error_factor=factor),
    ):
        with pytest.raises(cg.ArgumentTypeError, match="max_error_factor is"):
            call()


def test_whole_numbers_stay_exact_at_the_size_of_a_real_layer() -> None:
    g = geometry(2, 96, 14)
    rng = np.random.default_rng(0)
    shapes = {"input": g.input_shape, "weight": g.weight_shape, "grad_output": g.output_shape}
    operands = {name: rng.integers(-8, 9, shape).astype(np.float64) for name, shape in shapes.items()}
    expected = reference_and_bounds(g, operands, "float32", "float32")
    for gradient in ("input", "weight"):
        result = run_lowering(g, LOWERINGS[f"{gradient}.winograd4"], operands)
        assert np.array_equal(result, expected[gradient][0])


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).mean((2, 3))


@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch"}, "target": {0: "batch"}}])
def test_a_training_step_shares_the_transforms(dynamic) -> None:
    torch.manual_seed(0)
    arguments = (torch.rand(4, 64, 8, 8), torch.randint(0, 64, (4,)))
    report = cg.export_training_step(Wide(), "cross_entropy", "sgd", arguments, dynamic_shapes=dynamic)
    assert report.errors
    assert "Conv" not in report.operators
    # Of two convolutions: two forward passes, two weight gradients and one input gradient. Each has its own product and
    # transform back, ten; transforms of two inputs, two weights and two grad_outputs for the weight gradients, six; and
    # of one grad_output for the input gradient.
    assert report.operators["MatMul"] == 17
    direct = cg.export_training_step(
        Wide(), "cross_entropy", "sgd", arguments, dynamic_shapes=dynamic, max_error_factor=1
    )
    assert "MatMul" not in direct.operators or direct.operators["Conv"] >= 2


def test_gradients_of_a_wide_network_are_those_of_float64() -> None:
    torch.manual_seed(0)
    report = cg.export_gradient(Wide(), torch.rand(2, 64, 14, 14), wrt=["x", "parameters"])
    assert {choice.lowering for choice in report.lowerings} >= {"weight.winograd4"}
