"""Predicted times: right about clear-cut cases, growing with the work, the same everywhere unless measured."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import helper

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import LOWERINGS, candidates, catalogue
from convgrad_export.selection import calibration, graph_walk
from convgrad_export.selection.calibration import calibrate, calibrated, probes, shipped
from convgrad_export.selection.cost_model import UNITS, Costs, amounts, predict_ms, step_amounts
from tests.cases import CASES, ConvCase


def convolution(c: int, m: int, size: int, kernel: int, stride: int = 1, groups: int = 1, batch: int = 8):
    shape, weight = (batch, c, size, size), (m, c // groups, kernel, kernel)
    return ConvGeometry.from_forward(shape, weight, stride, kernel // 2, 1, groups)


def predicted(name: str, geometry: ConvGeometry, threads: int = 1) -> float:
    return predict_ms(name, geometry, costs=shipped(), threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("better", "worse", "geometry"),
    [
        # each at least 2 times apart in benchmarks/NOTES.md
        ("weight.matmul_taps", "weight.swapped_conv", convolution(256, 64, 56, 1)),
        ("weight.matmul_taps", "weight.swapped_conv", convolution(64, 64, 56, 3)),
        ("weight.im2col", "weight.matmul_taps", convolution(3, 64, 224, 7, 2)),
        ("input.conv_transpose", "input.phase_conv", convolution(3, 64, 224, 7, 2)),
        ("input.conv_transpose", "input.matmul_taps", convolution(64, 64, 56, 3)),
        ("weight.depthwise_rows", "weight.swapped_conv", convolution(192, 192, 28, 7, groups=192)),
    ],
)
def test_clear_cut_cases_are_predicted(better: str, worse: str, geometry: ConvGeometry, threads: int) -> None:
    assert predicted(better, geometry, threads) < predicted(worse, geometry, threads)


@pytest.mark.parametrize("gradient", ["input", "weight"])
def test_more_work_takes_longer(gradient: str) -> None:
    base = convolution(32, 32, 28, 3)
    larger = [
        base.with_batch(16),
        convolution(64, 32, 28, 3),
        convolution(32, 64, 28, 3),
        convolution(32, 32, 56, 3),
        convolution(32, 32, 28, 5),
    ]
    for lowering in candidates(gradient):
        if lowering.why_not(base) is None and lowering.error_factor == 1:
            for geometry in larger:
                assert predicted(lowering.name, geometry) > predicted(lowering.name, base), (lowering.name, geometry)


def test_more_threads_never_take_longer() -> None:
    geometry = convolution(64, 64, 56, 3)
    for name in ("input.conv_transpose", "input.flipped_conv", "weight.im2col", "weight.matmul_taps"):
        times = [predicted(name, geometry, threads) for threads in (2, 4, 16)]
        assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_lowering_of_every_case_has_a_prediction(case: ConvCase) -> None:
    for gradient in ("input", "weight"):
        for lowering in candidates(gradient):
            if lowering.why_not(case.geometry) is None:
                assert 0 < predicted(lowering.name, case.geometry) < 1e4


def test_a_new_lowering_needs_no_cost_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = LOWERINGS["weight.im2col"]

    def body(op, g, grad_output, operand):
        return op.Softplus(op.Neg(entry.body(op, g, grad_output, operand)))

    monkeypatch.setitem(catalogue.LOWERINGS, "weight.new", replace(entry, name="weight.new", body=body))
    geometry = convolution(16, 16, 14, 3)
    extra = dict(amounts("weight.new", geometry))
    known = dict(amounts("weight.im2col", geometry))
    assert extra["call"] == known["call"] + 2
    assert extra["elementwise"] == known.get("elementwise", 0) + 2 * 2 * 4 * 16 * 16 * 9
    assert predicted("weight.new", geometry) > predicted("weight.im2col", geometry)


def test_amounts_of_a_matmul_are_countable_by_hand() -> None:
    (step,) = graph_walk.graph_steps(probes()["gemm"])
    assert step_amounts(step) == {
        "call": 1.0,
        "gemm_mac": 384 * 384 * 576,
        "gemm_call": 1,
        "gemm_pack": 576 * 384 * 4,
        "gemm_result": 384 * 384 * 4 * 5,  # the sum runs in 576 / 128 blocks
    }


def test_the_shipped_constants_are_complete_and_are_what_predictions_use() -> None:
    costs = shipped()
    assert set(costs.one) == set(costs.two) == set(UNITS)
    assert all(cost >= 0 for cost in (*costs.one.values(), *costs.two.values()))
    geometry = convolution(64, 64, 28, 3)
    by_hand = sum(count * costs.one[key] for key, count in amounts("weight.im2col", geometry)) * 1e-6
    assert predicted("weight.im2col", geometry) == pytest.approx(by_hand, rel=1e-12)


def test_the_graph_of_a_geometry_is_walked_once() -> None:
    geometry = convolution(48, 80, 30, 3)
    names = [x.name for x in candidates("weight") if x.why_not(geometry) is None and x.error_factor == 1]
    first = [predicted(name, geometry) for name in names]
    walked = graph_walk.steps.cache_info().misses
    assert [predicted(name, geometry) for name in names] == first
    assert graph_walk.steps.cache_info().misses == walked


@pytest.fixture
def own_file(own_cache: Path) -> Path:
    return own_cache.with_name("calibration.json")


def test_calibration_is_quick_kept_and_scales_only_what_it_measured(
    own_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    first = calibrated()
    assert time.monotonic() - started < 20  # 10 s on an idle machine
    assert set(first.one) == set(UNITS)
    monkeypatch.setattr(calibration, "calibrate", lambda: pytest.fail("measured again"))
    assert calibrated() == first
    content = json.loads(own_file.read_text())
    content["machine"]["processor"] = "another"
    own_file.write_text(json.dumps(content))
    monkeypatch.setattr(calibration, "calibrate", lambda: Costs(dict.fromkeys(UNITS, 1.0), dict.fromkeys(UNITS, 1.0)))
    assert calibrated().one["call"] == 1.0  # the file was another machine's


def test_calibration_without_time_gives_the_shipped_constants() -> None:
    costs = calibrate(seconds=0.0)
    assert (costs.one, costs.two) == (shipped().one, shipped().two)


def test_a_machine_that_is_slower_at_one_kind_of_work_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base = shipped()

    def took(model: bytes, feeds, threads: int) -> float:
        steps = graph_walk.graph_steps(onnx.load_from_string(model))
        constants = base.one if threads == 1 else base.two
        per_step = [sum(n * constants[key] for key, n in step_amounts(step).items()) * 1e-6 for step in steps]
        return sum(per_step) * (3.0 if steps[0].op_type == "Transpose" else 1.0)

    monkeypatch.setattr(calibration, "_milliseconds", took)
    costs = calibrate()
    for key in UNITS:
        factor = costs.one[key] / base.one[key] if base.one[key] else 1.0
        assert factor == pytest.approx(3.0, rel=0.2) if key == "transposed" else factor == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(
    "text", ["", "{}", "[" * 100_000, '{"format": "convgrad cost calibration", "one": {}, "two": {}}']
)
def test_a_damaged_calibration_is_refused(text: str, own_file: Path) -> None:
    own_file.write_text(text)
    with pytest.raises(cg.TuningCacheError, match="delete it, and it is measured again"):
        calibrated()
    assert own_file.read_text() == text


def test_operators_without_a_rule_count_as_elementwise() -> None:
    node = helper.make_node("Erf", ["x0"], ["y0"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node], "g", [value("x0", 1, [10, 10])], [value("y0", 1, [10, 10])])
    (step,) = graph_walk.graph_steps(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    assert step_amounts(step) == {"call": 1.0, "elementwise": 800.0}
