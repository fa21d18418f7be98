"""Convolutions in onnxruntime's blocked layout: the same integers, in whatever layout this machine has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry
from convgrad_export.runtime import blocked
from convgrad_export.runtime.convolution_entries import METADATA, described, from_text

from .layouts import assert_steps_agree, integers, metadata

BLOCK = blocked.block_size()
needs_blocks = pytest.mark.skipif(BLOCK is None, reason="this machine's onnxruntime has no blocked layout")
CHANNELS = 32
LAYER: dict[str, Any] = {"input_shape": (2, CHANNELS, 6, 7), "weight_shape": (CHANNELS, 1, 3, 3), "groups": CHANNELS}


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Depthwise and dense ones, the latter in one group or two."""
    rank = draw(st.sampled_from([1, 2]))

    def sizes(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    kernel, stride, dilation, padding = sizes(1, 4), sizes(1, 3), sizes(1, 2), sizes(0, 3)
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    image = [max(1, e - 2 * p) + extra for e, p, extra in zip(extent, padding, sizes(0, 7), strict=True)]
    channels, groups = draw(st.sampled_from([3, 8, 16, 24, 32])), draw(st.sampled_from([1, 2, None]))
    outputs = draw(st.sampled_from([8, 16, 32]))
    if groups is None or channels % groups:
        groups = outputs = channels
    return {
        "input": (draw(st.integers(1, 3)), channels, *image),
        "weight": (outputs, channels // groups, *kernel),
        "attributes": {"stride": stride, "padding": padding, "dilation": dilation},
    }


def rewritten_model(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy of the model in the blocked layout, None where that is for nothing of it."""
    copy = onnx.load_from_string(model.SerializeToString())
    if blocked.put_blocked_layout(copy):
        return copy
    assert copy == model
    return None


def takes_input_gradient(
    image: Any, kernel: Any, output: Any, stride: list[int], padding: list[int], dilation: list[int]
) -> bool:
    """Whether grad_output, spread by the stride, has to be padded and not cut on both sides of every axis."""
    for i, k, o, s, p, d in zip(image, kernel, output, stride, padding, dilation, strict=True):
        begin = d * (k - 1) - p
        if begin < 0 or i + d * (k - 1) - s * o - begin < 0:
            return False
    return True


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@needs_blocks
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=convolutions())
def test_gradients_are_exact_on_integers(case: dict[str, Any]) -> None:
    x, w, attributes = integers(*case["input"]), integers(*case["weight"], seed=1), case["attributes"]
    rank, groups = x.dim() - 2, x.shape[1] // w.shape[1]
    forward = getattr(nn.functional, f"conv{rank}d")(x, w, **attributes, groups=groups)
    grad = integers(*forward.shape, seed=2)
    wanted = torch.ops.aten.convolution_backward(
        grad, x, w, None, *attributes.values(), False, [0] * rank, groups, [True, True, False]
    )
    for kind, expected in zip(("input", "weight"), wanted, strict=False):
        model = cg.build_model(
            f"conv{rank}d_{kind}", input_shape=x.shape, weight_shape=w.shape, **attributes, groups=groups, dynamic=()
        )
        rewritten = rewritten_model(model)
        fits = kind == "weight" or takes_input_gradient(x.shape[2:], w.shape[2:], grad.shape[2:], **attributes)
        if groups == x.shape[1]:
            assert (rewritten is not None) == (groups % BLOCK == 0 and fits)
        elif rewritten is not None and kind == "weight":
            assert (groups, w.shape[0] % BLOCK) == (1, 0)
        elif rewritten is not None:
            assert set(attributes["stride"]) == {1}
            assert (fits, w.shape[0] // groups % BLOCK, w.shape[1] % BLOCK) == (True, 0, 0)
        session = cg.GradientSession(model, threads=1)
        operands = {"grad_output": grad, "input": x, "weight": w}
        (got,) = session.run({name: operands[name] for name in session.input_names}).values()
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1),
        nn.Hardswish(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding="same", dilation=2),
        nn.Conv2d(CHANNELS, CHANNELS, 1),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),  # with a bias
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU6(),
        nn.Conv2d(CHANNELS, CHANNELS, (5, 3), 2, (2, 1), groups=CHANNELS, bias=False),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2),
        nn.Flatten(2),
        nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1),
        nn.Conv1d(CHANNELS, CHANNELS, 4, padding="same", dilation=2, groups=CHANNELS),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


def training_step(**options: Any) -> cg.TrainingStepReport:
    module, batch = network(), (torch.randn(4, 3, 11, 9), torch.tensor([0, 1, 2, 3]))
    with torch.no_grad():
        module(batch[0])
    return cg.export_training_step(module, "cross_entropy", "sgd", batch, **options)


@needs_blocks
@pytest.mark.parametrize("in_place", [False, True])
def test_a_step_computes_the_same_and_its_file_is_standard(in_place: bool) -> None:
    report = training_step()
    model = onnx.load_from_string(_bytes(report))
    assert {opset.domain for opset in model.opset_import} == {""}
    kinds = sorted(entry.kind for entry in from_text(metadata(model)))
    # No weight gradient of a dilated layer, of a pointwise one, of two groups.
    assert kinds == ["forward"] * 7 + ["input"] * 5 + ["weight"] * 5
    rewritten = rewritten_model(model)  # of the dense weight gradients the first layer's alone has the positions
    assert [n.op_type for n in rewritten.graph.node if n.domain == blocked.DOMAIN].count("Conv") == 16
    batch = torch.randn(4, 3, 11, 9), torch.tensor([0, 1, 2, 3])
    assert_steps_agree(report, batch, in_place)


def _bytes(report: cg.TrainingStepReport) -> bytes:
    import onnx_ir as ir

    content: bytes = ir.to_proto(report.model).SerializeToString()
    return content


@needs_blocks
def test_the_input_gradient_of_a_transposed_convolution_is_a_convolution() -> None:
    torch.manual_seed(0)
    transposed = nn.ConvTranspose2d(16, CHANNELS, 3, stride=2, padding=1, output_padding=1, bias=False)
    net = nn.Sequential(nn.Conv2d(1, 16, 1), nn.Tanh(), transposed, nn.Flatten())
    batch = torch.randn(2, 1, 4, 5), torch.tensor([3, 1])
    report = cg.export_training_step(net, "cross_entropy", "sgd", batch)
    entries = from_text(metadata(onnx.load_from_string(_bytes(report))))
    assert [(e.kind, e.geometry.in_channels, e.geometry.out_channels) for e in entries] == [
        ("forward", CHANNELS, 16),
        ("weight", CHANNELS, 16),
    ]
    sessions = [cg.TrainingSession(report.model, report.state, blocked_layout=layout) for layout in (True, False)]
    for session in sessions:
        session.step(*batch)
    for name, value in sessions[0].state().items():
        np.testing.assert_allclose(value, sessions[1].state()[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_convolution_with_a_window_too_many_is_none() -> None:
    """Output padding that reaches the stride: the adjoint's Conv would have five positions, the operator has four."""
    for output_padding, known in ((0, True), (1, False)):
        geometry = ConvGeometry.from_forward(
            (2, 16, 4, 4), (16, 32, 3, 3), padding=1, dilation=2, transposed=True, output_padding=output_padding
        ).adjoint()
        assert (described("forward", geometry.with_batch(2), "y", ("x", "w")) is not None) == known


@needs_blocks
def test_a_tensor_is_brought_into_the_layout_once() -> None:
    rewritten = rewritten_model(onnx.load_from_string(_bytes(training_step())))
    reordered = [node.input[0] for node in rewritten.graph.node if node.op_type == "ReorderInput"]
    assert len(reordered) == len(set(reordered))
    # six inputs (the images themselves are read as they are) and the gradients of six layers
    assert sum(not name.endswith(".weight.image") for name in reordered) == 12


@needs_blocks
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_every_batch_size_of_an_input_gradient(batch: int) -> None:
    model = cg.build_model(
        "conv2d_input", input_shape=(2, CHANNELS, 6, 7), weight_shape=(CHANNELS, 1, 3, 3), padding=1, groups=CHANNELS
    )
    assert rewritten_model(model) is not None
    w, grad = integers(CHANNELS, 1, 3, 3), integers(batch, CHANNELS, 6, 7, seed=1)
    (got,) = cg.GradientSession(model).run({"weight": w, "grad_output": grad}).values()
    assert got.shape == grad.shape
    expected = nn.functional.conv_transpose2d(grad, w, padding=1, groups=CHANNELS)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"lowering": "input.conv_transpose"},  # asked for by name
        {"dtype": "float64"},
        {"provider": "cuda"},
        {"groups": CHANNELS // 2, "weight_shape": (CHANNELS, 2, 3, 3)},
        {"weight_shape": (2 * CHANNELS, 1, 3, 3)},  # a channel multiplier
    ],
)
def test_models_that_say_nothing_are_left_alone(options: dict[str, Any]) -> None:
    model = cg.build_model("conv2d_input", **{**LAYER, **options})
    assert metadata(model) is None
    content = model.SerializeToString()
    assert blocked.in_blocked_layout(content) is content


@pytest.mark.parametrize(
    "change",
    [
        {"result": "nothing"},
        {"operands": ["grad_output", "nothing"]},
        {"operands": ["grad_output"]},
        {"geometry": {"weight_shape": [CHANNELS + 1, 1, 3, 3]}},
        {"geometry": {"weight_shape": [2 * CHANNELS, 1, 3, 3]}},
        {"geometry": {"input_shape": [2, -CHANNELS, 6, 7]}},
        {"geometry": {"input_shape": [2, CHANNELS, 6, 2**40]}},
        {"geometry": {"input_shape": [2, CHANNELS, "height", 7]}},
        {"geometry": {"padding": [1, 1, 1]}},
        {"geometry": {"weight_shape": "3333"}},
        {"geometry": {"stride": [0, 0]}},
        {"geometry": {"transposed": True}},
        {"geometry": {"more": 1}},
        {"geometry": None},
        {"kind": "bias"},
        {"kind": ["input"]},
        {"more": 1},
        {"formula": "0" * 32},
        {"formula": None},
    ],
)
def test_entries_that_do_not_fit_the_graph_are_left_out(change: dict[str, Any]) -> None:
    model = cg.build_model("conv2d_input", **LAYER)
    (entry,) = json.loads(metadata(model) or "")
    for item in model.metadata_props:
        if item.key == METADATA:
            geometry = change.get("geometry", {})
            changed = geometry and {**entry["geometry"], **geometry}
            item.value = json.dumps([{**entry, **change, "geometry": entry["geometry"] if changed == {} else changed}])
    assert rewritten_model(model) is None
    w, grad = integers(CHANNELS, 1, 3, 3), integers(2, CHANNELS, 4, 5, seed=1)
    (got,) = cg.GradientSession(model).run({"weight": w, "grad_output": grad}).values()
    torch.testing.assert_close(got, nn.functional.conv_transpose2d(grad, w, groups=CHANNELS), rtol=0, atol=0)


@needs_blocks
def test_constant_weights_are_left_to_onnxruntime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS), nn.Tanh()).eval()
    report = cg.export_gradient(net, (torch.randn(2, CHANNELS, 6, 7),), tmp_path / "grad.onnx")
    assert from_text(metadata(onnx.load(report.path)))
    assert blocked.in_blocked_layout(report.path) == report.path


def test_files_are_searched_and_not_changed(tmp_path: Path) -> None:
    empty, other = tmp_path / "empty.onnx", tmp_path / "other.onnx"
    empty.write_bytes(b"")
    other.write_bytes(cg.build_model("conv2d_input", **LAYER, lowering="input.conv_transpose").SerializeToString())
    assert blocked.in_blocked_layout(empty) == empty
    assert blocked.in_blocked_layout(other) == other


@pytest.mark.parametrize("text", ["", "{", "3", "[3, null]", '{"kind": "input"}'])
def test_metadata_of_another_form_is_nometadata(text: str) -> None:
    assert from_text(text) == []


def test_without_the_layout_the_file_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "block_size", lambda: None)
    model = cg.build_model("conv2d_input", **LAYER)
    assert rewritten_model(model) is None


def test_a_wrong_layout_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of another size than the machine's give wrong numbers, which is how the size is told."""
    monkeypatch.setattr(blocked, "_CANDIDATES", (4,))
    assert blocked.block_size.__wrapped__() is None


@needs_blocks
@pytest.mark.parametrize(
    ("batch", "size", "one", "several"),
    [(1, (2048,), True, False), (8, (2048,), True, True), (80, (2048,), True, False), (1, (40, 40), True, True)],
)
def test_a_layer_without_work_for_two_threads_keeps_its_formula(
    batch: int, size: tuple, one: bool, several: bool
) -> None:
    """One sample, one row and no more than four blocks of filters are one piece of work to onnxruntime.

    Rows of all samples that leave the cache are reordered on both threads at once, which a few taps do not pay for.
    """
    kernel = (5,) * len(size)
    model = cg.build_model(
        f"conv{len(size)}d_input",
        input_shape=(batch, 32, *size),
        weight_shape=(32, 32, *kernel),
        padding=2,
        dynamic=(),
    )
    found = [blocked.put_blocked_layout(onnx.load_from_string(model.SerializeToString()), n) for n in (1, 2, None)]
    assert found == [one, several, several]
