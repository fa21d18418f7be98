"""The benchmark of training steps goes on where a peer cannot take part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.training import steps


class Ready:
    """Stands in for a contender's process."""

    pid = os.getpid()

    def steps(self, count: int) -> dict[str, Any]:
        return {"losses": [1.0, 0.9, 0.8], "seconds": 0.01}

    def turn(self, count: int) -> float:
        return 0.01

    def close(self) -> dict[str, int]:
        return {"peak": 2 << 20, "base": 1 << 20}

    def kill(self) -> None: ...


def test_a_forward_model_that_cannot_be_exported_fails_its_contender_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = []

    def start(name: str, *_: Any) -> Ready:
        started.append(name)
        return Ready()

    def export(*_: Any, **__: Any) -> None:
        raise RuntimeError("no symbolic for it")

    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.setattr(steps, "start", start)
    monkeypatch.setattr(steps, "RESULT", tmp_path / "steps.json")
    monkeypatch.setattr(steps, "write_table", lambda *_: None)
    options = ["--networks", "dcgan_generator", "--batch", "1", "--threads", "1", "--rounds", "1"]
    options += ["--contenders", "onnxruntime", "eager", "ort_training", "--ort-training-python", "python"]
    assert steps.main(options) == 0
    (row,) = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert row["failed"] == {"ort_training": "torch.onnx: RuntimeError: no symbolic for it"}
    assert started == ["onnxruntime", "eager"] == list(row["contenders"])
    assert "| fails |" in steps.markdown([row])
