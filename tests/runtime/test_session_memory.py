"""Sessions on the CPU give memory back early, unless the caller brings settings of his own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import convgrad_export as cg
from convgrad_export.session_memory import free_early

LAYER = {"input_shape": (2, 3, 6, 6), "weight_shape": (4, 3, 3, 3)}
PEAK = """
import json, sys
import numpy as np
import onnxruntime as ort
from convgrad_export.session_memory import free_early

options = ort.SessionOptions()
options.intra_op_num_threads = 1
if sys.argv[2] == "early":
    free_early(options)
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

before = peak()
for _ in range(3):
    session.run(None, {"x": np.ones((1 << 20,), np.float32)})
print(json.dumps(peak() - before))
"""


@pytest.mark.parametrize("own", [False, True])
def test_a_gradient_session_frees_early_unless_it_is_given_options(own: bool) -> None:
    model = cg.build_model("conv2d_input", **LAYER)
    session = cg.GradientSession(model, session_options=ort.SessionOptions() if own else None)
    used = session.inference_session.get_session_options()
    assert (used.enable_mem_pattern, used.enable_mem_reuse) == (own, own)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux's /proc")
def test_buffers_are_not_kept_for_later_tensors_of_the_same_shape(tmp_path: Path) -> None:
    """Pairs of tensors of growing size, as on the way up a network, and of the same sizes on the way back."""
    nodes, last = [], "x"
    sizes = [i << 20 for i in range(1, 9)]
    for way, steps in (("up", sizes), ("down", sizes[::-1])):
        for size in steps:
            name = f"{way}{size}"
            nodes.append(helper.make_node("Expand", [last, f"shape{size}"], [f"{name}.wide"]))
            nodes.append(helper.make_node("Neg", [f"{name}.wide"], [f"{name}.neg"]))
            nodes.append(helper.make_node("ReduceMax", [f"{name}.neg"], [name], keepdims=1))
            last = name
    shapes = [helper.make_tensor(f"shape{size}", TensorProto.INT64, [1], [size]) for size in sizes]
    whole = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1 << 20])
    nodes.insert(0, helper.make_node("ReduceMax", ["x"], ["first"], keepdims=1))
    nodes[1].input[0] = "first"
    graph = helper.make_graph(
        nodes, "chain", [whole], [helper.make_tensor_value_info(last, TensorProto.FLOAT, [1])], shapes
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "chain.onnx"
    path.write_bytes(model.SerializeToString())
    peaks = {
        how: json.loads(
            subprocess.run([sys.executable, "-c", PEAK, str(path), how], capture_output=True, check=True).stdout
        )
        for how in ("default", "early")
    }
    assert peaks["early"] < 0.6 * peaks["default"]


def test_free_early_changes_these_two_settings() -> None:
    options = ort.SessionOptions()
    free_early(options)
    assert not options.enable_mem_pattern
    assert not options.enable_mem_reuse
