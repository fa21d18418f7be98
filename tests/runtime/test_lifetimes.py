"""Orders in which tensors live shorter: what moves, that the order stays one, and that sessions run it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, parser

from convgrad_export.errors import ModelFileError
from convgrad_export.runtime import ordered_session
from convgrad_export.runtime.lifetimes import order_lives
from convgrad_export.runtime.ordered_session import open_ordered_session
from convgrad_export.runtime.tensor_bytes import completed_bytes, declared_bytes

CPU = [("CPUExecutionProvider", {})]

# A gradient in small, as onnxruntime orders one: what only the ends need comes last.
GRADIENT = """
<ir_version: 8, opset_import: ["" : 18]>
gradient (float[64, 64] x, float[64, 64] g, int64[2] axes) => (float[64, 64] dx, float[1, 2] sums)
    <float[64, 64] a, float[64, 64] b, float[64, 64] gb, float[64, 64] ga, float[64, 64] s, float[64, 64] t,
     float[64, 64] u, float[64, 64] masked, bool[64, 64] mask, float[64, 64] wide, float[1, 1] sb, float[1, 1] sa>
{
    a = Sin(x)
    b = Relu(a)
    s = Sigmoid(b)
    c = Mul(b, s)
    gb = Mul(g, c)
    t = Neg(s)
    u = Exp(t)
    masked = Mul(gb, u)
    mask = Greater(b, g)
    wide = Cast <to = 1> (mask)
    ga = Mul(masked, wide)
    dx = Tan(ga)
    sb = ReduceSum (gb, axes)
    sa = ReduceSum (masked, axes)
    sums = Concat <axis = 1> (sb, sa)
}
"""


def names(graph: onnx.GraphProto) -> list[str]:
    return [node.output[0] for node in graph.node]


def is_an_order(graph: onnx.GraphProto) -> bool:
    made = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if not made.issuperset(node.input):
            return False
        made.update(node.output)
    return True


def test_sums_masks_and_slopes_are_computed_where_their_operands_end():
    graph = parser.parse_model(GRADIENT).graph
    assert order_lives(graph, declared_bytes(graph))
    assert is_an_order(graph)
    found = names(graph)
    # a bias gradient right behind the gradient that it sums, not behind the whole backward
    assert found.index("sb") == found.index("gb") + 1
    assert found.index("sa") < found.index("dx")
    # a mask takes a quarter of what it is made of; here the product is the last that reads the activation besides
    assert found.index("mask") == found.index("c") + 1
    assert found.index("wide") == found.index("ga") - 1


def test_an_order_that_is_no_better_stays():
    graph = parser.parse_model(GRADIENT).graph
    order_lives(graph, declared_bytes(graph))
    before = names(graph)
    assert not order_lives(graph, declared_bytes(graph))
    assert names(graph) == before
    assert not order_lives(graph, {})  # of tensors without sizes nothing is known
    assert names(graph) == before


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 3), st.integers(1, 9)), max_size=40))
def test_any_graph_keeps_its_meaning(rows: list[tuple[int, int, int, int]]):
    """Nodes of one and two operands, views, Concats; nodes are only moved, behind what they read."""
    nodes, tensors, sizes = [], ["x"], {"x": 4}
    for number, (first, second, kind, size) in enumerate(rows):
        operands = [tensors[first % len(tensors)], tensors[second % len(tensors)]]
        op = ("Add", "Identity", "Concat", "Neg")[kind]
        nodes.append(helper.make_node(op, operands[: 1 if op in ("Identity", "Neg") else 2], [f"t{number}"]))
        tensors.append(f"t{number}")
        sizes[f"t{number}"] = size
    float_value = [helper.make_tensor_value_info("x", 1, [1])]
    graph = helper.make_graph(nodes, "g", float_value, [helper.make_tensor_value_info(tensors[-1], 1, None)])
    before = sorted(node.SerializeToString() for node in graph.node)
    order_lives(graph, sizes)
    assert is_an_order(graph)
    assert sorted(node.SerializeToString() for node in graph.node) == before


def test_sizes_of_what_is_declared_and_of_what_is_rearranged():
    model = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[batch, 3] x) => (double[2, 3] y) <float16[batch, 5] h, int64[2] shape> {
            turned = Transpose(x)
            again = Reshape(turned, shape)
            sum = Add(again, x)
            h = Cast <to = 10> (sum)
            y = Foo(h)
        }
        """
    )
    declared = declared_bytes(model.graph)
    assert declared == {"x": 8 * 3 * 4, "y": 2 * 3 * 8, "h": 8 * 5 * 2, "shape": 16}  # a free size is taken as 8
    assert completed_bytes(model.graph, declared) == declared | {"turned": 96, "again": 96, "sum": 96}
    assert completed_bytes(model.graph, {"again": 7})["turned"] == 7  # backwards


def profiled(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> list[str]:
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    suffix = "_kernel_time"
    return [event["name"].removesuffix(suffix) for event in events if event.get("name", "").endswith(suffix)]


def gradient_model() -> onnx.ModelProto:
    model = parser.parse_model(GRADIENT)
    for node in model.graph.node:
        node.name = node.output[0]
    return model


FEEDS = {
    "x": np.linspace(-2, 2, 64 * 64, dtype=np.float32).reshape(64, 64),
    "g": np.linspace(-1, 0, 64 * 64, dtype=np.float32).reshape(64, 64),
    "axes": np.array([0, 1], np.int64),
}


def test_a_session_runs_the_order(tmp_path: Path):
    def options() -> ort.SessionOptions:
        made = ort.SessionOptions()
        made.intra_op_num_threads = 1
        made.enable_profiling = True
        made.profile_file_prefix = str(tmp_path / "profile")
        made.log_severity_level = 3
        return made

    model = gradient_model()
    content, sizes = model.SerializeToString(), declared_bytes(model.graph)
    plain = ort.InferenceSession(content, options(), providers=["CPUExecutionProvider"])
    expected = plain.run(None, FEEDS)
    session = open_ordered_session(content, options, CPU, "the model", sizes)
    for found, wanted in zip(session.run(None, FEEDS), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    order = profiled(session, FEEDS)
    assert order.index("sb") == order.index("gb") + 1
    assert order.index("mask") < order.index("gb")
    assert order != profiled(plain, FEEDS)


@pytest.mark.parametrize("obstacle", ["no folder", "no file", "few sizes", "large"])
def test_a_session_in_onnxruntimes_own_order(obstacle: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model = gradient_model()
    sizes = declared_bytes(model.graph)
    if obstacle == "no folder":

        def refuse(prefix: str) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(ordered_session.tempfile, "TemporaryDirectory", refuse)
    elif obstacle == "no file":

        class Gone:
            def __init__(self, prefix: str) -> None: ...

            def __enter__(self) -> str:
                return str(tmp_path / "gone")

            def __exit__(self, *error: object) -> None: ...

        monkeypatch.setattr(ordered_session.tempfile, "TemporaryDirectory", Gone)
    elif obstacle == "few sizes":
        sizes = {"x": 4}
    else:
        monkeypatch.setattr(ordered_session, "_LARGEST", 10)
    session = open_ordered_session(model.SerializeToString(), ort.SessionOptions, CPU, "the model", sizes)
    assert session.run(None, FEEDS)[0].shape == (64, 64)
    assert session.get_session_options().execution_order == ort.ExecutionOrder.DEFAULT


def test_a_model_that_cannot_be_loaded():
    with pytest.raises(ModelFileError, match="onnxruntime cannot load the model"):
        open_ordered_session(b"no model", ort.SessionOptions, CPU, "the model", {})
