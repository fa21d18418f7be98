"""Training steps per second and peak memory: the exported step on onnxruntime, PyTorch, and onnxruntime-training.

    python -m benchmarks.training.steps [--networks NAME ...] [--batch 1 8 32] [--threads 1 2] [--rounds 5]
        [--contenders onnxruntime eager eager_fused inductor ort_training] [--ort-training-python old/bin/python]
        [--seconds 280] [--again]

Every contender is a process of its own that loads the same weights and the same batch and waits; they take turns in
short rounds, and a round during which the host took time away, or other processes ran, is thrown out. The optimizer is
AdamW everywhere: as torch.optim.AdamW comes in "eager", with fused=True in "eager_fused" and "inductor". Dropout is
off. Before anything is timed, the first loss and what the first update takes off it are compared with eager PyTorch's.
Memory is the process's peak less what was resident after its imports. glibc keeps freed blocks in every process alike:
with its defaults, PyTorch would pay for fresh pages at every step (benchmarks/NOTES.md, "Fresh memory").

A cell (network, batch, threads) that steps.json holds already is left out unless --again is given; after --seconds no
new cell is begun. So a long run can be made of short ones. --table writes README.md from what there is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import convgrad_export as cg
from benchmarks.environment import environment
from benchmarks.training.networks import BY_NAME, TrainedNetwork, without_dropout
from benchmarks.training.parity import write_table
from convgrad_export.bench.run import KEEP_MEMORY
from convgrad_export.timing import alternate

RESULT = Path(__file__).parent / "steps.json"
ROOT = Path(__file__).parents[2]
CONTENDERS = ("onnxruntime", "eager", "eager_fused", "inductor", "ort_training")
LEARNING_RATE = 1e-3  # of the first update, whose effect is checked
TIMED_LEARNING_RATE = 1e-5  # of all others: on one batch a larger one soon makes gradients that are subnormal, and slow
TURN_SECONDS = 0.25  # a contender's turn is as many steps as fill this, at least one
SETTLE_SECONDS = 0.02  # for the last contender's idle threads to fall asleep
LOSS_TOLERANCE = 2e-3  # of the loss before the first update
GAIN_TOLERANCE = 0.1  # of what the first update takes off the loss


class Worker:
    """A contender's process."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                cwd=ROOT,
                env={**os.environ, **KEEP_MEMORY},
            )

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text().strip().splitlines()[-3:]
            raise RuntimeError(" ".join(tail) or f"exit status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def steps(self, count: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return self._answer()

    @property
    def pid(self) -> int:
        return self._process.pid

    def turn(self, count: int) -> float:
        """Seconds of `count` steps."""
        return float(self.steps(count)["seconds"])

    def close(self) -> dict[str, Any]:
        """The memory; the process ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._answer()
        finally:
            self._process.wait(timeout=60)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def prepare(
    network: TrainedNetwork, batch: int, folder: Path, with_forward: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the exported step, the state, the batch, and the forward model for onnxruntime-training.

    Returns:
        Facts about the exported step, and why contenders cannot take part, by name.
    """
    torch.manual_seed(0)
    module = without_dropout(network.build()).train()
    ((x, y),) = network.data(1, batch)
    np.savez(folder / "batch.npz", x=x.numpy(), y=y.numpy())
    torch.save(module.state_dict(), folder / "state.pt")
    settings = {
        "network": network.name,
        "learning_rate": LEARNING_RATE,
        "timed_learning_rate": TIMED_LEARNING_RATE,
        "loss": network.loss if isinstance(network.loss, str) else None,
        "parameters": [name for name, _ in module.named_parameters()],
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)
    report = cg.export_training_step(module, network.loss, optimizer, (x, y), folder / "step.onnx", verify=False)
    seconds = time.perf_counter() - started
    failed = {}
    if with_forward:
        try:
            _write_forward(module, x, folder / "forward.onnx")
        except Exception as error:  # torch.onnx has errors of many kinds, and the other contenders need no such model
            failed["ort_training"] = f"torch.onnx: {type(error).__name__}: {error}"[:400]
    return {"nodes": sum(report.operators.values()), "export_seconds": round(seconds, 1)}, failed


def _write_forward(module: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    torch.onnx.export(
        module,
        (x,),
        str(path),
        dynamo=False,
        training=torch.onnx.TrainingMode.TRAINING,
        do_constant_folding=False,
        opset_version=17,
        input_names=["x"],
        output_names=["output"],
    )


def start(name: str, folder: Path, threads: int, old_python: str | None) -> Worker:
    log = folder / f"{name}.log"
    if name != "ort_training":
        return Worker([sys.executable, "-m", "benchmarks.training.worker", name, str(folder), str(threads)], log)
    script = str(Path(__file__).parent / "ort_training_worker.py")
    if not (folder / "artifacts" / "optimizer_model.onnx").exists():
        made = subprocess.run([str(old_python), script, str(folder), "1"], capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(" ".join(made.stderr.strip().splitlines()[-2:]))
    return Worker([str(old_python), script, str(folder), str(threads)], log)


def measure(
    folder: Path,
    threads: int,
    rounds: int,
    contenders: list[str],
    old_python: str | None,
    unable: Mapping[str, str],
) -> dict[str, Any]:
    """Times, memory and failures of every contender; `unable` are those that failed before, with the reason."""
    workers: dict[str, Worker] = {}
    failed = dict(unable)
    losses: dict[str, list[float]] = {}
    try:
        for name in contenders:
            if name in unable:
                continue
            try:
                workers[name] = start(name, folder, threads, old_python)
                losses[name] = workers[name].steps(3)["losses"]
            except (RuntimeError, OSError) as error:
                failed[name] = str(error)[-400:]  # onnxruntime names the cause last
                if name in workers:
                    workers.pop(name).kill()
        for name, values in losses.items():
            expected = losses.get("eager", values)
            # What an update gains depends on every gradient. AdamW's first updates are as large for a gradient that is
            # rounding alone as for any other, so losses part soon. parity.py bounds every tensor.
            gained, gain = values[0] - values[1], expected[0] - expected[1]
            same = abs(values[0] - expected[0]) <= LOSS_TOLERANCE * abs(expected[0])
            if same and abs(gained - gain) <= GAIN_TOLERANCE * abs(gain):
                continue
            reason = f"computes something else than eager: {values[:2]}, {expected[:2]}"
            if name == "onnxruntime":
                raise SystemExit(f"{name} {reason}")
            failed[name] = reason
            workers.pop(name).kill()
        timed = alternate(
            {name: worker.turn for name, worker in workers.items()},
            rounds,
            math.inf,
            always=tuple(workers),
            processes=tuple(worker.pid for worker in workers.values()),
            turn_seconds=TURN_SECONDS,
            settle_seconds=SETTLE_SECONDS,
        )
        times = {name: [value / 1e3 for value in timing.values] for name, timing in timed.timings.items()}
        memory = {name: worker.close() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    return {
        "rounds": timed.kept,
        "discarded": timed.discarded,
        "disturbed": timed.disturbed,
        "failed": failed,
        "contenders": {
            name: {
                "median_ms": round(statistics.median(values) * 1e3, 3),
                "min_ms": round(min(values) * 1e3, 3),
                "steps_per_second": round(1 / statistics.median(values), 2),
                "peak_mib": round((memory[name]["peak"] - memory[name]["base"]) / 2**20, 1),
                "losses": losses[name],
            }
            for name, values in times.items()
        },
    }


def ratios(row: Mapping[str, Any], other: str) -> float | None:
    """Time of the other contender / ours: above 1 the exported step is faster."""
    cells = row["contenders"]
    return cells[other]["median_ms"] / cells["onnxruntime"]["median_ms"] if other in cells else None


def markdown(rows: list[Mapping[str, Any]]) -> str:
    """The table of benchmarks/training/README.md, with the geometric means in the last rows."""
    lines = [
        "| network | batch, input | threads | steps/s | eager / ours | eager, fused AdamW / ours | Inductor / ours "
        "| onnxruntime-training / ours | peak MiB: ours | eager | eager, fused | Inductor | onnxruntime-training |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = row["contenders"]
        shown = [row["network"], f"{row['batch']}, {'x'.join(map(str, row['shape']))}", str(row["threads"])]
        shown.append(f"{cells['onnxruntime']['steps_per_second']:.1f}")
        for other in CONTENDERS[1:]:
            ratio = ratios(row, other)
            shown.append("fails" if other in row["failed"] else "-" if ratio is None else f"{ratio:.2f}")
        for name in CONTENDERS:
            shown.append(f"{cells[name]['peak_mib']:.0f}" if name in cells else "-")
        lines.append("| " + " | ".join(shown) + " |")
    for batch, threads in sorted({(row["batch"], row["threads"]) for row in rows}):
        group = [row for row in rows if (row["batch"], row["threads"]) == (batch, threads)]
        shown = ["geometric mean", str(batch), str(threads), ""]
        for other in CONTENDERS[1:]:
            found = [ratio for ratio in (ratios(row, other) for row in group) if ratio is not None]
            shown.append(f"**{statistics.geometric_mean(found):.2f}** ({len(found)})" if found else "-")
        cells = [row["contenders"] for row in group if "eager" in row["contenders"]]
        memory = [found["onnxruntime"]["peak_mib"] / found["eager"]["peak_mib"] for found in cells]
        shown.append(f"{statistics.geometric_mean(memory):.2f} of eager" if memory else "-")
        lines.append("| " + " | ".join([*shown, *[""] * (len(CONTENDERS) - 1)]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--ort-training-python", help="a Python that has onnxruntime-training 1.19.2")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no new cell after this long")
    parser.add_argument("--again", action="store_true", help="measure cells that steps.json holds already")
    parser.add_argument("--table", action="store_true", help="write README.md's table from steps.json and stop")
    options = parser.parse_args(argv)
    contenders = [c for c in options.contenders if c != "ort_training" or options.ort_training_python]
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    began = time.perf_counter()
    order = {name: index for index, name in enumerate(BY_NAME)}
    for name in [] if options.table else options.networks:
        network = BY_NAME[name]
        for batch in options.batch:
            wanted = [
                t for t in options.threads if options.again or (name, batch, t) not in {_key(row) for row in rows}
            ]
            if not wanted or time.perf_counter() - began > options.seconds:
                continue
            with tempfile.TemporaryDirectory() as text:
                folder = Path(text)
                facts, unable = prepare(network, batch, folder, "ort_training" in contenders)
                for threads in wanted:
                    python = options.ort_training_python
                    result = measure(folder, threads, options.rounds, contenders, python, unable)
                    row = {"network": name, "batch": batch, "shape": network.shape, "threads": threads, **facts}
                    row = {**row, **result, "environment": environment()}
                    rows = [r for r in rows if _key(r) != _key(row)] + [row]
                    rows.sort(key=lambda r: (order[r["network"]], r["batch"], r["threads"]))
                    RESULT.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                    times = {k: v["median_ms"] for k, v in result["contenders"].items()}
                    print(name, batch, threads, times, result["failed"] or "", flush=True)
    write_table(RESULT.parent / "README.md", "<!-- steps table", markdown(rows))
    return 0


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["network"], row["batch"], row["threads"]


if __name__ == "__main__":
    sys.exit(main())
