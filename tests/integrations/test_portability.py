"""What an exported gradient model is made of, and where it runs besides onnxruntime: OpenVINO, Node.js, WebAssembly."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg

from ..browser.node_runner import needs_node, needs_web, run_model
from .gradient_modules import AutogradGrad, image


class Segmenter(nn.Module):
    """Convolutions of every kind that needs a rewrite somewhere: strided, depthwise, dilated, transposed, upsampled."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 2, 2, groups=8)
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1, 1), nn.GroupNorm(2, 8), nn.SiLU())
        self.decode = nn.Sequential(nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), nn.Upsample(scale_factor=2, mode="bilinear"))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.pool(self.encode(x)))


def written(tmp_path: Path, opset: int = 18) -> tuple[Path, cg.ExportReport]:
    torch.manual_seed(4)
    path = tmp_path / "gradients.onnx"
    report = cg.export_gradient(
        Segmenter().train(),
        (image(2, 3, 16, 20),),
        path,
        wrt=["inputs", "parameters"],
        of=lambda out: out.pow(2).mean(),
        dynamic_shapes={"x": {0: "batch", 2: "height", 3: "width"}},
        opset_version=opset,
    )
    return path, report


@pytest.mark.parametrize("opset", [13, 17, 18, 20, 22, 23])
def test_standard_operators_checked_strictly_at_every_opset(opset: int, tmp_path: Path) -> None:
    path, report = written(tmp_path, opset)
    assert report.verified
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert not model.functions
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    typed = {value.name for value in [*inferred.graph.value_info, *inferred.graph.output]}
    assert {name for node in model.graph.node for name in node.output if name} <= typed


def test_a_file_is_its_weights_and_its_graph(tmp_path: Path) -> None:
    """Within 2 % of weights plus graph: nothing is stored twice, nothing is folded into large constants."""
    module = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128)).eval()
    weights = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    report = cg.export_gradient(module, (image(),), tmp_path / "m.onnx", wrt=["inputs", "parameters"])
    model = onnx.load(tmp_path / "m.onnx")
    stored = sum(len(i.raw_data) for i in model.graph.initializer)
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    for initializer in graph.graph.initializer:
        initializer.ClearField("raw_data")
    # the lists of rows that Gathers read
    tables = sum(len(i.raw_data) for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT64)
    assert tables <= 4096
    assert stored <= weights + 2048 + tables
    assert report.sizes["files"] <= 1.02 * (weights + graph.ByteSize()) + tables


def test_external_data_stays_in_its_folder_and_moves_with_it(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    cg.export_gradient(nn.Conv2d(3, 64, 5), (image(),), tmp_path / "first" / "m.onnx", external_data=True)
    model = onnx.load(tmp_path / "first" / "m.onnx", load_external_data=False)
    places = {entry.value for i in model.graph.initializer for entry in i.external_data if entry.key == "location"}
    assert places == {"m.onnx.data"}
    (tmp_path / "first").rename(tmp_path / "second")
    assert cg.GradientSession(tmp_path / "second" / "m.onnx").run({"input": image()})["value"].shape == ()


@pytest.mark.slow
def test_more_than_two_gigabytes_of_weights(tmp_path: Path) -> None:
    """Some 2.2 GB on disk, twice for a moment; 9 GB of memory."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(216, 24_000), nn.ReLU(), nn.Linear(24_000, 23_000, bias=False))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.01)
    path = tmp_path / "large.onnx"
    report = cg.export_gradient(module, (image(1, 3, 9, 8),), path, of=lambda out: out.pow(2).mean(), samples=1)
    assert report.verified
    assert report.sizes["weights"] > 2**31
    assert path.stat().st_size < 100_000
    assert (tmp_path / "large.onnx.data").stat().st_size <= 1.02 * report.sizes["weights"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    actual = cg.GradientSession(path).run({"input": image(1, 3, 9, 8)})["input.grad"]
    x = image(1, 3, 9, 8).requires_grad_()
    module(x).pow(2).mean().backward()
    torch.testing.assert_close(actual, x.grad, rtol=1e-4, atol=1e-4 * float(x.grad.abs().max()))


def test_one_file_of_more_than_two_gigabytes_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convgrad_export.integrations import onnx_export

    monkeypatch.setattr(onnx_export, "_PROTOBUF_LIMIT", 100)
    with pytest.raises(cg.ArgumentTypeError, match="external_data is False"):
        cg.export_gradient(nn.Conv2d(3, 4, 3), (image(),), tmp_path / "m.onnx", external_data=False)
    # the way of large models, on a small one
    report = cg.export_gradient(nn.Conv2d(3, 4, 3), (image(),), tmp_path / "m.onnx", external_data=True)
    assert report.verified
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


@pytest.mark.peer
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
@pytest.mark.parametrize("opset", [13, 18])
def test_openvino_computes_the_same_gradients(opset: int, tmp_path: Path) -> None:
    import openvino

    path, _ = written(tmp_path, opset)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for shape in ((2, 3, 16, 20), (3, 3, 20, 16)):
        x = image(*shape).numpy()
        results = compiled({"x": x})
        expected = cg.GradientSession(path).run({"x": x})
        _agree({port.get_any_name(): results[port] for port in compiled.outputs}, expected)


@pytest.mark.browser
@pytest.mark.parametrize("runtime", [pytest.param("node", marks=needs_node), pytest.param("web", marks=needs_web)])
def test_node_and_webassembly_compute_the_same_gradients(runtime: str, tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    x = image(3, 3, 20, 16).numpy()
    _agree(run_model(path, {"x": x}, tmp_path, runtime=runtime), cg.GradientSession(path).run({"x": x}))


def test_the_report_tells_what_was_done(tmp_path: Path) -> None:
    path, report = written(tmp_path)
    text, data = str(report), report.to_dict()
    assert str(path) in text
    assert "verified: worst relative error" in text
    assert data["inputs"] == {"x": ["batch", 3, "height", "width"]}
    assert data["sizes"]["files"] == path.stat().st_size
    assert sum(entry["count"] for entry in data["lowerings"]) == len(report.lowerings)
    assert set(data["seconds"]) == {"capture", "translate", "optimize", "check", "verify", "write"}
    assert cg.export(AutogradGrad(), (image(),), verify=False).to_dict()["path"] is None


def _agree(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(actual) == set(expected)
    largest = max(float(np.abs(value).max()) for value in expected.values())
    for name, value in expected.items():
        # float32 in another order of summation; what is zero but for rounding has the rounding of the largest
        scale = max(float(np.abs(value).max()), 1e-3 * largest)
        assert float(np.abs(actual[name] - value).max()) <= 2e-5 * scale, name
