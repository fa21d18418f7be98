"""The generated models: byte for byte what the generator gives, and accepted by the runtimes they are for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest

import convgrad_export as cg
from convgrad_export.model_check import check_model

FOLDER = Path(__file__).parent.parent / "models"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())


def test_regenerating_gives_the_same_bytes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate_models", FOLDER / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.generate(tmp_path)
    committed = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.onnx")} - repository_files()
    assert committed == set(MANIFEST) == {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.onnx")}
    assert (tmp_path / "manifest.json").read_bytes() == (FOLDER / "manifest.json").read_bytes()
    for name, entry in MANIFEST.items():
        data = (FOLDER / name).read_bytes()
        assert data == (tmp_path / name).read_bytes(), name
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["bytes"])


def repository_files() -> set[str]:
    """Models of the serving repository, which another generator owns."""
    return {str(path.relative_to(FOLDER)) for path in (FOLDER / "repository").rglob("*.onnx")}


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_every_model_is_valid_and_loads(name: str) -> None:
    onnx.checker.check_model(onnx.load(FOLDER / name), full_check=True)
    assert len(cg.GradientSession(FOLDER / name).output_names) == 1


@pytest.mark.parametrize(
    "name",
    [f"functions/conv{rank}d_{gradient}.onnx" for rank in (1, 2, 3) for gradient in ("input", "weight")]
    + ["mobilenet_v2/features.2.depthwise.weight.onnx", "tcn/level7.input.onnx", "resnet50/layer4.conv3.weight.onnx"],
)
def test_models_agree_with_float64_autograd(name: str) -> None:
    assert all(check.passed for check in check_model(FOLDER / name))


@pytest.mark.peer
def test_openvino_agrees_with_onnxruntime() -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    core = openvino.Core()
    small = [
        name
        for name, entry in MANIFEST.items()
        if name.startswith(("functions/", "tcn/", "mobilenet_v2/features.1")) and entry["bytes"] < 20_000
    ]
    rng = np.random.default_rng(0)
    for name in small:
        model = onnx.load(FOLDER / name)
        if model.functions:  # OpenVINO takes no local functions: the inlined form of the same model
            model = onnx.inliner.inline_local_functions(model)
        session = cg.GradientSession(model)
        geometry = example_geometry(name)
        shapes = {"input": geometry.input_shape, "weight": geometry.weight_shape, "grad_output": geometry.output_shape}
        feeds = {key: rng.integers(-3, 4, shape).astype(np.float32) for key, shape in shapes.items()}
        feeds |= {"input_size": np.array(geometry.input_shape), "weight_size": np.array(geometry.weight_shape)}
        feeds = {key: feeds[key] for key in session.input_names}
        graph = core.read_model(model.SerializeToString(), b"")
        graph.reshape({key: list(value.shape) for key, value in feeds.items()})  # deconvolutions want static weights
        compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # bf16 otherwise
        (expected,) = session.run(feeds).values()
        (result,) = compiled(feeds).values()
        assert np.array_equal(result, expected), name


def example_geometry(name: str):
    arguments = dict(MANIFEST[name]["geometry"])
    if "input_shape" not in arguments:
        rank = int(name.split("conv")[1][0])
        arguments |= {"input_shape": (2, 3, *(9, 8, 7)[:rank]), "weight_shape": (4, 3, *(3, 2, 3)[:rank])}
    return cg.ConvGeometry.from_dict(arguments)
