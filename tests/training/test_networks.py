"""Whole training steps of networks against PyTorch: part of the table of benchmarks/training, the rest if asked for."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.training.networks import BY_NAME, NETWORKS
from benchmarks.training.parity import RESULT, available, compare, markdown

QUICK = ("tcn", "dcgan_generator")
DTYPES = ["float32", "float64"]


@pytest.mark.parametrize("name", QUICK)
def test_training_follows_pytorch(name: str) -> None:
    row = compare(BY_NAME[name], torch.float32, steps=5)
    assert row["within"], row


def test_another_training_is_not_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: PyTorch with another momentum is outside by far."""
    from benchmarks.training import parity

    exported = parity.make_optimizer
    calls: list[None] = []

    def different(parameters: object) -> torch.optim.Optimizer:
        calls.append(None)
        optimizer = exported(parameters)
        if len(calls) > 1:  # the first call is the exporter's
            optimizer.param_groups[0]["momentum"] = 0.89
        return optimizer

    monkeypatch.setattr(parity, "make_optimizer", different)
    row = compare(BY_NAME["dcgan_generator"], torch.float32, steps=3)
    assert not row["within"]
    assert row["worst_in_bounds"] > 10


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_every_network_follows_pytorch(network, dtype: str) -> None:
    if not available(network):
        pytest.skip(f"{network.package} is not installed")
    row = compare(network, getattr(torch, dtype))
    assert row["within"], row


def test_the_committed_table_is_the_measurement() -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    assert markdown(rows) in (RESULT.parent / "README.md").read_text()
    assert all(row["within"] for row in rows)
    assert {row["network"] for row in rows} <= set(BY_NAME)
