"""Times on a device, in turns, and a budget that ends a part gracefully."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from convgrad_export.integrations.aten_measure import milliseconds


@dataclass
class Budget:
    """Seconds that a part may take, from its creation on."""

    seconds: float

    def __post_init__(self) -> None:
        self._started = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        return self.seconds - self.spent


@contextmanager
def cudnn_benchmark(tf32: bool) -> Iterator[None]:
    """cuDNN times its algorithms for every new shape; TF32 in convolutions and GEMMs as asked for; restored after."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def medians(
    calls: Mapping[str, Callable[[], Any]], device: str, rounds: int, round_ms: float = 4.0
) -> dict[str, dict[str, float]]:
    """Median, minimum and number of rounds for each call, in milliseconds of one call; the calls take turns.

    On CUDA by events around as many calls as fill about `round_ms`, so that the time to launch a kernel is hidden where
    the device is slower than the host and counted where it is not. On the CPU by the clock.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        repeats[name] = max(1, min(50, int(round_ms / max(_once(call, device, 1), 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_once(call, device, repeats[name]))
    return {
        name: {"median_ms": statistics.median(times), "min_ms": min(times), "rounds": len(times)}
        for name, times in samples.items()
    }


def _once(call: Callable[[], Any], device: str, repeats: int) -> float:
    synchronise(device)
    return milliseconds(call, repeats, on_cuda=device.startswith("cuda"))
