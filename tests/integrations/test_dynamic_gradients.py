"""Gradients over dynamic sizes, verified at the example's and at further ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def squares(output: Tensor) -> Tensor:
    return output.square().sum()


def exported(module: nn.Module, x: Tensor, dimensions: dict[int, str], **options: Any) -> cg.ExportReport:
    report = cg.export_gradient(
        module, (x,), of=squares, wrt=["inputs", "parameters"], dynamic_shapes={"input": dimensions}, **options
    )
    assert report.verified
    return report


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_over_a_dynamic_batch(training: bool) -> None:
    exported(nn.InstanceNorm2d(4, affine=True).train(training), image(2, 4, 9, 8), {0: "n"})
