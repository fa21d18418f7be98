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
