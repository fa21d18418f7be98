"""Driving a benchmark: a measuring process for each thread count, results saved after every measurement."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..arguments import as_int, as_number, check_pool
from ..errors import BenchmarkError
from ..reference import FORWARD
from ..timing import FOREIGN_CORES
from . import contenders, memory
from .plan import Item
from .results import Results
from .subprocess_lines import Child

Progress: TypeAlias = Callable[[int, int, str], None]

# Freed blocks stay with the process, in huge pages where the kernel allows it. PyTorch allocates every result afresh
# and onnxruntime's arena keeps its own: with glibc's defaults, which unmap large blocks, a comparison on large layers
# is one of page faults (benchmarks/NOTES.md, "Fresh memory"). glibc reads this when a process starts.
KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_threshold=17179869184:"
    "glibc.malloc.hugetlb=1"
}
_PER_PROCESS = 150  # measurements; then a fresh one, in case a process slows down with age


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds, seconds, foreign_cores: of each measurement, as in `timing.alternate`.
        time_limit: seconds after which no further measurement starts; None for no limit.
        ort_training: a Python that has onnxruntime-training, or None.
        memory: measure peak memory instead of time, and add it to the records.
        retry_disturbed: measure again what the file has from disturbed rounds only.

    Raises:
        ArgumentTypeError, GeometryError: no number, or one out of range.
    """

    rounds: int = 7
    seconds: float = 2.0
    time_limit: float | None = None
    ort_training: str | None = None
    memory: bool = False
    retry_disturbed: bool = False
    foreign_cores: float = FOREIGN_CORES

    def __post_init__(self) -> None:
        as_int(self.rounds, "rounds", minimum=1)
        for name in ("seconds", "time_limit", "foreign_cores"):
            value = getattr(self, name)
            if value is not None:
                as_number(value, name, minimum=0)


@dataclass
class Outcome:
    """Counts of measurements: made now, found in the file, left for want of time, and failed with the reason."""

    made: int = 0
    known: int = 0
    left: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def run(
    items: Sequence[Item],
    results: Results,
    output: Path,
    settings: Settings,
    commit: str | None,
    progress: Progress = lambda done, total, text: None,
) -> Outcome:
    """Measure what the file lacks.

    What it has keeps its times, but gets the choices that the policy and the tuning cache make now; a choice that was
    not timed then is a reason to measure the layer again.

    Args:
        items: in order. results: gains the records, and is written to `output` after each.
        commit: recorded with each measurement. progress: called with (done, total, what comes next).

    Raises:
        BenchmarkError: the measuring process, or the peer's, cannot be started; peak memory of forward passes alone.
        ArgumentTypeError: more threads than this machine runs.
    """
    check_pool(max((item.threads for item in items), default=None))
    started = time.monotonic()
    outcome = Outcome()
    todo = []
    wanted = [item for item in items if not (settings.memory and item.operation == FORWARD)]
    if items and not wanted:
        raise BenchmarkError("peak memory is measured of gradients: expected input or weight among them")
    for item in wanted:
        if _known(results, item, settings) and _refreshed(results.records[item.key], item):
            outcome.known += 1
        else:
            todo.append(item)
    measuring = _Measuring(settings)
    try:
        for index, item in enumerate(todo):
            if settings.time_limit is not None and time.monotonic() - started > settings.time_limit:
                outcome.left = len(todo) - index
                break
            progress(outcome.known + index, len(wanted), f"{item.uses[0][0]}/{item.uses[0][1]} {item.operation}")
            answer = measuring.ask(item)
            results.environment["ort_training"] = measuring.peer or results.environment.get("ort_training")
            if "error" in answer:
                outcome.failed[item.key] = answer["error"]
                continue
            _add(results, item, answer, commit)
            outcome.made += 1
            results.save(output)
        progress(len(wanted) - outcome.left, len(wanted), "")
    finally:
        measuring.close()
    results.save(output)
    return outcome


class _Measuring:
    """The measuring process: a fresh one for each thread count, after `_PER_PROCESS` measurements and after a death.

    Attributes:
        peer: version of onnxruntime-training, once a process has said that it takes part.
    """

    def __init__(self, settings: Settings) -> None:
        self.peer: str | None = None
        self._settings = settings
        self._child: Child | None = None
        self._threads = self._served = 0

    def ask(self, item: Item) -> dict[str, Any]:
        """The record of one measurement, or why there is none under ``error``.

        Raises:
            BenchmarkError: no process can be started.
        """
        if self._child is None or self._threads != item.threads or self._served >= _PER_PROCESS:
            self.close()
            self._child = _start(self._settings)
            self._threads, self._served = item.threads, 0
            self.peer = self._child.greeting["ort_training"] or self.peer
        self._served += 1
        try:
            return self._child.ask(_request(item, self._settings))
        except BenchmarkError as error:  # it died
            self.close()
            return {"error": str(error)}

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def _known(results: Results, item: Item, settings: Settings) -> bool:
    record = results.records.get(item.key)
    if settings.memory:
        return record is not None and "memory" in record
    if record is None or "times" not in record:
        return False
    rounds = record["rounds"]
    return not (settings.retry_disturbed and rounds["disturbed"] >= rounds["kept"])


def _refreshed(record: dict[str, Any], item: Item) -> bool:
    """Bring a record up to date; False when it lacks the time of a lowering that is chosen now."""
    record["uses"] = _merged_uses(record["uses"], item.uses)
    if "times" not in record:
        return True
    choices = contenders.choices(item.operation, item.geometry, item.threads)
    seen = {*record["times"], *record.get("wrong", {}), *record.get("failed", {})}
    if any(name is not None and name not in seen for name in choices.values()):
        return False
    record["choices"] = choices
    return True


def _merged_uses(old: Sequence[Any], new: Sequence[Any]) -> list[list[Any]]:
    found = {(use[0], use[1]): list(use) for use in (*old, *new)}
    return list(found.values())


def _start(settings: Settings) -> Child:
    command = [sys.executable, "-m", "convgrad_export.bench.worker"]
    if settings.ort_training and not settings.memory:
        command.append(settings.ort_training)
    environment = {**os.environ, **(memory.ENVIRONMENT if settings.memory else KEEP_MEMORY)}
    return Child(command, "the measuring process", environment)


def _request(item: Item, settings: Settings) -> dict[str, Any]:
    return {
        "kind": "memory" if settings.memory else "time",
        "operation": item.operation,
        "geometry": item.geometry.to_dict(),
        "threads": item.threads,
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "foreign_cores": settings.foreign_cores,
    }


def _add(results: Results, item: Item, answer: dict[str, Any], commit: str | None) -> None:
    record = results.records.get(item.key, {})
    record |= {
        "operation": item.operation,
        "batch": item.geometry.batch,
        "threads": item.threads,
        "geometry": item.geometry.to_dict(),
        "uses": _merged_uses(record.get("uses", ()), item.uses),
    }
    if "times" in answer:
        record["commit"] = commit
    results.records[item.key] = record | answer
