"""Transposed forward passes by lowerings of the input gradient that they are, and where a step takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import CPU, CUDA
from convgrad_export.selection.forward_policy import forward_body


def is_replaced(
    channels: int, size: int, kernel: int, stride: int, *, batch: int = 8, groups: int = 1, dtype="float32", **other
) -> bool:
    weight = (channels, channels // groups, kernel, kernel)
    g = ConvGeometry.from_forward(
        (batch, channels, size, size), weight, stride, kernel // 2, groups=groups, transposed=True
    )
    return forward_body(g, dtype, other.get("provider", CPU), 1.0, 1, other.get("opset", 18)) is not None


def test_the_rule_is_that_of_the_input_gradient() -> None:
    assert is_replaced(32, 8, 4, 2)
    assert is_replaced(32, 4, 3, 1)
    assert not is_replaced(32, 8, 4, 2, batch=1)  # ConvTranspose reads the weight as it lies
    assert not is_replaced(32, 8, 4, 2, groups=32)
    assert not is_replaced(32, 64, 4, 2)
    assert not is_replaced(32, 8, 4, 2, opset=17)  # no Col2Im
    assert not is_replaced(32, 8, 4, 2, provider=CUDA)
    assert not is_replaced(32, 8, 4, 2, dtype="float64")


@pytest.mark.parametrize("dynamic", [None, {"input": {0: "batch"}, "target": {0: "batch"}}])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.ConvTranspose2d(6, 4, 4), (1, 1)),
        (nn.ConvTranspose2d(6, 4, (3, 4), (2, 3), (1, 2), (1, 2)), (5, 4)),
        (nn.ConvTranspose2d(6, 4, 3, 2, padding=1, output_padding=1, dilation=2, bias=False), (4, 6)),
        (nn.ConvTranspose1d(6, 4, 4, 2, 1), (9,)),
    ],
)
def test_a_training_step_takes_it(layer: nn.Module, size: tuple[int, ...], dynamic) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, *size)
    target = torch.randn_like(layer(x)).detach()
    report = cg.export_training_step(layer, "mse", "sgd", (x, target), dynamic_shapes=dynamic)
    assert report.errors
    assert "ConvTranspose" not in report.operators
    session = cg.TrainingSession(report.model, report.state)
    for batch in (x, torch.randn(5, 6, *size)) if dynamic else (x,):
        wanted = torch.randn_like(layer(batch)).detach()
        expected = nn.functional.mse_loss(layer(batch), wanted).item()
        found = session.step(batch.numpy(), wanted.numpy(), learning_rate=0.0)["loss"]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
