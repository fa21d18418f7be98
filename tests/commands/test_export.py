"""`convgrad export`: a network by its dotted name, a recipe, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import convgrad_export as cg
from convgrad_export.cli import main
from convgrad_export.commands import export as command
from convgrad_export.recipes.by_name import RECIPES
from convgrad_export.selection import runner


class Small(nn.Sequential):
    """A classifier with a strided convolution."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )


NAME = f"{__name__}:Small"
SHAPE = ["--input-shape", "2,3,16,17"]


def double() -> nn.Module:
    return Small().double()


def half() -> nn.Module:
    return Small().half()


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.sin(), x.cos()


@pytest.mark.parametrize("recipe", [[], ["--recipe", "saliency"], ["--recipe", "guided-diffusion"]])
@pytest.mark.parametrize("dtype", ["double", "half"])
def test_the_example_has_the_parameters_type(dtype: str, recipe: list[str], tmp_path: Path) -> None:
    """It was float32, which no other network takes."""
    path = tmp_path / "other.onnx"
    assert main(["export", f"{__name__}:{dtype}", "-o", str(path), *SHAPE, *recipe]) == 0
    kind = {"double": "tensor(double)", "half": "tensor(float16)"}[dtype]
    assert cg.GradientSession(path).inference_session.get_inputs()[0].type == kind


def test_gradients_of_inputs_and_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.onnx"
    arguments = ["export", NAME, "-o", str(path), *SHAPE, "--wrt", "inputs,parameters", "--of", "3", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["outputs"])[:2] == ["value", "input.grad"]
    assert "0.weight.grad" in report["outputs"]
    assert report["inputs"] == {"input": ["batch", 3, 16, 17]}
    assert report["errors"]
    assert {entry["gradient"] for entry in report["lowerings"]} == {"input", "weight", "bias"}
    assert cg.GradientSession(path).run({"input": np.ones((5, 3, 16, 17), np.float32)})["input.grad"].shape[0] == 5
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_a_recipe_with_saved_weights_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    network = Small()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    path = tmp_path / "cam.onnx"
    weights = ["--weights", str(tmp_path / "weights.safetensors")]
    recipe = [
        "--recipe",
        "gradcam",
        "--layer",
        "0",
        "--target",
        "1",
        "--dynamic",
        "batch,height,width",
        "--opset",
        "17",
    ]
    assert main(["export", NAME, "-o", str(path), *SHAPE, *weights, *recipe]) == 0
    text = capsys.readouterr().out
    assert "verified" in text
    assert "opset 17" in text
    from convgrad_export.recipes import GradCAM

    x = torch.rand(1, 3, 20, 21)
    got = cg.GradientSession(path).run({"x": x})["output"]
    torch.testing.assert_close(got, GradCAM(network.eval(), "0", 1)(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "expected package.module:Name"),
        ([NAME, "--recipe", "dream"], "expected one of: saliency"),
        ([NAME, "--recipe", "gradcam"], "--layer"),
        ([NAME, "--wrt", "layer9"], "layer9"),
        ([NAME, "--wrt", ""], "wrt is [], which names nothing"),
        ([NAME, "--of", "99"], "class 99"),
        ([NAME, "--dynamic", "depth"], "depth"),
        ([NAME, "--opset", "9"], "13 to 23"),
        ([NAME, "--weights", "none.safetensors"], "cannot be read"),
        ([NAME, "--weights", "."], "--weights . cannot be read as safetensors: it is a folder"),
        ([NAME, "--input-shape", "a,b"], "integers"),
        ([NAME, "--input-shape", "2,3,-8,8"], "sizes of at least 1"),
        ([NAME, "--input-shape", "2,3,8,99999999999999999999999"], "fits into memory"),
        ([NAME, "--seed", "-1"], "--seed"),
        ([NAME, "--seed", "99999999999999999999999"], "--seed"),
        ([NAME, "--of", "--1"], "--1"),
        ([NAME, "--of", "²"], "²"),
        ([f"{__name__}:Pair"], "the forward returns a tuple: pass of=..., a function of it"),
    ],
)
def test_wrong_usage_exits_with_2_and_writes_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = [] if "--input-shape" in arguments else SHAPE
    assert main(["export", *arguments, *shape, "-o", str(tmp_path / "out.onnx")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_input_that_no_memory_holds_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(torch, "rand", refuse)
    assert main(["export", NAME, *SHAPE, "-o", str(tmp_path / "out.onnx")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--input-shape is '2,3,16,17', of which no tensor can be made: DefaultCPUAllocator" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "3"], "--target is given, but it is for a --recipe"),
        (["--layer", "0", "--steps", "4"], "--layer, --steps is given"),
        (["--recipe", "saliency", "--wrt", "parameters"], "--wrt is given, but the recipe saliency"),
        (["--recipe", "gradcam", "--layer", "0", "--of", "3"], "--of is given"),
        (["--recipe", "fgsm", "--target", "3"], "--target is given"),
        (["--recipe", "saliency", "--train-mode"], "--train-mode is given"),
        (["--recipe", "fgsm", "--input-shape", "1,7,8,8"], "Small cannot run on an input of shape (1, 7, 8, 8)"),
        (
            ["--recipe", "integrated-gradients", "--steps", "8000000"],
            "--steps is 8000000, all of which are one batch: comparing it with float64 takes",
        ),
        (["--input-shape", "2,16", "--dynamic", "batch,height"], "expected some of batch: the input has 2 dimensions"),
        (["--input-shape", "2,3,16", "--dynamic", "height"], "expected some of batch, width"),
    ],
)
def test_options_without_an_effect_or_beyond_the_machine_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An ignored class would give another gradient than the one asked for."""
    monkeypatch.setattr(runner, "available_bytes", lambda: 2**30)
    shape = [] if "--input-shape" in arguments else SHAPE
    assert main(["export", NAME, *arguments, *shape, "-o", str(tmp_path / "out.onnx")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_names_every_recipe() -> None:
    """By hand, since --help is to answer without importing torch."""
    option = get_type_hints(command.export, include_extras=True)["recipe"].__metadata__[0]
    assert all(recipe in option.help for recipe in RECIPES)
