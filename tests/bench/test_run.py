"""Driving a benchmark: resuming, time limits, and measuring processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from convgrad_export.bench import contenders
from convgrad_export.bench import run as driver
from convgrad_export.bench.plan import Item, items
from convgrad_export.bench.results import Results, load
from convgrad_export.bench.run import Settings, run
from convgrad_export.bench.subprocess_lines import Child
from convgrad_export.errors import BenchmarkError, ConvGradError
from convgrad_export.lowering import LOWERINGS

from .records import ENVIRONMENT, timing


class Measuring:
    """Stands in for the measuring process; `deaths` are the requests it does not survive."""

    started = 0
    asked: ClassVar[list[dict[str, Any]]] = []
    deaths: ClassVar[set[int]] = set()
    timed: ClassVar[set[str]] = {"torch", "session", *LOWERINGS}
    greeting: ClassVar[dict[str, Any]] = {"ort_training": None}

    def __init__(self, command: Any, what: str, environment: Any) -> None:
        Measuring.started += 1

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        Measuring.asked.append(request)
        if len(Measuring.asked) in Measuring.deaths:
            raise BenchmarkError("the measuring process ended with status -9: it wrote no message")
        if request["kind"] == "memory":
            return {"memory": {"torch": 1}}
        return {
            "times": {name: timing(1.0) for name in Measuring.timed},
            "wrong": {},
            "choices": {},
            "multiplications": 1,
            "rounds": {"kept": 7, "discarded": 0, "disturbed": 0},
        }

    def close(self) -> None:
        pass


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> type[Measuring]:
    Measuring.started, Measuring.asked, Measuring.deaths = 0, [], set()
    monkeypatch.setattr(driver, "Child", Measuring)
    return Measuring


def plan(threads: tuple[int, ...] = (1,)) -> list[Item]:
    return items(["tcn"], operations=("weight",), threads=threads)


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path, measuring: type[Measuring]) -> None:
    path = tmp_path / "r.json"
    results = Results(dict(ENVIRONMENT))
    first = run(plan()[:3], results, path, Settings(), "abc")
    assert (first.made, first.known, first.left) == (3, 0, 0)
    again = load(path)
    second = run(plan(), again, path, Settings(), "def")
    assert (second.made, second.known) == (5, 3)
    assert len(measuring.asked) == 8
    assert [record["commit"] for record in load(path).records.values()] == ["abc"] * 3 + ["def"] * 5


def test_known_times_get_the_choices_of_today(
    tmp_path: Path, measuring: type[Measuring], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(dict(ENVIRONMENT))
    run(plan(), results, tmp_path / "r.json", Settings(), None)
    rule = {"policy": "weight.im2col", "tuned": None}
    monkeypatch.setattr(contenders, "choices", lambda *_: dict(rule))
    assert run(plan(), results, tmp_path / "r.json", Settings(), None).made == 0
    assert all(record["choices"] == rule for record in load(tmp_path / "r.json").records.values())
    rule["policy"] = "weight.of_tomorrow"
    assert run(plan(), results, tmp_path / "r.json", Settings(), None).made == 8


def test_uses_of_a_known_geometry_are_added(tmp_path: Path, measuring: type[Measuring]) -> None:
    path = tmp_path / "r.json"
    results = Results(dict(ENVIRONMENT))
    run(items(["resnet18"], ["conv1"], operations=("weight",))[:1], results, path, Settings(), None)
    run(items(["resnet50"], ["/conv1"], operations=("weight",)), results, path, Settings(), None)
    (uses,) = [record["uses"] for record in load(path).records.values() if ["resnet50", "conv1", 1] in record["uses"]]
    assert uses == [["resnet18", "conv1", 1], ["resnet50", "conv1", 1]]


def test_each_thread_count_gets_its_own_process(tmp_path: Path, measuring: type[Measuring]) -> None:
    run(plan((1, 2)), Results(dict(ENVIRONMENT)), tmp_path / "r.json", Settings(), None)
    assert measuring.started == 2


def test_a_process_that_dies_costs_one_measurement(tmp_path: Path, measuring: type[Measuring]) -> None:
    measuring.deaths = {2}
    outcome = run(plan(), Results(dict(ENVIRONMENT)), tmp_path / "r.json", Settings(), None)
    assert (outcome.made, measuring.started) == (7, 2)
    assert list(outcome.failed.values()) == ["the measuring process ended with status -9: it wrote no message"]
    assert len(load(tmp_path / "r.json").records) == 7


def test_the_time_limit_leaves_the_rest(tmp_path: Path, measuring: type[Measuring]) -> None:
    outcome = run(plan(), Results(dict(ENVIRONMENT)), tmp_path / "r.json", Settings(time_limit=0.0), None)
    assert (outcome.made, outcome.left) == (0, 8)
    assert load(tmp_path / "r.json").records == {}


def test_what_had_no_quiet_round_can_be_taken_again(tmp_path: Path, measuring: type[Measuring]) -> None:
    results = Results(dict(ENVIRONMENT))
    run(plan(), results, tmp_path / "r.json", Settings(), None)
    for index, record in enumerate(results.records.values()):
        record["rounds"] = {"kept": 3, "disturbed": 3 if index == 5 else 2}
    again = Settings(retry_disturbed=True)
    assert run(plan(), results, tmp_path / "r.json", again, "later").made == 1
    assert [record["commit"] for record in results.records.values()].index("later") == 5


def test_memory_is_added_to_the_times(tmp_path: Path, measuring: type[Measuring]) -> None:
    results = Results(dict(ENVIRONMENT))
    run(plan(), results, tmp_path / "r.json", Settings(), None)
    run(plan(), results, tmp_path / "r.json", Settings(memory=True), None)
    assert all({"times", "memory"} <= set(record) for record in results.records.values())
    assert run(plan(), results, tmp_path / "r.json", Settings(memory=True), None).made == 0


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(BenchmarkError, match="the worker: cannot run /no/such/python: No such file"):
        Child(["/no/such/python"], "the worker")
    with pytest.raises(BenchmarkError, match="the worker ended with status 3: no package here"):
        Child([sys.executable, "-c", "import os; os.write(2, b'no package here'); os._exit(3)"], "the worker")
    with pytest.raises(BenchmarkError, match=r"the worker wrote 'hello\\n', expected one line of JSON"):
        Child([sys.executable, "-c", "print('hello', flush=True); input()"], "the worker")


def test_peak_memory_of_forward_passes_alone_is_refused(tmp_path: Path, measuring: type[Measuring]) -> None:
    forward = items(["tcn"], operations=("forward",))
    with pytest.raises(BenchmarkError, match="peak memory is measured of gradients"):
        run(forward, Results(dict(ENVIRONMENT)), tmp_path / "r.json", Settings(memory=True), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds is 0, expected at least 1"),
        ({"seconds": float("nan")}, "seconds is nan, expected a number, 0 or above"),
        ({"time_limit": "1"}, "time_limit is '1' \\(str\\), expected a number, 0 or above"),
        ({"foreign_cores": -1}, "foreign_cores is -1, expected a number, 0 or above"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvGradError, match=message):
        Settings(**settings)


def test_a_layer_that_no_memory_holds_does_not_end_the_measuring_process() -> None:
    worker = Child([sys.executable, "-m", "convgrad_export.bench.worker"], "the worker")
    request = driver._request(Item("weight", plan()[0].geometry.with_batch(2**50), 1), Settings())
    try:
        for _ in range(2):
            assert worker.ask(request)["error"].startswith("RuntimeError: ")
    finally:
        worker.close()


def test_the_measuring_process_ends_with_its_parent(tmp_path: Path) -> None:
    """Killed in the midst of a measurement, which goes on for minutes."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, json\n"
        "from convgrad_export.bench import run\n"
        "from convgrad_export.bench.plan import items\n"
        "item = items(['resnet18'], ['conv1'], threads=(1,), operations=('input',))[0]\n"
        "child = run._start(run.Settings())\n"
        "request = run._request(item, run.Settings(rounds=10**6, seconds=600.0))\n"
        "child._process.stdin.write(json.dumps(request) + '\\n')\n"
        "child._process.stdin.flush()\n"
        "print(child._process.pid, flush=True)\n"
        "child._answer()\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(3)
        assert parent.poll() is None
        os.kill(worker, 0)  # it is there
        parent.terminate()
    deadline = time.monotonic() + 20
    while (running := is_running(worker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if running:
        os.kill(worker, signal.SIGKILL)
    assert not running, "the measuring process goes on without its parent"


def is_running(process: int) -> bool:
    """A process that ended and that nobody waited for counts as ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
