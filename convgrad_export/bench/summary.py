"""Figures from measurements: speed ratios, shares, shortfalls. No printing here.

A ratio is the time of the other contender divided by ours: above 1 ours is faster. Ratios are of minima over rounds
unless said otherwise, and means of ratios are geometric.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..lowering import LOWERINGS
from ..reference import FORWARD
from ..selection.reduced_arithmetic import DEFAULT_ERROR_FACTOR
from .contenders import CONV_GRAD, GEMM, GEMM_MULTIPLICATIONS, ORT_FORWARD, TORCH
from .results import Results, geometry_of

SLOW = 0.9  # a layer under this ratio to eager counts as slower
_DENSE_CHANNELS = 64
_NEAR_BEST = 1.1


@dataclass(frozen=True)
class Row:
    """One measured gradient of one geometry.

    Attributes:
        record: as stored. network, layer: its first use. count: how often the networks chosen have it.
    """

    record: dict[str, Any]
    network: str
    layer: str

    @property
    def label(self) -> str:
        return f"{self.network}/{self.layer} {self.record['operation']}"

    def time(self, name: str | None, statistic: str = "min_ms") -> float | None:
        """Milliseconds of a contender, of a choice (``"policy"``, ``"file"``, ``"textbook"`` ...), or of ``"best"``."""
        times = self.record["times"]
        if name == "best":
            name = self.best
        if name == "file" and "file" not in self.record["choices"]:
            name = "policy"  # of a layer that no session computes in another way
        name = self.record["choices"].get(name, name) if name else None
        return float(times[name][statistic]) if name in times else None

    @property
    def best(self) -> str | None:
        """The fastest of the lowerings that "auto" may take by default."""
        times = self.record["times"]
        allowed = [n for n in times if n in LOWERINGS and LOWERINGS[n].error_factor <= DEFAULT_ERROR_FACTOR]
        return min(allowed, key=lambda name: times[name]["min_ms"]) if allowed else None

    def ratio(self, other: str, ours: str = "policy", statistic: str = "min_ms") -> float | None:
        """Time of `other` / time of `ours`; None where one of them was not timed."""
        theirs, own = self.time(other, statistic), self.time(ours, statistic)
        return theirs / own if theirs is not None and own is not None else None

    def gflops(self, name: str) -> float | None:
        """Of the direct formula's operations, whatever the lowering really does."""
        milliseconds = self.time(name)
        return None if milliseconds is None else 2e-6 * self.record["multiplications"] / milliseconds

    def gemm_share(self, name: str = "policy") -> float | None:
        """Speed as a share of the GEMM's in the same rounds."""
        speed, gemm = self.gflops(name), self.time(GEMM)
        if speed is None or gemm is None:
            return None
        return speed / (2e-6 * GEMM_MULTIPLICATIONS / gemm)

    @property
    def is_dense(self) -> bool:
        """One group, and 64 or more channels on each side: where the goal is a share of the GEMM's speed."""
        g = geometry_of(self.record)
        return bool(g.groups == 1 and min(g.in_channels, g.out_channels) >= _DENSE_CHANNELS)

    def memory_ratio(self, name: str = "policy") -> float | None:
        """Peak extra memory of a contender, in units of the convolution's input."""
        measured = self.record.get("memory", {})
        name = self.record["choices"].get(name, name)
        g = geometry_of(self.record)
        size = 4 * math.prod(g.input_shape)
        return measured[name] / size if name in measured else None


@dataclass(frozen=True)
class Group:
    """Rows measured at one batch size and thread count."""

    batch: int
    threads: int
    rows: tuple[Row, ...]

    def select(self, operation: str | None = None, network: str | None = None) -> Group:
        """The rows of an operation (None: both gradients) and of a network (None: every geometry once)."""
        kept = []
        for row in self.rows:
            if row.record["operation"] != operation and (operation or row.record["operation"] == FORWARD):
                continue
            uses = {use[0]: use[1] for use in row.record["uses"]}
            if network is None:
                kept.append(row)
            elif network in uses:
                kept.append(Row(row.record, network, uses[network]))
        return Group(self.batch, self.threads, tuple(kept))

    def ratios(self, other: str, ours: str = "policy", statistic: str = "min_ms") -> list[float]:
        return _present(row.ratio(other, ours, statistic) for row in self.rows)

    def mean(self, other: str, ours: str = "policy", statistic: str = "min_ms") -> float | None:
        """Geometric mean of ratios; None without any."""
        values = self.ratios(other, ours, statistic)
        return statistics.geometric_mean(values) if values else None

    def figures(self) -> dict[str, float | int | None]:
        """The columns of the summary table."""
        eager = self.ratios(TORCH)
        shares = _present(row.gemm_share() for row in self.rows if row.is_dense)
        near = [ratio >= 1 / _NEAR_BEST for ratio in self.ratios("best")]
        memory = _present(row.memory_ratio() for row in self.rows)
        return {
            "layers": len(self.rows),
            "torch": self.mean(TORCH),
            "torch_median": self.mean(TORCH, statistic="median_ms"),
            "torch_worst": min(eager, default=None),
            "torch_share": _share(eager, lambda ratio: ratio >= SLOW),
            "file_torch": self.mean(TORCH, "file"),
            "best_torch": self.mean(TORCH, "best"),
            "tuned_torch": self.mean(TORCH, "tuned"),
            "relaxed_torch": self.mean(TORCH, "policy_8"),
            "conv_grad": self.mean(CONV_GRAD),
            "textbook": self.mean("textbook"),
            "gemm": statistics.geometric_mean(shares) if shares else None,
            "gemm_80": _share(shares, lambda share: share >= 0.8),
            "near_best": sum(near) / len(near) if near else None,
            "memory_2": _share(memory, lambda ratio: ratio <= 2.0),
            "memory_worst": max(memory, default=None),
        }

    def slowest(self, count: int = 12) -> list[Row]:
        """The layers where the policy's choice is furthest behind eager."""
        rows = [row for row in self.rows if row.ratio(TORCH) is not None]
        return sorted(rows, key=lambda row: row.ratio(TORCH) or 0.0)[:count]

    def forward(self) -> float | None:
        """onnxruntime's forward Conv against PyTorch's."""
        return self.mean(TORCH, ORT_FORWARD)


def groups(results: Results) -> list[Group]:
    """All rows with a quiet round, by batch size and thread count; what had none decides nothing."""
    found: dict[tuple[int, int], list[Row]] = {}
    for record in results.records.values():
        if "times" not in record:
            continue
        rows = found.setdefault((record["batch"], record["threads"]), [])
        if was_quiet(record):
            network, layer, _ = record["uses"][0]
            rows.append(Row(record, network, layer))
    return [Group(batch, threads, tuple(rows)) for (batch, threads), rows in sorted(found.items())]


def restless(results: Results, batch: int, threads: int) -> int:
    """How many measurements were left out of a group because none of their rounds was undisturbed."""
    return sum(
        "times" in record and (record["batch"], record["threads"]) == (batch, threads) and not was_quiet(record)
        for record in results.records.values()
    )


def was_quiet(record: dict[str, Any]) -> bool:
    """Whether at least one of the rounds kept was undisturbed."""
    return bool(record["rounds"]["disturbed"] < record["rounds"]["kept"])


def networks_of(group: Group) -> list[str]:
    """Networks with a row in the group, in order of first appearance."""
    return list(dict.fromkeys(use[0] for row in group.rows for use in row.record["uses"]))


def troubles(results: Results) -> list[str]:
    """Contenders that were not timed because they failed or gave a wrong result, one line each."""
    lines = []
    for record in results.records.values():
        use = record["uses"][0]
        threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
        where = f"{use[0]}/{use[1]} {record['operation']}, batch {record['batch']}, {threads}"
        for kind in ("wrong", "failed"):
            by_reason: dict[str, list[str]] = {}
            for name, reason in record.get(kind, {}).items():
                by_reason.setdefault(reason, []).append(name)
            lines += [f"{where}: {', '.join(names)} {kind}: {reason}" for reason, names in by_reason.items()]
    return lines


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _share(values: Sequence[float], test: Callable[[float], bool]) -> float | None:
    return sum(map(test, values)) / len(values) if values else None
