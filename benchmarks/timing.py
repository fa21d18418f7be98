"""Interleaved timing on a machine that other work shares: `convgrad_export.timing` with every contender kept.

Only time that the host took away makes a round void here: these benchmarks state their machine's load.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

from convgrad_export.timing import alternate, timed


def rounds_of(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Minimum and median milliseconds of one call for each contender, and the number of rounds kept."""
    for call in contenders.values():
        call()
    turns = {name: timed(call) for name, call in contenders.items()}
    result = alternate(turns, rounds, math.inf, always=tuple(contenders), foreign_cores=math.inf)
    return {
        name: {
            "min_ms": min(timing.values),
            "median_ms": statistics.median(timing.values),
            "rounds": len(timing.values),
        }
        for name, timing in result.timings.items()
    }
