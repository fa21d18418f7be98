"""The tuning cache on disk, and what ``lowering="tuned"`` makes of it."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import CPU
from convgrad_export.selection import cache
from convgrad_export.selection.cache import Timing, TuningRecord, load, save
from convgrad_export.selection.machine import default_threads, machine
from convgrad_export.selection.policy import choose

GEOMETRY = ConvGeometry.from_forward((4, 32, 14, 14), (32, 32, 3, 3), padding=1)
AUTO = choose("weight", GEOMETRY).name


def record(times: dict[str, float], geometry: ConvGeometry = GEOMETRY, threads: int = 0, **changes) -> TuningRecord:
    timings = tuple(Timing(name, ms, ms * 1.1, 5, 1000) for name, ms in sorted(times.items(), key=lambda item: item[1]))
    made = TuningRecord("weight", geometry, "float32", CPU, threads or default_threads(), machine(CPU), timings)
    return replace(made, **changes)


FASTER = {AUTO: 2.0, "weight.im2col": 1.0, "weight.swapped_conv": 3.0}


def test_records_come_back_as_they_were_written(own_cache: Path) -> None:
    written = [record(FASTER), record({AUTO: 1.0}, GEOMETRY.with_batch(1), 3, refused={"weight.im2col": "why"})]
    save(own_cache, written)
    assert sorted(load(own_cache), key=lambda r: r.key) == sorted(written, key=lambda r: r.key)
    save(own_cache, [record({AUTO: 9.0})])  # the same key: replaced
    assert [r.timings[0].min_ms for r in load(own_cache) if r.geometry == GEOMETRY] == [9.0]
    assert len(load(own_cache)) == 2


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    records = [record(FASTER), record(FASTER, GEOMETRY.with_batch(1)), record(FASTER, threads=5)]
    save(tmp_path / "a", records)
    for each in reversed(records):
        save(tmp_path / "b", [each])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tuned_takes_the_fastest_and_auto_does_not(own_cache: Path) -> None:
    save(own_cache, [record(FASTER)])
    assert choose("weight", GEOMETRY, lowering="tuned").name == "weight.im2col"
    assert choose("weight", GEOMETRY).name == AUTO
    assert choose("bias", GEOMETRY, lowering="tuned").name == "bias.reduce_sum"


def test_a_gain_below_3_percent_changes_nothing(own_cache: Path) -> None:
    save(own_cache, [record({AUTO: 1.02, "weight.im2col": 1.0})])
    assert choose("weight", GEOMETRY, lowering="tuned").name == AUTO


def test_limits_apply_to_what_the_cache_offers(own_cache: Path) -> None:
    wide = ConvGeometry.from_forward((4, 32, 14, 14), (32, 32, 3, 3), padding=1)
    save(own_cache, [record({AUTO: 3.0, "weight.winograd6": 1.0, "weight.im2col": 2.0}, wide)])
    assert choose("weight", wide, lowering="tuned").name == "weight.im2col"
    assert choose("weight", wide, lowering="tuned", max_error_factor=8).name == "weight.winograd6"
    assert choose("weight", wide, lowering="tuned", max_workspace=1_000_000).name == "weight.channels_last_conv"


def test_the_nearest_thread_count_and_batch_decide(own_cache: Path) -> None:
    save(
        own_cache,
        [
            record(FASTER, threads=1),
            record({AUTO: 2.0, "weight.swapped_conv": 1.0}, threads=8),
            record({AUTO: 1.0, "weight.im2col": 2.0}, GEOMETRY.with_batch(64), 1),
        ],
    )
    assert choose("weight", GEOMETRY, lowering="tuned", threads=2).name == "weight.im2col"
    assert choose("weight", GEOMETRY, lowering="tuned", threads=6).name == "weight.swapped_conv"
    assert choose("weight", GEOMETRY.with_batch(8), lowering="tuned", threads=1).name == "weight.im2col"
    assert choose("weight", GEOMETRY.with_batch(32), lowering="tuned", threads=1).name == AUTO


def test_an_open_batch_takes_what_is_best_over_all_measured_batches(own_cache: Path) -> None:
    one, many = GEOMETRY.with_batch(1), GEOMETRY.with_batch(32)
    save(own_cache, [record({AUTO: 1.0, "weight.im2col": 1.1}, one), record({AUTO: 9.0, "weight.im2col": 5.0}, many)])
    open_batch = GEOMETRY.with_batch("batch")
    assert choose("weight", open_batch, lowering="tuned").name == "weight.im2col"
    assert choose("weight", one, lowering="tuned").name == AUTO


def test_a_layer_that_is_missing_is_said_once_and_follows_auto(own_cache: Path) -> None:
    save(own_cache, [record(FASTER, GEOMETRY.with_batch(2))])
    other = ConvGeometry.from_forward((1, 3, 8, 8), (4, 3, 3, 3))
    with pytest.warns(cg.TuningWarning, match="no usable measurement of the weight gradient of input"):
        assert choose("weight", other, lowering="tuned") == choose("weight", other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("input", other, lowering="tuned") == choose("input", other)


def test_measurements_of_another_machine_are_not_used_and_said(own_cache: Path) -> None:
    foreign = {**machine(CPU), "processor": "Some Other CPU"}
    save(own_cache, [record(FASTER, machine=foreign)])
    with pytest.warns(cg.TuningWarning, match=r"measured elsewhere and are not used: processor 'Some Other CPU'"):
        assert choose("weight", GEOMETRY, lowering="tuned").name == AUTO


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "it is not JSON"),
        (lambda text: '{"format": "something else"}', "it is some other file"),
        (lambda text: "[]", "it is some other file"),
        (lambda text: text.replace('"version": 1', '"version": 99'), "its version is 99"),
        (lambda text: text.replace('"min_ms": 3.0', '"min_ms": 0.1'), "do not match its checksum"),
        (lambda text: text.replace("weight.swapped_conv", "weight.im2col"), "do not match its checksum"),
        (lambda text: "", "it is not JSON"),
    ],
)
def test_a_damaged_or_edited_file_is_refused_and_kept(own_cache: Path, damage, reason: str) -> None:
    save(own_cache, [record(FASTER)])
    spoiled = damage(own_cache.read_text())
    own_cache.write_text(spoiled)
    with pytest.raises(cg.TuningCacheError, match=reason):
        load(own_cache)
    with pytest.raises(cg.TuningCacheError, match=reason):
        choose("weight", GEOMETRY, lowering="tuned")
    with pytest.raises(cg.TuningCacheError, match=reason):
        save(own_cache, [record(FASTER)])
    assert own_cache.read_text() == spoiled


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gradient": "input"}, "does not give the input gradient"),
        ({"threads": 0}, "threads is 0"),
        ({"timings": [{"lowering": AUTO}]}, "KeyError"),
        ({"geometry": {"input_shape": [1, 2, 3], "weight_shape": [9, 9, 9]}}, "GeometryError"),
        ({"machine": None}, "AttributeError"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused_in_spite_of_its_checksum(own_cache: Path, change, reason) -> None:
    save(own_cache, [record(FASTER)])
    content = json.loads(own_cache.read_text())
    content["records"][0].update(change)
    content["sha256"] = cache._digest(content["records"])
    own_cache.write_text(json.dumps(content))
    with pytest.raises(cg.TuningCacheError, match=reason):
        load(own_cache)


def test_the_users_own_damaged_default_file_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import platformdirs

    monkeypatch.delenv(cache.ENVIRONMENT_VARIABLE)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    path = cache.cache_path()
    path.parent.mkdir()
    path.write_text("{")
    with pytest.warns(cg.TuningWarning, match="Delete it and tune again"):
        assert choose("weight", GEOMETRY, lowering="tuned").name == AUTO


def _write_some(path: Path, first: int) -> None:
    for number in range(first, first + 8):
        save(path, [record(FASTER, GEOMETRY.with_batch(number))])


def test_concurrent_writers_lose_nothing(own_cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_some, args=(own_cache, first)) for first in (1, 101, 201)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(load(own_cache)) == 24


def test_every_entry_point_takes_the_tuned_choice(own_cache: Path) -> None:
    save(own_cache, [record(FASTER)])
    shapes = {"input_shape": GEOMETRY.input_shape, "weight_shape": GEOMETRY.weight_shape}
    model = cg.build_model("conv2d_weight", **shapes, padding=1, lowering="tuned")
    metadata = {item.key: item.value for item in model.metadata_props}
    assert (metadata["convgrad.lowering"], metadata["convgrad.selection"]) == ("weight.im2col", "tuned")
    again = cg.build_model("conv2d_weight", **shapes, padding=1, lowering=f"tuned:{own_cache}")
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    listed = {entry.name: entry for entry in cg.lowerings("conv2d_weight", **shapes, padding=1)}
    assert [name for name, entry in listed.items() if entry.tuned] == ["weight.im2col"]
    assert [name for name, entry in listed.items() if entry.chosen] == [AUTO]

    rng = np.random.default_rng(0)
    x, dy = (rng.integers(-3, 4, shape).astype(np.float32) for shape in (GEOMETRY.input_shape, GEOMETRY.output_shape))
    results = [
        cg.conv2d_weight(x, GEOMETRY.weight_shape, dy, padding=1, lowering=lowering) for lowering in ("auto", "tuned")
    ]
    np.testing.assert_array_equal(*results)


def test_export_takes_the_tuned_choice(own_cache: Path, tmp_path: Path) -> None:
    import torch

    save(own_cache, [record(FASTER)])
    module = torch.nn.Conv2d(32, 32, 3, padding=1, bias=False)
    x = torch.randn(GEOMETRY.input_shape)
    report = cg.export_gradient(module, (x,), tmp_path / "g.onnx", wrt="parameters", lowering="tuned")
    assert {choice.lowering for choice in report.lowerings if choice.gradient == "weight"} == {"weight.im2col"}
    with pytest.raises(cg.UnsupportedLoweringError, match=r"tuning.*is none of: auto, tuned, input"):
        cg.export_gradient(module, (x,), tmp_path / "h.onnx", wrt="parameters", lowering="tuning")
