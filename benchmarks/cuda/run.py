"""Build, check and time everything on a GPU, in one call of less than ten minutes.

    python -m benchmarks.cuda.run [--parts placement bandwidth layers gate steps] [--seconds 560] [--output FILE]
    python -m benchmarks.cuda.run --device cpu --quick

Parts, each with its share of the time and cut where that ends:

- placement: every layer of every table in every type as a session; nodes that are not on the CUDA provider.
- bandwidth: a copy on the device, which the memory-bound layers are held against.
- layers: single gradients on onnxruntime against PyTorch eager (cuDNN in benchmark mode), results checked first.
- gate: the convolutions for which a lowering may beat cuDNN under torch.compile, each timed both ways.
- steps: ResNet-50, ConvNeXt-tiny and R3D-18 in tf32, bfloat16, float16 and float32 on every backend, gradients checked.

Writes JSON with the device, versions and the command, also when it is interrupted, and prints a short table last.
Exits with 1 when a result was wrong or a node left the provider.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda import layers, steps
from benchmarks.cuda.models import MODELS
from benchmarks.cuda.timing import Budget
from benchmarks.environment import environment
from convgrad_export.bench.networks import NETWORKS
from convgrad_export.files import write_atomically
from convgrad_export.integrations.aten_measure import measure_calls
from convgrad_export.selection import aten_measurements

RESULT = Path(__file__).parent / "results.json"
# share of the time; what a part leaves over goes to those after it
SHARES = {"placement": 0.08, "bandwidth": 0.02, "layers": 0.42, "gate": 0.13, "steps": 0.35}
GOAL_BANDWIDTH = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is False (--device cpu --quick runs the script's code alone)")
        return 2
    record: dict[str, Any] = {"environment": {**environment(), **_device(options.device)}, "quick": options.quick}
    started = time.monotonic()
    run_part: dict[str, Callable[[argparse.Namespace, Budget], Any]] = {
        "placement": _placement,
        "bandwidth": _bandwidth,
        "layers": _layers,
        "gate": _gate,
        "steps": _steps,
    }
    try:
        remaining = [part for part in SHARES if part in options.parts]
        for part in list(remaining):
            share = SHARES[part] / sum(SHARES[name] for name in remaining)
            budget = Budget(share * (options.seconds - (time.monotonic() - started)))
            record[part] = run_part[part](options, budget)
            print(f"{part}: {budget.spent:.0f} of {budget.seconds:.0f} s", flush=True)
            remaining.remove(part)
    finally:
        record["seconds"] = round(time.monotonic() - started, 1)
        write_atomically(options.output, (json.dumps(record, indent=1) + "\n").encode(), overwrite=True)
    failures = report(record)
    print(f"{record['seconds']} s, written to {options.output}")
    return 1 if failures else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--quick", action="store_true", help="few layers, cut-down networks: a test of this code")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--seconds", type=float, default=560.0, help="for all parts together")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="layer tables")
    parser.add_argument("--precisions", nargs="+", choices=layers.PRECISIONS, default=list(layers.PRECISIONS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--every-lowering", action="store_true", help="time all direct lowerings, not only the policy's"
    )
    parser.add_argument("--cuda-graphs", action="store_true", help="time sessions with recorded graphs too")
    parser.add_argument("--backends", nargs="+", choices=steps.BACKENDS, default=["eager", "inductor", "convgrad"])
    parser.add_argument("--write-measurements", action="store_true", help="keep the gate's results in the package")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(argv)
    if options.output is None:
        options.output = RESULT.with_name("quick.json") if options.quick else RESULT
    if options.quick:
        options.batch, options.rounds = 1, 2
        small = [name for name in options.networks if name in ("mobilenet_v2", "tcn")]
        options.networks = small or options.networks[:1]
        options.precisions = [name for name in options.precisions if name in ("float32", "float16")]
    return options


def _device(device: str) -> dict[str, Any]:
    """What is being measured: the GPU, its driver, and the CUDA and cuDNN that PyTorch uses."""
    if not device.startswith("cuda"):
        return {"device": device}
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        driver = ""
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "driver, clock, power limit": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _placement(options: argparse.Namespace, budget: Budget) -> Any:
    if not options.device.startswith("cuda"):
        return {"skipped": "the placement is that of the CUDA provider"}
    from benchmarks.cuda.placement import placed_nodes

    models, left, complete = 0, [], True
    for result in placed_nodes(options.networks, ["float32", "float16", "bfloat16"], []):
        models += 1
        if result["left"]:
            left.append(result)
        if budget.left < 0:
            complete = False
            break
    return {"models": models, "left": left, "complete": complete}


def _bandwidth(options: argparse.Namespace, budget: Budget) -> Any:
    return layers.copy_bandwidth(options.device, options.rounds, 2**20 if options.quick else 2**28)


def _layers(options: argparse.Namespace, budget: Budget) -> Any:
    cases = layers.cases(options.networks, options.batch, 2 if options.quick else None)
    return list(
        layers.run(
            cases,
            options.precisions,
            options.device,
            options.rounds,
            options.every_lowering,
            options.cuda_graphs,
            budget,
        )
    )


def _gate(options: argparse.Namespace, budget: Budget) -> Any:
    if options.quick:
        cases = layers.cases(["mobilenet_v2"], options.batch, 2)
        dtypes = ["float32"]
    else:
        cases = layers.cases(options.networks, options.batch, None)
        dtypes = ["float16", "bfloat16", "float32"]
    wanted = [
        (gradient, geometry, dtype)
        for _, geometry in cases
        for dtype in dtypes
        for gradient in ("input", "weight")
        if aten_measurements.worth_measuring(gradient, geometry)
    ]
    wanted = wanted[:1] if options.quick else wanted
    measured = measure_calls(wanted, device=options.device, seconds=budget.left)
    if options.write_measurements:
        aten_measurements.add(measured, aten_measurements.SHIPPED)
    return {"asked": len(wanted), "measured": [{**vars(item), "winner": item.winner} for item in measured]}


def _steps(options: argparse.Namespace, budget: Budget) -> Any:
    precisions = ["float32"] if options.quick else list(steps.PRECISIONS)
    return list(
        steps.run(
            list(MODELS),
            precisions,
            options.backends,
            options.batch,
            options.device,
            options.quick,
            options.rounds,
            budget,
        )
    )


def report(record: dict[str, Any]) -> int:
    """Print the short table; the number of failures (wrong results, nodes off the provider, errors)."""
    failures = 0
    environment = record["environment"]
    print(f"\n{environment['device']}; {', '.join(f'{k} {v}' for k, v in environment['versions'].items())}")
    if "models" in record.get("placement", {}):
        placement = record["placement"]
        failures += len(placement["left"])
        cut = "" if placement["complete"] else " (time ran out)"
        print(f"placement: {placement['models']} models, {len(placement['left'])} with a node off CUDA (goal 0){cut}")
    if "bandwidth" in record:
        print(f"copy: {record['bandwidth'] / 1e9:.0f} GB/s read and written")
    if record["quick"]:
        print("a quick run: these figures measure nothing")
    failures += _report_layers(record.get("layers", []), record.get("bandwidth"))
    if "gate" in record:
        won = [entry for entry in record["gate"]["measured"] if entry["winner"]]
        listed = ", ".join(f"{e['winner']} {e['kernel_ms'] / e['lowering_ms'][e['winner']]:.1f}x" for e in won[:6])
        print(f"gate: {len(record['gate']['measured'])} of {record['gate']['asked']} measured, {len(won)} won {listed}")
    for result in record.get("steps", []):
        title = f"step {result['network']:<14} {result['precision']:<9}"
        if "times" not in result:
            print(f"{title} {result.get('skipped') or result.get('error')}")
            failures += "error" in result
            continue
        times = " | ".join(f"{name} {entry['median_ms']:.2f} ms" for name, entry in result["times"].items())
        print(f"{title} {times}" + "".join(f" | {name}: {why}" for name, why in result["failed"].items()))
        failures += sum("wrong" in why for why in result["failed"].values())
    return failures


def _report_layers(results: Sequence[dict[str, Any]], bandwidth: float | None) -> int:
    if not results:
        return 0
    print("layers: time of PyTorch / time of onnxruntime (goals: mean 1.0, worst 0.8, depthwise 2.0)")
    for precision in layers.PRECISIONS:
        of_precision = [result for result in results if result["precision"] == precision]
        timed = layers.ratios(of_precision)
        if not timed:
            continue
        for gradient in ("input", "weight"):
            rows = [(result, ratio) for result, ratio in timed if result["gradient"] == gradient]
            if not rows:
                continue
            worst, ratio = min(rows, key=lambda row: row[1])
            skipped = sum("skipped" in r for r in of_precision if r["gradient"] == gradient)
            mean = layers.geometric_mean([ratio for _, ratio in rows])
            print(
                f"  {precision:<9} {gradient:<6} mean {mean:.2f}, worst {ratio:.2f} ({worst['layer']}, "
                f"{worst['chosen']}), {len(rows)} layers" + (f", {skipped} not reached" if skipped else "")
            )
    if bandwidth:
        best = max(
            (
                result["bytes"] / (result["times"][result["chosen"]]["median_ms"] * 1e-3) / bandwidth
                for result in results
                if result.get("chosen") in result.get("times", {})
            ),
            default=math.nan,
        )
        print(f"  best layer moves {best:.0%} of the copy's bandwidth (goal {GOAL_BANDWIDTH:.0%})")
    failures = 0
    for result in results:
        trouble = result.get("wrong") or result.get("left_cuda") or result.get("error")
        if trouble:
            failures += 1
            print(f"  {result['layer']} {result['gradient']} {result['precision']}: {trouble}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
