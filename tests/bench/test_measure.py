"""Real measurements of small layers, in this process and with the peers where they are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from convgrad_export.bench import contenders
from convgrad_export.bench.layer import Layer
from convgrad_export.bench.measure import measure
from convgrad_export.bench.memory import ENVIRONMENT
from convgrad_export.bench.peer import OrtTraining
from convgrad_export.lowering import CPU, LOWERINGS
from convgrad_export.selection import runner

SMALL = Layer("small", 8, 6, (9, 7), (3, 3), 2, 1).geometry(2)


@pytest.mark.parametrize("operation", ["forward", "input", "weight"])
def test_every_contender_is_checked_and_timed(operation: str) -> None:
    record = measure(operation, SMALL, 1, rounds=3, seconds=0.05)
    expected = {"torch", "gemm"}
    if operation == "forward":
        expected.add("onnxruntime")
    else:
        expected |= {entry.name for entry in contenders.applicable(operation, SMALL)}
        assert record["choices"]["policy"] in expected
        assert record["choices"]["textbook"] in expected
    assert set(record["times"]) == expected
    assert set(record["errors"]) == expected - {"gemm"}
    assert max(record["errors"].values()) <= 1.0
    assert record["wrong"] == record["failed"] == {}
    assert record["gemm_gflops"] > 0


def test_a_wrong_lowering_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    build = contenders.lowering_call

    def broken(lowering, geometry, feeds, threads):
        call = build(lowering, geometry, feeds, threads)
        if lowering.name != "weight.im2col":
            return call
        return contenders.Call(call.run, lambda: call.result() * np.float32(1.001))

    monkeypatch.setattr(contenders, "lowering_call", broken)
    record = measure("weight", SMALL, 1, rounds=3, seconds=0.05)
    assert "weight.im2col" not in record["times"]
    assert "times its bound" in record["wrong"]["weight.im2col"]
    assert "weight.matmul_taps" in record["times"]


def test_a_lowering_that_cannot_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> contenders.Call:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(contenders, "lowering_call", refuse)
    record = measure("input", SMALL, 1, rounds=3, seconds=0.05)
    assert record["failed"]["input.conv_transpose"] == "RuntimeError: no kernel"
    assert set(record["times"]) == {"torch", "gemm"}


def test_what_may_exceed_the_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "available_bytes", lambda: 1_000_000)
    record = measure("input", Layer("large", 8, 8, (64, 64), (3, 3), 1, 1).geometry(2), 1, rounds=3, seconds=0.05)
    assert set(record["times"]) == {"torch", "gemm", *contenders.SPARING} - {"input.conv"}
    assert record["failed"]["input.col2im"] == "left out: may need 0.0 GB, 0.0 GB are free"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_sees_the_column_buffer() -> None:
    code = (
        "from convgrad_export.bench.memory import measure_memory\n"
        "from convgrad_export.bench.layer import image\n"
        "names = ('weight.im2col', 'weight.matmul_taps')\n"
        "print(measure_memory('weight', image('', 32, 32, 48, 3).geometry(8), 1, names))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=True
    )
    found = eval(done.stdout)
    columns = 9 * 8 * 32 * 48 * 48 * 4  # nine copies of the input
    assert columns <= found["weight.im2col"] < 3 * columns
    assert found["weight.matmul_taps"] < columns / 2


@pytest.fixture
def ort_training() -> Iterator[OrtTraining]:
    python = os.environ.get("CONVGRAD_ORT_TRAINING_PYTHON")
    if python is None:
        pytest.skip("CONVGRAD_ORT_TRAINING_PYTHON names no Python with onnxruntime-training")
    peer = OrtTraining(python)
    yield peer
    peer.close()


@pytest.mark.peer
@pytest.mark.parametrize("operation", ["input", "weight"])
def test_conv_grad_takes_part(ort_training: OrtTraining, operation: str) -> None:
    record = measure(operation, SMALL, 1, rounds=3, seconds=0.05, peer=ort_training)
    assert record["errors"]["ort_training"] <= 1.0
    assert record["times"]["ort_training"]["min_ms"] > 0
    assert record["failed"] == record["wrong"] == {}


@pytest.mark.peer
def test_the_textbook_form_is_what_onnx_ad_emits() -> None:
    """The same operators around the same Conv, and the same numbers to the last bit."""
    onnx_ad = pytest.importorskip("onnx_ad", reason="onnx-ad is not installed")
    g = Layer("remainder", 8, 6, (10, 7), (3, 3), 2, 1).geometry(2)
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=g.stride, pads=[1, 1, 1, 1], dilations=g.dilation, kernel_shape=g.kernel_size
    )
    values = {"x": g.input_shape, "w": g.weight_shape, "y": g.output_shape}
    x, w, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items())
    forward = helper.make_model(
        helper.make_graph([node], "layer", [x, w], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    theirs = onnx_ad.reverse(forward, inputs=["w"])
    rng = np.random.default_rng(0)
    feeds = {name: rng.integers(-3, 4, shape).astype(np.float32) for name, shape in values.items()}
    session = runner.open_session(theirs.SerializeToString(), CPU, 1)
    seed = feeds["y"].reshape(theirs.graph.input[-1].type.tensor_type.shape.dim[0].dim_value, 1)
    (result,) = session.run(["adj_w"], {"x": feeds["x"], "w": feeds["w"], "adj_y": seed})
    named = {"input": feeds["x"], "weight": feeds["w"], "grad_output": feeds["y"]}
    textbook = LOWERINGS[contenders.choices("weight", g, 1)["textbook"]]
    ours = contenders.lowering_call(textbook, g, named, 1).result()
    np.testing.assert_array_equal(result.reshape(g.weight_shape), ours)

    def convolution(model: onnx.ModelProto, with_outputs: str) -> dict[str, object]:
        (found,) = [n for n in model.graph.node if n.op_type == "Conv" and n.output[0] != with_outputs]
        attributes = {a.name: helper.get_attribute_value(a) for a in found.attribute}
        return {name: attributes[name] for name in ("strides", "dilations", "group")}

    from convgrad_export import build_model

    mine = build_model(
        "conv2d_weight",
        input_shape=g.input_shape,
        weight_shape=g.weight_shape,
        stride=g.stride,
        padding=g.begin,
        lowering=textbook.name,
    )
    assert convolution(theirs, "y") == convolution(mine, "") == {"strides": [1, 1], "dilations": [2, 2], "group": 1}
    # The same three transpositions; theirs also slices the result, where ours reads less padding in the first place.
    counts = [[n.op_type for n in model.graph.node].count("Transpose") for model in (theirs, mine)]
    assert counts == [3, 3]
