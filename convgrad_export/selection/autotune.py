"""Measure every applicable lowering of one gradient on this machine.

A candidate first has to be right: against float64 on random data at a batch of at most 2, and, on integer-valued data
at the full batch, equal to the other direct forms. Then the candidates take turns in short rounds, so that a busy
moment hits all of them, until the time is used up; rounds in which the host took the processor away are thrown out.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..geometry import ConvGeometry
from ..lowering import CPU, CUDA, LOWERINGS, Lowering, candidates, preferred_opset
from ..reference import OPERANDS, check_elements, expected, make_operands
from ..timing import alternate, timed
from .cache import MEMORY, NO_TIME, WRONG, Timing, TuningRecord
from .calibration import shipped
from .cost_model import predict_ms
from .graph_walk import workspace_bytes
from .machine import default_threads, machine
from .policy import AUTO, choose
from .reduced_arithmetic import DEFAULT_ERROR_FACTOR, DIRECT
from .runner import Runner, available_bytes, place

_MOST_ROUNDS = 15
_TURN_SECONDS = 0.002  # a call shorter than this is repeated within its turn
_CHECKED_CHANNELS = 32
_CHECKED_BATCH = 2
_MOST_TAPS = 1 << 10  # in a graph that has nodes for each: beyond, making and loading it takes longer than measuring
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
    runner: Runner
    workspace: int
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
        UnsupportedLoweringError: nothing applies. MissingDependencyError: no onnxruntime. MemoryError: huge operands.
    """
    settings = settings or TuningSettings()
    check_elements(geometry, OPERANDS[gradient])
    end = clock() + settings.seconds
    names = candidate_names(gradient, geometry, settings)
    refused = {name: why for name, why in _too_long(gradient, geometry, settings).items() if name not in names}
    workspaces = {name: workspace_bytes(name, geometry, settings.dtype, settings.provider) for name in names}
    _limit_memory(workspaces, settings, refused)
    ready = _checked(gradient, geometry, workspaces, settings, refused, lambda: clock() > end)
    _measure(ready, max(0.0, end - clock()))
    timings = sorted(
        (Timing(c.name, min(c.times), statistics.median(c.times), len(c.times), c.workspace) for c in ready),
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
        settings.seconds,
    )


def candidate_names(gradient: str, geometry: ConvGeometry, settings: TuningSettings) -> list[str]:
    """What applies within the error limit: the policy's choice first, then the most promising by the cost model.

    Those whose graphs would be too long are left out, the policy's choice aside.
    """
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
    left_out = {first, *_too_long(gradient, geometry, settings)}
    others = [entry.name for entry in _applying(gradient, geometry, settings) if entry.name not in left_out]
    arguments: dict[str, Any] = {"costs": shipped(), "threads": settings.thread_count}
    others.sort(key=lambda name: predict_ms(name, geometry, settings.dtype, settings.provider, **arguments))
    return [first, *others]


def _applying(gradient: str, geometry: ConvGeometry, settings: TuningSettings) -> list[Lowering]:
    opset = preferred_opset(settings.dtype, settings.provider)
    return [
        entry
        for entry in candidates(gradient)
        if entry.why_not(geometry, settings.dtype, settings.provider, opset) is None
        and entry.error_factor <= settings.max_error_factor
    ]


def _too_long(gradient: str, geometry: ConvGeometry, settings: TuningSettings) -> dict[str, str]:
    """Lowerings with nodes for each of very many taps, and the reason against them."""
    if geometry.taps <= _MOST_TAPS:
        return {}
    reason = f"its graph would list {geometry.taps} taps one by one, more than {_MOST_TAPS}"
    return {entry.name: reason for entry in _applying(gradient, geometry, settings) if entry.lists_taps}


def _limit_memory(workspaces: dict[str, int], settings: TuningSettings, refused: dict[str, str]) -> None:
    """Drop candidates over the caller's limit, and those that this machine's memory has no room for."""
    available = available_bytes()
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


class _Check:
    """What a candidate is held to before it is timed."""

    def __init__(self, gradient: str, geometry: ConvGeometry, settings: TuningSettings) -> None:
        dtype, provider, seed, names = settings.dtype, settings.provider, settings.seed, OPERANDS[gradient]
        small = geometry.with_batch(min(geometry.batch, _CHECKED_BATCH))
        operands = make_operands(small, dtype, integers=False, seed=seed, names=names)
        self._reference = expected(gradient, small, operands, dtype, channels=_CHECKED_CHANNELS)
        self._small = place(operands, dtype, provider)
        self._full = place(make_operands(geometry, dtype, integers=True, seed=seed, names=names), dtype, provider)
        self._batch = geometry.batch
        self._direct: tuple[str, np.ndarray] | None = None  # the first direct form, and its result on integers

    def why_wrong(self, name: str, runner: Runner) -> str | None:
        """None when the results are right; the runner is bound to the full-size operands then, and warm."""
        factor = LOWERINGS[name].error_factor
        runner.bind(self._small)
        report = self._reference.report(runner.result(), factor)
        if not report.within:
            return f"{WRONG}: the error is {report.worst:.3g} times the bound"
        runner.bind(self._full)
        result = runner.result()
        if factor != DIRECT:
            return None
        if self._direct is None:
            self._direct = name, result
        elif not np.array_equal(self._direct[1], result):
            return f"{WRONG}: at batch {self._batch} it differs from {self._direct[0]}'s"
        return None


def _checked(
    gradient: str,
    geometry: ConvGeometry,
    workspaces: dict[str, int],
    settings: TuningSettings,
    refused: dict[str, str],
    late: Callable[[], bool],
) -> list[_Candidate]:
    """The candidates that load and give the right result, one at least however late it is."""
    check = _Check(gradient, geometry, settings)
    ready: list[_Candidate] = []
    for name, workspace in workspaces.items():
        if ready and late():
            refused[name] = NO_TIME
            continue
        try:
            runner = Runner(name, geometry, settings.dtype, settings.provider, settings.thread_count)
            reason = check.why_wrong(name, runner)
        except Exception as error:  # onnxruntime raises a private class for each status code, or a RuntimeError
            if not (type(error).__module__.startswith("onnxruntime") or type(error) is RuntimeError):
                raise
            reason = f"onnxruntime cannot run it: {error}"
        if reason is None:
            ready.append(_Candidate(name, runner, workspace))
        else:
            refused[name] = reason
    return ready


def _measure(ready: list[_Candidate], seconds: float) -> None:
    """Rounds over the candidates until the time or the number of rounds is used up."""
    if not ready:
        return
    rounds = alternate(
        {candidate.name: timed(candidate.runner.run) for candidate in ready},
        _MOST_ROUNDS,
        seconds,
        foreign_cores=math.inf,  # other work on the user's machine is a part of it
        turn_seconds=_TURN_SECONDS,
        settle_seconds=0.0,  # these sessions' threads stop spinning after a call
        hopeless_after=0,
        retake_seconds=seconds,
    )
    for candidate in ready:
        candidate.times = [rounds.first_ms[candidate.name], *rounds.timings[candidate.name].values]
