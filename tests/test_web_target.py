"""What onnxruntime-web cannot load is named, from the committed measurement; no browser is needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import convgrad_export as cg
from convgrad_export.cli import main
from convgrad_export.web_target import check_web, measured, require_web


def model_of(
    *nodes: onnx.NodeProto, dtype: int = TensorProto.FLOAT, opset: int = 18, domain: str = "", ir_version: int = 9
) -> onnx.ModelProto:
    """A chain from x to y over the given nodes, without shapes."""
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", dtype, None)],
        [helper.make_tensor_value_info("y", dtype, None)],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def problems(model: onnx.ModelProto, target: str) -> list[str]:
    return [str(problem) for problem in check_web(model).against(target)]


def test_gradient_models_in_float32_pass_for_both_builds() -> None:
    for name in ("conv1d_input", "conv2d_weight", "conv3d_input"):
        rank = int(name[4])
        model = cg.build_model(name, input_shape=(2, 4, *[8] * rank), weight_shape=(6, 4, *[3] * rank))
        assert problems(model, "webgpu") == []


def test_a_float64_convolution_is_named_with_its_node() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="stem.conv")
    model = model_of(conv, dtype=TensorProto.DOUBLE)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1, 3, 3)), "w"))
    (problem,) = check_web(model).against("web")
    assert (problem.operator, problem.node) == ("Conv", "stem.conv")
    assert "float64" in problem.reason
    with pytest.raises(cg.UnsupportedOperatorError, match=r"stem\.conv"):
        require_web(model, "web")


def test_float64_that_only_the_webgpu_build_lacks_is_told_apart() -> None:
    model = model_of(
        helper.make_node("Cast", ["x"], ["d"], name="widen", to=TensorProto.DOUBLE),
        helper.make_node("Exp", ["d"], ["e"], name="power"),
        helper.make_node("Cast", ["e"], ["y"], name="narrow", to=TensorProto.FLOAT),
    )
    assert problems(model, "web") == []
    assert [text.split("'")[1] for text in problems(model, "webgpu")] == ["widen", "power", "narrow"]


def test_nodes_of_subgraphs_and_functions_are_checked() -> None:
    info = helper.make_tensor_value_info
    inner = helper.make_node("Conv", ["x", "x"], ["b"], name="inner")
    branch = helper.make_graph([inner], "branch", [], [info("b", TensorProto.DOUBLE, None)])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch, name="choice")
    model = model_of(node, dtype=TensorProto.DOUBLE)
    model.graph.input.append(info("c", TensorProto.BOOL, []))
    assert [text.split("'")[1] for text in problems(model, "web")] == ["inner", "inner"]

    called = model_of(helper.make_node("F", ["x"], ["y"], domain="own"), dtype=TensorProto.DOUBLE, domain="own")
    body = [helper.make_node("Conv", ["a", "a"], ["r"])]
    called.functions.append(helper.make_function("own", "F", ["a"], ["r"], body, [helper.make_opsetid("", 18)]))
    (text,) = problems(called, "web")
    assert text.startswith("Conv '")


def test_what_no_node_shows_is_named_too() -> None:
    identity = helper.make_node("Identity", ["x"], ["y"])
    limits = measured()["limits"]
    assert "bfloat16" in problems(model_of(identity, dtype=TensorProto.BFLOAT16), "web")[0]
    assert "opset 99" in problems(model_of(identity, opset=99), "web")[0]
    (text,) = problems(model_of(identity, ir_version=limits["ir_version"] + 1), "web")
    assert "IR version" in text
    (text,) = problems(model_of(helper.make_node("Other", ["x"], ["y"], name="n", domain="ours"), domain="ours"), "web")
    assert text.startswith("ours::Other 'n'")
    (text,) = problems(model_of(helper.make_node("NoSuchOperator", ["x"], ["y"], name="n")), "web")
    assert "no standard operator" in text
    pool = helper.make_node("MaxPool", ["x"], ["y", "i"], name="pool", kernel_shape=[2])
    assert "forceCpuNodeNames: pool" in check_web(model_of(pool)).notes[0]
    assert "BigInt64Array" in check_web(model_of(identity, dtype=TensorProto.INT64)).notes[0]


def test_external_weights_are_counted_but_not_read(tmp_path: Path) -> None:
    model = model_of(helper.make_node("Add", ["x", "w"], ["y"]))
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**30 + 1])
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "big.data"), ("length", str(4 * (2**30 + 1)))):
        weights.external_data.add(key=key, value=value)
    model.graph.initializer.append(weights)
    (tmp_path / "big.onnx").write_bytes(model.SerializeToString())  # without big.data
    report = check_web(tmp_path / "big.onnx")
    assert "bytes of weights" in report.problems[0].reason
    assert "big.data" in report.notes[0]


def test_the_command_names_nodes_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    good.write_bytes(model_of(helper.make_node("Relu", ["x"], ["y"])).SerializeToString())
    conv = helper.make_node("Conv", ["x", "x"], ["y"], name="stem.conv")
    bad.write_bytes(model_of(conv, dtype=TensorProto.DOUBLE).SerializeToString())
    assert main(["check", "--target", "web", str(good)]) == 0
    assert "good.onnx: ok" in capsys.readouterr().out
    assert main(["check", "--target", "web", "--json", str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {Path(entry["model"]).name: entry["passed"] for entry in found["models"]} == {
        "bad.onnx": False,
        "good.onnx": True,
    }
    assert found["models"][0]["problems"][0]["node"] == "stem.conv"
    (tmp_path / "text.onnx").write_text("no model")
    assert main(["check", "--target", "web", str(tmp_path / "text.onnx")]) == 2
    assert main(["check", "--target", "phone", str(good)]) == 2
    assert "expected one of: web, webgpu" in capsys.readouterr().err


def test_export_refuses_before_it_writes(tmp_path: Path) -> None:
    module = torch.nn.MaxPool1d(2).double()
    x = torch.zeros(1, 2, 8, dtype=torch.float64)
    with pytest.raises(cg.UnsupportedOperatorError, match=r"MaxPool.*\n?.*WebGPU"):
        cg.export(module, (x,), tmp_path / "m.onnx", target="webgpu", verify=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(cg.ArgumentTypeError, match="expected one of: web, webgpu"):
        cg.export(module, (x,), target="browser")
    assert cg.export(torch.nn.ReLU(), (x.float(),), target="webgpu").verified


def test_a_length_and_an_element_type_that_are_none() -> None:
    model = model_of(helper.make_node("Relu", ["x"], ["y"]), dtype=TensorProto.FLOAT)
    weight = model.graph.initializer.add(name="w", data_type=99, dims=[1], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="w.bin")
    weight.external_data.add(key="length", value="abc")
    model.graph.input[0].type.tensor_type.elem_type = 77
    assert not any(problem.node for problem in check_web(model).problems)


def test_a_file_without_a_graph_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zero bytes are a valid protobuf message."""
    (tmp_path / "empty.onnx").write_bytes(b"")
    assert main(["check", "--target", "web", str(tmp_path / "empty.onnx")]) == 2
    assert "empty.onnx is not an ONNX model: it holds no graph" in capsys.readouterr().err
    with pytest.raises(cg.ModelFileError, match="the model is not an ONNX model"):
        check_web(onnx.ModelProto())


def calling(*body: onnx.NodeProto, opset: int, dtype: int = TensorProto.DOUBLE) -> onnx.ModelProto:
    """A model of opset 18 that calls a function of `opset`, a -> r."""
    model = model_of(helper.make_node("F", ["x"], ["y"], name="call", domain="own"), dtype=dtype, domain="own")
    model.functions.append(helper.make_function("own", "F", ["a"], ["r"], body, [helper.make_opsetid("", opset)]))
    return model


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_functions_that_import_another_opset_are_checked(opset: int) -> None:
    (text,) = problems(calling(helper.make_node("Conv", ["a", "a"], ["r"]), opset=opset), "web")
    assert text.startswith("Conv '")
    assert "float64" in text


def test_subgraphs_of_functions_are_checked() -> None:
    inner = helper.make_node("Conv", ["a", "a"], ["b"], name="inner")
    branch = helper.make_graph([inner], "branch", [], [helper.make_tensor_value_info("b", TensorProto.DOUBLE, None)])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["c"], ["r"], then_branch=branch, else_branch=branch, name="choice"),
    ]
    assert [text.split(" ")[0] for text in problems(calling(*nodes, opset=13), "web")] == ["Conv", "Conv"]


@pytest.mark.parametrize(
    ("node", "opset", "message"),
    [
        (helper.make_node("ReduceMax", ["a"], ["r"], axes=[1]), 13, "where ReduceMax takes no attribute 'axes'"),
        (helper.make_node("Clip", ["a", "a", "a", "a"], ["r"]), 6, "where Clip does not take 4 inputs"),
        (helper.make_node("Upsample", ["a", "a"], ["r"]), 9, "no standard operator at opset 18"),
    ],
    ids=["attribute", "inputs", "operator"],
)
def test_functions_are_read_by_the_opset_of_the_model(node: onnx.NodeProto, opset: int, message: str) -> None:
    """As onnxruntime does, which refuses these and takes a Softmax of opset 11 for one of 13."""
    model = calling(node, opset=opset, dtype=TensorProto.FLOAT)
    (text,) = problems(model, "web")
    assert message in text
    with pytest.raises(Exception, match=r"INVALID_GRAPH|FAIL"):
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    report = check_web(calling(helper.make_node("Softmax", ["a"], ["r"]), opset=11, dtype=TensorProto.FLOAT))
    assert report.problems == []
    assert "its function imports opset 11, but onnxruntime reads it by the model's opset 18" in report.notes[0]


def test_domains_of_onnxruntime_that_were_not_measured_are_notes() -> None:
    for domain in ("com.microsoft", "ai.onnx.ml"):
        report = check_web(model_of(helper.make_node("Some", ["x"], ["y"], name="n", domain=domain), domain=domain))
        assert report.problems == []
        assert f"{domain}::Some 'n': the operators of this domain were not measured" in report.notes


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(cg.ArgumentTypeError, match="model is 3"):
        check_web(3)
