"""One contender of `steps.py` in a process of its own: loads the folder, then runs as many steps as each line asks for.

    python -m benchmarks.training.worker {onnxruntime,eager,eager_fused,inductor} FOLDER THREADS

Lines on stdin are numbers of steps; each is answered by one line of JSON: the seconds and the losses. At the end of
input comes the memory: bytes resident after the imports, and the peak. The process of onnxruntime imports no torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Step = Callable[[float], float]  # of a learning rate


def resident(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def onnxruntime_step(folder: Path, threads: int) -> tuple[int, Step]:
    import onnx  # noqa: F401  the session reads the model with it

    from convgrad_export.runtime.providers import onnxruntime
    from convgrad_export.training import TrainingSession

    onnxruntime()
    base = resident("VmRSS")
    session = TrainingSession(folder / "step.onnx", threads=threads)
    with np.load(folder / "batch.npz") as batch:
        arrays = batch["x"], batch["y"]

    def step(learning_rate: float) -> float:
        session.learning_rate = learning_rate
        return float(session.step(*arrays)["loss"])

    return base, step


def pytorch_step(folder: Path, threads: int, compiled: bool, fused: bool) -> tuple[int, Step]:
    import torch

    from benchmarks.training.networks import BY_NAME, without_dropout
    from convgrad_export.training.losses import resolve_loss

    torch.set_num_threads(threads)
    settings = json.loads((folder / "settings.json").read_text())
    network = BY_NAME[settings["network"]]
    built = network.build()
    # The network is built among the imports, because that imports its package; its own tensors are no import.
    tensors = (*built.parameters(), *built.buffers())
    base = resident("VmRSS") - sum(tensor.nbytes for tensor in tensors)
    module = without_dropout(built).train()
    module.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    with np.load(folder / "batch.npz") as batch:
        x, y = torch.from_numpy(batch["x"]), torch.from_numpy(batch["y"])
    optimizer = torch.optim.AdamW(module.parameters(), fused=fused or None)
    loss = resolve_loss(network.loss)

    def value_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss.call(module(x), y)

    forward = torch.compile(value_of, dynamic=False) if compiled else value_of

    def step(learning_rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad()
        value = forward(x, y)
        value.backward()
        optimizer.step()
        return value.item()

    return base, step


def serve(folder: Path, base: int, step: Step) -> None:
    """Answer the lines of stdin."""
    settings = json.loads((folder / "settings.json").read_text())
    rate = settings["learning_rate"]
    for line in sys.stdin:
        started = time.perf_counter()
        losses = []
        for _ in range(int(line)):
            losses.append(step(rate))
            rate = settings["timed_learning_rate"]
        print(json.dumps({"seconds": time.perf_counter() - started, "losses": losses}), flush=True)
    print(json.dumps({"base": base, "peak": resident("VmHWM")}), flush=True)


def main() -> None:
    kind, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if kind == "onnxruntime":
        serve(folder, *onnxruntime_step(folder, threads))
    else:
        serve(folder, *pytorch_step(folder, threads, kind == "inductor", kind != "eager"))


if __name__ == "__main__":
    main()
