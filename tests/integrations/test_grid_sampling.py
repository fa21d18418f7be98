"""grid_sample and affine_grid: positions on the border, volumes, and dynamic sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg

from .onnx_check import compare_gradients


class Transformer(nn.Module):
    """A spatial transformer that starts as the identity: its outer positions lie exactly on the border."""

    def __init__(self, axes: int, padding_mode: str, align_corners: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(2, axes * (axes + 1))
        nn.init.zeros_(self.linear.weight)
        self.linear.bias.data.copy_(torch.eye(axes, axes + 1).flatten())
        self.options = {"padding_mode": padding_mode, "align_corners": align_corners}
        self.axes = axes

    def forward(self, input: Tensor) -> Tensor:
        theta = self.linear(input.flatten(2).mean(2)).unflatten(1, (self.axes, self.axes + 1))
        grid = functional.affine_grid(theta, input.shape, align_corners=self.options["align_corners"])
        return functional.grid_sample(input, grid, **self.options)


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", [(2, 2, 5, 5), (2, 2, 3, 5, 9)], ids=["picture", "volume"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_gradients_at_the_identity(shape: tuple[int, ...], padding_mode: str) -> None:
    compare_gradients(Transformer(len(shape) - 2, padding_mode, True), (data(*shape),))


def test_a_spatial_transformer_of_any_size() -> None:
    module = Transformer(2, "border", False)
    nn.init.normal_(module.linear.weight)
    shapes = {"input": {0: "batch", 2: "height", 3: "width"}}
    report = cg.export_gradient(module, (data(2, 2, 8, 6),), wrt=["inputs", "parameters"], dynamic_shapes=shapes)
    assert report.verified


class Warp(nn.Module):
    def __init__(self, mode: str, padding_mode: str) -> None:
        super().__init__()
        self.options = {"mode": mode, "padding_mode": padding_mode, "align_corners": False}

    def forward(self, input: Tensor, grid: Tensor) -> Tensor:
        return functional.grid_sample(input, grid, **self.options)


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_volumes_are_sampled_inside_and_outside(mode: str, padding_mode: str) -> None:
    grid = 2 * data(2, 4, 3, 5, 3)
    compare_gradients(Warp(mode, padding_mode), (data(2, 3, 4, 5, 6), grid))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_an_empty_batch_has_an_empty_gradient(mode: str) -> None:
    """torch.onnx's translation of index_put broadcast the positions of no samples to those of one."""
    module, shapes = Warp(mode, "zeros"), {"input": {0: "batch"}, "grid": {0: "batch"}}
    report = cg.export_gradient(module, (data(2, 2, 5, 6), data(2, 3, 4, 2)), dynamic_shapes=shapes)
    session = cg.GradientSession(report.model)
    for batch in (0, 1, 3):
        x, grid = data(batch, 2, 5, 6).requires_grad_(), data(batch, 3, 4, 2).requires_grad_()
        module(x, grid).sum().backward()
        found = session.run({"input": x.detach(), "grid": grid.detach()})
        torch.testing.assert_close(found["input.grad"], x.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["grid.grad"], grid.grad, rtol=1e-4, atol=1e-4)
