"""Measuring lowerings: what is refused, what bounds the time, what `convgrad tune` prints and keeps."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import convgrad_export as cg
from convgrad_export.cli import main
from convgrad_export.commands import tune as command
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import LOWERINGS, catalogue
from convgrad_export.selection import autotune, cache, graph_walk, runner
from convgrad_export.selection.autotune import TuningSettings, tune_gradient
from convgrad_export.selection.layers import module_layers
from convgrad_export.selection.policy import choose
from convgrad_export.selection.tune import SkippedGradient, TuningReport
from tests.cases import CASES, ConvCase

GEOMETRY = ConvGeometry.from_forward((3, 8, 9, 10), (6, 8, 3, 3), padding=1)
QUICK = TuningSettings(threads=1, seconds=0.2)


def stopped() -> float:
    """A clock by which no time passes: the number of rounds ends a measurement, however busy the machine is."""
    return 0.0


def wrong(name: str, monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    """Replace a catalogue entry by one whose result `spoil` alters."""
    entry = LOWERINGS[name]

    def body(op, g, grad_output, operand):
        return spoil(op, g, entry.body(op, g, grad_output, operand))

    monkeypatch.setitem(catalogue.LOWERINGS, name, replace(entry, body=body))
    graph_walk.steps.cache_clear()


@pytest.mark.parametrize("gradient", ["input", "weight"])
def test_every_allowed_lowering_is_measured(gradient: str) -> None:
    record = tune_gradient(gradient, GEOMETRY, QUICK, clock=stopped)
    applicable = {
        name
        for name, entry in LOWERINGS.items()
        if entry.gradient == gradient and entry.why_not(GEOMETRY) is None and entry.error_factor <= 2
    }
    assert {timing.lowering for timing in record.timings} == applicable
    assert record.refused == {}
    assert [t.min_ms for t in record.timings] == sorted(t.min_ms for t in record.timings)
    assert all(0 < t.min_ms <= t.median_ms for t in record.timings)
    assert record.threads == 1


def test_winograd_is_measured_when_its_error_is_allowed() -> None:
    names = {
        t.lowering
        for t in tune_gradient("weight", GEOMETRY, replace(QUICK, max_error_factor=8.0), clock=stopped).timings
    }
    assert {"weight.winograd4", "weight.winograd6"} <= names


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes_are_measured(dtype: str) -> None:
    record = tune_gradient("weight", GEOMETRY, replace(QUICK, dtype=dtype), clock=stopped)
    assert "weight.matmul_taps" in {t.lowering for t in record.timings}
    assert record.refused == {}


@pytest.mark.parametrize("name", ["mixed1d", "mixed3d", "depthwise_multiplier", "transposed2d", "only_padding_is_read"])
@pytest.mark.parametrize("gradient", ["input", "weight"])
def test_right_lowerings_are_not_refused(name: str, gradient: str) -> None:
    case: ConvCase = next(case for case in CASES if case.name == name)
    record = tune_gradient(gradient, case.geometry, QUICK, clock=stopped)
    assert {k: v for k, v in record.refused.items() if "no time" not in v} == {}
    assert record.timings


def test_a_wrong_lowering_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_element(op, g, value):
        first = op.Slice(value, *(op.Constant(value_ints=[bound]) for bound in (0, 1, 0)))
        rest = op.Slice(value, *(op.Constant(value_ints=[bound]) for bound in (1, g.weight_shape[0], 0)))
        return op.Concat(op.Add(first, op.Constant(value_floats=[0.05])), rest, axis=0)

    wrong("weight.im2col", monkeypatch, one_element)
    record = tune_gradient("weight", GEOMETRY, QUICK, clock=stopped)
    assert "its result is wrong" in record.refused["weight.im2col"]
    assert "weight.im2col" not in {t.lowering for t in record.timings}
    assert record.timings


def test_a_lowering_that_is_wrong_only_at_larger_batches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LOWERINGS["weight.swapped_conv"]

    def drops_third_sample(op, g, grad_output, operand):
        start, stop, axis = (op.Constant(value_ints=[bound]) for bound in (0, 2, 0))
        return original.body(op, g, op.Slice(grad_output, start, stop, axis), op.Slice(operand, start, stop, axis))

    monkeypatch.setitem(catalogue.LOWERINGS, "weight.swapped_conv", replace(original, body=drops_third_sample))
    graph_walk.steps.cache_clear()
    refused = tune_gradient("weight", GEOMETRY, QUICK, clock=stopped).refused
    assert "differs from" in refused["weight.swapped_conv"]


def test_a_lowering_that_onnxruntime_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def reshaped(op, g, value):
        return op.Reshape(value, op.Constant(value_ints=[7, -1]))

    wrong("weight.im2col", monkeypatch, reshaped)
    monkeypatch.setattr(autotune, "workspace_bytes", lambda *arguments: 0)
    assert (
        "onnxruntime cannot run it" in tune_gradient("weight", GEOMETRY, QUICK, clock=stopped).refused["weight.im2col"]
    )


def test_the_memory_limit_keeps_candidates_out() -> None:
    need = graph_walk.workspace_bytes("weight.im2col", GEOMETRY)
    record = tune_gradient("weight", GEOMETRY, replace(QUICK, max_workspace=need - 1), clock=stopped)
    assert "needs more memory" in record.refused["weight.im2col"]
    assert all(t.workspace_bytes < need for t in record.timings)


def test_time_that_is_used_up_leaves_the_policys_choice_measured() -> None:
    ticks = itertools.count(step=10.0)
    record = tune_gradient("weight", GEOMETRY, replace(QUICK, seconds=5.0), clock=lambda: next(ticks))
    assert [t.lowering for t in record.timings] == [choose("weight", GEOMETRY).name]
    assert set(record.refused.values()) == {"no time was left to measure it"}


def test_the_budget_bounds_the_whole_run(own_cache: Path) -> None:
    layers = [ConvGeometry.from_forward((2, 8, 20 + n, 20), (8, 8, 3, 3), padding=1) for n in range(60)]
    started = time.monotonic()
    report = cg.tune(layers, budget=1.0, threads=1)
    assert time.monotonic() - started < 20
    assert report.skipped
    assert all(entry.reason is None for entry in report.skipped)
    assert len(report.gradients) + len(report.skipped) == 120
    assert len(cache.load(own_cache)) == len(report.gradients)


def test_a_budget_shorter_than_the_trace_goes_on_from_call_to_call(own_cache: Path) -> None:
    for measured in (1, 2, 3):
        report = cg.tune(Net(), input_shape=(2, 3, 8, 8), budget=1e-3, threads=1)
        assert len(report.gradients) == measured
        assert [entry.reason for entry in report.skipped] == [None] * (8 - measured)
        assert len(cache.load(own_cache)) == measured


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.twice = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.up = torch.nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.stem(x)))
        return torch.nn.functional.conv2d(self.up(x), torch.ones(1, 4, 1, 1))


def test_a_module_is_tuned_layer_by_layer_and_the_cache_answers_next_time(own_cache: Path) -> None:
    report = cg.tune(Net(), input_shape=(2, 3, 8, 8), budget=20, threads=1)
    names = [(entry.layer, entry.count) for entry in report.gradients if entry.gradient == "input"]
    assert names == [("stem", 1), ("twice", 2), ("up", 1), ("convolution", 1)]
    assert "input (2, 3, 10, 10)" in report.gradients[0].geometry  # reflection padding comes before the convolution
    assert not any(entry.cached for entry in report.gradients)
    before = own_cache.read_bytes()
    second = cg.tune(Net(), input_shape=(2, 3, 8, 8), budget=20, threads=1)
    assert all(entry.cached for entry in second.gradients)
    assert own_cache.read_bytes() == before
    assert [(e.tuned, e.timings) for e in second.gradients] == [(e.tuned, e.timings) for e in report.gradients]
    for entry in report.gradients:
        assert entry.tuned_ms == entry.timings[entry.tuned] <= 1.03 * min(entry.timings.values())
        assert entry.auto_ms == entry.timings[entry.auto]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": 3}, cg.ArgumentTypeError, "target is a int"),
        ({"target": np.array("a"), "input_shape": (1, 2)}, cg.ArgumentTypeError, "target is a ndarray"),
        ({"target": GEOMETRY, "gradients": np.array("input")}, cg.ArgumentTypeError, "gradients is array"),
        ({"target": GEOMETRY.with_batch("n")}, cg.GeometryError, "open sizes"),
        ({"target": GEOMETRY, "budget": 0}, cg.ArgumentTypeError, "budget is 0, expected a number above 0"),
        ({"target": GEOMETRY, "budget": "1"}, cg.ArgumentTypeError, "budget is '1'"),
        ({"target": GEOMETRY, "budget": float("nan")}, cg.ArgumentTypeError, "budget is nan"),
        ({"target": GEOMETRY, "threads": 0}, cg.ArgumentTypeError, "threads is 0"),
        ({"target": GEOMETRY, "max_error_factor": "2"}, cg.ArgumentTypeError, "max_error_factor is '2'"),
        ({"target": GEOMETRY, "max_workspace": "1"}, cg.ArgumentTypeError, "max_workspace is '1'"),
        ({"target": GEOMETRY, "seed": -1}, cg.GeometryError, "seed is -1"),
        ({"target": GEOMETRY, "gradients": np.ones((2, 2))}, cg.GeometryError, "gradients is .*expected 'input'"),
        ({"target": GEOMETRY, "progress": True}, cg.ArgumentTypeError, "progress is True"),
        ({"target": GEOMETRY, "gradients": 3}, cg.ArgumentTypeError, "gradients is 3"),
        ({"target": GEOMETRY, "gradients": ("bias",)}, cg.GeometryError, "gradients is"),
        ({"target": GEOMETRY, "provider": "tpu"}, cg.ProviderError, "provider is 'tpu'"),
        ({"target": GEOMETRY, "provider": ["cpu"]}, cg.ProviderError, "provider is .'cpu'."),
        ({"target": GEOMETRY, "provider": "CoreMLExecutionProvider"}, cg.ProviderError, "expected cpu or cuda"),
        ({"target": GEOMETRY, "cache": 3}, cg.ArgumentTypeError, "cache is 3"),
        ({"target": GEOMETRY, "cache": "a\0b"}, cg.TuningCacheError, "cannot be read"),
        ({"target": GEOMETRY, "input_shape": (1, 2)}, cg.GeometryError, "are for a module"),
        ({"target": GEOMETRY.with_batch(0)}, cg.GeometryError, "empty batch"),
        ({"target": GEOMETRY, "batch": 0}, cg.GeometryError, "batch is 0"),
        ({"target": GEOMETRY, "dtype": "int8"}, cg.DTypeError, "dtype is int8"),
        ({"target": "missing.onnx"}, cg.ModelFileError, "does not exist"),
        ({"target": Net()}, cg.GeometryError, "exactly one of them"),
        ({"target": Net(), "args": torch.zeros(1, 3, 8, 8)}, cg.ArgumentTypeError, "args is a Tensor"),
        ({"target": Net(), "input_shape": (2**30, 2**20, 8, 8)}, cg.GeometryError, "no tensor can be made"),
        ({"target": Net(), "input_shape": (1, 5, 8, 8)}, cg.CaptureError, "cannot run on inputs of shape .*5 channels"),
        ({"target": torch.nn.ReLU(), "input_shape": (1, 5)}, cg.GeometryError, "runs no convolution"),
        ({"target": GEOMETRY, "max_workspace": 1}, cg.UnsupportedLoweringError, "max_workspace is 1"),
    ],
)
def test_wrong_arguments_are_one_clear_error(arguments: dict, error: type, message: str, own_cache: Path) -> None:
    target = arguments.pop("target")
    with pytest.raises(error, match=message):
        cg.tune(target, **arguments)
    assert not own_cache.exists()


def build(path: Path, operator: str = "conv2d_weight", **options) -> Path:
    shapes = {"input_shape": (2, 4, 9, 9), "weight_shape": (6, 4, 3, 3)}
    path.write_bytes(cg.build_model(operator, **{**shapes, **options}).SerializeToString())
    return path


def test_the_command_tunes_models_and_shows_a_table(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    build(models / "weight.onnx")
    build(models / "input.onnx", "conv2d_input", dtype="float64")
    build(
        models / "dynamic.onnx", dynamic=("batch", "channels", "space", "kernel"), input_shape=None, weight_shape=None
    )
    assert main(["tune", str(models), "--threads", "1", "--budget", "5"]) == 0
    shown = capsys.readouterr().out
    assert "all layers:" in shown
    assert f"{own_cache}: 2 measured" in shown.replace("\n", "")
    assert main(["tune", str(models), "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(e["layer"], e["gradient"], e["dtype"]) for e in report["gradients"]] == [
        ("input", "input", "float64"),
        ("weight", "weight", "float32"),
    ]
    assert all(entry["cached"] for entry in report["gradients"])
    other = tmp_path / "other.json"
    arguments = ["--threads", "1", "--batch", "3", "--cache", str(other), "--json"]
    assert main(["tune", str(models / "weight.onnx"), *arguments]) == 0
    assert [record.geometry.batch for record in cache.load(other)] == [3]


def test_the_command_tunes_a_module_by_name(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tuned_net.py").write_text("import torch\ndef Net():\n    return torch.nn.Conv1d(2, 4, 3)\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["tune", "tuned_net:Net", "--shape", "2,2,12", "--gradients", "weight", "--threads", "1", "--json"]
    assert main(arguments) == 0
    assert len(json.loads(capsys.readouterr().out)["gradients"]) == 1


def test_lowerings_shows_the_tuned_choice(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["--input-shape", "3,8,9,10", "--weight-shape", "6,8,3,3", "--padding", "1"]
    cg.tune(GEOMETRY, gradients=("weight",))
    assert main(["lowerings", "conv2d_weight", *shapes, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["lowerings"]
    chosen = [entry["name"] for entry in entries if entry["tuned"]]
    assert chosen == [choose("weight", GEOMETRY, lowering="tuned").name]
    assert main(["lowerings", "conv2d_weight", *shapes]) == 0
    assert "tuned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "missing.onnx"], "does not exist"),
        (["tune", "torch.nn:Conv2d"], "--shape is missing"),
        (["tune", "missing.onnx", "--shape", "1,2,3"], "use --batch"),
        (["tune", "nowhere:Net", "--shape", "1,2,3"], "cannot be imported"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_someone_else_is_refused_with_advice(tmp_path: Path) -> None:
    path = build(tmp_path / "m.onnx")
    import onnx

    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(cg.ModelFileError, match=r"was not made by convgrad build.*give its module"):
        cg.tune(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(cg.ModelFileError, match="not an ONNX model"):
        cg.tune(path)


class Training(torch.nn.Module):
    """All that a forward pass in training mode moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return self.layers(x)


def test_a_module_and_the_random_numbers_are_left_as_they_were() -> None:
    module = Training()
    before, drawn = {name: value.clone() for name, value in module.state_dict().items()}, torch.get_rng_state()
    for shape in ((2, 3, 8, 8), (2, 3, 2, 2)):  # in the second the forward pass fails half-way
        try:
            module_layers(module, (torch.ones(shape),))
        except cg.CaptureError:
            assert shape[-1] == 2
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_scripted_modules_and_inference_mode_hide_no_convolution() -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    expected = module_layers(plain, (torch.ones(1, 3, 6, 6),))
    with torch.inference_mode():
        assert module_layers(plain, (torch.ones(1, 3, 6, 6),)) == expected
    (scripted,) = module_layers(torch.jit.script(plain), (torch.ones(1, 3, 6, 6),))
    assert (scripted.name, scripted.geometry) == ("convolution", expected[0].geometry)


def test_a_folder_may_hold_a_repository_of_a_server(tmp_path: Path) -> None:
    shapes = {"input_shape": (2, 3, 6, 6), "weight_shape": (4, 3, 3, 3)}
    onnx.save(cg.build_model("conv2d_weight", **shapes), tmp_path / "ours.onnx")
    foreign = tmp_path / "repository" / "net" / "1"
    foreign.mkdir(parents=True)
    (foreign.parent / "config.pbtxt").touch()
    (foreign / "model.onnx").write_bytes(b"")
    report = cg.tune(tmp_path, budget=0.5, threads=1)
    assert [entry.layer for entry in report.gradients] == ["ours"]


@pytest.mark.parametrize(("key", "value"), [("geometry", "[" * 100_000), ("dtype", "int8"), ("op", "conv2d")])
def test_a_model_with_damaged_metadata_is_refused(key: str, value: str, tmp_path: Path) -> None:
    model = cg.build_model("conv2d_weight", input_shape=(2, 3, 6, 6), weight_shape=(4, 3, 3, 3))
    for item in model.metadata_props:
        item.value = value if item.key == f"convgrad.{key}" else item.value
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(cg.ModelFileError, match="its metadata is damaged"):
        cg.tune(tmp_path / "damaged.onnx")


def test_the_choice_for_the_thread_count_is_measured_first() -> None:
    for case in CASES:
        for gradient, threads in itertools.product(("input", "weight"), (1, 2)):
            first = autotune.candidate_names(gradient, case.geometry, replace(QUICK, threads=threads))[0]
            assert first == choose(gradient, case.geometry, threads=threads).name


def test_a_provider_that_onnxruntime_lacks_is_refused(own_cache: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(cg.ProviderError, match="CUDAExecutionProvider is not in this onnxruntime"):
        cg.tune(GEOMETRY, provider="cuda")
    with pytest.raises(cg.ProviderError):
        runner.open_session(b"", "CUDAExecutionProvider", 1)
    assert not own_cache.exists()


@pytest.mark.parametrize("place", ["tuning.json", "inner/tuning.json"])
def test_a_cache_that_cannot_be_written_is_refused_before_the_measurements(place: str) -> None:
    measured: list[str] = []
    path = Path("/proc/self", place)  # where nobody may write, the superuser neither
    with pytest.raises(cg.OutputPathError, match="cannot write to /proc/self"):
        cg.tune(GEOMETRY, cache=path, budget=0.1, progress=lambda done, total, name: measured.append(name))
    assert not measured


def test_a_cache_that_answers_need_not_be_writable(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cg.tune(GEOMETRY, gradients="weight", threads=1, budget=0.3, cache=own_cache)

    def refuse(path: Path) -> None:
        raise cg.OutputPathError(f"{path} is read only")

    monkeypatch.setattr(cache, "check_writable", refuse)
    assert not first.gradients[0].cached
    assert cg.tune(GEOMETRY, gradients="weight", threads=1, budget=0.3, cache=own_cache).gradients[0].cached
    with pytest.raises(cg.OutputPathError, match="read only"):
        cg.tune(GEOMETRY, gradients="input", threads=1, budget=0.3, cache=own_cache)


def test_a_layer_too_large_for_any_machine_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    huge = ConvGeometry.from_forward((2, 4, 2**40, 2**40), (4, 4, 3, 3))
    report = cg.tune([huge, GEOMETRY], gradients="weight", budget=1, threads=1)
    (skipped,) = report.skipped
    assert (skipped.layer, skipped.gradient) == (huge.describe(), "weight")
    assert "its operands cannot be made" in str(skipped.reason)
    assert len(report.gradients) == 1
    command._print(report)
    text = capsys.readouterr().out
    assert f"not measured: {huge.describe()} weight: its operands" in text
    assert "no time" not in text  # another run would end alike


def test_what_a_short_measurement_left_out_is_measured_when_there_is_more_time(own_cache: Path) -> None:
    ticks = itertools.count(step=10.0)
    short = tune_gradient("weight", GEOMETRY, replace(QUICK, seconds=0.5), clock=lambda: next(ticks))
    cache.save(own_cache, [short])
    assert set(short.refused.values()) == {cache.NO_TIME}
    (held,) = cg.tune(GEOMETRY, gradients="weight", threads=1, budget=0.5).gradients
    assert (held.cached, len(held.timings)) == (True, 1)
    (measured,) = cg.tune(GEOMETRY, gradients="weight", threads=1, budget=20).gradients
    assert not measured.cached
    assert len(measured.timings) > 1


def test_an_open_batch_is_measured_at_the_batch_that_is_given() -> None:
    report = cg.tune(GEOMETRY.with_batch("n"), batch=2, gradients="weight", threads=1, budget=0.5)
    assert report.gradients[0].geometry.startswith("input (2, 8, 9, 10)")


def test_the_command_tells_what_waits_from_what_cannot_be_measured(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = (SkippedGradient("conv: a", "input"), SkippedGradient("conv: b", "weight", "there is no memory"))
    command._print(TuningReport(own_cache, 1, (), skipped, 0.0))
    text = capsys.readouterr().out
    assert "no time for 1 gradients, run again to go on: conv: a input\n" in text
    assert "not measured: conv: b weight: there is no memory\n" in text


@pytest.mark.parametrize("gradient", ["input", "weight"])
def test_graphs_with_nodes_for_each_of_very_many_taps_are_not_made(gradient: str) -> None:
    """A filter of 4,000 taps: 20,000 nodes, which take longer to load than all other candidates to measure."""
    geometry = ConvGeometry.from_forward((1, 1, 4400), (1, 1, 4000))
    record = tune_gradient(gradient, geometry, QUICK)
    assert record.timings
    expected = {"input.matmul_taps"} if gradient == "input" else {"weight.matmul_taps", "weight.im2col"}
    assert expected <= set(record.refused)
    assert all("list 4000 taps one by one" in record.refused[name] for name in expected)
    short = autotune.candidate_names(gradient, ConvGeometry.from_forward((1, 1, 400), (1, 1, 9)), QUICK)
    assert expected <= set(short)


def test_lowerings_that_list_taps_are_those_whose_graphs_grow_with_them() -> None:
    def nodes(name: str, taps: int) -> int | None:
        geometry = ConvGeometry.from_forward((2, 2, 300), (2, 1, taps), groups=2, transposed=name == "input.im2col")
        return None if LOWERINGS[name].why_not(geometry) else len(graph_walk.steps(name, geometry))

    for name, lowering in LOWERINGS.items():
        few, more = nodes(name, 32), nodes(name, 64)
        if few is not None and more is not None and lowering.gradient != "bias":
            assert (more - few >= 32) == lowering.lists_taps, name
