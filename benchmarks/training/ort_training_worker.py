"""onnxruntime-training 1.19.2 as a contender of `steps.py`, in an environment of its own. Imports nothing of ours.

    python3.11 -m venv old && old/bin/pip install onnxruntime-training-cpu==1.19.2 onnx==1.16.2 "numpy<2" \\
        "protobuf<6" "ml_dtypes<0.6" cerberus h5py
    old/bin/python ort_training_worker.py FOLDER THREADS

FOLDER holds forward.onnx, settings.json and batch.npz; the artifacts are made there. Speaks as `worker.py` does.
"""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path

import numpy as np

for name in ("onnxruntime.training.optim", "onnxruntime.training.amp"):  # they import torch
    sys.modules[name] = types.ModuleType(name)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnxruntime.training import api, artifacts  # noqa: E402


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text())
    made = folder / "artifacts"
    if not (made / "optimizer_model.onnx").exists():
        made.mkdir(exist_ok=True)
        loss = {"cross_entropy": "CrossEntropyLoss", "mse": "MSELoss", "l1": "L1Loss"}[settings["loss"]]
        artifacts.generate_artifacts(
            onnx.load(str(folder / "forward.onnx")),
            requires_grad=settings["parameters"],
            frozen_params=[],
            loss=artifacts.LossType[loss],
            optimizer=artifacts.OptimType.AdamW,
            artifact_directory=str(made),
        )
        print(json.dumps({"made": True}), flush=True)
        return
    base = resident("VmRSS")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    state = api.CheckpointState.load_checkpoint(str(made / "checkpoint"))
    module = api.Module(str(made / "training_model.onnx"), state, device="cpu", session_options=options)
    optimizer = api.Optimizer(str(made / "optimizer_model.onnx"), module)
    rate = settings["learning_rate"]
    with np.load(folder / "batch.npz") as batch:
        x, y = batch["x"], batch["y"]

    def step(learning_rate: float) -> float:
        optimizer.set_learning_rate(learning_rate)
        loss = module(x, y)
        optimizer.step()
        module.lazy_reset_grad()
        return float(np.asarray(loss))

    module.train()
    for line in sys.stdin:
        started = time.perf_counter()
        losses = []
        for _ in range(int(line)):
            losses.append(step(rate))
            rate = settings["timed_learning_rate"]
        print(json.dumps({"seconds": time.perf_counter() - started, "losses": losses}), flush=True)
    print(json.dumps({"base": base, "peak": resident("VmHWM")}), flush=True)


if __name__ == "__main__":
    main()
