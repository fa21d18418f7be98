"""Weight gradients in onnxruntime's blocked layout: the same integers as PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry
from convgrad_export.runtime import blocked
from convgrad_export.runtime.blocked_weights import fills_blocks
from convgrad_export.runtime.convolution_entries import WEIGHT, ConvolutionEntry, from_text

from ..lowering.forward import convolved
from .layouts import assert_steps_agree, integers, metadata

BLOCK = blocked.block_size()
pytestmark = pytest.mark.skipif(BLOCK is None, reason="this machine's onnxruntime has no blocked layout")
FILTERS = 32


@st.composite
def layers(draw: st.DrawFn) -> ConvGeometry:
    """Dense convolutions over one axis or two, padded on both sides differently, of samples that fill blocks."""
    rank = draw(st.sampled_from([1, 2]))

    def sizes(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    kernel, stride, dilation = sizes(1, 4), sizes(1, 3), sizes(1, 2)
    if rank == 2 and kernel[1] > 1:
        dilation[1] = 1
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    pads = [(draw(st.integers(0, e)), draw(st.integers(0, e))) for e in extent]
    image = [max(1, e - sum(pair)) + more for e, pair, more in zip(extent, pads, sizes(0, 6), strict=True)]
    batch, channels = draw(st.sampled_from([1, 2, 5, 7, 16, 32, 48])), draw(st.sampled_from([1, 3, 8, 16, 20]))
    filters = draw(st.sampled_from([16, 48]))
    return ConvGeometry.from_forward((batch, channels, *image), (filters, channels, *kernel), stride, pads, dilation)


def gradient_model(g: ConvGeometry) -> onnx.ModelProto:
    return cg.build_model(f"conv{g.rank}d_weight", **{**g.to_dict(), "transposed": False}, dynamic=())


def assert_same_integers(g: ConvGeometry, model: onnx.ModelProto) -> None:
    x, w, grad = integers(*g.input_shape), integers(*g.weight_shape, seed=1), integers(*g.output_shape, seed=2)
    w.requires_grad_(True)
    (expected,) = torch.autograd.grad(convolved(g, x, w), w, grad)
    session = cg.GradientSession(model, ["CPUExecutionProvider"], blocked_layout=False, threads=1)
    (got,) = session.run({"grad_output": grad, "input": x}).values()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(g=layers())
def test_dense_layers(g: ConvGeometry) -> None:
    assume(fills_blocks(g, BLOCK))
    model = gradient_model(g)
    # However few positions it has: what is to gain is another question.
    entry = ConvolutionEntry(WEIGHT, "grad_weight", ("grad_output", "input"), g)
    assert blocked._rewrite(model, [entry], BLOCK)
    assert [node.op_type for node in model.graph.node if node.domain == blocked.DOMAIN].count("Conv") == 1
    assert_same_integers(g, model)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_depthwise_layers_of_large_images(rank: int, stride: int, dilation: int) -> None:
    size = (40,) * rank if rank == 2 else (301,)
    g = ConvGeometry.from_forward(
        (2, FILTERS, *size), (FILTERS, 1, *(5,) * rank), stride, [(3, 1)] * rank, dilation, groups=FILTERS
    )
    model = gradient_model(g)
    assert blocked.put_blocked_layout(model)
    padded = "Pad" in [node.op_type for node in model.graph.node]
    assert padded == (stride == 1)
    assert_same_integers(g, model)


@pytest.mark.parametrize(
    ("batch", "size", "options", "expected"),
    [
        (1, (32, 32), {}, True),
        (5, (12, 12), {}, True),
        (32, (16, 16), {}, True),
        (2, (900,), {}, True),
        (8, (4, 4), {}, True),  # few positions, but a small weight
        (1, (10, 10), {}, False),
        (33, (16, 16), {}, False),  # neither fewer samples than channels in a block nor whole blocks
        (8, (16, 16), {"dilation": 2}, False),  # its taps do not lie beside the channels
        (8, (16, 16), {"dilation": (2, 1)}, True),
        (8, (16, 16), {"stride": 2}, True),
        (8, (5, 9, 9), {}, False),  # volumes
        (8, (16, 16), {"groups": 2}, False),
        (8, (16, 16), {"filters": FILTERS + 4}, False),
        (8, (32, 32), {"kernel": 1}, False),
        (8, (32, 32), {"kernel": 2, "stride": 2}, False),  # patches side by side
        (8, (32, 32), {"channels": 3}, True),
        (1, (32, 32), {"channels": 3, "filters": 2 * FILTERS}, True),
        (8, (32, 32), {"channels": 96, "filters": 96, "stride": 2}, False),  # a matrix product of full size
        (8, (600,), {"channels": 96, "filters": 64, "kernel": 2}, False),
        (48, (64, 64), {"channels": 16}, False),  # larger than the cache
        (8, (32, 32), {"channels": 3, "filters": 2 * FILTERS}, False),  # little to do for each element of grad_output
    ],
)
def test_where_a_weight_gradient_takes_the_layout(
    batch: int, size: tuple[int, ...], options: dict[str, Any], expected: bool
) -> None:
    filters, kernel, channels = options.pop("filters", FILTERS), options.pop("kernel", 3), options.pop("channels", 8)
    model = cg.build_model(
        f"conv{len(size)}d_weight",
        input_shape=(batch, channels, *size),
        weight_shape=(filters, channels // options.get("groups", 1), *(kernel,) * len(size)),
        padding=kernel // 2,
        dynamic=(),
        **options,
    )
    assert blocked.put_blocked_layout(model, threads=1) == expected


@pytest.mark.skipif(BLOCK != 16, reason="the numbers are those of blocks of 16 channels")
@pytest.mark.parametrize(
    ("channels", "filters", "size", "kernel", "expected"),
    [
        (64, 64, 64, (3, 3), False),  # three rows for two threads
        (64, 64, 64, (4, 4), True),
        (64, 64, 64, (5, 5), True),
        (64, 64, 64, (1, 7), False),  # one row
        (32, 128, 64, (3, 3), True),  # more than the filters that are taken at once
        (64, 128, 64, (3, 3), False),  # many channels
        (64, 32, 64, (3, 3), True),  # few filters
        (96, 32, 64, (3, 3), False),
        (96, 32, 32, (3, 3), True),
    ],
)
def test_what_is_divided_among_threads(
    channels: int, filters: int, size: int, kernel: tuple[int, int], expected: bool
) -> None:
    for threads in (1, 2, None):
        model = cg.build_model(
            "conv2d_weight",
            input_shape=(8, channels, size, size),
            weight_shape=(filters, channels, *kernel),
            stride=2,
            padding=[k // 2 for k in kernel],
            dynamic=(),
        )
        assert blocked.put_blocked_layout(model, threads=threads) == (expected or threads == 1)


def test_long_rows_are_for_one_thread() -> None:
    for length, expected in ((4096, True), (8192, False)):
        for threads in (1, 2):
            model = cg.build_model(
                "conv1d_weight",
                input_shape=(4, 16, length),
                weight_shape=(FILTERS, 16, 4),
                padding=[(2, 1)],
                dynamic=(),
            )
            assert blocked.put_blocked_layout(model, threads=threads) == (expected or threads == 1)


def test_a_dynamic_batch_is_no_number_of_channels() -> None:
    model = cg.build_model(
        "conv2d_weight", input_shape=(8, 8, 16, 16), weight_shape=(FILTERS, 8, 3, 3), padding=1, dynamic=("batch",)
    )
    assert not blocked.put_blocked_layout(model)


@pytest.mark.parametrize("batch", [2, 16])
def test_a_step_computes_the_same(batch: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, FILTERS, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(FILTERS),
        nn.ReLU(),
        nn.Conv2d(FILTERS, FILTERS, (3, 1), padding=(1, 0)),
        nn.Tanh(),
        nn.ConvTranspose2d(FILTERS, 16, 4, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, FILTERS, 5, padding="same"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(FILTERS, 4),
    )
    data = torch.randn(batch, 3, 48, 48), torch.arange(batch) % 4
    report = cg.export_training_step(network, "cross_entropy", "sgd", data)
    model = ir.to_proto(report.model)
    assert {opset.domain for opset in model.opset_import} == {""}
    kinds = [entry.kind for entry in from_text(metadata(model))]
    assert kinds.count("weight") == 4
    assert blocked.put_blocked_layout(model)
    assert_steps_agree(report, data, in_place=False)


def test_nothing_is_read_beyond_the_last_window() -> None:
    """A row and a column that no window reaches hold NaN."""
    g = ConvGeometry.from_forward((4, 8, 30, 30), (FILTERS, 8, 3, 3), stride=2, padding=0)
    x, grad = integers(*g.input_shape), integers(*g.output_shape, seed=2)
    dirty = x.clone()
    dirty[:, :, -1], dirty[:, :, :, -1] = np.nan, np.nan
    model = gradient_model(g)
    assert blocked.put_blocked_layout(model)
    session = cg.GradientSession(model, ["CPUExecutionProvider"], blocked_layout=False)
    results = [session.run({"grad_output": grad, "input": data})["grad_weight"] for data in (x, dirty)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
