"""Training steps of forwards under `torch.autocast`, inside of the module and around the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.training import artifacts
from convgrad_export.training.api import CheckpointState, Module, Optimizer

from .parity import batches

DYNAMIC = ({0: "batch"}, {0: "batch"})


class Inside(nn.Module):
    """Convolutions in bfloat16; the last layer, and the loss, in float32."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head, self.dtype = nn.Linear(144, 5), dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            x = self.features(x)
        return self.head(x.float().flatten(1))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_with_autocast_inside_trains_as_pytorch_does(dtype: torch.dtype) -> None:
    module, data = Inside(dtype), batches(4, torch.float32)
    report = cg.export_training_step(module, "cross_entropy", "sgd", data[0], dynamic_shapes=DYNAMIC)
    assert report.verified
    assert {value.dtype.name for value in report.model.graph.inputs} <= {"FLOAT", "INT64"}
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for x, y in data:
        loss = session.step(x, y)["loss"]
        optimizer.zero_grad()
        expected = functional.cross_entropy(module(x), y)
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=2e-2)
    for name, value in module.named_parameters():
        np.testing.assert_allclose(session.state()[name], value.detach(), rtol=0.05, atol=5e-3, err_msg=name)


def test_autocast_around_the_export_is_that_of_forward_and_loss() -> None:
    module, data = Plain(), batches(3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = cg.export_training_step(
            module, "cross_entropy", "adam", data[0], dynamic_shapes=DYNAMIC, return_outputs=True
        )
    assert report.verified
    assert any("bfloat16" in note for note in report.notes)
    plain = cg.export_training_step(module, "cross_entropy", "adam", data[0])
    assert not any("bfloat16" in note for note in plain.notes)
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.0, in_place=True)
    for x, y in data:
        result = session.step(x, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = module(x)
            loss = functional.cross_entropy(scores, y)
        assert result["loss"] == pytest.approx(loss.item(), rel=1e-2)
        np.testing.assert_allclose(result["output"].astype(np.float32), scores.detach().float(), rtol=0.05, atol=0.02)


def test_artifacts_with_autocast_train(tmp_path: Path) -> None:
    module, data = Inside(), batches(3, torch.float32)
    artifacts.generate_artifacts(
        module, loss="cross_entropy", optimizer="sgd", args=data[0], artifact_directory=tmp_path
    )
    state = CheckpointState.load_checkpoint(tmp_path / "checkpoint")
    trained = Module(tmp_path / "training_model.onnx", state, tmp_path / "eval_model.onnx")
    optimizer = Optimizer(tmp_path / "optimizer_model.onnx", trained)
    optimizer.set_learning_rate(0.1)
    reference = torch.optim.SGD(module.parameters(), lr=0.1)
    for x, y in data:
        loss = trained(x, y)[0]
        optimizer.step()
        trained.lazy_reset_grad()
        reference.zero_grad()
        expected = functional.cross_entropy(module(x), y)
        expected.backward()
        reference.step()
        assert float(loss) == pytest.approx(expected.item(), rel=2e-2)


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
def test_an_export_where_no_gradients_are_wanted(around: type, tmp_path: Path) -> None:
    module, batch = Plain(), batches(1, torch.float32)[0]
    with around():
        report = cg.export_training_step(module, "cross_entropy", "adam", batch)
        artifacts.generate_artifacts(module, loss="cross_entropy", args=batch, artifact_directory=tmp_path)
    assert report.verified
    assert not any(tensor.is_inference() for tensor in report.state.values())
