"""Small models with and without a batch dimension, for the tests of repositories and servers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import convgrad_export as cg


def gradient_model(path: Path, *, scale: float = 1.0) -> Path:
    """A depthwise input gradient with its weight inside: x (batch, 2, 6) to y (batch, 2, 8)."""
    values = scale * np.arange(1, 7, dtype=np.float32).reshape(2, 1, 3)
    weight = numpy_helper.from_array(values, "w")
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=2)
    return _save(path, [node], [("x", ["batch", 2, 6])], [("y", ["batch", 2, 8])], [weight])


def mean_model(path: Path) -> Path:
    """Rows that see one another: y = x - mean over the batch."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, (1,), [0])
    return _save(path, nodes, [("x", ["batch", 3])], [("y", ["batch", 3])], [axes])


def classifier(path: Path, *, batch: object = "batch") -> Path:
    """Scores and a scalar a row: x (batch, 3) to scores (batch, 3), best (batch,)."""
    nodes = [
        helper.make_node("Softmax", ["x"], ["scores"]),
        helper.make_node("ReduceMax", ["x", "axes"], ["best"], keepdims=0),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, (1,), [1])
    return _save(path, nodes, [("x", [batch, 3])], [("scores", [batch, 3]), ("best", [batch])], [axes])


def typed_model(path: Path, code: int) -> Path:
    """y = x in any element type, (batch, height)."""
    node = helper.make_node("Identity", ["x"], ["y"])
    shapes = [("x", ["batch", "height"])], [("y", ["batch", "height"])]
    return _save(path, [node], *shapes, [], code)


def bfloat16_model(path: Path) -> Path:
    """y = x + x by way of float32, (batch, 3): onnxruntime's CPU provider adds no bfloat16."""
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "wide"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.BFLOAT16),
    ]
    return _save(path, nodes, [("x", ["batch", 3])], [("y", ["batch", 3])], [], TensorProto.BFLOAT16)


def weight_gradient(path: Path) -> Path:
    """Operands with a batch, a result without one."""
    onnx.save(cg.build_model("conv1d_weight", input_shape=(2, 3, 8), weight_shape=(4, 3, 3)), path)
    return path


def scalar_model(path: Path, code: int = TensorProto.FLOAT) -> Path:
    """No batch, and scalars: x (n, 3) times factor () to y (n, 3), and total () of x."""
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["factor"], ["wide_factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "wide_factor"], ["product"]),
        helper.make_node("ReduceSum", ["wide"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["product"], ["y"], to=code),
        helper.make_node("Cast", ["sum"], ["total"], to=code),
    ]
    return _save(path, nodes, [("x", ["n", 3]), ("factor", [])], [("y", ["n", 3]), ("total", [])], [], code)


def external(path: Path) -> Path:
    """`gradient_model` with its weight in weights/w.bin beside it."""
    model = onnx.load(gradient_model(path))
    (path.parent / "weights").mkdir()
    onnx.save(model, path, save_as_external_data=True, location="weights/w.bin", size_threshold=0)
    return path


def external_inside(path: Path, place: str, location: str = "w.bin") -> Path:
    """y = x + w, (batch, 4), with w = 0, 1, 2, 3 in a file: of a Constant, or of a branch of an If."""
    if not (path.parent / "w.bin").exists():
        np.arange(4, dtype=np.float32).tofile(path.parent / "w.bin")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    sides = [("x", ["batch", 4])], [("y", ["batch", 4])]
    if place == "constant":
        constant = helper.make_node("Constant", [], ["w"], value=weight)
        return _save(path, [constant, helper.make_node("Add", ["x", "w"], ["y"])], *sides, [])
    branches = {
        name: helper.make_graph(
            [helper.make_node("Add", ["x", "w"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])],
            [weight],
        )
        for name in ("then_branch", "else_branch")
    }
    condition = helper.make_tensor("condition", TensorProto.BOOL, [], [True])
    return _save(path, [helper.make_node("If", ["condition"], ["y"], **branches)], *sides, [condition])


def _save(path: Path, nodes: list, inputs: list, outputs: list, held: list, code: int = TensorProto.FLOAT) -> Path:
    def values(side: list) -> list:
        return [helper.make_tensor_value_info(name, code, shape) for name, shape in side]

    graph = helper.make_graph(nodes, "test", values(inputs), values(outputs), held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path
