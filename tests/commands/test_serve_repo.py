"""`convgrad serve-repo`, and the refusals of `convgrad serve`."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from convgrad_export.cli import main
from convgrad_export.serving import launch
from tests.serving import models

pytest.importorskip("tritonclient.grpc", reason="tritonclient and grpcio are not installed (extra serving)")


def test_two_models_then_a_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grad, weight = models.gradient_model(tmp_path / "grad.onnx"), models.weight_gradient(tmp_path / "weight.onnx")
    repository = str(tmp_path / "repo")
    assert main(["serve-repo", str(grad), str(weight), "-o", repository, "--backend", "python", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(e["name"], e["version"], e["max_batch_size"]) for e in report["models"]] == [
        ("grad", 1, 8),
        ("weight", 1, 0),
    ]
    assert main(["serve-repo", str(grad), "-o", repository, "--backend", "python"]) == 0
    text = capsys.readouterr().out
    assert "FP32 [-1, 2, 6]" in text
    assert (tmp_path / "repo" / "grad" / "2" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx"], "does not exist"),
        (["grad.onnx", "weight.onnx", "--name", "x"], "one at a time"),
        (["grad.onnx", "./grad.onnx"], "one file name"),
        (["grad.onnx", "none.onnx"], "none.onnx does not exist"),
        (["grad.onnx", "--size", "height"], "NAME=VALUE"),
        (["grad.onnx", "--size", "height=²"], "NAME=VALUE"),
        (["grad.onnx", "--size", "height=" + "9" * 5000], "--size is"),
        (["grad.onnx", "--size", "hieght=4", "--size", "batch=2"], "--size names hieght, which no input has"),
        (["grad.onnx", "--max-batch-size", "99999999999"], "max_batch_size is 99999999999, expected at most"),
        (["grad.onnx", "--preferred-batch-sizes", "a"], "integers"),
        (["grad.onnx", "--preferred-batch-sizes", "99", "--max-batch-size", "4"], "exceeds"),
        (["weight.onnx", "--max-batch-size", "4"], "no batch dimension"),
        (["grad.onnx", "--warmup", "noise"], "zero, random"),
        (["grad.onnx", "--labels", "none.txt"], "cannot be read"),
    ],
)
def test_wrong_usage_exits_with_2_and_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    models.gradient_model(tmp_path / "grad.onnx")
    models.weight_gradient(tmp_path / "weight.onnx")
    assert main(["serve-repo", *arguments, "-o", "repo"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "repo").glob("*"))


def test_serve_says_how_to_get_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONVGRAD_TRITON_PYTHON", raising=False)
    assert main(["serve", str(tmp_path), "--server", "triton", "--python", "/no/python"]) == 2
    assert "pip install nvidia-pytriton" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert "convgrad serve-repo" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--server", "apache"]) == 2
    assert "triton, mlserver" in capsys.readouterr().err
    for program in ("echo", "true"):
        path = shutil.which(program)
        assert main(["serve", str(tmp_path), "--server", "triton", "--python", str(path)]) == 2
        assert "cannot say whether it has triton" in capsys.readouterr().err


def test_a_server_that_cannot_be_started_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "tritonserver"
    program.touch()  # that may not be executed
    monkeypatch.setattr(launch, "command", lambda *_: contextlib.nullcontext(([str(program)], {})))
    assert main(["serve", str(tmp_path)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "tritonserver cannot be started: Permission denied" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--http-port", "8001"], "--http-port and --grpc-port are both 8001"),
        (["--server", "mlserver", "--host", "192.0.2.1"], "host is '192.0.2.1', on which nothing can listen"),
    ],
)
def test_addresses_on_which_nothing_can_listen(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "probe", lambda *_: {})
    assert main(["serve", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
