"""Interleaved timing on a machine that other work shares.

Contenders take turns in short rounds, so that a busy moment hits all of them. A round during which the host took time
away (steal in /proc/stat) is thrown out, and taken again up to as many times as rounds were asked for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from convgrad_export.selection.timing import stolen_ticks

MIN_SECONDS = 0.004  # a call shorter than this is repeated within its turn


def rounds_of(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Minimum and median milliseconds of one call for each contender, and the number of rounds kept."""
    repeats = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(MIN_SECONDS / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    spare = rounds
    kept = 0
    while kept < rounds:
        stolen = stolen_ticks()
        taken = {}
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            taken[name] = (time.perf_counter() - start) * 1e3 / repeats[name]
        if stolen_ticks() - stolen > 1 and spare > 0:
            spare -= 1
            continue
        kept += 1
        for name, value in taken.items():
            times[name].append(value)
    return {
        name: {"min_ms": min(values), "median_ms": statistics.median(values), "rounds": len(values)}
        for name, values in times.items()
    }
