"""Every lowering of a sample of real layers, measured: what choices are judged by.

    python -m benchmarks.selection.measure [--batch 8] [--threads 1 2] [--seconds 240] [--seed 0]

Layers are drawn at random from the networks' tables, so that a run of any length is a fair sample. Each candidate is
checked before it is timed (`convgrad_export.selection.autotune`). Adds to measurements.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from convgrad_export.bench.networks import NETWORKS
from convgrad_export.selection.autotune import TuningSettings, tune_gradient

RESULT = Path(__file__).parent / "measurements.json"


def sample(batch: int, seed: int) -> list[tuple[str, Any, str]]:
    """(name, geometry, gradient) of every distinct layer of every network, in random order."""
    distinct = {}
    for network, table in NETWORKS.items():
        for layer in table():
            distinct.setdefault(layer.geometry(batch), f"{network} {layer.name}")
    work = [(name, geometry, gradient) for geometry, name in distinct.items() for gradient in ("input", "weight")]
    random.Random(seed).shuffle(work)
    return work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {"environment": None, "results": []}
    known = {(entry["layer"], entry["gradient"], entry["batch"], entry["threads"]) for entry in stored["results"]}
    end = time.monotonic() + options.seconds
    for name, geometry, gradient in sample(options.batch, options.seed):
        for threads in options.threads:
            if time.monotonic() > end or (name, gradient, options.batch, threads) in known:
                continue
            record = tune_gradient(gradient, geometry, TuningSettings(threads=threads, seconds=1.0))
            times = {timing.lowering: [timing.min_ms, timing.median_ms, timing.rounds] for timing in record.timings}
            stored["results"].append(
                {
                    "layer": name,
                    "gradient": gradient,
                    "batch": options.batch,
                    "threads": threads,
                    "geometry": geometry.to_dict(),
                    "min_median_rounds": times,
                    "refused": record.refused,
                }
            )
    stored["environment"] = environment()
    RESULT.write_text(json.dumps(stored, indent=None, separators=(",", ":")) + "\n")
    print(f"{len(stored['results'])} measurements in {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
