"""Measure every applicable lowering of one gradient on this machine.

A candidate first has to be right: against float64 on random data at a batch of at most 2, and, on integer-valued data
at the full batch, equal to the other direct forms. Then the candidates take turns in short rounds, so that a busy
moment hits all of them, until the time is used up; rounds in which the host took the processor away are thrown out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..geometry import ConvGeometry
from ..lowering import CPU, CUDA, LOWERINGS, candidates, preferred_opset
from . import timing
from .cache import Timing, TuningRecord
from .calibration import shipped
from .cost_model import predict_ms
from .graph_walk import workspace_bytes
from .machine import default_threads, machine
from .policy import AUTO, choose
from .reduced_arithmetic import DEFAULT_ERROR_FACTOR, DIRECT
from .reference import expected, operands_for, with_checked_batch

_MOST_ROUNDS = 15
_FEWEST_ROUNDS = 3
_ROUNDS_OF_QUICK_CALLS = 10  # where they cost next to nothing, a busy moment should not decide
_QUICK_MS = 50.0  # for one round over all candidates
_MIN_TURN_MS = 2.0  # a call shorter than this is repeated within its turn
_HOPELESS = 4.0  # times the fastest: after its first turn such a candidate gets no other
MEMORY = "needs more memory"  # how the reason begins that another limit or another day may lift
_MEMORY_SHARE = 0.4  # of what is available, for all candidates together


@dataclass(frozen=True)
class TuningSettings:
    """How to measure.

    Attributes:
        dtype, provider: of the graphs. threads: of onnxruntime's intra-op pool; None for its default.
        max_error_factor: candidates with a larger error bound than this many times the direct form's stay out.
        max_workspace: candidates whose intermediate tensors need more bytes than this stay out; None for no limit.
        seconds: for one gradient of one convolution, the check included. The first turn of a candidate is never cut
            short, so a slow layer can take longer by one call of each remaining candidate.
        seed: of the data.
    """

    dtype: str = "float32"
    provider: str = CPU
    threads: int | None = None
    max_error_factor: float = DEFAULT_ERROR_FACTOR
    max_workspace: int | None = None
    seconds: float = 5.0
    seed: int = 0

    @property
    def thread_count(self) -> int:
        return self.threads or (1 if self.provider == CUDA else default_threads())


@dataclass
class _Candidate:
    name: str
    runner: timing.Runner
    workspace: int
    repeats: int = 1
    times: list[float] = field(default_factory=list)


def tune_gradient(
    gradient: str,
    geometry: ConvGeometry,
    settings: TuningSettings | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> TuningRecord:
    """The measured times of one gradient's lowerings.

    Args:
        gradient: ``"input"`` or ``"weight"``. geometry: its batch is the one to measure, an integer.
        settings: defaults to float32 on the CPU.

    Returns:
        The record for the cache: timings, the fastest first, and why candidates were refused. The fixed policy's choice
        is measured first, and every candidate that the time allows after it.

    Raises:
        UnsupportedLoweringError: nothing applies. MissingDependencyError: no onnxruntime.
    """
    settings = settings or TuningSettings()
    end = clock() + settings.seconds
    refused: dict[str, str] = {}
    names = candidate_names(gradient, geometry, settings)
    workspaces = {name: workspace_bytes(name, geometry, settings.dtype, settings.provider) for name in names}
    _limit_memory(workspaces, settings, refused)
    ready = _checked(gradient, geometry, workspaces, settings, refused, end, clock)
    _measure(ready, refused, end, clock)
    timings = sorted(
        (Timing(c.name, min(c.times), statistics.median(c.times), len(c.times), c.workspace) for c in ready if c.times),
        key=lambda t: t.min_ms,
    )
    return TuningRecord(
        gradient,
        geometry,
        settings.dtype,
        settings.provider,
        settings.thread_count,
        machine(settings.provider),
        tuple(timings),
        refused,
    )


def candidate_names(gradient: str, geometry: ConvGeometry, settings: TuningSettings) -> list[str]:
    """What applies within the error limit: the policy's choice first, then the most promising by the cost model."""
    opset = preferred_opset(settings.dtype, settings.provider)
    first = choose(
        gradient,
        geometry,
        settings.dtype,
        lowering=AUTO,
        provider=settings.provider,
        opset=opset,
        max_error_factor=settings.max_error_factor,
        max_workspace=settings.max_workspace,
        threads=settings.thread_count,
    ).name
    others = []
    for entry in candidates(gradient):
        if entry.name == first or entry.why_not(geometry, settings.dtype, settings.provider, opset) is not None:
            continue
        if entry.error_factor <= settings.max_error_factor:
            others.append(entry.name)
    arguments: dict[str, Any] = {"costs": shipped(), "threads": settings.thread_count}
    others.sort(key=lambda name: predict_ms(name, geometry, settings.dtype, settings.provider, **arguments))
    return [first, *others]


def _limit_memory(workspaces: dict[str, int], settings: TuningSettings, refused: dict[str, str]) -> None:
    """Drop candidates over the caller's limit, and those that this machine's memory has no room for."""
    available = timing.available_bytes()
    room = None if available is None else int(available * _MEMORY_SHARE)
    for name in list(workspaces):
        need = workspaces[name]
        if settings.max_workspace is not None and need > settings.max_workspace:
            refused[name] = f"{MEMORY}: {need} bytes of workspace, max_workspace is {settings.max_workspace}"
        elif room is not None and need > room:
            refused[name] = f"{MEMORY}: {need} bytes of workspace, this machine has {room} for it"
        else:
            room = None if room is None else room - need
            continue
        del workspaces[name]


def _checked(
    gradient: str,
    geometry: ConvGeometry,
    workspaces: dict[str, int],
    settings: TuningSettings,
    refused: dict[str, str],
    end: float,
    clock: Callable[[], float],
) -> list[_Candidate]:
    """The candidates that load and give the right result, bound to full-size operands and warmed up."""
    dtype, provider = settings.dtype, settings.provider
    small = with_checked_batch(geometry)
    operands = operands_for(gradient, small, dtype, integers=False, seed=settings.seed)
    reference = expected(gradient, small, operands, dtype, settings.seed)
    placed = timing.place(operands, dtype, provider)
    full = timing.place(operands_for(gradient, geometry, dtype, integers=True, seed=settings.seed), dtype, provider)
    anchor: np.ndarray | None = None
    ready: list[_Candidate] = []
    for name, workspace in workspaces.items():
        if ready and clock() > end:
            refused[name] = "no time was left to measure it"
            continue
        try:
            runner = timing.Runner(name, geometry, dtype, provider, settings.thread_count)
            runner.bind(placed)
            report = reference.report(runner.result(), LOWERINGS[name].error_factor)
            if not report.within:
                refused[name] = f"its result is wrong: the error is {report.worst:.3g} times the bound"
                continue
            runner.bind(full)
            result = runner.result()
        except Exception as error:  # onnxruntime raises a private class for each status code, or a RuntimeError
            if not (type(error).__module__.startswith("onnxruntime") or type(error) is RuntimeError):
                raise
            refused[name] = f"onnxruntime cannot run it: {error}"
            continue
        if LOWERINGS[name].error_factor == DIRECT:
            if anchor is None:
                anchor = result
            elif not np.array_equal(anchor, result):
                refused[name] = f"its result at batch {geometry.batch} differs from {ready[0].name}'s"
                continue
        ready.append(_Candidate(name, runner, workspace))
    return ready


def _measure(ready: list[_Candidate], refused: dict[str, str], end: float, clock: Callable[[], float]) -> None:
    """Rounds over the candidates until the time or the number of rounds is used up."""
    for candidate in ready:
        once = candidate.runner.timed(1)
        candidate.repeats = max(1, int(_MIN_TURN_MS / max(once, 1e-4)))
        candidate.times.append(once)
    fastest = min((min(c.times) for c in ready), default=0.0)
    running = [c for c in ready if min(c.times) <= _HOPELESS * fastest]
    one_round = sum(min(c.times) * c.repeats for c in running)
    fewest = _ROUNDS_OF_QUICK_CALLS if one_round < _QUICK_MS else _FEWEST_ROUNDS
    rounds, spare = 0, _MOST_ROUNDS
    while rounds < _MOST_ROUNDS and (rounds < fewest or clock() < end):
        stolen = timing.stolen_ticks()
        taken = [(candidate, candidate.runner.timed(candidate.repeats)) for candidate in running]
        if timing.stolen_ticks() - stolen > 1 and spare > 0 and clock() < end:
            spare -= 1
            continue
        rounds += 1
        for candidate, value in taken:
            candidate.times.append(value)
