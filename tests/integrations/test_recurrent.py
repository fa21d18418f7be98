"""Recurrent layers, whose kernels PyTorch chooses by CPU and dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg


class LastState(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0][-1]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_of_float32_are_exported_with_their_gradients(kind: type[nn.RNNBase]) -> None:
    """oneDNN's LSTM is one operator without an ONNX form; PyTorch takes it for float32 on CPUs that have it."""
    torch.manual_seed(0)
    module, x = LastState(kind), torch.randn(5, 2, 6)
    report = cg.export_gradient(module, (x,), wrt=["inputs", "parameters"], of=lambda out: out.square().sum())
    assert report.verified
    assert cg.export_training_step(module, "cross_entropy", "sgd", (x, torch.tensor([0, 1]))).verified
