"""The command line: what it prints, its exit status, and what it leaves on disk."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file

import convgrad_export as cg
from convgrad_export import files
from convgrad_export.cli import main
from convgrad_export.model_check import check_model

SHAPES = ["--input-shape", "2,4,9,9", "--weight-shape", "6,4,3,3"]


def test_build_writes_a_model_that_check_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gradient.onnx"
    arguments = ["build", "conv2d_weight", *SHAPES, "--stride", "2,1", "--padding", "0:1,2:2", "-o", str(path)]
    assert main(arguments) == 0
    assert "conv2d_weight by weight." in capsys.readouterr().out
    assert main(["check", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert [(check["data"], check["exact"]) for check in report["checks"]] == [("integers", True), ("random", False)]
    assert all(0 <= check["worst"] <= 1 for check in report["checks"])


def test_a_dash_is_no_file_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = (
        ["build", "conv2d_weight", *SHAPES],
        ["export", "torch.nn:ReLU"],
        ["bench"],
        ["train"],
        ["serve-repo", "gradient.onnx"],
    )
    for command in commands:
        assert main([*command, "-o", "-"]) == 2
        assert "--output is '-', expected a name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_every_dtype_and_a_folder_are_checked(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for operator in ("conv2d_input", "convolution_backward"):
        assert main(["build", operator, *SHAPES, "--dtype", dtype, "-o", str(tmp_path / f"{operator}.onnx")]) == 0
    capsys.readouterr()
    assert main(["check", str(tmp_path)]) == 0
    assert "2 models, 8 checks, 0 failed" in capsys.readouterr().out


def test_a_transposed_convolution_with_uneven_padding_is_checked(tmp_path: Path) -> None:
    path = str(tmp_path / "transposed.onnx")
    shapes = ["--input-shape", "2,4,5,6", "--weight-shape", "4,3,3,3", "--stride", "2", "--transposed"]
    ends = ["--padding", "0:1,2:0", "--output-padding", "1"]
    assert main(["build", "convolution_backward", *shapes, *ends, "-o", path]) == 0
    assert main(["check", path]) == 0


def test_a_dynamic_model_without_sizes_is_checked(tmp_path: Path) -> None:
    path = str(tmp_path / "dynamic.onnx")
    dynamic = ["--dynamic", "batch,channels,space,kernel", "--keep-function"]
    assert main(["build", "conv3d_weight", "--stride", "2", *dynamic, "-o", path]) == 0
    assert len(onnx.load(path).functions) == 1
    assert main(["check", path]) == 0


def test_brackets_in_a_name_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """rich takes them for markup, and drops them or fails."""
    path = tmp_path / "a[b]" / "[" / "c].onnx"
    path.parent.mkdir(parents=True)
    onnx.save(cg.build_model("conv1d_weight", input_shape=(2, 3, 8), weight_shape=(4, 3, 3)), path)
    assert main(["check", str(path)]) == 0
    assert "a[b]/[/c].onnx" in "".join(capsys.readouterr().out.replace("│", "").split())


def test_a_name_that_is_no_utf_8_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime takes none: its binding ended in a TypeError."""
    path = tmp_path / os.fsdecode(b"na\xefve.onnx")
    onnx.save(cg.build_model("conv1d_weight", input_shape=(2, 3, 8), weight_shape=(4, 3, 3)), path)
    assert main(["check", str(path)]) == 2
    assert "takes no path that is not UTF-8; rename it" in capsys.readouterr().err


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "naïve.onnx"
    onnx.save(cg.build_model("conv1d_weight", input_shape=(2, 3, 8), weight_shape=(4, 3, 3)), path)
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.chdir(tmp_path)
    assert main(["check", path.name]) == 0
    shown.seek(0)
    assert "na\\xefve.onnx" in shown.read()


def test_a_table_in_a_narrow_terminal_has_its_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich made columns of no width, and empty cells."""
    path = tmp_path / "m.onnx"
    onnx.save(cg.build_model("conv1d_weight", input_shape=(2, 3, 8), weight_shape=(4, 3, 3)), path)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    assert main(["check", str(path)]) == 0
    cells = [line.split("│")[-2].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [cell for cell in cells if cell] == ["ok", "ok"]


def test_check_fails_with_1_on_a_model_with_a_wrong_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = cg.build_model("conv2d_input", input_shape=(2, 4, 9, 9), weight_shape=(6, 4, 3, 3), padding=1)
    metadata = {item.key: item for item in model.metadata_props}
    metadata["convgrad.geometry"].value = metadata["convgrad.geometry"].value.replace(
        "[[1, 1], [1, 1]]", "[[2, 0], [1, 1]]"
    )
    path = tmp_path / "wrong.onnx"
    onnx.save(model, path)
    assert main(["check", str(path)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_what_onnxruntime_says_of_a_damaged_model_is_one_line(tmp_path: Path, capsys) -> None:
    model = cg.build_model(
        "conv2d_weight", input_shape=(2, 3, 8, 8), weight_shape=(4, 3, 3, 3), lowering="weight.im2col"
    )
    (size,) = (each for each in model.graph.initializer if onnx.numpy_helper.to_array(each).tolist() == [1, 27, 4])
    size.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 27, 5]), size.name))
    path = tmp_path / "a.onnx"
    onnx.save(model, path)
    assert main(["check", str(path)]) == 2
    assert len(capsys.readouterr().err.removeprefix("convgrad: ").splitlines()) == 1
    model.graph.node[0].op_type = "no\nsuch"
    onnx.save(model, path)
    with pytest.raises(cg.ModelFileError, match="No Op registered for no such"):
        cg.GradientSession(path)


def test_check_refuses_foreign_and_truncated_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", ["x"], ["y"])],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, [1])],
            [onnx.helper.make_tensor_value_info("y", 1, [1])],
        ),
        ir_version=8,
        opset_imports=[onnx.helper.make_opsetid("", 18)],
    )
    path = tmp_path / "foreign.onnx"
    onnx.save(foreign, path)
    assert main(["check", str(path)]) == 2
    assert "was not made by convgrad build" in capsys.readouterr().err
    path.write_bytes(b"not a model")
    assert main(["check", str(path)]) == 2
    assert "is not an ONNX model" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "absent.onnx")]) == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["check", str(empty)]) == 2


@pytest.mark.parametrize("name", ["manifest.json", "model.textproto", "model.onnxtxt"])
@pytest.mark.parametrize(
    "arguments", [["check"], ["check", "--target", "web"], ["tune"], ["serve-repo", "-o", "repository"]]
)
def test_a_file_of_another_kind_is_refused_whatever_its_suffix(
    arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text('{"functions/conv1d_input.onnx": {}}')
    assert main([*arguments, name]) == 2
    assert "ONNX model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


HUGE = '{{"input_shape": [2, 4, {0}, {0}], "weight_shape": [8, 4, 3, 3], "padding": 1}}'


def renamed(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("grad_weight", "dw"), "has the outputs dw, expected grad_weight"),
        (("input", "image"), "has the inputs image"),
        ({"op": "foo"}, "operator is 'foo'"),
        ({"op": "conv2d_input"}, "is for no gradient of conv2d_input"),
        ({"op": "conv3d_weight"}, "of a convolution in 2d"),
        ({"dtype": "int8"}, "convgrad.dtype is 'int8'"),
        ({"dtype": "float64"}, "input input is float64"),
        ({"lowering": ""}, "is for no gradient"),
        ({"lowering": "input.col2im"}, "is for no gradient"),
        ({"geometry": "[" * 100_000}, "convgrad.geometry is damaged"),
        ({"geometry": "null"}, "convgrad.geometry is damaged"),
        ({"geometry": HUGE.format(10**6)}, "data of the sizes in its metadata cannot be made"),
        ({"geometry": HUGE.format(2**40)}, "data of the sizes in its metadata cannot be made"),
    ],
)
def test_check_refuses_a_model_of_ours_that_was_edited(
    change: tuple[str, str] | dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the outputs of its metadata there is nothing to compare, which is no success."""
    model = cg.build_model("conv2d_weight", input_shape=(2, 4, 6, 6), weight_shape=(8, 4, 3, 3), padding=1)
    if isinstance(change, tuple):
        renamed(model, *change)
    else:
        for item in model.metadata_props:
            item.value = change.get(item.key.removeprefix("convgrad."), item.value)
    path = tmp_path / "edited.onnx"
    onnx.save(model, path)
    assert main(["check", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error


def test_check_refuses_a_declared_size_that_the_result_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = cg.build_model("conv2d_weight", input_shape=(2, 4, 6, 6), weight_shape=(8, 4, 3, 3), padding=1)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 7
    path = tmp_path / "edited.onnx"
    onnx.save(model, path)
    assert main(["check", str(path)]) == 2
    assert "declares grad_weight as [7, 4, 3, 3], and it has the shape [8, 4, 3, 3]" in capsys.readouterr().err
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    assert main(["check", str(path)]) == 0


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(tmp_path: Path, capsys) -> None:
    path = tmp_path / "gradient.onnx"
    path.write_text("mine")
    arguments = ["build", "conv2d_weight", *SHAPES, "-o", str(path)]
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert onnx.load(path).graph.output[0].name == "grad_weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "conv2d_weight", *SHAPES, "-o", "/no/such/folder/x.onnx"], "does not exist"),
        (["build", "conv2d_weight", *SHAPES, "-o", "/"], "is a folder"),
        (["build", "conv2d_weight", "-o", "unused.onnx"], "input_shape is missing"),
        (["build", "conv2d_weight", *SHAPES, "--stride", "a", "-o", "unused.onnx"], "--stride is 'a'"),
        (["build", "conv2d_weight", *SHAPES, "--padding", "1:x,1:1", "-o", "unused.onnx"], "--padding is '1:x,1:1'"),
        (["build", "conv2d_weight", *SHAPES, "--groups", "3", "-o", "unused.onnx"], "4 channels, expected 12"),
        (["build", "conv2d_weight", *SHAPES, "--groups", "1.5", "-o", "unused.onnx"], "'--groups'"),
        (["build", "conv2d_weight", *SHAPES], "Missing option"),
        (["lowerings", "conv9d_weight"], "operator_name is 'conv9d_weight'"),
        (["nothing"], "No such command"),
    ],
)
def test_wrong_usage_exits_with_2_and_one_clear_message(arguments: list[str], message: str, capsys) -> None:
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("unused.onnx").exists()


def test_lowerings_lists_reasons_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lowerings", "conv2d_input", *SHAPES, "--stride", "2"]) == 0
    text = capsys.readouterr().out
    assert "no: stride is (2, 2), it needs 1" in text
    assert "chosen" in text
    assert main(["lowerings", "convolution_backward", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["lowerings"]
    assert {entry["gradient"] for entry in listed} == {"input", "weight", "bias"}


@pytest.mark.parametrize("command", [[], ["build"], ["check"], ["lowerings"]])
def test_help_and_version_exit_with_0(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == cg.__version__


def test_the_geometry_of_a_saved_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "layer.safetensors"
    save_file({"conv.weight": np.zeros((6, 4, 3, 3), np.float32), "conv.bias": np.zeros(6, np.float32)}, weights)
    out = tmp_path / "a.onnx"
    assert main(["build", "conv2d_weight", "--layer", str(weights), "-o", str(out)]) == 2
    assert "--input-shape is missing" in capsys.readouterr().err
    assert main(["build", "conv2d_weight", "--layer", str(weights), "--input-shape", "1,4,8,8", "-o", str(out)]) == 0

    state = tmp_path / "layer.pt"
    torch.save({"conv.weight": torch.zeros(6, 4, 3, 3), "conv.bias": torch.zeros(6)}, state)
    same = tmp_path / "same.onnx"
    assert main(["build", "conv2d_weight", "--layer", str(state), "--input-shape", "1,4,8,8", "-o", str(same)]) == 0
    assert same.read_bytes() == out.read_bytes()

    network = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        torch.nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1),
    )
    program = tmp_path / "network.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(2, 4, 9, 9),)), program)
    capsys.readouterr()
    assert main(["build", "conv2d_weight", "--layer", str(program), "-o", str(tmp_path / "b.onnx")]) == 2
    assert "holds 0.weight, 1.weight" in capsys.readouterr().err
    for name, operator in (("0", "conv2d_weight"), ("1.weight", "convolution_backward")):
        out = tmp_path / f"{name}.onnx"
        assert main(["build", operator, "--layer", str(program), "--layer-name", name, "-o", str(out)]) == 0
        assert main(["check", str(out)]) == 0
    geometry = json.loads({p.key: p.value for p in onnx.load(tmp_path / "0.onnx").metadata_props}["convgrad.geometry"])
    assert (geometry["groups"], geometry["stride"], geometry["padding"]) == (2, [2, 2], [[1, 1], [1, 1]])


@pytest.mark.parametrize(
    ("file", "given", "message"),
    [
        (
            "net.pt2",
            ["--input-shape", "4,1,32,32", "--stride", "2"],
            "--input-shape, --stride is given, but --layer net",
        ),
        ("net.pt2", ["--padding", "0"], "--padding is given"),
        ("net.pt2", ["--transposed"], "--transposed is given"),
        ("net.pt", ["--input-shape", "2,4,8,8", "--weight-shape", "4,9,3,3"], "--weight-shape is given"),
        (None, [*SHAPES, "--layer-name", "0"], "--layer is missing"),
    ],
)
def test_options_that_the_layer_determines_are_refused(
    file: str | None, given: list[str], message: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3))
    torch.save(network.state_dict(), "net.pt")
    torch.export.save(torch.export.export(network, (torch.zeros(2, 4, 8, 8),)), "net.pt2")
    layer = [] if file is None else ["--layer", file]
    assert main(["build", "conv2d_weight", *layer, *given, "-o", "x.onnx"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("x.onnx").exists()
    weights = ["build", "conv2d_weight", "--layer", "net.pt", "--input-shape", "2,4,8,8", "--stride", "2"]
    assert main([*weights, "-o", "x.onnx"]) == 0  # which a file of weights does not know


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors", "broken.pt2", "absent.pt2", "layer.txt"])
def test_layer_files_that_cannot_be_read_are_refused(name: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / name
    if not name.startswith("absent"):
        path.write_bytes(b"\x80\x04 pickled or broken")
    assert main(["build", "conv2d_weight", "--layer", str(path), "-o", str(tmp_path / "x.onnx")]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert name in message


def test_an_archive_that_is_no_program_is_refused_in_one_line(tmp_path: Path, capfd) -> None:
    """torch logs a traceback of its own."""
    path = tmp_path / "bogus.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    assert main(["build", "conv2d_weight", "--layer", str(path), "-o", str(tmp_path / "x.onnx")]) == 2
    (message,) = capfd.readouterr().err.splitlines()
    assert "bogus.pt2 is not a torch.export program" in message


class RunsCode:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("opened"),))


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(6, 4, 3, 3), "trap": RunsCode()}, "layer.pt")
    command = ["build", "conv2d_weight", "--layer", "layer.pt", "--input-shape", "1,4,8,8", "-o", "x.onnx"]
    assert main(command) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "save module.state_dict()" in message
    assert [path.name for path in tmp_path.iterdir()] == ["layer.pt"]


def test_a_full_disk_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gradient.onnx"
    path.write_bytes(b"previous")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(cg.OutputPathError, match="No space left"):
        files.write_atomically(path, b"new", overwrite=True)
    assert path.read_bytes() == b"previous"
    assert [file.name for file in tmp_path.iterdir()] == ["gradient.onnx"]


def exported(path: Path, module: torch.nn.Module, *shapes: tuple[int, ...], **options: object) -> Path:
    program = torch.export.export(module, tuple(torch.zeros(shape) for shape in shapes), **options)
    torch.export.save(program, path)
    return path


def test_a_program_that_runs_code_when_torch_loads_it_is_read_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.export.load unpickles the example inputs."""
    monkeypatch.chdir(tmp_path)
    program = exported(tmp_path / "net.pt2", torch.nn.Conv2d(4, 6, 3), (2, 4, 8, 8))
    with zipfile.ZipFile(program) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (inputs,) = (name for name in entries if "sample_inputs" in name)
    trap = io.BytesIO()
    torch.save((RunsCode(),), trap)
    with zipfile.ZipFile(program, "w") as archive:
        for name, content in (entries | {inputs: trap.getvalue()}).items():
            archive.writestr(name, content)
    assert main(["build", "conv2d_weight", "--layer", "net.pt2", "-o", "x.onnx"]) == 0
    assert main(["check", "x.onnx"]) == 0
    assert not Path("opened").exists()


def test_sizes_that_a_program_leaves_open_are_the_callers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=6), 3: torch.export.Dim("width", min=6)}
    net = torch.nn.Conv2d(4, 6, 3, stride=2)
    program = exported(tmp_path / "open.pt2", net, (2, 4, 9, 9), dynamic_shapes={"input": sizes})
    command = ["build", "conv2d_weight", "--layer", str(program), "-o", str(tmp_path / "x.onnx")]
    assert main(command) == 2
    assert "--input-shape is missing" in capsys.readouterr().err
    assert main([*command, "--input-shape", "1,4,20,21"]) == 0
    geometry = json.loads({p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}["convgrad.geometry"])
    assert (geometry["input_shape"], geometry["stride"]) == ([1, 4, 20, 21], [2, 2])
    batch = exported(tmp_path / "batch.pt2", net, (2, 4, 9, 9), dynamic_shapes={"input": {0: sizes[0]}})
    assert main(["build", "conv2d_weight", "--layer", str(batch), "-o", str(tmp_path / "y.onnx")]) == 0


class SharedWeight(torch.nn.Module):
    """One convolution at two scales, as heads of detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Conv2d(4, 6, 3, padding="same")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.head(x), self.head(x), self.head(x[:, :, ::2, ::2])


def test_a_weight_of_several_geometries_is_none_of_them_by_itself(tmp_path: Path, capsys) -> None:
    program = exported(tmp_path / "heads.pt2", SharedWeight(), (1, 4, 8, 8))
    command = ["build", "conv2d_weight", "--layer", str(program), "-o", str(tmp_path / "x.onnx")]
    assert main([*command, "--layer-name", "head.weight"]) == 2
    names = capsys.readouterr().err.partition("expected one of ")[2].strip().split(", ")
    assert len(names) == 3
    assert all(name.startswith("head.weight:") for name in names)
    assert main([*command, "--layer-name", names[2]]) == 0
    geometry = json.loads({p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}["convgrad.geometry"])
    assert geometry["input_shape"] == [1, 4, 4, 4]


def test_a_report_of_a_failure_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error of a result that is not finite is infinite, for which JSON has no number."""
    model = cg.build_model("conv1d_weight", input_shape=(1, 1, 4), weight_shape=(1, 1, 2), dynamic=())
    (output,) = (node for node in model.graph.node if "grad_weight" in node.output)
    output.output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Log", ["negative"], ["nan"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["before", "nan"], ["grad_weight"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(-1, np.float32), "negative"))
    path = tmp_path / "nan.onnx"
    onnx.save(model, path)
    assert main(["check", str(path), "--json"]) == 1

    def refuse(name: str) -> None:
        raise AssertionError(name)

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (report["passed"], report["checks"][0]["worst"]) == (False, None)


@pytest.mark.parametrize(
    "options",
    [
        ["--dilation", "6"],
        ["--stride", "7,2", "--padding", "0,3"],
        ["--groups", "2", "--weight-shape", "6,2,7,5", "--dynamic", "batch,channels,space"],
        ["--input-shape", "3,4,5,4", "--dilation", "3", "--dynamic", "channels,kernel"],
    ],
)
@pytest.mark.parametrize("operator", ["conv2d_input", "conv2d_weight"])
def test_dynamic_models_are_checked_at_the_sizes_they_fix(operator: str, options: list[str], tmp_path: Path) -> None:
    path = str(tmp_path / "dynamic.onnx")
    assert main(["build", operator, "--dynamic", "batch,channels,space,kernel", *options, "-o", path]) == 0
    assert main(["check", path]) == 0


def test_a_missing_package_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "gradient.onnx")
    assert main(["build", "conv2d_weight", *SHAPES, "-o", path]) == 0
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["check", path]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "pip install 'convgrad-export[torch]'" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--target", "web", "--seed", "1", "x.onnx"], "--seed is given, but --target runs nothing"),
        (["lowerings", "conv2d_input", "--stride", "2", "--dtype", "float64"], "--stride, --dtype is given, but"),
        (["check", "x" * 300 + ".onnx"], "File name too long"),
        (["build", "conv2d_input", *SHAPES, "--dynamic", "batch, depth", "-o", "x.onnx"], "dynamic holds ['depth']"),
    ],
)
def test_what_has_no_effect_or_no_name_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, cg.GeometryError, "seed is -1, expected at least 0"),
        ({"seed": "1"}, cg.ArgumentTypeError, "seed is '1'"),
        ({"batch": 0}, cg.GeometryError, "batch is 0, expected at least 1"),
        ({"batch": 2.5}, cg.ArgumentTypeError, "batch is 2.5"),
        ({"path": 3}, cg.ArgumentTypeError, "path is 3"),
    ],
)
def test_check_model_names_an_argument_that_cannot_be(
    arguments: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "gradient.onnx"
    onnx.save(cg.build_model("conv1d_weight", input_shape=(2, 3, 8), weight_shape=(4, 3, 3)), path)
    with pytest.raises(error, match=message):
        check_model(**{"path": path, **arguments})


def test_a_folder_that_is_called_like_a_model_is_none(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    onnx.save(cg.build_model("conv1d_weight", input_shape=(2, 3, 8), weight_shape=(4, 3, 3)), tmp_path / "model.onnx")
    assert main(["check", str(tmp_path)]) == 0
