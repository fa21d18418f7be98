"""The GPU benchmark's own code on the CPU, and the pieces around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.cuda import layers, models, run, steps, wheel_parts
from benchmarks.cuda.timing import Budget, medians


def test_one_call_checks_times_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    parts = ["--parts", "placement", "bandwidth", "layers", "steps", "--networks", "tcn", "--backends", "eager"]
    assert run.main(["--device", "cpu", "--quick", "--output", str(output), *parts]) == 0
    record = json.loads(output.read_text())
    assert record["environment"]["device"] == "cpu"
    assert record["environment"]["command"]
    assert {result["precision"] for result in record["layers"]} == {"float32", "float16"}
    assert all(set(result["times"]) == {"torch", result["chosen"]} for result in record["layers"])
    assert [result["network"] for result in record["steps"]] == list(models.MODELS)
    assert all(result["gradient_error"]["eager"] < 1e-4 for result in record["steps"])
    printed = capsys.readouterr().out
    assert "these figures measure nothing" in printed
    assert "step r3d_18" in printed


@pytest.mark.slow
def test_one_call_with_compiled_steps_and_the_gate(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    arguments = ["--device", "cpu", "--quick", "--output", str(output), "--parts", "gate", "steps"]
    assert run.main([*arguments, "--backends", "eager", "inductor", "convgrad", "convgrad_ort"]) == 0
    record = json.loads(output.read_text())
    assert [entry["kernel_ms"] > 0 for entry in record["gate"]["measured"]] == [True]
    assert all(len(result["times"]) == 4 and not result["failed"] for result in record["steps"])


def test_without_a_device_the_script_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert run.main(["--output", str(tmp_path / "results.json")]) == 2
    assert "torch.cuda.is_available() is False" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_spent_budget_skips_and_says_so() -> None:
    cases = layers.cases(["tcn", "resnet18"], 1, 2)
    assert [label.split()[0] for label, _ in cases[:2]] == ["tcn", "resnet18"]
    results = list(layers.run(cases, ["float32"], "cpu", 1, False, False, Budget(-1.0)))
    assert [result["skipped"] for result in results] == ["no time left"] * (2 * len(cases))
    failures = run.report({"environment": {"device": "x", "versions": {}}, "quick": False, "layers": results})
    assert failures == 0


def test_wrong_results_and_nodes_off_cuda_are_failures() -> None:
    result = {"layer": "a", "gradient": "input", "precision": "float32", "chosen": "input.conv", "bytes": 8}
    timed = {**result, "times": {n: {"median_ms": 1.0} for n in ("torch", "input.conv")}, "wrong": [], "left_cuda": {}}
    record = {"environment": {"device": "x", "versions": {}}, "quick": False}
    assert run.report({**record, "layers": [timed]}) == 0
    assert run.report({**record, "layers": [{**timed, "wrong": ["input.conv"]}]}) == 1
    assert run.report({**record, "layers": [{**timed, "left_cuda": {"input.conv": ["Pad"]}}]}) == 1
    left = {"models": 3, "left": [{"case": "x"}], "complete": True}
    assert run.report({**record, "placement": left}) == 1
    wrong_step = {"network": "n", "precision": "tf32", "times": {}, "failed": {"convgrad": "wrong gradients: 1.0"}}
    assert run.report({**record, "steps": [wrong_step]}) == 1


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps.TOLERANCES, "float32", -1.0)
    (result,) = steps.run(["resnet50"], ["float32"], ["eager"], 2, "cpu", True, 1, Budget(60.0))
    assert result["times"] == {}
    assert "wrong gradients" in result["failed"]["eager"]


def test_medians_are_of_alternating_calls() -> None:
    order: list[str] = []
    times = medians({name: lambda name=name: order.append(name) for name in "ab"}, "cpu", rounds=3, round_ms=0.0)
    assert {name: entry["rounds"] for name, entry in times.items()} == {"a": 3, "b": 3}
    assert order[-6:] == ["a", "b"] * 3


def test_the_networks_have_their_published_number_of_parameters() -> None:
    counts = {}
    with torch.device("meta"):
        for name, (build, _, _) in models.MODELS.items():
            counts[name] = sum(parameter.numel() for parameter in build(False).parameters())
    assert counts == {"resnet50": 25_557_032, "convnext_tiny": 28_589_128, "r3d_18": 33_371_472}


def test_a_file_is_cut_and_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel, folder, out = tmp_path / "a-1.whl", tmp_path / "parts", tmp_path / "out"
    out.mkdir()
    wheel.write_bytes(bytes(range(256)) * 10000)  # 2.44 MiB
    assert wheel_parts.main(["split", str(wheel), str(folder), "--megabytes", "1"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "a-1.whl.000",
        "a-1.whl.001",
        "a-1.whl.002",
        "a-1.whl.sha256",
    ]
    assert wheel_parts.main(["join", str(folder), str(out)]) == 0
    assert (out / "a-1.whl").read_bytes() == wheel.read_bytes()
    (out / "a-1.whl").unlink()
    (folder / "a-1.whl.001").unlink()
    assert wheel_parts.main(["join", str(folder), str(out)]) == 1
    assert "expected" in capsys.readouterr().err
    assert not list(out.iterdir())
