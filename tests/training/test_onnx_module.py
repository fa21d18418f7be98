"""ONNX forward models as torch modules, held to onnxruntime."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import convgrad_export as cg
from convgrad_export.training import artifacts
from convgrad_export.training.onnx_module import OnnxModule

RANDOM = np.random.default_rng(0)


def model(*nodes: Any, shape: tuple[Any, ...] = ("n", 3), opset: int = 15, **weights: Any) -> onnx.ModelProto:
    """A graph from x to y."""
    graph = helper.make_graph(
        list(nodes),
        "forward",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def scaled(*nodes: Any, **options: Any) -> onnx.ModelProto:
    """`nodes` from h to y, after a multiplication by a weight."""
    return model(helper.make_node("Mul", ["x", "w"], ["h"]), *nodes, w=np.float32([1.5]), **options)


node = helper.make_node
MODELS: dict[str, onnx.ModelProto] = {
    "clip by attributes": scaled(node("Clip", ["h"], ["y"], min=-0.5, max=1.0), opset=10),
    "clip by inputs": scaled(node("Clip", ["h", "low", ""], ["y"]), low=np.float32(-0.5)),
    "hard sigmoid": scaled(node("HardSigmoid", ["h"], ["y"], alpha=1 / 6)),
    "hard sigmoid, by default": scaled(node("HardSigmoid", ["h"], ["y"])),
    "softmax over all that follows": scaled(node("Softmax", ["h"], ["y"], axis=1), shape=(2, 3, 4), opset=11),
    "softmax by default, old": scaled(node("Softmax", ["h"], ["y"]), shape=(2, 3, 4), opset=11),
    "log_softmax, old": scaled(node("LogSoftmax", ["h"], ["y"], axis=-1), shape=(2, 3, 4), opset=11),
    "softmax over one axis": scaled(node("Softmax", ["h"], ["y"], axis=1), shape=(2, 3, 4)),
    "constant integers": scaled(
        node("Constant", [], ["s"], value_ints=[3, -1]), node("Reshape", ["h", "s"], ["y"]), shape=(2, 3, 4)
    ),
    "constant number": scaled(node("Constant", [], ["s"], value_float=2.5), node("Mul", ["h", "s"], ["y"])),
    "no axis to reduce": scaled(node("ReduceMean", ["h"], ["y"], noop_with_empty_axes=1), opset=18),
    "every axis reduced": scaled(node("ReduceMean", ["h"], ["y"], keepdims=0)),
    "flatten at 2": scaled(node("Flatten", ["h"], ["y"], axis=2), shape=(2, 3, 4)),
    "slice": scaled(
        node("Slice", ["h", "first", "last", "axes", "steps"], ["y"]),
        first=np.int64([1, -3]),
        last=np.int64([2**63 - 1, -1]),
        axes=np.int64([-1, 1]),
        steps=np.int64([2, 1]),
        shape=(2, 4, 5),
    ),
    "slice by attributes": scaled(node("Slice", ["h"], ["y"], starts=[0, 1], ends=[1, 9]), shape=(2, 3), opset=9),
    "split by sizes": scaled(
        node("Split", ["h", "sizes"], ["a", "y", "c"], axis=-1), sizes=np.int64([1, 3, 2]), shape=(2, 6)
    ),
    "split by attribute": scaled(node("Split", ["h"], ["a", "y"], axis=1, split=[1, 2]), opset=11),
    "split evenly": scaled(node("Split", ["h"], ["a", "y"]), shape=(4, 3)),
    "split by number": scaled(node("Split", ["h"], ["a", "y"], axis=1, num_outputs=2), opset=18),
    "cast": scaled(
        node("Cast", ["h"], ["i"], to=TensorProto.INT64),
        node("Div", ["i", "two"], ["j"]),
        node("Cast", ["j"], ["y"], to=TensorProto.FLOAT),
        two=np.int64([2]),
        shape=(20, 3),
    ),
    "half of a size": scaled(
        node("Shape", ["h"], ["s"]),
        node("Gather", ["s", "one"], ["n"]),
        node("Add", ["n", "one"], ["o"]),
        node("Div", ["o", "two"], ["half"]),
        node("Slice", ["h", "one", "half", "one"], ["y"]),
        one=np.int64([1]),
        two=np.int64([2]),
        shape=(2, 6),
    ),
    "divided by a size": scaled(
        node("Shape", ["h"], ["s"]),
        node("Gather", ["s", "one"], ["n"]),
        node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        node("Div", ["h", "f"], ["g"]),
        node("Mul", ["g", "root"], ["y"]),
        one=np.int64([1]),
        root=np.float32([0.3]),
    ),
    "flatten at 0": scaled(node("Flatten", ["h"], ["y"], axis=0), shape=(2, 3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_module_computes_what_onnxruntime_does(name: str) -> None:
    proto = MODELS[name]
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    x = RANDOM.standard_normal([dim.dim_value or 4 for dim in dims], dtype=np.float32)
    expected = cg.GradientSession(proto).run({"x": x})["y"]
    got = OnnxModule(proto)(torch.from_numpy(x))["y"].detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (scaled(node("Relu", ["h"], ["y"], domain="com.example")), r"com\.example::Relu"),
        (
            scaled(*(node("Selu", [a], [b], name=f"selu_{b}") for a, b in ("hi", "ij", "jy"))),
            r"form: Selu \(node selu_i and 2 more\)\. Known",
        ),
        (scaled(node("Dropout", ["h"], ["d", "mask"]), node("Identity", ["mask"], ["y"])), "reads mask"),
        (scaled(node("Identity", ["h"], ["y"]), opset=6), "of opset 6, expected 7 or later"),
        (
            scaled(node("Slice", ["h", "a", "b", "a", "a"], ["y"]), a=np.int64([-1]), b=np.int64([-9])),
            "Slice: Slice from the end",
        ),
        (scaled(node("Constant", [], ["s"], value_string="a"), node("Mul", ["h", "s"], ["y"])), "no dense numbers"),
    ],
    ids=range(6),
)
def test_models_of_other_kinds_are_refused(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(cg.UnsupportedOperatorError, match=message):
        OnnxModule(proto)(torch.ones(2, 3))


@pytest.mark.parametrize("scale", ["one", "again"], ids=["the very same", "through an Identity"])
def test_statistics_that_are_a_weight_too_are_refused(scale: str) -> None:
    """Exporters merge equal initializers, and a new BatchNorm has a scale of 1 and a variance of 1."""
    proto = model(
        node("Identity", ["one"], ["again"]),
        node("BatchNormalization", ["x", scale, "shift", "mean", "one"], ["y"], name="bn"),
        one=np.ones(3, np.float32),
        shift=np.zeros(3, np.float32),
        mean=np.zeros(3, np.float32),
    )
    with pytest.raises(cg.UnsupportedOperatorError, match=r"bn: one\. Export it for training"):
        OnnxModule(proto)
    proto.graph.node[1].input[4] = "again"
    with pytest.raises(cg.UnsupportedOperatorError, match=r"bn: again\. Export it for training"):
        OnnxModule(proto)


def linears(first: np.ndarray, second: np.ndarray, bias: np.ndarray, *, split: bool) -> onnx.ModelProto:
    """Two layers with one bias, read through an Identity by the second; `split` into products and additions."""
    weights = {"a": first, "b": second, "zero": bias}
    again = node("Identity", ["zero"], ["again"])
    if not split:
        return model(
            again, node("Gemm", ["x", "a", "zero"], ["h"]), node("Gemm", ["h", "b", "again"], ["y"]), **weights
        )
    sums = [node("Add", ["p", "zero"], ["h"]), node("Add", ["again", "q"], ["y"])]
    return model(again, node("MatMul", ["x", "a"], ["p"]), node("MatMul", ["h", "b"], ["q"]), *sums, **weights)


@pytest.mark.parametrize("split", [False, True], ids=["Gemm", "MatMul and Add"])
def test_biases_that_an_exporter_merged_are_refused(split: bool) -> None:
    """Zeros for all layers of a new network are one initializer then, and would be trained as one."""
    first, second = RANDOM.normal(size=(2, 3, 3)).astype(np.float32)
    zeros = np.zeros(3, np.float32)
    merged = linears(first, second, zeros, split=split)
    with pytest.raises(cg.UnsupportedOperatorError, match=r"share a bias of equal values.*: zero \(h, y\)\. Export it"):
        OnnxModule(merged)
    OnnxModule(merged, ["a", "b"])  # the bias stays
    OnnxModule(linears(first, second, first[0], split=split))  # shared by the network itself, for all one can tell
    once = linears(first, second, zeros, split=split)
    for reader in once.graph.node:  # the same layer twice
        reader.input[:] = ["a" if name == "b" else name for name in reader.input]
    OnnxModule(once)


class Folded(nn.Module):
    """Of which torch.onnx's newer exporter drops a zero bias, folds a BatchNorm, and transposes a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)
        self.second, self.scores = nn.Conv2d(2, 3, 3), nn.Linear(4, 5)
        nn.init.normal_(self.norm.bias)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self.second(self.norm(self.first(x)).relu()).flatten(2))


def test_parameters_that_an_exporter_dropped_are_named(tmp_path: Path) -> None:
    program = torch.onnx.export(Folded().eval(), (torch.randn(2, 1, 6, 6),), dynamo=True, verbose=False)
    assert program is not None
    proto = program.model_proto
    write = functools.partial(artifacts.generate_artifacts, proto, loss="mse", artifact_directory=tmp_path)
    message = r"has no norm\.weight, norm\.bias, second\.bias, which the module has.*name it in requires_grad"
    with pytest.raises(cg.UnsupportedOperatorError, match=message):
        write()
    with pytest.raises(cg.UnsupportedOperatorError, match=r"has no second\.bias, which"):
        write(frozen_params=["first.weight", "first.weight_bias"])
    assert not list(tmp_path.iterdir())
    write(frozen_params=["first.weight", "first.weight_bias", "second.weight"])
    write(requires_grad=["first.weight", "second.weight"])
