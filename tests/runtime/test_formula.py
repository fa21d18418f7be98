"""Models that somebody edited after they were written: a session computes what the file says, not what it once said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import convgrad_export as cg
from convgrad_export.runtime import blocked
from convgrad_export.runtime.convolution_entries import METADATA, from_text

CHANNELS = 16
needs_blocks = pytest.mark.skipif(blocked.block_size() is None, reason="this onnxruntime has no blocked layout")


def layer(kind: str = "input", **options: Any) -> onnx.ModelProto:
    shapes: dict[str, Any] = {"input_shape": (2, CHANNELS, 6, 6), "weight_shape": (CHANNELS, 1, 3, 3)}
    return cg.build_model(f"conv2d_{kind}", **shapes, groups=CHANNELS, padding=1, **options)


def feeds(model: onnx.ModelProto, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(0), {"weight": (CHANNELS, 1, 3, 3)}
    return {
        v.name: rng.integers(-3, 4, sizes.get(v.name, (2, CHANNELS, 6, 6))).astype(dtype) for v in model.graph.input
    }


def put_behind(model: onnx.ModelProto, name: str, operator: str, *more: str, **attributes: Any) -> None:
    """A node between a graph input and all its readers."""
    edited = f"{name}.edited{len(model.graph.node)}"
    for node in model.graph.node:
        for i, read in enumerate(node.input):
            if read == name:
                node.input[i] = edited
    model.graph.node.insert(0, helper.make_node(operator, [name, *more], [edited], **attributes))


def scaled_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "two"))
    put_behind(model, "weight", "Mul", "two")


def negated_gradient(model: onnx.ModelProto) -> None:
    put_behind(model, "grad_output", "Neg")


def there_and_back(model: onnx.ModelProto) -> None:
    put_behind(model, "grad_output", "Transpose", perm=[0, 3, 1, 2])
    put_behind(model, "grad_output", "Transpose", perm=[0, 2, 3, 1])


def negated_result(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            if name == "grad_input":
                node.output[i] = "grad_input.raw"
    model.graph.node.append(helper.make_node("Neg", ["grad_input.raw"], ["grad_input"]))


def other_padding(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "pads":
                attribute.ints[:] = [0, 0, 2, 2]


EDITS = [scaled_weight, negated_gradient, there_and_back, negated_result, other_padding]


def plain(model: onnx.ModelProto, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    results: list[np.ndarray] = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    ).run(None, values)
    return results


def assert_left_alone(model: onnx.ModelProto) -> None:
    content = model.SerializeToString()
    assert blocked.in_blocked_layout(content) is content


@needs_blocks
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_formula_runs_as_edited(edit: Callable[[onnx.ModelProto], None]) -> None:
    model = layer()
    assert blocked.put_blocked_layout(onnx.load_from_string(model.SerializeToString()))
    before = plain(model, feeds(model))
    edit(model)
    after = plain(model, feeds(model))
    assert edit is there_and_back or not np.array_equal(before[0], after[0])
    assert_left_alone(model)
    np.testing.assert_array_equal(cg.GradientSession(model).run(None, feeds(model))[0], after[0])


@needs_blocks
def test_every_constant_counts() -> None:
    for index in range(len(layer().graph.initializer)):
        model = layer()
        tensor = model.graph.initializer[index]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, tensor.name))
        assert_left_alone(model)


def test_half_precision_by_a_converter_runs_as_it_is() -> None:
    """Types of inputs and outputs change, the nodes do not."""
    model = layer()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del model.graph.value_info[:]
    assert_left_alone(model)
    values = feeds(model, np.float16)
    np.testing.assert_array_equal(cg.GradientSession(model).run(None, values)[0], plain(model, values)[0])


@needs_blocks
def test_a_batch_made_dynamic_later_keeps_the_formula() -> None:
    """The weight gradient's blocked form has the batch in its shapes."""
    model = layer("weight", dynamic=())
    assert blocked.put_blocked_layout(onnx.load_from_string(model.SerializeToString()))
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    assert_left_alone(model)


@needs_blocks
def test_names_and_the_nodes_around_may_change() -> None:
    """Only what lies between operands and result counts."""
    model = layer()
    model.graph.node.insert(0, helper.make_node("Mul", ["given", "given"], ["weight"], name="square"))
    for value in model.graph.input:
        if value.name == "weight":
            model.graph.value_info.append(value)
            value.name = "given"
    for node in model.graph.node[1:]:
        node.name = f"renamed {node.name}"
        node.doc_string = "of another tool"
    expected = plain(model, {("given" if k == "weight" else k): v for k, v in feeds(layer()).items()})
    assert blocked.put_blocked_layout(model)
    np.testing.assert_array_equal(
        plain(model, {("given" if k == "weight" else k): v for k, v in feeds(layer()).items()})[0], expected[0]
    )


@pytest.mark.parametrize("without", ["formula", "types"])
def test_files_that_do_not_say_enough_are_left_alone(without: str) -> None:
    """Those written before there were fingerprints, and those whose tensors have lost their types."""
    model = layer()
    if without == "types":
        for value in model.graph.input:
            value.type.tensor_type.ClearField("shape")
    for item in model.metadata_props:
        if item.key == METADATA and without == "formula":
            item.value = json.dumps(
                [{k: v for k, v in entry.items() if k != "formula"} for entry in json.loads(item.value)]
            )
            assert from_text(item.value) == []
    assert_left_alone(model)


def test_a_rewritten_model_that_does_not_load_gives_way_to_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from convgrad_export.runtime import session

    model = layer()
    monkeypatch.setattr(session, "in_blocked_layout", lambda source, parsed, threads: b"no model")
    values = feeds(model)
    np.testing.assert_array_equal(cg.GradientSession(model).run(None, values)[0], plain(model, values)[0])


def test_a_result_without_an_end_is_no_formula() -> None:
    """A cycle, and a chain that reaches something else than the operands."""
    for read in ("loop", "another input"):
        model = layer()
        for node in model.graph.node:
            if "grad_input" in node.output:
                node.input[0] = read
        model.graph.node.insert(0, helper.make_node("Neg", ["loop"], ["loop"]))
        assert_left_alone(model)


@pytest.mark.parametrize("change", [{"data_type": 99}, {"data_type": 0}, {"dims": [77]}])
def test_damaged_constants_are_for_onnxruntime_to_refuse(change: dict[str, Any]) -> None:
    model = layer()
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.MergeFrom(TensorProto(**change))
    with pytest.raises(cg.ModelFileError):
        cg.GradientSession(model)


@pytest.mark.parametrize("blocked_layout", [True, False])
def test_data_of_attributes_comes_from_the_models_folder(
    blocked_layout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from that of the process, where another file may have the name."""
    model = layer()
    model.graph.node.append(helper.make_node("Constant", [], ["scale"], value=TensorProto()))
    tensor = model.graph.node[-1].attribute[0].t
    tensor.MergeFrom(TensorProto(dims=[1000], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL))
    tensor.external_data.add(key="location", value="data.bin")
    for value, folder in ((2, tmp_path / "model"), (3, tmp_path / "elsewhere")):
        folder.mkdir()
        (folder / "data.bin").write_bytes(np.full(1000, value, np.float32).tobytes())
    model.graph.node.append(helper.make_node("ReduceMax", ["scale"], ["most"], keepdims=0))
    model.graph.node.append(helper.make_node("Mul", ["grad_input", "most"], ["scaled"]))
    model.graph.value_info.add().CopyFrom(model.graph.output[0])
    model.graph.output[0].name = "scaled"
    (tmp_path / "model" / "model.onnx").write_bytes(model.SerializeToString())
    monkeypatch.chdir(tmp_path / "elsewhere")
    session = cg.GradientSession(tmp_path / "model" / "model.onnx", blocked_layout=blocked_layout)
    expected = 2 * plain(layer(), feeds(layer()))[0]
    np.testing.assert_array_equal(session.run(None, feeds(layer()))[0], expected)


def test_metadata_nested_too_deep_is_no_entry() -> None:
    assert from_text("[" * 100_000) == []
