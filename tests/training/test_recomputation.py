"""`torch.utils.checkpoint` inside a training step: a part of the forward is called again by the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import convgrad_export as cg
from convgrad_export.training import artifacts
from convgrad_export.training.api import CheckpointState, Module, Optimizer
from convgrad_export.training.comparison import train_with_pytorch
from convgrad_export.training.losses import resolve_loss
from convgrad_export.training.randomness import SeededRandomness

from .parity import assert_same_training, batches, train_artifacts, train_in_pytorch


class Recomputing(nn.Module):
    """Two checkpointed parts, or the same layers without checkpoints."""

    def __init__(self, layer: nn.Module, recompute: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, bias=False), layer, nn.SiLU(), nn.Conv2d(3, 3, 1))
        self.second = nn.Sequential(nn.Tanh(), layer, nn.Conv2d(3, 3, 3))
        self.head = nn.Linear(3, 5)
        self.recompute = recompute
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.second):
            x = checkpoint(part, x, use_reentrant=False) if self.recompute else part(x)
        return self.head(x.flatten(1))


@pytest.mark.parametrize(
    "layer",
    [nn.Identity(), nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)],
    ids=["stateless", "BatchNorm", "BatchNorm, averages"],
)
def test_checkpointed_parts_train_as_in_pytorch(layer: nn.Module) -> None:
    """The new weights are seen by the second call, and BatchNorm's statistics move twice, as PyTorch's do."""
    assert_same_training(
        Recomputing(layer),
        "cross_entropy",
        functional.cross_entropy,
        lambda p: torch.optim.SGD(p, lr=0.5),
        batches(4),
    )


def test_dropout_is_the_same_in_both_calls() -> None:
    states, losses = [], []
    for recompute in (True, False):
        module = Recomputing(nn.Dropout(0.5), recompute)
        data = batches(3)
        report = cg.export_training_step(module, "cross_entropy", "sgd", data[0])
        session = cg.TrainingSession(report.model, report.state, learning_rate=0.5, seed=3)
        losses.append([session.step(x.numpy(), y.numpy())["loss"] for x, y in data])
        states.append(session.state())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=1e-10, err_msg=name)


def test_pytorchs_own_training_draws_the_same_numbers() -> None:
    loss, data = resolve_loss("cross_entropy"), [(x.numpy(), y.numpy()) for x, y in batches(3)]
    found = [
        train_with_pytorch(
            Recomputing(nn.Dropout(0.5), recompute),
            loss,
            lambda p: torch.optim.SGD(p, lr=0.5),
            data,
            seed=3,
            dtype=torch.float64,
        )
        for recompute in (True, False)
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for name, value in found[0][1].state_dict().items():
        torch.testing.assert_close(value, found[1][1].state_dict()[name], rtol=1e-10, atol=1e-12)


def test_generators_are_given_back() -> None:
    before = (torch.get_rng_state, torch.random.get_rng_state, torch.set_rng_state, torch.random.set_rng_state)
    with SeededRandomness(torch.tensor(0), torch.tensor(0)) as random:
        with torch.random.fork_rng():
            first = torch.rand(3)
        assert torch.equal(torch.rand(3), first)
        assert random.draws == 1
    assert before == (
        torch.get_rng_state,
        torch.random.get_rng_state,
        torch.set_rng_state,
        torch.random.set_rng_state,
    )


def test_artifacts_of_a_checkpointed_module_train_as_in_pytorch(tmp_path: Path) -> None:
    eager = Recomputing(nn.Identity(), dtype=torch.float32)
    data = batches(4, torch.float32)
    options: dict[str, Any] = {"loss": artifacts.LossType.CrossEntropyLoss, "optimizer": artifacts.OptimType.SGD}
    artifacts.generate_artifacts(eager, args=data[0], artifact_directory=tmp_path, **options)
    state = CheckpointState.load_checkpoint(tmp_path / "checkpoint")
    module = Module(tmp_path / "training_model.onnx", state)
    optimizer = Optimizer(tmp_path / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(0.5)
    reference = torch.optim.SGD(eager.parameters(), lr=0.5)
    losses = [loss for loss, *_ in train_artifacts(module, optimizer, data)]
    assert losses == pytest.approx(train_in_pytorch(eager, functional.cross_entropy, reference, data), rel=1e-4)
    for name, value in eager.named_parameters():
        np.testing.assert_allclose(state.arrays[name], value.detach(), rtol=1e-3, atol=1e-5, err_msg=name)
