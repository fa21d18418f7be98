"""The order that makes onnxruntime run a graph's nodes as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, parser

from convgrad_export.runtime.execution_order import put_execution_order

# A gradient in small: masks of the forward's values, written where they are used.
GRADIENT = """
<ir_version: 8, opset_import: ["" : 18]>
gradient (float[4, 4] x, float[4, 4] g) => (float[4, 4] dx, float[4, 4] d1, float[4, 4] d2) {
    a = Sin(x)
    b = Cos(a)
    c = Tan(b)
    gc = Mul(g, c)
    d2 = Atan(gc)
    mb = Sign(b)
    gb = Mul(gc, mb)
    d1 = Atan(gb)
    ma = Sign(a)
    ga = Mul(gb, ma)
    dx = Tanh(ga)
}
"""


def executed(model: onnx.ModelProto, folder: Path) -> list[str]:
    """First outputs of the nodes, in the order in which onnxruntime runs them."""
    for node in model.graph.node:
        node.name = node.output[0]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {value.name: np.ones((4, 4), np.float32) for value in model.graph.input})
    events = json.loads(Path(session.end_profiling()).read_text())
    suffix = "_kernel_time"
    return [event["name"].removesuffix(suffix) for event in events if event.get("name", "").endswith(suffix)]


def test_what_a_gradient_needs_is_computed_when_it_is_needed(tmp_path: Path) -> None:
    model = parser.parse_model(GRADIENT)
    put_execution_order(model.graph)
    onnx.checker.check_model(model)
    order = executed(model, tmp_path)
    assert len(order) == 11
    assert order.index("mb") + 1 == order.index("gb")
    assert order.index("ma") + 1 == order.index("ga")
    assert order.index("gc") < order.index("mb")


def test_onnxruntime_brings_the_masks_forward_otherwise(tmp_path: Path) -> None:
    """The reason for all this; when it fails, onnxruntime's order has changed and ours may be dropped."""
    order = executed(parser.parse_model(GRADIENT), tmp_path)
    assert order.index("ma") < order.index("gc")
    assert order.index("mb") < order.index("gc")


def test_results_stay_and_subgraphs_are_read() -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        choice (float[4] x, bool p) => (float[4] y) {
            a = Sin(x)
            b = Cos(x)
            y = If (p) <
                then_branch = first () => (float[4] t) { t = Neg(a) },
                else_branch = second () => (float[4] e) { e = Neg(b) }
            >
        }
    """)
    put_execution_order(model.graph)
    assert [node.op_type for node in model.graph.node] == ["Cos", "Sin", "If"]
    onnx.checker.check_model(model)


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=3), min_size=1, max_size=30))
def test_every_graph_stays_in_topological_order(reads: list[list[int]]) -> None:
    names = ["x"]
    nodes = []
    for i, picks in enumerate(reads):
        nodes.append(helper.make_node("Sum", [names[pick % len(names)] for pick in picks], [f"v{i}"]))
        names.append(f"v{i}")
    graph = helper.make_graph(nodes, "sums", [], [])
    put_execution_order(graph)
    seen = {"x"}
    for node in graph.node:
        assert seen.issuperset(node.input)
        seen.update(node.output)
    assert sorted(map(str, graph.node)) == sorted(map(str, nodes))


@pytest.mark.parametrize("cycle", [1, 2])
def test_nodes_that_wait_for_each_other_are_left_to_onnxruntime(cycle: int) -> None:
    nodes = [helper.make_node("Neg", [f"v{(i + 1) % cycle}"], [f"v{i}"]) for i in range(cycle)]
    graph = helper.make_graph([helper.make_node("Sin", ["x"], ["s"]), *nodes], "cycle", [], [])
    before = str(graph)
    put_execution_order(graph)
    assert str(graph) == before
