"""Three spatial axes in onnxruntime's blocked layout, plane by plane: the same integers as PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry
from convgrad_export.runtime import blocked
from convgrad_export.runtime.blocked_volumes import plane_pairs
from convgrad_export.runtime.convolution_entries import FORWARD, ConvolutionEntry, from_text, reversed_pads

from ..lowering.forward import convolved, forward_model
from .layouts import assert_steps_agree, integers, metadata

BLOCK = blocked.block_size()
pytestmark = pytest.mark.skipif(BLOCK is None, reason="this machine's onnxruntime has no blocked layout")
CHANNELS = 32


@st.composite
def volumes(draw: st.DrawFn) -> ConvGeometry:
    """Convolutions over three axes, in one group, padded on both sides differently."""

    def sizes(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=3, max_size=3))

    kernel, stride, dilation = sizes(1, 3), sizes(1, 2), sizes(1, 2)
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    pads = [(draw(st.integers(0, e - 1)), draw(st.integers(0, e - 1))) for e in extent]
    image = [max(1, e - sum(pair)) + more for e, pair, more in zip(extent, pads, sizes(0, 4), strict=True)]
    channels, outputs = draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 48]))
    batch = draw(st.integers(1, 2))
    return ConvGeometry.from_forward((batch, channels, *image), (outputs, channels, *kernel), stride, pads, dilation)


def convolution(op: Any, g: ConvGeometry, input: Any, weight: Any) -> Any:
    return op.Conv(input, weight, strides=list(g.stride), dilations=list(g.dilation), pads=g.onnx_pads)


def run(model: onnx.ModelProto, **feeds: torch.Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {name: value.numpy() for name, value in feeds.items()})[0]
    return result


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(g=volumes())
def test_the_forward_pass_is_exact_on_integers(g: ConvGeometry) -> None:
    x, w = integers(*g.input_shape), integers(*g.weight_shape, seed=1)
    model = ir.to_proto(forward_model(g, convolution))
    entry = ConvolutionEntry(FORWARD, "output", ("input", "weight"), g)
    if all(plane_pairs(entry)):
        assert blocked._rewrite(model, [entry], BLOCK)
        assert [node.op_type for node in model.graph.node if node.domain == blocked.DOMAIN].count("Conv")
    np.testing.assert_array_equal(run(model, input=x, weight=w), convolved(g, x, w).numpy())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(g=volumes())
def test_input_gradients_are_exact_on_integers(g: ConvGeometry) -> None:
    x, w, grad = integers(*g.input_shape), integers(*g.weight_shape, seed=1), integers(*g.output_shape, seed=2)
    x.requires_grad_(True)
    (expected,) = torch.autograd.grad(convolved(g, x, w), x, grad)
    model = cg.build_model("conv3d_input", **{**g.to_dict(), "transposed": False}, dynamic=())
    (entry,) = from_text(metadata(model)) or [None]
    if entry is not None:
        # However few positions it has: what is to gain is another question.
        rows = reversed_pads(g)
        if set(g.stride[1:]) == {1} and min(rows[1], rows[2], rows[4], rows[5]) >= 0 and all(plane_pairs(entry)):
            assert blocked._rewrite(model, [entry], BLOCK)
    np.testing.assert_array_equal(run(model, grad_output=grad, weight=w), expected.numpy())


@pytest.mark.parametrize(
    ("batch", "channels", "size", "kernel", "options", "blocked_layout"),
    [
        (4, CHANNELS, (3, 8, 8), (3, 3, 3), {}, True),
        (4, CHANNELS, (3, 8, 8), (3, 3, 3), {"stride": (2, 1, 1)}, True),
        (1, CHANNELS, (1, 5, 5), (3, 3, 3), {}, False),  # too few positions for the weight's rearrangement
        (8, 512, (1, 4, 4), (3, 3, 3), {}, False),
        (4, CHANNELS, (3, 8, 8), (3, 3, 3), {"stride": 2}, False),  # zeros between the elements
        (4, CHANNELS, (3, 8, 8), (3, 1, 1), {"padding": (1, 1, 0)}, False),  # grad_output would have to be cut
        (4, CHANNELS + 8, (3, 8, 8), (3, 3, 3), {}, False),
    ],
)
def test_where_an_input_gradient_takes_the_layout(
    batch: int, channels: int, size: tuple, kernel: tuple, options: dict[str, Any], blocked_layout: bool
) -> None:
    arguments = {"padding": [(k - 1) // 2 for k in kernel], **options}
    model = cg.build_model(
        "conv3d_input",
        input_shape=(batch, channels, *size),
        weight_shape=(channels, channels, *kernel),
        dynamic=(),
        **arguments,
    )
    assert blocked.put_blocked_layout(model) == blocked_layout


def test_models_in_groups_say_nothing() -> None:
    model = cg.build_model(
        "conv3d_input", input_shape=(4, CHANNELS, 3, 8, 8), weight_shape=(CHANNELS, 16, 3, 3, 3), groups=2, padding=1
    )
    assert metadata(model) is None


@pytest.mark.parametrize("in_place", [False, True])
def test_a_step_computes_the_same(in_place: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(3, CHANNELS, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False),
        nn.BatchNorm3d(CHANNELS),
        nn.ReLU(),
        nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1),  # with a bias
        nn.Tanh(),
        nn.Conv3d(CHANNELS, CHANNELS, (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.Conv3d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, 4),
    )
    batch = torch.randn(4, 3, 4, 16, 16), torch.tensor([0, 1, 2, 3])
    report = cg.export_training_step(network, "cross_entropy", "sgd", batch)
    model = ir.to_proto(report.model)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert sorted(entry.kind for entry in from_text(metadata(model))) == ["forward"] * 4 + ["input"] * 3
    assert blocked.put_blocked_layout(model)
    assert_steps_agree(report, batch, in_place)
