"""Five training steps of real networks on onnxruntime, every parameter and buffer against PyTorch.

    python -m benchmarks.training.parity [--networks NAME ...] [--dtypes float32 float64] [--steps 5]

The exported step and eager PyTorch start from the same state and train freely on the same batches, with the same
random numbers for dropout: nothing is reset in between. The truth is PyTorch in float64. Rounding grows from step to
step, so the bound of a tensor is what it does to PyTorch itself:

    8 * own + floor * |change| + rounding * |value|        (Euclidean norms over the tensor)

own is the largest distance from the truth over PyTorch's run in the model's own type, and over two more from initial
parameters moved by a few layers' rounding; for float32 models floor = 2**-16, rounding = 2**-23, for float64 ones
2**-38 and 2**-52. Writes parity.json beside this file (rows of earlier runs stay) and README.md's table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import convgrad_export as cg
from benchmarks.environment import environment
from benchmarks.training.networks import BY_NAME, NETWORKS, TrainedNetwork
from convgrad_export.integrations.eager_run import perturbed
from convgrad_export.integrations.verification import DOUBLE, SINGLE, SLACK
from convgrad_export.training.comparison import train_with_pytorch
from convgrad_export.training.losses import resolve_loss

RESULT = Path(__file__).parent / "parity.json"
SEED = 3
State = dict[str, np.ndarray]


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


def _moved(module: nn.Module, amount: float, seed: int) -> nn.Module:
    """A copy with every parameter moved by up to `amount` of itself."""
    own = copy.deepcopy(module)
    with torch.no_grad():
        for index, parameter in enumerate(own.parameters()):
            parameter.copy_(perturbed(parameter, amount, 1000 * seed + index))
    return own


def _state(module: nn.Module) -> State:
    return {name: value.detach().double().numpy().copy() for name, value in module.state_dict().items()}


def compare(network: TrainedNetwork, dtype: torch.dtype = torch.float32, steps: int = 5) -> dict[str, Any]:
    """Train by all of them; a row of the table. `within` tells whether every tensor keeps its bound."""
    precision = DOUBLE if dtype == torch.float64 else SINGLE
    torch.manual_seed(0)
    module = network.build().to(dtype).train()
    data = network.data(steps, network.batch, dtype)
    arrays = [(x.numpy(), y.numpy()) for x, y in data]
    loss = resolve_loss(network.loss)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        report = cg.export_training_step(
            module, network.loss, make_optimizer(module.parameters()), data[0], path, verify=False
        )
        seconds = time.perf_counter() - started
        session = cg.TrainingSession(path, seed=SEED)
        report.state.clear()
    losses = [session.step(*batch)["loss"] for batch in arrays]
    found = {name: value.astype(np.float64) for name, value in session.state_dict(module.state_dict()).items()}
    del session

    def pytorch(start: nn.Module, kind: torch.dtype) -> tuple[list[float], State]:
        values, trained = train_with_pytorch(start, loss, make_optimizer, arrays, seed=SEED, dtype=kind)
        return values, _state(trained)

    before = _state(module)
    exact_losses, exact = pytorch(module, torch.float64)
    own = dict.fromkeys(exact, 0.0)
    own_loss = 0.0
    for number, amount in enumerate((0.0, *precision.perturbations[1:3])):
        start = _moved(module, amount, number)
        offset = _state(start)
        values, state = pytorch(start, dtype)
        own_loss = max(own_loss, *(abs(a - b) for a, b in zip(values, exact_losses, strict=True)))
        for name in own:
            moved = offset[name] - before[name]  # the perturbation itself is no part of what training adds
            own[name] = max(own[name], float(np.linalg.norm(state[name] - exact[name] - moved)))
    ratios, relative = {}, {}
    for name, truth in exact.items():
        if name not in found:
            continue  # nothing in the step reads or changes it
        change = float(np.linalg.norm(truth - before[name]))
        error = float(np.linalg.norm(found[name].reshape(truth.shape) - truth))
        allowed = SLACK * own[name] + precision.floor * change + precision.rounding * float(np.linalg.norm(truth))
        ratios[name] = error / (allowed + 1e-300)
        relative[name] = (error / change, own[name] / change) if change else (error, own[name])
    missing = sorted(name for name, _ in module.named_parameters() if name not in found)
    worst = max(ratios, key=lambda name: ratios[name])
    distance = max(abs(a - b) for a, b in zip(losses, exact_losses, strict=True))
    loss_bound = SLACK * own_loss + precision.floor * max(map(abs, exact_losses))
    return {
        "network": network.name,
        "dtype": str(dtype).removeprefix("torch."),
        "input": [network.batch, *network.shape],
        "steps": steps,
        "tensors": len(ratios),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "nodes": sum(report.operators.values()),
        "losses": losses,
        "loss_error_in_bounds": distance / loss_bound,
        "worst_tensor": worst,
        "worst_in_bounds": ratios[worst],
        "median_relative_error": float(np.median([ours for ours, _ in relative.values()])),
        "median_relative_error_of_pytorch": float(np.median([own for _, own in relative.values()])),
        "unread_parameters": missing,
        "within": bool(ratios[worst] <= 1.0 and distance <= loss_bound and not missing),
        "export_seconds": round(seconds, 1),
    }


def markdown(rows: list[Mapping[str, Any]]) -> str:
    """The table of benchmarks/training/README.md."""
    lines = [
        "| network | input | parameters | graph nodes | float32: worst tensor, in bounds | median error (PyTorch's) "
        "| float64: worst tensor, in bounds | median error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_key = {(row["network"], row["dtype"]): row for row in rows}
    for name in dict.fromkeys(row["network"] for row in rows):
        single, double = by_key.get((name, "float32")), by_key.get((name, "float64"))
        row = single or double
        assert row is not None
        cells = [name, "x".join(map(str, row["input"])), f"{row['parameters']:,}", f"{row['nodes']:,}"]
        if single is None:
            cells += ["-", "-"]
        else:
            cells += [
                f"{single['worst_in_bounds']:.2f}",
                f"{single['median_relative_error']:.0e} ({single['median_relative_error_of_pytorch']:.0e})",
            ]
        cells += (
            ["-", "-"]
            if double is None
            else [
                f"{double['worst_in_bounds']:.2f}",
                f"{double['median_relative_error']:.0e}",
            ]
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def available(network: TrainedNetwork) -> bool:
    return network.package is None or importlib.util.find_spec(network.package) is not None


def write_table(path: Path, start: str, table: str) -> None:
    """Replace what stands between the line that begins with `start` and the next ``<!-- end -->``."""
    text = path.read_text()
    head, marker, rest = text.partition(start)
    first_line, _, body = rest.partition("\n")
    if not marker or "<!-- end -->" not in body:
        raise SystemExit(f"{path} has no table that starts with {start!r}")
    path.write_text(f"{head}{marker}{first_line}\n{table}\n<!-- end -->{body.partition('<!-- end -->')[2]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float64"], default=["float32", "float64"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="write README.md's table from parity.json and stop")
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    failed = False
    for name in [] if options.table else options.networks:
        network = BY_NAME[name]
        if not available(network):
            print(f"{name}: {network.package} is not installed", file=sys.stderr)
            failed = True
            continue
        for dtype in options.dtypes:
            row = compare(network, getattr(torch, dtype), options.steps)
            failed |= not row["within"]
            print(
                f"{name:20s} {dtype} worst {row['worst_in_bounds']:.3f} ({row['worst_tensor']}) loss "
                f"{row['loss_error_in_bounds']:.3f} export {row['export_seconds']} s",
                flush=True,
            )
            rows = [r for r in rows if (r["network"], r["dtype"]) != (name, dtype)] + [row]
            order = {network.name: index for index, network in enumerate(NETWORKS)}
            rows.sort(key=lambda r: (order[r["network"]], r["dtype"]))
            RESULT.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    write_table(RESULT.parent / "README.md", "<!-- parity table", markdown(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
