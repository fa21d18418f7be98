"""Whole training steps (forward, cross entropy, backward): PyTorch eager, torch.compile, this package's backends."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cuda.models import example
from benchmarks.cuda.timing import Budget, cudnn_benchmark, medians

# name: (allow TF32, autocast type)
PRECISIONS: dict[str, tuple[bool, torch.dtype | None]] = {
    "tf32": (True, None),
    "bfloat16": (True, torch.bfloat16),
    "float16": (True, torch.float16),
    "float32": (False, None),
}
BACKENDS: dict[str, str | None] = {
    "eager": None,
    "inductor": "inductor",
    "convgrad": "convgrad",
    "convgrad_ort": "convgrad_ort",
}
# Relative distance (2-norm over all gradients) from eager float32 that a precision may have.
TOLERANCES = {"float32": 2e-3, "tf32": 3e-2, "float16": 3e-2, "bfloat16": 1.5e-1}


def run(
    networks: Sequence[str],
    precisions: Sequence[str],
    contenders: Sequence[str],
    batch: int,
    device: str,
    small: bool,
    rounds: int,
    budget: Budget,
) -> Iterator[dict[str, Any]]:
    """One result for each network and precision; those that the budget leaves no time for say so."""
    costliest = 0.0
    for precision in precisions:
        for network in networks:
            result: dict[str, Any] = {"network": network, "precision": precision, "batch": batch}
            if budget.left < 1.3 * costliest:
                yield {**result, "skipped": "no time left"}
                continue
            before = budget.spent
            try:
                result.update(_measure(network, precision, contenders, batch, device, small, rounds, budget))
            except torch.OutOfMemoryError as error:
                result["error"] = str(error).splitlines()[0]
            costliest = max(costliest, budget.spent - before)
            yield result
            gc.collect()


def _measure(
    network: str,
    precision: str,
    contenders: Sequence[str],
    batch: int,
    device: str,
    small: bool,
    rounds: int,
    budget: Budget,
) -> dict[str, Any]:
    tf32, half = PRECISIONS[precision]
    model, x, labels = example(network, batch, small, device)
    reference = _gradients(_step(copy.deepcopy(model), x, labels, None, device, None), tf32=False)
    steps: dict[str, Callable[[], nn.Module]] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in contenders:
        if budget.left < 0 and steps:
            failed[name] = "no time left"
            continue
        torch._dynamo.reset()
        try:
            step = _step(copy.deepcopy(model), x, labels, half, device, BACKENDS[name])
            errors[name] = _distance(_gradients(step, tf32), reference)
        except Exception as error:  # one contender's failure is a result, not the end of the run
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        if errors[name] <= TOLERANCES[precision]:
            steps[name] = step
        else:
            failed[name] = f"wrong gradients: relative distance {errors[name]:.1e}"
    with cudnn_benchmark(tf32):
        times = medians(steps, device, rounds, round_ms=1.0) if steps else {}
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return {"times": times, "gradient_error": errors, "failed": failed, "peak_bytes": peak}


def _step(
    model: nn.Module, x: Tensor, labels: Tensor, half: torch.dtype | None, device: str, backend: str | None
) -> Callable[[], nn.Module]:
    """A call that runs one step and leaves the gradients in the model it returns."""
    forward: Callable[[Tensor], Tensor] = model if backend is None else torch.compile(model, backend=backend)

    def step() -> nn.Module:
        for parameter in model.parameters():
            parameter.grad = None
        cast: AbstractContextManager[Any] = nullcontext()
        if half is not None:
            cast = torch.autocast(device.split(":")[0], half)
        with cast:
            logits = forward(x)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        return model

    return step


def _gradients(step: Callable[[], nn.Module], tf32: bool) -> list[Tensor]:
    """Copies of all gradients after one step from the model's first state."""
    with cudnn_benchmark(tf32):
        return [parameter.grad.clone() for parameter in step().parameters() if parameter.grad is not None]


def _distance(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if len(got) != len(expected):
        return float("inf")
    square = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, expected, strict=True))
    return (square / sum(float(b.double().square().sum()) for b in expected)) ** 0.5
