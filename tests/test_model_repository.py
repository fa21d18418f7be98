"""The committed model repository: byte for byte what its generator gives, and right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import convgrad_export as cg

pytest.importorskip("tritonclient.grpc", reason="tritonclient and grpcio are not installed (extra serving)")

from convgrad_export.serving.config import read_config

from .torch_release import needs_torch

FOLDER = Path(__file__).parent.parent / "models"
REPOSITORY = FOLDER / "repository"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_repository", FOLDER / "generate_repository.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(folder: Path) -> dict[str, bytes]:
    """Without what a server that ran on the folder left there."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.parent.name != "__pycache__")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@needs_torch("2.13", "writes other names than the release that wrote the files")
def test_regenerating_gives_the_same_bytes(tmp_path: Path) -> None:
    generator().generate(tmp_path / "repository")
    committed, generated = files(REPOSITORY), files(tmp_path / "repository")
    assert set(committed) == set(generated)
    assert [name for name in committed if committed[name] != generated[name]] == []


def test_the_digits_model_agrees_with_eager() -> None:
    module = generator().ExplainedDigits().eval()
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    scores, cam = module(x)
    got = cg.GradientSession(REPOSITORY / "digits_gradcam" / "1" / "model.onnx").run({"x": x})
    torch.testing.assert_close(got["scores"], scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["cam"], cam, rtol=1e-4, atol=1e-6)
    assert cam.amax() > 0


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_functions_agree_with_torch(rank: int) -> None:
    rng = np.random.default_rng(rank)
    shapes = ((2, 3, *[7] * rank), (4, 3, *[3] * rank), (2, 4, *[5] * rank))
    x, weight, grad = (rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes)
    for gradient, feeds, size, rest in (
        ("input", {"input_size": np.array(x.shape), "weight": weight, "grad_output": grad}, x.shape, (weight, grad)),
        ("weight", {"input": x, "weight_size": np.array(weight.shape), "grad_output": grad}, weight.shape, (x, grad)),
    ):
        name = f"conv{rank}d_{gradient}"
        (got,) = cg.GradientSession(REPOSITORY / name / "1" / "model.onnx").run(feeds).values()
        first, second = (torch.from_numpy(value) for value in rest)
        arguments = (size, first, second) if gradient == "input" else (first, size, second)
        assert np.array_equal(got, getattr(torch.nn.grad, name)(*arguments).numpy())


def test_every_configuration_names_its_folder_and_only_rows_that_are_independent_are_merged() -> None:
    configs = {path.name: read_config(path / "config.pbtxt") for path in REPOSITORY.iterdir()}
    assert {name: config.name for name, config in configs.items()} == {name: name for name in configs}
    assert [name for name, config in configs.items() if config.HasField("dynamic_batching")] == ["digits_gradcam"]
    assert configs["digits_gradcam"].output[0].label_filename == "labels.txt"
