"""Model repositories: what the configuration says, extending, refusals; nothing half-written."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import convgrad_export as cg
from convgrad_export.serving import repository as repository_module
from convgrad_export.serving.options import ServingOptions
from convgrad_export.serving.repository import add_model
from convgrad_export.serving.signature import read_signature

from . import models

pytest.importorskip("tritonclient.grpc", reason="tritonclient and grpcio are not installed (extra serving)")

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb


def config_of(repository: Path, name: str) -> pb.ModelConfig:
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), pb.ModelConfig())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_batched_model_gets_shapes_batching_and_its_files(tmp_path: Path) -> None:
    model = models.gradient_model(tmp_path / "grad.onnx")
    options = ServingOptions(
        backend="python", max_batch_size=16, preferred_batch_sizes=(8, 4), queue_delay_us=900, instances=2, threads=3
    )
    entry = add_model(model, tmp_path / "repo", options)
    assert (entry.name, entry.version, entry.extended, entry.dynamic_batching) == ("grad", 1, False, True)
    config = config_of(tmp_path / "repo", "grad")
    assert (config.name, config.backend, config.max_batch_size) == ("grad", "python", 16)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("x", pb.TYPE_FP32, [2, 6])]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [("y", pb.TYPE_FP32, [2, 8])]
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 900
    assert [(g.count, g.kind) for g in config.instance_group] == [(2, pb.ModelInstanceGroup.KIND_CPU)]
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    files = snapshot(tmp_path / "repo")
    assert set(files) == {
        "grad/config.pbtxt",
        *(f"grad/1/{n}" for n in ("model.onnx", "model.py", "model-settings.json")),
    }
    assert files["grad/1/model.onnx"] == model.read_bytes()
    compile(files["grad/1/model.py"], "model.py", "exec")
    settings = json.loads(files["grad/1/model-settings.json"])
    assert settings["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2, 6]}]
    assert settings["parameters"]["version"] == "1"


def test_the_onnxruntime_backend_needs_no_python_file(tmp_path: Path) -> None:
    model = models.gradient_model(tmp_path / "grad.onnx")
    options = ServingOptions(graph_optimization="basic", device="gpu", versions=0)
    entry = add_model(model, tmp_path / "repo", options, name="other.name-2")
    config = config_of(tmp_path / "repo", "other.name-2")
    assert (config.backend, config.platform) == ("onnxruntime", "onnxruntime_onnx")
    assert config.default_model_filename == "model.onnx"
    assert config.optimization.graph.level == -1
    assert config.version_policy.HasField("all")
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert not any(file.endswith(".py") for file in entry.files)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (TensorProto.FLOAT16, "FP16"),
        (TensorProto.BFLOAT16, "BF16"),
        (TensorProto.DOUBLE, "FP64"),
        (TensorProto.INT64, "INT64"),
        (TensorProto.UINT8, "UINT8"),
    ],
)
def test_element_types(code: int, name: str, tmp_path: Path) -> None:
    entry = add_model(models.typed_model(tmp_path / "m.onnx", code), tmp_path / "repo")
    config = config_of(tmp_path / "repo", "m")
    assert config.input[0].data_type == pb.DataType.Value(f"TYPE_{name}")
    assert (config.max_batch_size, list(config.output[0].dims)) == (8, [-1])
    # the size of "height" is not known, so nothing could be run, and nothing is merged on trust
    assert not entry.dynamic_batching
    assert "--size" in entry.notes[0]


def test_a_weight_gradient_is_never_merged(tmp_path: Path) -> None:
    model = models.weight_gradient(tmp_path / "w.onnx")
    entry = add_model(model, tmp_path / "repo")
    assert (entry.max_batch_size, entry.dynamic_batching) == (0, False)
    assert "grad_weight" in entry.notes[0]
    config = config_of(tmp_path / "repo", "w")
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1, 3, 8]
    for options, message in (
        (ServingOptions(max_batch_size=4), "dynamic"),
        (ServingOptions(dynamic_batching=True), "merged"),
    ):
        with pytest.raises(cg.ServingConfigError, match=message):
            add_model(model, tmp_path / "other", options)
    assert not (tmp_path / "other").exists()


def test_rows_that_see_one_another_are_not_merged(tmp_path: Path) -> None:
    model = models.mean_model(tmp_path / "mean.onnx")
    entry = add_model(model, tmp_path / "repo")
    assert (entry.max_batch_size, entry.dynamic_batching) == (8, False)
    assert "output y of a row changes" in entry.notes[0]
    with pytest.raises(cg.ServingConfigError, match="Leave dynamic batching off"):
        add_model(model, tmp_path / "repo", ServingOptions(dynamic_batching=True), name="merged")
    assert [path.name for path in (tmp_path / "repo").iterdir()] == ["mean"]


def test_a_model_with_a_fixed_batch_is_served_with_full_shapes_and_scalars_are_reshaped(tmp_path: Path) -> None:
    add_model(models.classifier(tmp_path / "fixed.onnx", batch=4), tmp_path / "repo")
    config = config_of(tmp_path / "repo", "fixed")
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [4, 3])
    add_model(models.classifier(tmp_path / "any.onnx"), tmp_path / "repo")
    best = config_of(tmp_path / "repo", "any").output[1]
    assert (best.name, list(best.dims), best.HasField("reshape"), list(best.reshape.shape)) == ("best", [1], True, [])


def test_scalars_without_a_batch_have_one_element_and_no_reshape(tmp_path: Path) -> None:
    """Triton refuses an empty reshape there, and then starts with none of the repository's models."""
    add_model(models.scalar_model(tmp_path / "m.onnx"), tmp_path / "repo")
    config = config_of(tmp_path / "repo", "m")
    factor, total = config.input[1], config.output[1]
    assert (factor.name, list(factor.dims), factor.HasField("reshape")) == ("factor", [1], False)
    assert (total.name, list(total.dims), total.HasField("reshape")) == ("total", [1], False)


def test_tensors_that_are_always_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(cg.ServingConfigError, match=r"x \(batch, 0\) is always empty"):
        add_model(with_width(tmp_path / "m.onnx", 0), tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def with_width(path: Path, width: int) -> Path:
    """y = x, (batch, width)."""
    model = onnx.load(models.typed_model(path, TensorProto.FLOAT))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[1].dim_value = width
    onnx.save(model, path)
    return path


def test_a_negative_size_is_a_dynamic_one(tmp_path: Path) -> None:
    """As onnxruntime has it; older exporters write -1. Rows of that many elements ended in an error of numpy's."""
    entry = add_model(with_width(tmp_path / "m.onnx", -1), tmp_path / "repo")
    assert entry.inputs == {"x": "FP32 [-1, -1]"}
    assert not entry.dynamic_batching
    assert "the sizes of ? are not known" in entry.notes[0]


def test_rows_that_no_memory_holds_are_not_looked_at(tmp_path: Path) -> None:
    entry = add_model(with_width(tmp_path / "m.onnx", 2**40), tmp_path / "repo")
    assert not entry.dynamic_batching
    assert "do not fit into memory" in entry.notes[0]


def test_labels(tmp_path: Path) -> None:
    model = models.classifier(tmp_path / "c.onnx")
    labels = tmp_path / "names.txt"
    labels.write_text("cat\ndog\n")
    options = ServingOptions(labels=labels, label_output="scores")
    with pytest.raises(cg.ServingConfigError, match="names 2 classes, but scores has 3"):
        add_model(model, tmp_path / "repo", options)
    labels.write_text("cat\ndog\nowl\n")
    with pytest.raises(cg.ServingConfigError, match="name it, one of scores, best"):
        add_model(model, tmp_path / "repo", ServingOptions(labels=labels))
    with pytest.raises(cg.ServingConfigError, match="label_output is 'y'"):
        add_model(model, tmp_path / "repo", ServingOptions(labels=labels, label_output="y"))
    add_model(model, tmp_path / "repo", options)
    assert config_of(tmp_path / "repo", "c").output[0].label_filename == "names.txt"
    assert (tmp_path / "repo" / "c" / "names.txt").read_text() == "cat\ndog\nowl\n"
    labels.write_text("cat\ndog\nfox\n")
    with pytest.raises(cg.ServingConfigError, match="labels"):
        add_model(model, tmp_path / "repo", options)
    add_model(model, tmp_path / "repo", options, update_config=True)
    assert (tmp_path / "repo" / "c" / "names.txt").read_text() == "cat\ndog\nfox\n"


def test_warm_up_samples(tmp_path: Path) -> None:
    model = models.gradient_model(tmp_path / "g.onnx")
    add_model(model, tmp_path / "repo", ServingOptions(warmup="random"))
    (sample,) = config_of(tmp_path / "repo", "g").model_warmup
    assert (sample.batch_size, list(sample.inputs["x"].dims), sample.inputs["x"].random_data) == (1, [2, 6], True)
    data = np.arange(36, dtype=np.float32).reshape(3, 2, 6)
    np.savez(tmp_path / "data.npz", x=data)
    add_model(model, tmp_path / "repo", ServingOptions(warmup=tmp_path / "data.npz"), name="h")
    (sample,) = config_of(tmp_path / "repo", "h").model_warmup
    assert sample.batch_size == 3
    file = tmp_path / "repo" / "h" / "warmup" / sample.inputs["x"].input_data_file
    assert file.read_bytes() == data.tobytes()
    typed = models.typed_model(tmp_path / "t.onnx", TensorProto.INT32)
    with pytest.raises(cg.ServingConfigError, match="height"):
        add_model(typed, tmp_path / "repo", ServingOptions(warmup="zero"))
    entry = add_model(typed, tmp_path / "repo", ServingOptions(warmup="random", sizes={"height": 5}))
    (sample,) = config_of(tmp_path / "repo", "t").model_warmup
    assert sample.inputs["x"].zero_data  # a random integer is seldom a valid class
    assert entry.dynamic_batching


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros((1, 2, 6), np.float32)}, "one array for each"),
        ({"x": np.zeros((1, 2, 6))}, "float64, expected float32"),
        ({"x": np.zeros((1, 2, 7), np.float32)}, "expected x"),
        ({"x": np.zeros((9, 2, 6), np.float32)}, "9 rows"),
        (None, "can be read"),
    ],
)
def test_warm_up_data_that_does_not_fit(arrays: dict | None, message: str, tmp_path: Path) -> None:
    model = models.gradient_model(tmp_path / "g.onnx")
    (tmp_path / "d.npz").write_bytes(b"PK no archive")
    if arrays is not None:
        np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(cg.ServingConfigError, match=message):
        add_model(model, tmp_path / "repo", ServingOptions(warmup=tmp_path / "d.npz"))
    assert not (tmp_path / "repo").exists()


def test_the_next_version_leaves_everything_else_as_it_was(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    add_model(models.gradient_model(tmp_path / "grad.onnx"), repository)
    add_model(models.mean_model(tmp_path / "mean.onnx"), repository)
    before = snapshot(repository)
    (repository / "grad" / "7").mkdir()  # a version that someone else put there
    entry = add_model(models.gradient_model(tmp_path / "grad.onnx", scale=2.0), repository)
    assert (entry.version, entry.extended) == (8, True)
    after = snapshot(repository)
    assert {key: after[key] for key in before} == before
    assert json.loads(after["grad/8/model-settings.json"])["parameters"]["version"] == "8"
    assert {key for key in after if key not in before} == {"grad/8/model.onnx", "grad/8/model-settings.json"}


def test_a_version_that_takes_other_requests_or_settings_is_refused(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    grad = models.gradient_model(tmp_path / "grad.onnx")
    add_model(grad, repository)
    before = snapshot(repository)
    with pytest.raises(cg.ServingConfigError, match="another --name"):
        add_model(models.mean_model(tmp_path / "mean.onnx"), repository, name="grad")
    with pytest.raises(cg.ServingConfigError, match=r"instance_group.*--update-config"):
        add_model(grad, repository, ServingOptions(instances=4))
    assert snapshot(repository) == before
    entry = add_model(grad, repository, ServingOptions(instances=4), update_config=True)
    assert entry.version == 2
    assert config_of(repository, "grad").instance_group[0].count == 4
    (repository / "grad" / "config.pbtxt").write_text("max_batch_size: many")
    with pytest.raises(cg.ModelFileError, match="not a Triton model configuration"):
        add_model(grad, repository)


def test_external_data_is_carried_along(tmp_path: Path) -> None:
    model = models.external(tmp_path / "big.onnx")
    assert read_signature(model).external_files == ("weights/w.bin",)
    entry = add_model(model, tmp_path / "repo")
    assert "big/1/weights/w.bin" in entry.files
    x = np.ones((2, 2, 6), np.float32)
    expected = cg.GradientSession(model).run({"x": x})["y"]
    link = tmp_path / "links" / "net.onnx"
    link.parent.mkdir()
    link.symlink_to(model)
    assert add_model(link, tmp_path / "repo").files[0].startswith("net/1/")  # its own name, the other's weights
    shutil.rmtree(tmp_path / "weights")
    assert np.array_equal(cg.GradientSession(Path(entry.folder) / "model.onnx").run({"x": x})["y"], expected)
    with pytest.raises(cg.ModelFileError, match=r"weights/w\.bin"):
        add_model(model, tmp_path / "repo")


@pytest.mark.parametrize("place", ["constant", "subgraph"])
def test_external_data_of_attributes_and_subgraphs_is_carried_along(place: str, tmp_path: Path) -> None:
    model = models.external_inside(tmp_path / "net.onnx", place)
    entry = add_model(model, tmp_path / "repo")
    assert "net/1/w.bin" in entry.files
    (tmp_path / "w.bin").unlink()
    (y,) = cg.GradientSession(Path(entry.folder) / "model.onnx").run({"x": np.ones((2, 4), np.float32)}).values()
    assert np.array_equal(y, np.ones((2, 4)) + np.arange(4))
    for location in ("../w.bin", "/w.bin"):
        outside = models.external_inside(tmp_path / "outside.onnx", place, location)
        with pytest.raises(cg.ModelFileError, match="outside the model's folder"):
            add_model(outside, tmp_path / "repo")


def test_warm_up_data_of_a_single_array(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.zeros((1, 2, 6), np.float32))
    with pytest.raises(cg.ServingConfigError, match="no zip archive"):
        add_model(
            models.gradient_model(tmp_path / "g.onnx"), tmp_path / "repo", ServingOptions(warmup=tmp_path / "d.npy")
        )


def test_weights_under_a_name_of_the_repository_are_refused(tmp_path: Path) -> None:
    model = models.external_inside(tmp_path / "net.onnx", "constant", "model.onnx")
    with pytest.raises(cg.ModelFileError, match=r"takes weights from model\.onnx"):
        add_model(model, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_model_that_does_not_load_is_not_published(device: str, tmp_path: Path) -> None:
    """Its inputs and outputs can be read, what is between them is broken."""
    path = models.gradient_model(tmp_path / "broken.onnx")
    proto = onnx.load(path)
    proto.graph.node[0].input[0] = "nothing"
    onnx.save(proto, path)
    with pytest.raises(cg.ModelFileError, match=r"broken\.onnx cannot be served"):
        add_model(path, tmp_path / "repo", ServingOptions(device=device))
    assert not (tmp_path / "repo").exists()


def test_operators_that_the_cpu_lacks_are_for_the_gpu(tmp_path: Path) -> None:
    path = models.typed_model(tmp_path / "half.onnx", TensorProto.BFLOAT16)
    proto = onnx.load(path)
    proto.graph.node[0].op_type = "Relu"
    onnx.save(proto, path)
    with pytest.raises(cg.ModelFileError, match="NOT_IMPLEMENTED"):
        add_model(path, tmp_path / "repo")
    (note,) = add_model(path, tmp_path / "repo", ServingOptions(device="gpu", dynamic_batching=False)).notes
    assert note.startswith("not loaded here, for the GPU alone")


def test_options_are_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    path = models.gradient_model(tmp_path / "grad.onnx")
    with pytest.raises(cg.ServingConfigError):
        add_model(path, tmp_path / "repo", ServingOptions(labels=tmp_path / "absent.txt"))
    assert not (tmp_path / "repo").exists()


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.gradient_model(tmp_path / "grad.onnx")
    repository = tmp_path / "repo"
    add_model(model, repository)
    before = snapshot(repository)

    def disk_full(*_: object) -> dict:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository_module, "_mlserver_tensor", disk_full)
    for name in ("grad", "new"):
        with pytest.raises(cg.OutputPathError, match="No space left"):
            add_model(model, repository, name=name)
    assert snapshot(repository) == before
    assert [path.name for path in repository.iterdir()] == ["grad"]
    assert sorted(path.name for path in (repository / "grad").iterdir()) == ["1", "config.pbtxt"]


def test_versions_added_at_once_get_different_numbers(tmp_path: Path) -> None:
    model = models.gradient_model(tmp_path / "grad.onnx")
    add_model(model, tmp_path / "repo")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(lambda _: add_model(model, tmp_path / "repo"), range(8)))
    assert sorted(entry.version for entry in entries) == list(range(2, 10))
    assert all((Path(entry.folder) / "model.onnx").read_bytes() == model.read_bytes() for entry in entries)


def test_models_that_cannot_be_served(tmp_path: Path) -> None:
    text = helper.make_tensor_value_info("s", TensorProto.STRING, [1])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["s"], ["t"])],
        "g",
        [text],
        [helper.make_tensor_value_info("t", TensorProto.STRING, [1])],
    )
    onnx.save(helper.make_model(graph), tmp_path / "text.onnx")
    with pytest.raises(cg.DTypeError, match="s is a tensor of string, servers take"):
        add_model(tmp_path / "text.onnx", tmp_path / "repo")
    text.type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    graph.input[0].CopyFrom(text)
    onnx.save(helper.make_model(graph), tmp_path / "sequence.onnx")
    with pytest.raises(cg.DTypeError, match="s is a sequence, servers take"):
        add_model(tmp_path / "sequence.onnx", tmp_path / "repo")
    (tmp_path / "cut.onnx").write_bytes(models.gradient_model(tmp_path / "g.onnx").read_bytes()[:60])
    with pytest.raises(cg.ModelFileError, match="truncated"):
        add_model(tmp_path / "cut.onnx", tmp_path / "repo")
    with pytest.raises(cg.ModelFileError, match="does not exist"):
        add_model(tmp_path / "none.onnx", tmp_path / "repo")
    with pytest.raises(cg.OutputPathError, match="is a file"):
        add_model(tmp_path / "g.onnx", tmp_path / "cut.onnx")
    with pytest.raises(cg.OutputPathError, match="does not exist"):
        add_model(tmp_path / "g.onnx", tmp_path / "a" / "b")
    add_model(tmp_path / "g.onnx", tmp_path / "repo")
    with pytest.raises(cg.OutputPathError, match=r"repo/g is a model of one: give the folder that it lies in"):
        add_model(tmp_path / "g.onnx", tmp_path / "repo" / "g")
    for name in ("../up", "", ".hidden", "a/b", "a b"):
        with pytest.raises(cg.ServingConfigError, match="model name"):
            add_model(tmp_path / "g.onnx", tmp_path / "repo", name=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt"}, "onnxruntime, python"),
        ({"device": "tpu"}, "cpu, gpu"),
        ({"max_batch_size": -1}, "at least 0"),
        ({"instances": 0}, "at least 1"),
        ({"threads": 0}, "at least 1"),
        ({"graph_optimization": "O3"}, "all, extended"),
        ({"max_batch_size": 4, "preferred_batch_sizes": (8,)}, "exceeds"),
        ({"dynamic_batching": False, "preferred_batch_sizes": (8,)}, "leave one out"),
        ({"label_output": "y"}, "no labels file"),
        ({"sizes": {"height": 0}}, "size of height"),
    ],
)
def test_options_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(cg.ServingConfigError, match=message):
        ServingOptions(**arguments)


def integer_model(path: Path, classes: int = 5) -> Path:
    """Rows that see one another through integers alone: y = embedding(x) - mean over the batch."""
    table = numpy_helper.from_array(np.arange(3.0 * classes, dtype=np.float32).reshape(classes, 3) ** 2, "table")
    axes = numpy_helper.from_array(np.array([0]), "axes")
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["rows"]),
        helper.make_node("ReduceMean", ["rows", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["rows", "mean"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "integers",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [table, axes],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.mark.parametrize(("classes", "note"), [(5, "output y of a row changes"), (1, "could not be run")])
def test_rows_of_integers_are_told_apart(classes: int, note: str, tmp_path: Path) -> None:
    """Rows of zeros alone are the same alone and together, whatever the model does with a batch."""
    entry = add_model(integer_model(tmp_path / "tokens.onnx", classes), tmp_path / "repo")
    assert not entry.dynamic_batching
    assert note in entry.notes[0]


def test_preferred_batches_stay_within_the_default_limit(tmp_path: Path) -> None:
    model = models.gradient_model(tmp_path / "grad.onnx")
    with pytest.raises(cg.ServingConfigError, match=r"preferred batch size 16 exceeds max_batch_size, 8"):
        add_model(model, tmp_path / "repo", ServingOptions(preferred_batch_sizes=(4, 16)))
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize("name", ["config.pbtxt", "Config.pbtxt", "warmup", "2"])
def test_labels_under_a_name_of_the_repository_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("cat\ndog\nowl\n")
    options = ServingOptions(labels=tmp_path / name, label_output="scores")
    with pytest.raises(cg.ServingConfigError, match="rename the file"):
        add_model(models.classifier(tmp_path / "c.onnx"), tmp_path / "repo", options)
    assert not (tmp_path / "repo").exists()


def test_a_number_that_a_file_has_is_taken(tmp_path: Path) -> None:
    model = models.gradient_model(tmp_path / "grad.onnx")
    add_model(model, tmp_path / "repo")
    (tmp_path / "repo" / "grad" / "2").write_text("someone's note")
    (tmp_path / "repo" / "grad" / "²").mkdir()
    assert add_model(model, tmp_path / "repo").version == 3


def test_files_are_open_for_writing_when_they_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses fsync of a file that is open for reading."""
    fcntl = pytest.importorskip("fcntl")
    modes = []

    def flush(descriptor: int) -> None:
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, "fsync", flush)
    add_model(models.gradient_model(tmp_path / "grad.onnx"), tmp_path / "repo")
    assert modes
    assert os.O_RDONLY not in modes


def test_warm_up_data_in_another_byte_order(tmp_path: Path) -> None:
    data = np.arange(12, dtype=np.float32).reshape(1, 2, 6)
    np.savez(tmp_path / "data.npz", x=data.astype(">f4"))
    add_model(
        models.gradient_model(tmp_path / "g.onnx"), tmp_path / "repo", ServingOptions(warmup=tmp_path / "data.npz")
    )
    (file,) = (tmp_path / "repo" / "g" / "warmup").iterdir()
    assert file.read_bytes() == data.tobytes()


def test_float16_is_not_read_as_bfloat16(tmp_path: Path) -> None:
    model, options = models.bfloat16_model(tmp_path / "b.onnx"), ServingOptions(warmup=tmp_path / "data.npz")
    np.savez(tmp_path / "data.npz", x=np.ones((1, 3), np.float16))
    with pytest.raises(cg.ServingConfigError, match="x is float16, expected bfloat16"):
        add_model(model, tmp_path / "repo", options)
    np.savez(tmp_path / "data.npz", x=np.ones((1, 3), np.uint16))
    add_model(model, tmp_path / "repo", options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sizes": [4]}, cg.ArgumentTypeError, "sizes is .4."),
        ({"preferred_batch_sizes": 4}, cg.ArgumentTypeError, "preferred_batch_sizes is 4"),
        ({"dynamic_batching": "yes"}, cg.ArgumentTypeError, "dynamic_batching is 'yes'"),
        ({"labels": 3}, cg.ArgumentTypeError, "labels is 3"),
        ({"warmup": 3}, cg.ArgumentTypeError, "warmup is 3"),
        ({"backend": ["python"]}, cg.ServingConfigError, "backend is .'python'."),
        ({"threads": 1.0}, cg.ArgumentTypeError, "threads is 1.0"),
    ],
)
def test_options_of_the_wrong_type_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ServingOptions(**options)


def test_labels_may_be_text_and_nothing_else_may_be_options(tmp_path: Path) -> None:
    model, labels = models.classifier(tmp_path / "c.onnx"), tmp_path / "names.txt"
    labels.write_text("cat\ndog\nowl\n")
    add_model(model, tmp_path / "repo", ServingOptions(labels=str(labels), label_output="scores"))
    assert (tmp_path / "repo" / "c" / "names.txt").is_file()
    with pytest.raises(cg.ArgumentTypeError, match="options is a dict"):
        add_model(model, tmp_path / "repo", {"backend": "python"})
    with pytest.raises(cg.ArgumentTypeError, match="repository is 3"):
        add_model(model, 3)
    with pytest.raises(cg.ServingConfigError, match="up to 200 letters"):
        add_model(model, tmp_path / "repo", name="n" * 300)
