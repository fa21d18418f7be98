"""Gradient hooks on parameters: `register_hook` runs in the exported step, other hooks are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.training import artifacts
from convgrad_export.training.api import CheckpointState, Module

from .parity import batches, small_network


def hooked(hook: Callable[[Tensor], Tensor | None], *names: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    module = small_network(dtype)
    for name in names:
        module.get_parameter(name).register_hook(hook)
    return module


def assert_same_hooked(module: nn.Module, **options: Any) -> None:
    """As PyTorch trains it; a copied parameter has no hooks, so the module itself is trained, after its export."""
    data = batches(3)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    report = cg.export_training_step(module, "cross_entropy", "sgd", data[0], **options)
    for name, value in module.state_dict().items():
        assert torch.equal(value, start[name])
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for x, y in data:
        session.step(x, y)
        optimizer.zero_grad()
        functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    for name, value in module.named_parameters():
        np.testing.assert_allclose(session.state()[name], value.detach(), rtol=1e-9, err_msg=name)


def test_hooks_change_gradients() -> None:
    mask = (torch.arange(24) % 2 == 0).double()
    module = hooked(lambda gradient: gradient * mask, "7.weight")
    module[5].weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    module[5].weight.register_hook(lambda gradient: 3 * gradient)
    module[7].bias.register_hook(lambda gradient: None)
    assert_same_hooked(module)


def test_hooks_after_accumulation_are_refused(tmp_path: Path) -> None:
    module = small_network()
    module[7].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(cg.UnsupportedOperatorError, match=r"7\.weight.*register_post_accumulate_grad_hook"):
        cg.export_training_step(module, "cross_entropy", "sgd", batches(1)[0])
    with pytest.raises(cg.UnsupportedOperatorError, match=r"7\.weight"):
        artifacts.generate_artifacts(module, loss="cross_entropy", args=batches(1)[0], artifact_directory=tmp_path)


def test_hooks_run_in_artifacts(tmp_path: Path) -> None:
    module = hooked(lambda gradient: 2 * gradient, "7.weight", dtype=torch.float32)
    (batch,) = batches(1, torch.float32)
    artifacts.generate_artifacts(module, loss="cross_entropy", args=batch, artifact_directory=tmp_path)
    state = CheckpointState.load_checkpoint(tmp_path / "checkpoint")
    Module(tmp_path / "training_model.onnx", state)(*batch)
    functional.cross_entropy(module(batch[0]), batch[1]).backward()
    for name in ("7.weight", "5.weight"):
        np.testing.assert_allclose(
            state.parameters[name].grad, module.get_parameter(name).grad, rtol=1e-4, atol=1e-6, err_msg=name
        )
