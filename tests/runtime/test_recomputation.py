"""Transformed weights made twice: which, with the same results, and only where it is worth it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper, parser

import convgrad_export as cg
from convgrad_export.runtime import lifetimes
from convgrad_export.runtime.graph_lives import GraphLives
from convgrad_export.runtime.lifetimes import order_lives
from convgrad_export.runtime.recomputation import made_again
from convgrad_export.runtime.tensor_bytes import declared_bytes

# Two layers and their gradients: a weight of 1 MiB is transformed to one of 4 and read, seen as another shape, by both.
LAYERS = """
<ir_version: 8, opset_import: ["" : 18]>
layers (float[4, 512] x, float[128, 2048] w, float[128, 2048] v, int64[2] flat, int64[3] deep)
    => (float[4, 2048] y, float[1, 4, 2048] dy)
    <float[512, 2048] tw, float[512, 2048] tv, float[1, 512, 2048] sw, float[1, 512, 2048] sv, float[512, 2048] large,
     float[512, 2048] twice, float[4, 2048] a, float[1, 4, 2048] b, float[1, 4, 2048] c, float[4, 128] d,
     float[4, 512] l, float[1, 4, 2048] da, float[1, 4, 2048] db, float[1, 4, 2048] dc>
{
    tw = MatMul(g, w)
    a = MatMul(x, tw)
    tv = MatMul(g, v)
    sv = Reshape(tv, deep)
    b = MatMul(x, sv)
    c = Add(a, b)
    y = Reshape(c, flat)
    large = MatMul(h, w)
    twice = Mul(large, large)
    l = Gemm <transB = 1> (y, twice)
    db = MatMul(l, sv)
    sw = Reshape(tw, deep)
    da = MatMul(l, sw)
    dc = Add(da, db)
    d = MatMul(l, h)
    e = MatMul(d, w)
    dy = Add(dc, e)
}
"""


def layers() -> onnx.ModelProto:
    model = parser.parse_model(LAYERS)
    rng = np.random.default_rng(0)
    for name, shape in (("g", (512, 128)), ("h", (512, 128))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    return model


def outputs(model: onnx.ModelProto) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    feeds = {
        "x": rng.standard_normal((4, 512), np.float32),
        "w": rng.standard_normal((128, 2048), np.float32),
        "v": rng.standard_normal((128, 2048), np.float32),
        "flat": np.array([4, 2048]),
        "deep": np.array([1, 512, 2048]),
    }
    return ort.InferenceSession(model.SerializeToString()).run(None, feeds)


def lives_of(model: onnx.ModelProto) -> tuple[GraphLives, list[int], list[str]]:
    lives = GraphLives.of(model.graph, declared_bytes(model.graph))
    return lives, list(range(len(lives.nodes))), [value.name for value in model.graph.input]


def test_weights_are_transformed_again_behind_the_fullest_moment() -> None:
    model = layers()
    before = outputs(model)
    lives, order, given = lives_of(model)
    names = [node.output[0] for node in model.graph.node]
    most, at = lives.fullest(order)
    assert names[at] == "twice"
    again = made_again(lives, order, given)
    assert {name: {names[i] for i in late} for name, late in again.items()} == {"tw": {"sw", "da"}, "tv": {"db"}}
    assert lives.fullest(order, again)[0] == most - 2 * (4 << 20)
    assert order_lives(model.graph, declared_bytes(model.graph))
    onnx.checker.check_model(model, full_check=True)
    found = [node.output[0] for node in model.graph.node]
    assert found.index("tw.again") + 1 == found.index("sw.again") == found.index("da") - 1
    assert found.index("tv.again") > found.index("twice")
    assert "sw" not in found  # nothing reads it any more
    for first, second in zip(before, outputs(model), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_small_gain_is_not_worth_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetimes, "_WORTH", 0.9)
    model = layers()
    order_lives(model.graph, declared_bytes(model.graph))
    assert not any(name.endswith(".again") for node in model.graph.node for name in node.output)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tw = MatMul(g, w)", "tw = Gemm(g, w)"),  # an operator that may take long
        ("tw = MatMul(g, w)", "p = Relu(w) tw = MatMul(g, p)"),  # of what would have to be held, or made, itself
        ("da = MatMul(l, sw)", "da = Relu(b)"),  # no use of it comes late
    ],
)
def test_what_is_not_made_again(old: str, new: str) -> None:
    assert LAYERS.count(old) == 1
    model = parser.parse_model(LAYERS.replace(old, new))
    model.graph.initializer.extend(layers().graph.initializer)
    lives, order, given = lives_of(model)
    assert set(made_again(lives, order, given)) == {"tv"}


def test_a_step_with_winograd_convolutions_keeps_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = [torch.nn.Conv2d(128, 128, 3, padding=1) for _ in range(4)]
    module = torch.nn.Sequential(*layer, torch.nn.Flatten(), torch.nn.Linear(128 * 64, 5))
    batch = torch.randn(4, 128, 8, 8), torch.randint(0, 5, (4,))
    report = cg.export_training_step(module, "cross_entropy", "sgd", batch, verify=False)
    states: list[dict[str, np.ndarray]] = []
    monkeypatch.setattr(lifetimes, "_WORTH", -1.0)
    for name in ("made_again", "nothing"):
        calls: list[dict[str, set[int]]] = []

        def found(*args: Any, name: str = name, calls: list[dict[str, set[int]]] = calls) -> dict[str, set[int]]:
            calls.append(made_again(*args) if name == "made_again" else {})
            return calls[-1]

        monkeypatch.setattr(lifetimes, "made_again", found)
        session = cg.TrainingSession(report.model, report.state, threads=1)
        assert any(calls) == (name == "made_again")
        session.step(*batch)
        states.append(session.state())
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
