"""torch.onnx's translations, and what they log."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convgrad_export as cg
from convgrad_export.integrations import torchlib


class Sample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-0.9, 0.8, 24).reshape(1, 3, 4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.grid_sample(x, self.grid, align_corners=False)


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A scatter that names every axis made onnx_ir log a line; the registry one for each operator of torchvision."""
    torchlib.translations.cache_clear()
    cg.export_gradient(Sample(), (torch.randn(1, 3, 4, 5),))
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6), (4, 3, 2, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_group_normalization_takes_an_empty_batch(affine: bool, shape: tuple[int, ...]) -> None:
    """torch.onnx's translation leaves the size of a group to the runtime, which cannot tell it without samples."""
    x = torch.randn(3, *shape)
    module = nn.GroupNorm(2, 4, affine=affine)
    report = cg.export_gradient(module, (x,), dynamic_shapes={"input": {0: "batch"}}, of=lambda y: y.pow(3).sum())
    session = cg.GradientSession(report.model)
    for batch in (0, 1, 5):
        x = torch.randn(batch, *shape, requires_grad=True)
        module(x).pow(3).sum().backward()
        found = session.run({"input": x.detach()})
        torch.testing.assert_close(found["input.grad"], x.grad, rtol=1e-3, atol=1e-4)


class Diagonal(nn.Module):
    def __init__(self, *where: int) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x.diagonal(*self.where)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("where", [(), (1, -1, -2), (-2, 0, 1), (9, 1, 2), (0, 2, 0)])
def test_a_diagonal_reads_nothing_beside_it(where: tuple[int, ...], opset: int) -> None:
    """torch.onnx's translation multiplies the rest by zeros, which made NaN of a mask of infinities."""
    module, x = Diagonal(*where), torch.randn(3, 4, 5)
    report = cg.export(module, (x,), dynamic_shapes=({1: "height"},), opset_version=opset)
    session = cg.GradientSession(report.model)
    for height in (4, 1, 6):
        x = torch.randn(3, height, 5)
        x[:, 0, 1], x[1, :, 0], x[-1, -1, -1] = torch.inf, -torch.inf, torch.nan
        (found,) = session.run(None, {"x": x})
        torch.testing.assert_close(found, module(x), equal_nan=True)


class Mean(nn.Module):
    def __init__(self, *dims: int, keepdim: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.dims:
            return x.mean(dtype=torch.float32)
        return x.mean(self.dims, keepdim=self.keepdim, dtype=torch.float32)


@pytest.mark.parametrize("module", [Mean(), Mean(1), Mean(-1, 0, keepdim=True)])
def test_a_mean_of_integers_in_another_type_is_no_integer(module: nn.Module) -> None:
    """torch.onnx's translation converts the integer that the mean of integers is in ONNX."""
    x = torch.tensor([[1, 2, 4], [7, 8, 10]])
    report = cg.export(module, (x,), dynamic_shapes=({0: "batch"},))
    for batch in (x, x[:1], x.repeat(3, 1)):
        (found,) = cg.GradientSession(report.model).run(None, {"x": batch})
        torch.testing.assert_close(found, module(batch))


LOSSES = {
    "mean": lambda x, y: (x - y).mean(),
    "mse": nn.functional.mse_loss,
    "squares": lambda x, y: nn.functional.mse_loss(x, y, reduction="none"),
    "sum of squares": lambda x, y: nn.functional.mse_loss(x, y, reduction="sum"),
    "l1": nn.functional.l1_loss,
    "bce": nn.functional.binary_cross_entropy_with_logits,
    "cross entropy": lambda x, y: nn.functional.cross_entropy(x, y.argmax(1)),
}


class Loss(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return LOSSES[self.name](x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_batch_that_turns_out_to_be_empty_is_pytorchs(name: str, dtype: torch.dtype) -> None:
    """onnxruntime's mean of no elements is 0, a loss that looks perfect."""
    module, shapes = Loss(name), ({0: "batch"}, {0: "batch"})
    report = cg.export(module, (torch.rand(4, 3, dtype=dtype), torch.rand(4, 3, dtype=dtype)), dynamic_shapes=shapes)
    session = cg.GradientSession(report.model)
    for count in (0, 1, 7):
        x, y = torch.rand(count, 3, dtype=dtype), torch.rand(count, 3, dtype=dtype)
        (found,) = session.run({"x": x, "y": y}).values()
        torch.testing.assert_close(found, module(x, y), equal_nan=True, rtol=1e-2, atol=1e-3)
