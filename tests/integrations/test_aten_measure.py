"""On CUDA a lowering is taken only where it was measured to win; the measuring itself, with a timer of our own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry
from convgrad_export.integrations import aten_convolution, aten_measure
from convgrad_export.integrations.aten_convolution import ConvolutionCall
from convgrad_export.selection import aten_measurements as records
from convgrad_export.selection.aten_policy import AUTO, FASTEST, PORTABLE, choose_aten

DEPTHWISE = ConvGeometry.from_forward((2, 8, 9, 9), (8, 1, 3, 3), padding=1, groups=8)
DENSE = ConvGeometry.from_forward((2, 8, 9, 9), (8, 8, 3, 3), padding=1)


@pytest.fixture(autouse=True)
def own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "measurements.json"
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(path))
    return path


def measurement(kernel_ms: float, gradient: str = "weight", **lowering_ms: float) -> records.AtenMeasurement:
    times = {f"{gradient}.{name}": value for name, value in lowering_ms.items()}
    return records.AtenMeasurement(gradient, DEPTHWISE.to_dict(), "float16", "GPU A", "2.13", kernel_ms, times)


def test_nothing_is_rewritten_on_cuda_without_a_measurement() -> None:
    for gradient in ("input", "weight", "bias"):
        for dtype in ("float32", "float16", "bfloat16"):
            assert choose_aten(gradient, DEPTHWISE, dtype, lowering=FASTEST, device="cuda GPU A") is None
    assert choose_aten("weight", DEPTHWISE, "float16", lowering=PORTABLE, device="cuda GPU A") is not None


def test_a_measured_winner_is_taken_for_its_own_convolution_dtype_and_device() -> None:
    records.add([measurement(1.0, depthwise_taps=0.5, im2col=0.8)])
    chosen = choose_aten("weight", DEPTHWISE, "float16", lowering=FASTEST, device="cuda GPU A")
    assert chosen is not None
    assert chosen.name == "weight.depthwise_taps"
    assert choose_aten("weight", DEPTHWISE, "float16", lowering=AUTO, device="cuda GPU A") is chosen
    for gradient, geometry, dtype, device in (
        ("input", DEPTHWISE, "float16", "cuda GPU A"),
        ("weight", DENSE, "float16", "cuda GPU A"),
        ("weight", DEPTHWISE, "float32", "cuda GPU A"),
        ("weight", DEPTHWISE, "float16", "cuda GPU B"),
    ):
        assert choose_aten(gradient, geometry, dtype, lowering=FASTEST, device=device) is None


@pytest.mark.parametrize(
    ("kernel", "lowering", "wins"), [(1.0, 0.90, True), (1.0, 0.92, False), (1.0, 1.5, False), (1.1, 1.0, True)]
)
def test_a_lowering_has_to_win_by_the_margin(kernel: float, lowering: float, wins: bool) -> None:
    assert measurement(kernel, im2col=lowering).winner == ("weight.im2col" if wins else None)
    assert measurement(kernel).winner is None


def test_later_measurements_replace_earlier_ones_and_change_the_digest(own_file: Path) -> None:
    before = records.digest()
    records.add([measurement(1.0, im2col=0.5), measurement(1.0, "input", conv_transpose=0.5)])
    between = records.digest()
    records.add([measurement(1.0, im2col=0.99)])
    assert len({before, between, records.digest()}) == 3
    assert records.winner("weight", DEPTHWISE, "float16", "GPU A") is None
    assert records.winner("input", DEPTHWISE, "float16", "GPU A") == "input.conv_transpose"
    assert cg.RewriteConvolutionBackwardPass().uuid().endswith(records.digest())
    assert [path.name for path in own_file.parent.iterdir()] == [own_file.name]


def with_times(kernel_ms: object, lowering_ms: object) -> str:
    entry = asdict(measurement(1.0, im2col=0.5)) | {"kernel_ms": kernel_ms, "lowering_ms": lowering_ms}
    return json.dumps({"format": "convgrad aten measurements", "version": 1, "measurements": [entry]})


def test_a_file_that_may_not_be_looked_at_is_none(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder of another user, in a container with that user's HOME."""
    before, stat = records.digest(), Path.stat

    def refuse(self: Path, **options: bool) -> os.stat_result:
        if self == own_file:
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    assert records.digest() == before


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[" * 100_000,
        with_times(None, {}),
        with_times(1, ["weight.im2col"]),
        with_times(1, {"weight.im2col": "a"}),
    ],
)
def test_a_foreign_file_is_named(text: str) -> None:
    records.own_path().write_text(text)
    with pytest.raises(cg.ModelFileError, match=r"measurements.json holds no measurements.*CONVGRAD_ATEN_MEASUREMENTS"):
        records.winner("weight", DENSE, "float32", "GPU A")


def test_an_unknown_lowering_in_the_file_is_passed_over() -> None:
    records.add([measurement(1.0, of_a_later_version=0.1)])
    assert choose_aten("weight", DEPTHWISE, "float16", lowering=FASTEST, device="cuda GPU A") is None


def test_a_plan_asks_for_the_device_that_the_tensors_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU A")
    records.add([measurement(1.0, depthwise_taps=0.5)])
    call = ConvolutionCall(DEPTHWISE, False, (True, True, False), "float16", "cuda")
    plan = aten_convolution.plan(call, FASTEST)
    assert plan["input"] is None
    assert getattr(plan["weight"], "name", None) == "weight.depthwise_taps"


def test_the_convolutions_of_a_step_are_found_once_each() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    )
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    found = aten_measure.calls_of(lambda: model(x).sum().backward())
    assert {(gradient, dtype) for gradient, _, dtype in found} == {(g, "float32") for g in ("input", "weight", "bias")}
    assert len(found) == 3
    assert found[0][1] == DEPTHWISE
    assert [records.worth_measuring(gradient, geometry) for gradient, geometry, _ in found] == [True, True, False]
    assert not records.worth_measuring("weight", DENSE)


def test_measuring_a_step_checks_times_and_keeps(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten_measure, "CANDIDATES", {"weight": ("weight.depthwise_taps",)})  # compiling is slow
    conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    x = torch.randn(2, 8, 9, 9)
    seen: list[set[str]] = []

    def timer(contenders: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        for call in contenders.values():
            call()
        seen.append(set(contenders))
        return {name: 1.0 if name != "weight.depthwise_taps" else 0.25 for name in contenders}

    (measured,) = aten_measure.measure_step(lambda: conv(x).sum().backward(), device="cpu", timer=timer)
    assert seen == [{"kernel", *aten_measure.CANDIDATES["weight"]}]
    assert measured.winner == "weight.depthwise_taps"
    assert records.winner("weight", DEPTHWISE, "float32", "cpu") == "weight.depthwise_taps"
    assert own_file.exists()


def test_no_time_left_measures_nothing() -> None:
    assert aten_measure.measure_calls([("weight", DEPTHWISE, "float32")], device="cpu", seconds=-1.0) == []


def test_a_wrong_result_is_no_contender() -> None:
    exact = torch.tensor([3.0, -40.0])
    assert aten_measure.agrees(exact, exact, "float32")
    assert not aten_measure.agrees(exact + 1, exact, "float32")
    assert not aten_measure.agrees((exact + 1).half(), exact.half(), "float16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this PyTorch finds a CUDA device")
def test_without_a_gpu_there_is_nothing_to_measure_on() -> None:
    conv = torch.nn.Conv2d(8, 8, 3, groups=8)
    with pytest.raises(cg.DeviceError, match=r"device is 'cuda', and this PyTorch .* finds no CUDA device"):
        aten_measure.measure_step(lambda: conv(torch.randn(2, 8, 9, 9)).sum().backward())
