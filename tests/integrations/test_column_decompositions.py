"""Unfold and Fold: empty batches, float64, old opsets, single pictures, dynamic sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg

from .onnx_check import compare_gradients

OPTIONS: dict[str, dict[str, Any]] = {
    "padded": {"kernel_size": 3, "padding": 1},
    "remainder": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 2)},
    "dilated": {"kernel_size": (2, 3), "stride": 2, "dilation": (3, 1)},
}


class RoundTrip(nn.Module):
    """The squares of all windows, added up where they lie."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, input: Tensor) -> Tensor:
        columns = nn.functional.unfold(input, **self.options)
        return nn.functional.fold(columns.square(), input.shape[-2:], **self.options)


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients(options: dict[str, Any], dtype: torch.dtype, opset: int) -> None:
    compare_gradients(RoundTrip(**options), (data(2, 3, 7, 8).to(dtype),), opset=opset)


def test_a_picture_without_a_batch_axis() -> None:
    compare_gradients(RoundTrip(**OPTIONS["remainder"]), (data(3, 7, 8),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_and_no_samples(dtype: torch.dtype) -> None:
    module = RoundTrip(**OPTIONS["remainder"])
    shapes = {"input": {0: "batch", 2: "height", 3: "width"}}
    report = cg.export_gradient(module, (data(2, 3, 7, 8).to(dtype),), dynamic_shapes=shapes)
    session = cg.GradientSession(report.model)
    for shape in ((0, 3, 7, 8), (1, 3, 6, 11)):
        x = data(*shape).to(dtype).requires_grad_()
        module(x).sum().backward()
        found = session.run({"input": x.detach()})
        torch.testing.assert_close(found["input.grad"], x.grad, rtol=1e-5, atol=1e-5)
