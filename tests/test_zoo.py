"""Input and parameter gradients of whole networks, exported and held to float64 eager.

Six small networks in every run; all of `networks.py` with `pytest -m "peer and slow" tests/test_zoo.py` (some four
minutes, needs the packages named there), or as a table with `python -m tests.zoo`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from .networks import NETWORKS, Network
from .small_networks import SMALL_NETWORKS
from .zoo import RESULTS, export_network


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("network", SMALL_NETWORKS, ids=lambda network: network.name)
def test_small_networks(network: Network, training: bool, tmp_path: Path) -> None:
    report = export_network(network, training=training, path=tmp_path / "gradients.onnx")
    assert report.verified
    assert {name for name in report.errors if name.endswith(".grad")} >= {
        f"{name}.grad" for name, _ in network.build().named_parameters()
    }
    # A file is its weights and the graph: nothing is stored twice.
    assert report.sizes["files"] == (tmp_path / "gradients.onnx").stat().st_size
    assert report.sizes["graph"] < 1200 * sum(report.operators.values())


def test_biases_before_a_normalization_are_judged_by_what_cancels() -> None:
    report = export_network(SMALL_NETWORKS[1])
    cancelled = {name for name, error in report.errors.items() if error.cancelled}
    assert cancelled == {"down.0.bias.grad", "bottom.0.bias.grad"}
    assert all(report.errors[name].bound < 1e-4 for name in cancelled)
    # A near tie of a ReLU on one of the inputs widens the bounds of what lies below it.
    bounds = sorted(error.bound for error in report.errors.values())
    assert bounds[len(bounds) // 3] < 1e-4


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_public_networks(network: Network) -> None:
    if importlib.util.find_spec(network.package) is None:
        pytest.skip(f"{network.package} is not installed")
    assert export_network(network).verified


def test_the_committed_results_are_of_this_list_and_all_passed() -> None:
    results = json.loads(RESULTS.read_text())
    assert results["failed"] == []
    assert [row["network"] for row in results["passed"]] == [network.name for network in NETWORKS]
    assert all(row["relative_error"] <= row["bound"] for row in results["passed"])
    # A tie of a ReLU or a max pooling on one of the inputs widens a network's bound; few have one.
    assert sorted(row["bound"] for row in results["passed"])[29] < 2e-4
    assert max(row["bound"] for row in results["passed"]) < 2e-2
