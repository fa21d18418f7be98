"""Alternating rounds: what is kept, what is thrown out, and when a contender stops."""

from __future__ import annotations

import pytest

from convgrad_export.timing import Ticks, alternate, read_ticks, timed

QUIET = Ticks(0.0, 0.0, 0.0)


class Contender:
    """Takes the seconds it is told to, without taking them, and logs its turns."""

    def __init__(self, name: str, log: list[str], *seconds: float) -> None:
        self.name, self.log, self.seconds = name, log, seconds
        self.turns = 0

    def __call__(self, repeats: int) -> float:
        value = self.seconds[min(self.turns, len(self.seconds) - 1)]
        self.turns += 1
        self.log.append(self.name)
        return value * repeats


def test_minimum_and_median_are_those_of_the_kept_rounds() -> None:
    times = (1.0, 0.030, 0.010, 0.020, 0.050, 0.040)  # the first decides how often a turn repeats the call
    result = alternate({"a": Contender("a", [], *times)}, rounds=5, read=lambda _: QUIET)
    assert result.timings["a"].to_json() == {"min_ms": 10.0, "median_ms": 30.0, "rounds": 5}
    assert (result.kept, result.discarded, result.disturbed) == (5, 0, 0)


def test_short_calls_are_repeated_within_a_turn() -> None:
    asked: list[int] = []

    def contender(repeats: int) -> float:
        asked.append(repeats)
        return repeats * 0.001

    result = alternate({"a": contender}, rounds=3, read=lambda _: QUIET)
    assert asked == [1, 4, 4, 4]
    assert result.timings["a"].to_json()["min_ms"] == pytest.approx(1.0)


def test_the_order_turns_round_every_round() -> None:
    log: list[str] = []
    alternate({name: Contender(name, log, 0.01) for name in "abc"}, rounds=3, read=lambda _: QUIET)
    assert "".join(log) == "abc" + "abc" + "cba" + "abc"


def test_a_contender_whose_threads_spin_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr("convgrad_export.timing.time.sleep", lambda seconds: log.append(f"{seconds:g}"))
    contenders = {name: Contender(name, log, 0.01) for name in "ab"}
    alternate(contenders, rounds=2, settle_seconds=0.5, rest_after={"a": 2.0}, seconds=0.0, read=lambda _: QUIET)
    assert log[2:] == ["0.5", "a", "2", "0.5", "b", "0", "0.5", "b", "0", "0.5", "a", "2"]


@pytest.mark.parametrize(
    ("disturbance", "disturbed"),
    [(Ticks(0.05, 0.0, 0.0), True), (Ticks(0.0, 5.0, 0.0), True), (Ticks(0.0, 5.0, 5.0), False)],
    ids=["steal", "other processes", "own work"],
)
def test_a_disturbed_round_is_taken_again(disturbance: Ticks, disturbed: bool) -> None:
    states = iter([QUIET, disturbance, *[QUIET] * 100])
    contender = Contender("a", [], 0.01, 9.0, 0.01)
    result = alternate({"a": contender}, rounds=3, read=lambda _: next(states))
    assert result.discarded == int(disturbed)
    assert result.kept == 3
    assert result.timings["a"].to_json()["median_ms"] == pytest.approx(10.0)
    assert (9000.0 in result.timings["a"].values) is not disturbed


def test_other_work_can_be_allowed_for() -> None:
    ticks = iter(range(1000))
    result = alternate(
        {"a": Contender("a", [], 0.01)}, 3, foreign_cores=1e9, read=lambda _: Ticks(0.0, float(next(ticks)), 0.0)
    )
    assert (result.kept, result.discarded, result.disturbed, result.foreign) == (3, 0, 0, 3.0)


def test_a_machine_that_never_rests_is_measured_all_the_same_and_said_to_be_disturbed() -> None:
    ticks = iter(range(1000))
    result = alternate({"a": Contender("a", [], 0.01)}, rounds=3, read=lambda _: Ticks(float(next(ticks)), 0.0, 0.0))
    assert (result.kept, result.discarded, result.disturbed) == (3, 3, 3)
    assert result.stolen == 6.0


def test_hopeless_contenders_stop_after_two_rounds_unless_they_are_the_yardstick() -> None:
    contenders = {name: Contender(name, [], seconds) for name, seconds in (("a", 0.01), ("b", 0.05), ("c", 0.06))}
    result = alternate(contenders, rounds=6, always=("c",), read=lambda _: QUIET)
    assert {name: len(timing.values) for name, timing in result.timings.items()} == {"a": 6, "b": 2, "c": 6}


def test_time_ends_the_rounds_but_not_before_three() -> None:
    result = alternate({"a": Contender("a", [], 0.06)}, rounds=50, seconds=0.0, read=lambda _: QUIET)
    assert result.kept == 3


def test_real_calls_and_real_ticks() -> None:
    calls = []
    result = alternate({"a": timed(lambda: calls.append(1))}, rounds=3)
    assert result.kept == 3
    assert len(calls) > 3
    assert 0 < result.timings["a"].to_json()["min_ms"] < 100
    assert read_ticks().used >= 0.0


def test_quick_calls_get_more_rounds_than_the_time_allows() -> None:
    result = alternate({"a": Contender("a", [], 0.001)}, rounds=50, seconds=0.0, read=lambda _: QUIET)
    assert result.kept == 10


def test_the_first_call_can_decide_that_a_contender_is_hopeless() -> None:
    contenders = {name: Contender(name, [], seconds) for name, seconds in (("a", 0.01), ("b", 0.05))}
    result = alternate(contenders, rounds=4, hopeless_after=0, read=lambda _: QUIET)
    assert {name: len(timing.values) for name, timing in result.timings.items()} == {"a": 4, "b": 0}
    assert result.first_ms == pytest.approx({"a": 10.0, "b": 50.0})


def test_a_disturbed_round_is_not_taken_again_for_ever() -> None:
    ticks = iter(range(1000))
    result = alternate(
        {"a": Contender("a", [], 0.1)}, 3, retake_seconds=0.0, read=lambda _: Ticks(float(next(ticks)), 0.0, 0.0)
    )
    assert (result.kept, result.discarded, result.disturbed) == (3, 0, 3)
