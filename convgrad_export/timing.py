"""Taking turns: contenders timed in short alternating rounds, on a machine that may be disturbed.

What `convgrad bench`, `convgrad tune` and the benchmarks time by. Every round times each contender once, forwards and
backwards in turn, so that a slow moment or a warm cache favours nobody for long. A round in which the host took
processor time away (steal in /proc/stat), or in which other processes ran for more than a tenth of a core, is thrown
out and taken again, up to as many times as rounds were asked for. Minima and medians are of the kept rounds; what had
to be kept although it was disturbed is counted.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

Contender: TypeAlias = Callable[[int], float]  # runs that many calls, returns their seconds together

TURN_SECONDS = 0.004  # a call shorter than this is repeated within its turn
FEWEST_ROUNDS = 3
QUICK_ROUNDS, QUICK_SECONDS = 10, 0.05  # where rounds cost next to nothing, a busy moment should not decide
HOPELESS = 4.0  # a contender this many times slower than the fastest stops after two rounds
_MOST_REPEATS = 500
FOREIGN_CORES = 0.1  # used by other processes: above, the round is disturbed
SETTLE_SECONDS = 0.002  # for another contender's threads to stop spinning


@dataclass(frozen=True)
class Ticks:
    """Processor time since boot, in seconds: taken by the host, used by everyone, used by the processes measured."""

    stolen: float
    used: float
    own: float


@dataclass
class Timing:
    """Milliseconds of one call of one contender over the kept rounds."""

    values: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "min_ms": float(f"{min(self.values):.5g}"),
            "median_ms": float(f"{statistics.median(self.values):.5g}"),
            "rounds": len(self.values),
        }


@dataclass
class Rounds:
    """What `alternate` returns.

    Attributes:
        timings: by contender. first_ms: of its call before the first round, by contender.
        kept, discarded: rounds. disturbed: kept rounds that were disturbed.
        stolen, foreign: seconds of processor time taken by the host and by other processes, over all rounds.
    """

    timings: dict[str, Timing]
    first_ms: dict[str, float]
    kept: int = 0
    discarded: int = 0
    disturbed: int = 0
    stolen: float = 0.0
    foreign: float = 0.0

    def note_disturbance(self, before: Ticks, after: Ticks, elapsed: float, foreign_cores: float) -> bool:
        """Add up what was taken during a round of `elapsed` seconds, and say whether it was too much."""
        stolen = after.stolen - before.stolen
        foreign = max(0.0, (after.used - before.used) - (after.own - before.own))
        self.stolen += stolen
        self.foreign += foreign
        # one clock tick (10 ms) either way is the resolution of these counters
        return stolen > 0.015 or foreign > foreign_cores * elapsed + 0.02


def timed(call: Callable[[], object]) -> Contender:
    """A contender that runs in this process."""

    def turn(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start

    return turn


def read_ticks(processes: tuple[int, ...] = ()) -> Ticks:
    """Now; zeros where the kernel does not say. `processes`: other processes that belong to the measurement."""
    try:
        unit = os.sysconf("SC_CLK_TCK")
        fields = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        own = sum(os.times()[:2])
        for process in processes:
            after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            own += (int(after_name[11]) + int(after_name[12])) / unit
    except (OSError, IndexError, ValueError, AttributeError):
        return Ticks(0.0, 0.0, 0.0)
    user, nice, system, _, _, interrupt, soft, stolen = fields
    return Ticks(stolen / unit, (user + nice + system + interrupt + soft) / unit, own)


def alternate(
    contenders: Mapping[str, Contender],
    rounds: int = 7,
    seconds: float = 2.0,
    *,
    always: tuple[str, ...] = (),
    processes: tuple[int, ...] = (),
    foreign_cores: float = FOREIGN_CORES,
    turn_seconds: float = TURN_SECONDS,
    settle_seconds: float = SETTLE_SECONDS,
    rest_after: Mapping[str, float] = MappingProxyType({}),
    hopeless_after: int = 2,
    retake_seconds: float = math.inf,
    read: Callable[[tuple[int, ...]], Ticks] = read_ticks,
) -> Rounds:
    """Time contenders that have run once already.

    Args:
        contenders: by name, at least one. rounds: how many to keep.
        seconds: no further round starts after this many, once `FEWEST_ROUNDS` are kept, or `QUICK_ROUNDS` where a round
            takes less than `QUICK_SECONDS`.
        always: contenders that are never given up as hopeless.
        processes: ids of other processes that work for a contender.
        foreign_cores: what the rest of the machine may use before a round counts as disturbed.
        settle_seconds: pause before each turn. rest_after: a further pause after the turns of these contenders, whose
            threads spin for longer.
        turn_seconds: a call shorter than this is repeated within its turn.
        hopeless_after: rounds after which a contender that takes `HOPELESS` times as long as the fastest stops; 0 lets
            the call before the first round decide as well.
        retake_seconds: a disturbed round is not taken again after this many.
        read: where processor times come from.
    """
    started = time.perf_counter()
    once = {name: max(turn(1), 1e-7) for name, turn in contenders.items()}
    repeats = {name: max(1, min(_MOST_REPEATS, round(turn_seconds / took))) for name, took in once.items()}
    quick = sum(took * repeats[name] for name, took in once.items()) < QUICK_SECONDS
    fewest = QUICK_ROUNDS if quick else FEWEST_ROUNDS
    result = Rounds({name: Timing() for name in contenders}, {name: took * 1e3 for name, took in once.items()})
    active = list(contenders) if hopeless_after else _hopeful(result.first_ms, always)
    while result.kept < rounds and (result.kept < fewest or time.perf_counter() - started < seconds):
        before, start = read(processes), time.perf_counter()
        taken = {}
        for name in active if result.kept % 2 == 0 else active[::-1]:
            time.sleep(settle_seconds)
            taken[name] = contenders[name](repeats[name]) * 1e3 / repeats[name]
            time.sleep(rest_after.get(name, 0.0))
        if result.note_disturbance(before, read(processes), time.perf_counter() - start, foreign_cores):
            if result.discarded < rounds and time.perf_counter() - started < retake_seconds:
                result.discarded += 1
                continue
            result.disturbed += 1
        result.kept += 1
        for name, value in taken.items():
            result.timings[name].values.append(value)
        if result.kept >= hopeless_after:
            active = _hopeful({name: min(result.timings[name].values) for name in active}, always)
    return result


def _hopeful(best: Mapping[str, float], always: tuple[str, ...]) -> list[str]:
    """The contenders that another round may still find the fastest."""
    limit = HOPELESS * min(best.values())
    return [name for name, value in best.items() if value <= limit or name in always]
