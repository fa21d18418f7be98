"""GradientSession: loading, running, placement, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

import convgrad_export as cg
from convgrad_export.model_check import check_model
from convgrad_export.runtime import providers
from convgrad_export.runtime.placement import NodePlacement, PlacementReport
from convgrad_export.web_target import check_web

MODEL = cg.build_model(
    "conv2d_input", input_shape=(2, 3, 8, 8), weight_shape=(4, 3, 3, 3), padding=1, lowering="input.conv_transpose"
)


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "weight": rng.standard_normal((4, 3, 3, 3), np.float32),
        "grad_output": rng.standard_normal((2, 4, 8, 8), np.float32),
    }


def test_a_model_is_taken_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "gradient.onnx"
    onnx.save(MODEL, path)
    forms = [path, str(path), MODEL, MODEL.SerializeToString(), onnx_ir.from_proto(MODEL)]
    results = [cg.GradientSession(form).run(feeds())["grad_input"] for form in forms]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_run_has_a_mapping_form_and_onnxruntimes_own() -> None:
    session = cg.GradientSession(MODEL)
    assert session.input_names == ("weight", "grad_output")
    assert session.output_names == ("grad_input",)
    by_name = session.run(feeds())["grad_input"]
    (as_list,) = session.run(None, feeds())
    (named,) = session.run(["grad_input"], feeds())
    plain = onnxruntime.InferenceSession(MODEL.SerializeToString()).run(None, feeds())[0]
    for result in (as_list, named, plain):
        assert np.array_equal(result, by_name)


def test_torch_tensors_are_read_in_place_and_results_are_tensors() -> None:
    session = cg.GradientSession(MODEL)
    tensors = {name: torch.from_numpy(array) for name, array in feeds().items()}
    result = session.run(tensors)["grad_input"]
    assert isinstance(result, torch.Tensor)
    assert np.array_equal(result.numpy(), session.run(feeds())["grad_input"])
    from convgrad_export.runtime.tensors import view

    assert view(tensors["weight"], "weight").pointer == tensors["weight"].data_ptr()
    array = feeds()["weight"]
    assert view(array, "weight").pointer == array.ctypes.data


def test_results_outlive_the_session() -> None:
    session = cg.GradientSession(MODEL)
    tensors = {name: torch.from_numpy(array) for name, array in feeds().items()}
    result = session.run(tensors)["grad_input"]
    expected = result.clone()
    del session
    assert torch.equal(result, expected)


@pytest.mark.parametrize("as_torch", [True, False])
def test_an_output_that_is_an_input_has_memory_of_its_own(as_torch: bool) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [value], [result, value])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    given = torch.ones(3) if as_torch else np.ones(3, np.float32)
    found = cg.GradientSession(model).run({"x": given})
    found["x"][:] = 7
    assert given.tolist() == [1, 1, 1]


def test_bfloat16_arrays_go_through_numpy() -> None:
    model = cg.build_model("conv1d_input", input_shape=(1, 1, 4), weight_shape=(1, 1, 2), dtype="bfloat16")
    ones = {"weight": np.ones((1, 1, 2), ml_dtypes.bfloat16), "grad_output": np.ones((1, 1, 3), ml_dtypes.bfloat16)}
    result = cg.GradientSession(model).run(ones)["grad_input"]
    assert result.dtype == ml_dtypes.bfloat16
    assert result.tolist() == [[[1, 2, 2, 1]]]


def identity(element_type: int) -> onnx.ModelProto:
    x, y = (onnx.helper.make_tensor_value_info(name, element_type, ["rows", "columns"]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64", "int8", "uint16", "uint64", "bool"])
@pytest.mark.parametrize("rows", [2, 0])
def test_tensors_of_every_type_come_back_as_such(name: str, rows: int) -> None:
    dtype = getattr(torch, name)
    given = torch.tensor([[1, 0, 3], [4, 5, 6]]).to(dtype)[:rows]
    element_type = getattr(onnx.TensorProto, {"float64": "DOUBLE"}.get(name, name.upper()))
    result = cg.GradientSession(identity(element_type)).run({"x": given})["y"]
    assert result.dtype == dtype
    assert torch.equal(result, given)


def test_tensors_that_are_zero_without_memory() -> None:
    zero = torch._efficientzerotensor((2, 3))  # PyTorch's own, in forward-mode derivatives
    assert torch.equal(cg.GradientSession(identity(onnx.TensorProto.FLOAT)).run({"x": zero})["y"], torch.zeros(2, 3))


def test_placement_lists_every_node_and_none_left_the_cpu() -> None:
    report = cg.GradientSession(MODEL).placement()
    assert [node.op_type for node in report.nodes] == ["ConvTranspose"]
    assert report.left == ()
    assert str(report) == "all 1 nodes run on CPUExecutionProvider"


def test_a_placement_report_names_the_nodes_that_left() -> None:
    nodes = (NodePlacement("a", "Conv", providers.CUDA), NodePlacement("b", "Col2Im", providers.CPU))
    report = PlacementReport(providers.CUDA, nodes)
    assert report.left == nodes[1:]
    assert "1 of 2 nodes left CUDAExecutionProvider: Col2Im 'b' on CPUExecutionProvider" in str(report)


def test_sizes_that_cuda_leaves_to_the_cpu_have_not_left() -> None:
    on_cuda, sizes = NodePlacement("a", "Conv", providers.CUDA), NodePlacement("b", "Concat", providers.CPU)
    report = PlacementReport(providers.CUDA, (on_cuda, sizes))
    assert (report.left, report.shape_arithmetic) == ((), (sizes,))
    assert str(report) == "all 2 nodes run on CUDAExecutionProvider but 1 that compute sizes on the CPU"
    pad = NodePlacement("c", "Pad", providers.CPU)
    assert PlacementReport(providers.CUDA, (on_cuda, sizes, pad)).left == (pad,)
    elsewhere = NodePlacement("d", "Concat", "OtherProvider")
    assert PlacementReport(providers.CUDA, (elsewhere,)).left == (elsewhere,)
    assert PlacementReport("OtherProvider", (sizes,)).left == (sizes,)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_thread_count_is_passed_on(threads: int) -> None:
    session = cg.GradientSession(MODEL, threads=threads)
    assert session.inference_session.get_session_options().intra_op_num_threads == threads


def test_a_callers_session_options_stay_as_they_were(capfd: pytest.CaptureFixture[str]) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = cg.GradientSession(MODEL, threads=1, session_options=options)
    assert session.placement().nodes
    assert options.intra_op_num_threads == 2
    before = capfd.readouterr().err
    cg.GradientSession(MODEL, threads=1, session_options=options)
    assert not before
    assert not capfd.readouterr().err  # onnxruntime warns of an entry that is set twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": "a"}, "threads is 'a', expected a number"),
        ({"threads": -1}, "threads is -1, expected a number"),
        ({"threads": 10**23}, "threads is 1000000"),
        ({"threads": True}, "threads is True, expected a number"),
        ({"threads": 4 * max(64, os.cpu_count() or 1) + 1}, "expected at most .* on this machine of"),
        ({"session_options": 3}, r"session_options is a int, expected an onnxruntime\.SessionOptions"),
    ],
)
def test_settings_of_another_kind_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(cg.ArgumentTypeError, match=message):
        cg.GradientSession(MODEL, **arguments)


def test_output_names_are_a_list_and_none_of_them_are_all() -> None:
    session = cg.GradientSession(MODEL)
    assert np.array_equal(session.run([], feeds())[0], session.run(None, feeds())[0])
    assert len(session.run(["grad_input", "grad_input"], feeds())) == 2
    with pytest.raises(cg.ArgumentTypeError, match="'grad_input', expected a list of output names"):
        session.run("grad_input", feeds())
    with pytest.raises(cg.ArgumentTypeError, match="expected a list of output names"):
        session.run(3, feeds())
    with pytest.raises(cg.ArgumentTypeError, match="inputs as a list, expected a mapping"):
        session.run(None, [1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_output_that_a_model_lists_twice_is_given_for_both(dtype: str) -> None:
    model = cg.build_model("conv1d_weight", input_shape=(2, 3, 8), weight_shape=(4, 3, 3), dtype=dtype)
    model.graph.output.append(model.graph.output[0])
    session = cg.GradientSession(model)
    given = {"input": np.ones((2, 3, 8), dtype), "grad_output": np.ones((2, 4, 6), dtype)}
    assert list(session.run(given)) == ["grad_weight"]
    first, second = session.run(None, given)
    assert np.array_equal(first, second)
    assert np.array_equal(first, np.full((4, 3, 3), 12, dtype))


def test_a_provider_that_cannot_start_is_an_error_and_not_a_log_line() -> None:
    with pytest.raises(cg.ProviderError, match=r"could not start.*fell back to CPUExecutionProvider"):
        providers.check_active(providers.CUDA, [providers.CPU])
    if providers.CUDA not in onnxruntime.get_available_providers():
        with pytest.raises(cg.ProviderError, match="onnxruntime-gpu"):
            cg.GradientSession(MODEL, "cuda")


@pytest.mark.parametrize("name", ["no_such", "use_arena"])
def test_an_option_that_the_cpu_provider_does_not_have_is_an_error(name: str) -> None:
    """onnxruntime takes any, and does nothing with it."""
    with pytest.raises(cg.ProviderError, match=rf"{providers.CPU} has no option '{name}'.*takes none"):
        cg.GradientSession(MODEL, [(providers.CPU, {name: "1"})])
    with pytest.raises(cg.ProviderError, match=f"no option '{name}'"):
        cg.conv2d_input((2, 3, 8, 8), **feeds(), padding=1, providers=("cpu", {name: 1}))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [providers.CPU]),
        ("cpu", [providers.CPU]),
        (providers.CPU, [providers.CPU]),
        ([("cpu", {"use_arena": "1"})], [providers.CPU]),
        (("cpu", {}), [providers.CPU]),
    ],
)
def test_providers_come_in_onnxruntimes_forms(given, expected: list[str]) -> None:
    assert [name for name, _ in providers.resolve(given)] == expected


@pytest.mark.parametrize("given", [[], [3], [("cpu", 3)]])
def test_malformed_providers_are_refused(given) -> None:
    with pytest.raises(cg.ArgumentTypeError, match="providers"):
        providers.resolve(given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": None}, cg.ArgumentTypeError, r"missing: \['weight'\], unknown: none"),
        ({"extra": np.ones(1)}, cg.ArgumentTypeError, r"unknown: \['extra'\]"),
        ({"extra": np.ones(1), 3: np.ones(1)}, cg.ArgumentTypeError, r"unknown: \[3, 'extra'\]"),
        ({"weight": np.ones((4, 3, 3, 3))}, cg.DTypeError, r"input weight is float64, expected float32"),
        ({"weight": np.ones((4, 3, 3), np.float32)}, cg.GeometryError, r"input weight has shape \(4, 3, 3\)"),
        ({"weight": np.ones((4, 3, 3, 5), np.float32)}, cg.GeometryError, r"expected \(4, 3, 3, 3\)"),
        (
            {"weight": torch.ones(4, 3, 3, 3)},
            cg.ArgumentTypeError,
            r"mix numpy arrays \(grad_output\) and torch tensors \(weight\)",
        ),
        ({"weight": "text"}, cg.ArgumentTypeError, r"weight is a str, expected a numpy array or a torch tensor"),
    ],
)
def test_wrong_inputs_are_refused_before_the_run(changes: dict, error: type[Exception], message: str) -> None:
    given = {name: value for name, value in (feeds() | changes).items() if value is not None}
    with pytest.raises(error, match=message):
        cg.GradientSession(MODEL).run(given)


@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize("dtype", [onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16])
def test_values_that_an_operator_refuses_are_one_error_of_the_packages(as_torch: bool, dtype: int) -> None:
    """With arrays onnxruntime raises a private class of its own, with a binding a RuntimeError."""
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "index"], ["row"])],
        "g",
        [
            onnx.helper.make_tensor_value_info("table", dtype, ["n", 2]),
            onnx.helper.make_tensor_value_info("index", onnx.TensorProto.INT64, [1]),
        ],
        [onnx.helper.make_tensor_value_info("row", dtype, [1, 2])],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    session = cg.GradientSession(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9))
    kind = ml_dtypes.bfloat16 if dtype == onnx.TensorProto.BFLOAT16 else np.float32
    inputs = {"table": np.zeros((3, 2), kind), "index": np.array([7])}
    if as_torch:
        table = torch.zeros(3, 2, dtype=torch.bfloat16 if kind is not np.float32 else torch.float32)
        inputs = {"table": table, "index": torch.tensor([7])}
    with pytest.raises(cg.ArgumentTypeError, match=r"stopped within the run.*index out of range.*idx=7") as refused:
        session.run(inputs)
    assert "\n" not in str(refused.value)


def test_a_symbolic_batch_has_one_value() -> None:
    model = cg.build_model("conv2d_weight", input_shape=(2, 3, 8, 8), weight_shape=(4, 3, 3, 3), padding=1)
    wrong = {"input": np.ones((2, 3, 8, 8), np.float32), "grad_output": np.ones((3, 4, 8, 8), np.float32)}
    with pytest.raises(cg.GeometryError, match="with batch = 2 as in input"):
        cg.GradientSession(model).run(wrong)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_sparse_and_quantized_tensors_are_refused() -> None:
    tensors = {name: torch.from_numpy(array) for name, array in feeds().items()}
    with pytest.raises(cg.ArgumentTypeError, match=r"torch.sparse_coo tensor.*to_dense"):
        cg.GradientSession(MODEL).run(tensors | {"weight": tensors["weight"].to_sparse()})
    quantized = torch.quantize_per_tensor(tensors["weight"], 0.1, 0, torch.qint8)
    with pytest.raises(cg.ArgumentTypeError, match=r"weight is a quantized tensor.*dequantize"):
        cg.GradientSession(MODEL).run(tensors | {"weight": quantized})


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(cg.ModelFileError, match="does not exist"):
        cg.GradientSession(path)
    with pytest.raises(cg.ModelFileError, match="is not a file"):
        cg.GradientSession(tmp_path)
    data = MODEL.SerializeToString()
    for content in (b"", b"PK\x03\x04 no model", data[: len(data) // 2], b"\x80\x04 pickle"):
        path.write_bytes(content)
        with pytest.raises(cg.ModelFileError):
            cg.GradientSession(path)
    with pytest.raises(cg.ModelFileError, match="given as bytes"):
        cg.GradientSession(b"no model")
    with pytest.raises(cg.ArgumentTypeError, match="model is a int"):
        cg.GradientSession(3)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(MODEL, path)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(onnx, "load", denied)
    with pytest.raises(cg.ModelFileError, match=r"model\.onnx cannot be read: Permission denied"):
        cg.GradientSession(path)


@pytest.mark.parametrize("name", [b"grad_output", b"grad_input", b"weight", b"Conv"])
def test_names_that_are_no_utf_8_are_refused(name: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = MODEL.SerializeToString()
    damaged = content.replace(name, b"\xff" + name[1:])
    assert damaged != content
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damaged)
    for model in (damaged, path):
        with pytest.raises(cg.ModelFileError):
            cg.GradientSession(model)
    assert not capsys.readouterr().out  # onnxruntime's own word on trying again
    for read in (check_model, check_web):
        with pytest.raises(cg.ModelFileError):
            read(path)


def test_metadata_that_is_no_utf_8() -> None:
    """The convolutions of a model, as far as a session looks at them, are read by protobuf."""
    model = cg.build_model("conv2d_input", input_shape=(2, 16, 6, 6), weight_shape=(16, 1, 3, 3), groups=16, padding=1)
    content = model.SerializeToString()
    damaged = content.replace(b'"kind":"input"', b'"kind":"\xffnput"')
    assert damaged != content
    assert cg.GradientSession(damaged).output_names == ("grad_input",)
    with pytest.raises(cg.ModelFileError, match="metadata of it is damaged"):
        providers.model_metadata(cg.GradientSession(damaged).inference_session, "it")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "sub/../../secret.bin", "C:\\secret.bin"])
def test_external_data_outside_the_models_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(4 * 3 * 3 * 3 * 4))
    model = onnx.ModelProto()
    model.CopyFrom(MODEL)
    tensor = model.graph.initializer.add()
    tensor.name, tensor.data_type = "weight_data", onnx.TensorProto.FLOAT
    tensor.dims.extend([4, 3, 3, 3])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(cg.ModelFileError, match="outside the model's folder"):
        cg.GradientSession(folder / "model.onnx")


def test_external_data_that_names_no_file_is_refused(tmp_path: Path) -> None:
    """pathlib ended in a ValueError of its own."""
    model = onnx.ModelProto()
    model.CopyFrom(MODEL)
    tensor = model.graph.initializer.add(name="weight_data", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights\0.bin")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(cg.ModelFileError, match=r"weights.*names no file"):
        cg.GradientSession(tmp_path / "model.onnx")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    from convgrad_export.runtime.model_source import check_location

    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"0")
    (folder / "data.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(cg.ModelFileError, match="outside"):
        check_location(folder / "model.onnx", "w", "data.bin")
    check_location(folder / "model.onnx", "w", "other.bin")


def test_a_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the check of its external data, and for the blocked layout."""
    path = tmp_path / "depthwise.onnx"
    onnx.save(cg.build_model("conv2d_input", input_shape=(2, 16, 8, 8), weight_shape=(16, 1, 3, 3), groups=16), path)
    parsed = []
    for name in ("load", "load_model_from_string"):
        original = getattr(onnx, name)
        monkeypatch.setattr(onnx, name, lambda *a, original=original, **k: parsed.append(a) or original(*a, **k))
    cg.GradientSession(path)
    assert len(parsed) == 1


def test_a_layout_that_is_no_boolean_is_refused() -> None:
    for given in (np.ones(2), "no"):
        with pytest.raises(cg.ArgumentTypeError, match="blocked_layout is"):
            cg.GradientSession(b"", blocked_layout=given)  # type: ignore[arg-type]


def test_an_input_that_is_no_array_is_named_beside_tensors() -> None:
    inputs = {name: torch.from_numpy(array) for name, array in feeds().items()} | {"weight": None}
    with pytest.raises(cg.ArgumentTypeError, match=r"^weight is a NoneType, expected a numpy array or a torch tensor"):
        cg.GradientSession(MODEL).run(inputs)
