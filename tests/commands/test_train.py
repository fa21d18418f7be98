"""`convgrad train`: the digits, a network and data of one's own, refusals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import convgrad_export as cg
from convgrad_export.cli import main
from convgrad_export.training.data import Dataset, read_dataset
from convgrad_export.training.run import TrainingSettings, load_module, train

from ..torch_release import needs_torch

pytest.importorskip("sklearn", reason="scikit-learn's digits are not installed")


def test_the_digits_are_learnt_as_in_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-o", str(tmp_path), "--epochs", "12", "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["within_bound"]
    assert report["compared_steps"] == 100
    assert report["accuracy"] > 0.97
    assert report["torch"]["accuracy"] > 0.97
    assert report["steps"] == 12 * (1438 // 32)
    for path in report["files"].values():
        assert Path(path).stat().st_size > 1000
    with Path(report["files"]["plot"]).open("rb") as stream:
        assert stream.read(8) == b"\x89PNG\r\n\x1a\n"
    scores = cg.GradientSession(report["files"]["trained network"]).run({"x": np.zeros((3, 1, 8, 8), np.float32)})
    assert scores["output"].shape == (3, 10)


class Line(nn.Module):
    """A network for one's own data: 1-D convolution to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Scores(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 2))


def own_data(path: Path, **arrays: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 2, 8)).astype(np.float32)
    np.savez(path, **{"x": x, "y": x.mean((1, 2))[:, None], **arrays})
    return path


def test_a_network_and_data_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = own_data(tmp_path / "data.npz")
    arguments = ["train", "-o", str(tmp_path / "out"), "--module", f"{__name__}:Line", "--data", str(data)]
    assert main([*arguments, "--loss", "mse", "--optimizer", "sgd", "--epochs", "3", "--batch-size", "8"]) == 0
    text = capsys.readouterr().out
    assert "onnxruntime" in text
    assert "within the bound" in text
    assert main([*arguments, "--loss", "mse"]) == 2  # the files exist
    assert "exists already" in capsys.readouterr().err


def test_more_steps_to_compare_than_there_are_is_all_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number beyond 64 bits ended in a traceback of itertools, after the training."""
    data = str(own_data(tmp_path / "data.npz"))
    own = ["--module", f"{__name__}:Line", "--data", data, "--loss", "mse"]
    assert main(["train", "-o", str(tmp_path / "out"), *own, "--epochs", "2", "--compare", str(10**30), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compared_steps"] == report["steps"] == 2


def test_epochs_are_drawn_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once they were a copy of the data for each, and many of them no memory holds."""
    drawn: list[int] = []
    batches = Dataset.batches

    def counted(self: Dataset, size: int, epoch: int, seed: int) -> Any:
        drawn.append(epoch)
        return batches(self, size, epoch, seed)

    def stop(step: int, steps: int, loss: float) -> None:
        assert steps == 300
        raise InterruptedError

    monkeypatch.setattr(Dataset, "batches", counted)
    settings = TrainingSettings("mse", epochs=300)
    with pytest.raises(InterruptedError):
        train(Line(), read_dataset(own_data(tmp_path / "data.npz")), tmp_path / "out", settings, stop)
    assert drawn == [0, 0]  # the example, the first step


@needs_torch("2.13", "fixes a dynamic batch whose targets are probabilities")
def test_probabilities_as_targets_have_no_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And other arrays of the file stay out of it, and the byte order is any."""
    rng = np.random.default_rng(0)
    y = rng.random((60, 1)).astype(">f8")
    data = own_data(tmp_path / "data.npz", y=np.concatenate([y, 1 - y], 1), classes=np.array(["cat", "dog"]))
    arguments = ["train", "-o", str(tmp_path / "out"), "--module", f"{__name__}:Scores", "--data", str(data)]
    assert main([*arguments, "--epochs", "2", "--batch-size", "8", "--compare", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accuracy"] is None
    assert report["within_bound"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--module", "nothing"], "expected package.module:Name"),
        (["--module", "convgrad_export.nothing:Name"], "cannot be imported"),
        (["--module", "math:pi"], "expected a torch.nn.Module"),
        (["--data", "none.npz"], "cannot be read"),
        (["--batch-size", "5000"], "fewer than a batch"),
        (["--optimizer", "lamb"], "expected one of: sgd"),
        (["--loss", "dice"], "expected one of: cross_entropy"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-o", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros(3)}, "60 samples"),
        ({"x_test": np.zeros((3, 2, 8)), "y_test": np.zeros(2)}, "x_test has 3"),
        ({"y": np.array([object()] * 60)}, "pickled objects"),
        ({"x": np.float32(3)}, "expected numbers"),
        ({"x": np.full((60, 1, 8, 8), np.nan)}, "3840 infinite or not-a-number"),
        ({}, r"do not take a batch of it \(x torch.float32 \(32, 2, 8\)"),
        (
            {"x": np.zeros((60, 1, 8, 8)), "y": np.where(np.arange(60) == 4, 12, 3)},
            "labels from 3 to 12, DigitsNetwork has 10 classes",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = own_data(tmp_path / "data.npz", **arrays)
    assert main(["train", "-o", str(tmp_path / "out"), "--data", str(data)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_an_output_that_can_be_no_folder_is_refused(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    assert main(["train", "-o", str(tmp_path / folder)]) == 2
    assert "cannot be made a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--module", "nothing:Name"],
        ["--optimizer", "lamb"],
        ["--loss", "dice"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "1e+300"],
        ["--threads", "99999999999"],
        ["--seed", "-1"],
        ["--seed", "99999999999999999999999"],
        ["--batch-size", "5000"],
        ["--data", "none.npz"],
    ],
)
def test_what_is_refused_leaves_no_folder(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-o", str(tmp_path / "out" / "below"), *arguments]) == 2
    assert (arguments[0] if arguments[0] == "--seed" else arguments[1]) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_step_that_is_refused_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = own_data(tmp_path / "data.npz")
    arguments = ["--module", f"{__name__}:Line", "--data", str(data), "--loss", "mse"]
    rate = ["--optimizer", "sgd", "--learning-rate", "1e30"]  # with which not a single step can be held to PyTorch
    assert main(["train", "-o", str(tmp_path / "out" / "below"), *arguments, *rate]) == 2
    assert "Nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_a_single_array_is_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 1, 8, 8), np.float32))
    assert main(["train", "-o", str(tmp_path / "out"), "--data", str(tmp_path / "x.npy")]) == 2
    assert "no zip archive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("def f(:", "f", "cannot be imported: SyntaxError"),
        ("x = 1 / 0", "x", "cannot be imported: ZeroDivisionError: division by zero (bad_module.py, line 1)"),
        (
            "def f():\n    raise KeyError('a')",
            "f",
            "gives no network when it is called without arguments: KeyError: 'a'",
        ),
        ("class C:\n    def __init__(self, width): pass", "C", "missing 1 required positional argument: 'width'"),
        ("x = 3", "y", "has no attribute 'y'"),
        ("import sys\nsys.exit()", "f", "cannot be imported: SystemExit"),
        ("def f():\n    raise SystemExit(0)", "f", "SystemExit: 0 (bad_module.py, line 2)"),
    ],
)
def test_modules_that_give_no_network(
    source: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_module", raising=False)
    with pytest.raises(cg.ArgumentTypeError, match=re.escape(message)):
        load_module(f"bad_module:{name}")


def test_a_relative_name_is_no_module() -> None:
    with pytest.raises(cg.ArgumentTypeError, match="from the top package on"):
        load_module(".digits:DigitsNetwork")


def test_modules_are_found_by_dotted_name() -> None:
    assert isinstance(load_module("convgrad_export.training.digits:DigitsNetwork"), nn.Module)


def test_without_matplotlib_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["train", "-o", str(tmp_path / "out"), "--epochs", "1"]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "convgrad-export[examples]" in message
    assert not (tmp_path / "out").exists()


class Hooked(nn.Sequential):
    """A mask on a weight's gradient, by a hook, and a forward that casts."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1))
        mask = (torch.arange(64).reshape(4, 16) % 2).float()
        self[1].weight.register_hook(lambda gradient: gradient * mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


def test_hooks_of_parameters_take_part_in_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = own_data(tmp_path / "data.npz")
    arguments = ["train", "-o", str(tmp_path / "out"), "--module", f"{__name__}:Hooked", "--data", str(data)]
    options = ["--loss", "mse", "--optimizer", "sgd", "--learning-rate", "0.1", "--epochs", "3", "--batch-size", "8"]
    assert main([*arguments, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["within_bound"]
