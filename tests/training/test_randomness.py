"""Random numbers from a seed: their distribution, and that ONNX draws the same ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.training.randomness import SeededRandomness


def mode(seed: int = 0, step: int = 0) -> SeededRandomness:
    return SeededRandomness(torch.tensor(seed), torch.tensor(step))


def test_numbers_are_uniform_and_independent() -> None:
    drawn = mode().uniform((200_000,), torch.float64).numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts, _ = np.histogram(drawn, 100, (0, 1))
    # 99 degrees of freedom: beyond 160 with probability below 1e-4
    assert ((counts - 2000.0) ** 2 / 2000).sum() < 160
    for distance in (1, 2, 7, 64):
        assert abs(np.corrcoef(drawn[:-distance], drawn[distance:])[0, 1]) < 0.01


@pytest.mark.parametrize("other", [mode(1, 0), mode(0, 1)], ids=["seed", "step"])
def test_seeds_steps_and_draws_are_uncorrelated(other: SeededRandomness) -> None:
    first = mode()
    a, b, c = (x.numpy() for x in (first.bits((50_000,)), first.bits((50_000,)), other.bits((50_000,))))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert abs(np.corrcoef(a, c)[0, 1]) < 0.02
    assert (a == b).mean() < 1e-3


def test_dropout_keeps_the_mean_and_scales() -> None:
    x = torch.ones(1000, 100)
    with mode():
        y = functional.dropout(x, 0.3)
        channels = functional.dropout2d(torch.ones(50, 40, 3, 3), 0.25)
        assert functional.dropout(x, 0.3, training=False) is x
        assert functional.dropout(x, 1.0).abs().max() == 0
        alpha = functional.alpha_dropout(torch.randn(400, 500), 0.2, training=True)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert abs(y.mean().item() - 1) < 0.01
    assert all(len(channel.unique()) == 1 for channel in channels.flatten(0, 1))
    assert abs(alpha.mean().item()) < 0.02
    assert abs(alpha.std().item() - 1) < 0.02


class Random(nn.Module):
    """Everything that draws: dropout in all forms, stochastic depth's bernoulli_, rand, rand_like."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.drop, self.channels, self.alpha = nn.Dropout(0.4), nn.Dropout2d(0.3), nn.AlphaDropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(self.drop(self.conv(x)))
        depth = torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.7).div_(0.7)
        x = self.alpha(x * depth) * torch.rand_like(x) + torch.rand(4, 1, 1)
        return x * torch.bernoulli(torch.sigmoid(x.detach()))


def test_the_exported_step_draws_what_pytorch_draws() -> None:
    """Verification compares with eager PyTorch under the same mode; a step draws anew."""
    batch = (torch.randn(3, 2, 5, 6), torch.randn(3, 4, 5, 6))
    module = Random().train()
    report = cg.export_training_step(module, "mse", "sgd", batch, dynamic_shapes={"x": {0: "n"}, "target": {0: "n"}})
    assert report.verified
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.0, seed=5)
    for step in range(3):
        loss = session.step(*batch)["loss"]
        with SeededRandomness(torch.tensor(5), torch.tensor(step)), torch.no_grad():
            assert functional.mse_loss(module(batch[0]), batch[1]).item() == pytest.approx(loss, rel=1e-5)
