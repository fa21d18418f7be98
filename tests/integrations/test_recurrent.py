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


class BehindConvolution(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 6, 3, stride=2, padding=1)
        self.recurrent = kind(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(self.convolution(x).transpose(1, 2))[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_length_that_follows_from_a_dynamic_one_is_named(kind: type[nn.RNNBase]) -> None:
    """It was an error of PyTorch's about two sizes that must match."""
    module, x = BehindConvolution(kind), torch.randn(2, 3, 10)
    with pytest.raises(
        cg.DynamicShapeError, match=r"dimension 2 of 'x' .*\('time'\).* for size 10.*module 'recurrent'"
    ):
        cg.export_gradient(module, (x,), dynamic_shapes={"x": {0: "batch", 2: "time"}})
    assert cg.export_gradient(module, (x,), dynamic_shapes={"x": {0: "batch"}}).verified
