"""Where an exported training step's time goes: onnxruntime's profile, summed by operator.

    python -m benchmarks.training.operators resnet18 [--batch 8] [--threads 1] [--nodes 15]

Prints the fastest of several runs: milliseconds and calls of each operator, then the slowest nodes with their shapes.
The optimizer is AdamW, as in `steps.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

import convgrad_export as cg
from benchmarks.training.networks import BY_NAME, without_dropout
from convgrad_export.integrations import saving

RUNS = 8


def profile(name: str, batch: int, threads: int) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds of the fastest run, and its node events as onnxruntime writes them (durations in microseconds)."""
    network = BY_NAME[name]
    torch.manual_seed(0)
    module = without_dropout(network.build()).train()
    ((x, y),) = network.data(1, batch)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
    report = cg.export_training_step(module, network.loss, optimizer, (x, y), verify=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        saving.save(report.model, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        state = {key: value.detach().numpy() for key, value in report.state.items()}
        batch_names = [value.name for value in session.get_inputs() if value.name not in state]
        feeds = {**state, **dict(zip(batch_names, (x.numpy(), y.numpy()), strict=False))}
        feeds["learning_rate"] = np.array(1e-5, np.float32)
        for _ in range(RUNS):
            session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text())
    fastest = min((e for e in events if e["name"] == "model_run"), key=lambda e: e["dur"])
    first, last = fastest["ts"], fastest["ts"] + fastest["dur"]
    nodes = [e for e in events if e["name"].endswith("_kernel_time") and first <= e["ts"] <= last]
    return fastest["dur"] / 1e3, nodes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=list(BY_NAME))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=15)
    options = parser.parse_args(argv)
    milliseconds, nodes = profile(options.network, options.batch, options.threads)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for node in nodes:
        entry = sums[node["args"]["op_name"]]
        entry[0] += node["dur"] / 1e3
        entry[1] += 1
    table = Table(title=f"{options.network}, batch {options.batch}: {milliseconds:.1f} ms")
    for heading in ("operator", "ms", "share", "calls"):
        table.add_column(heading)
    for operator, (spent, calls) in sorted(sums.items(), key=lambda item: -item[1][0]):
        table.add_row(operator, f"{spent:.2f}", f"{spent / milliseconds:.0%}", str(int(calls)))
    slowest = Table(title="slowest nodes")
    for heading in ("ms", "operator", "input shapes"):
        slowest.add_column(heading)
    for node in sorted(nodes, key=lambda node: -node["dur"])[: options.nodes]:
        shapes = [next(iter(value.values())) for value in node["args"].get("input_type_shape", [])]
        slowest.add_row(f"{node['dur'] / 1e3:.2f}", node["args"]["op_name"], str(shapes[:4]))
    console = Console(width=120)
    console.print(table)
    console.print(slowest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
