"""Worst error of every lowering over the shared case table, by dtype and rank: `python -m benchmarks.accuracy_table`.

Runs each applicable lowering on onnxruntime with random and with integer-valued operands, takes float64 autograd as the
reference and reports the largest error in units of the bound of `convgrad_export.accuracy`. Writes accuracy.json beside
this file and prints the table as Markdown; exits with 1 when any error exceeds its bound.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.environment import environment
from convgrad_export import dtypes
from convgrad_export.accuracy import compare
from convgrad_export.lowering import LOWERINGS
from tests.cases import CASES
from tests.running import run_lowering

RANKS = (1, 2, 3)
RESULT = Path(__file__).parent / "accuracy.json"


def measure() -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    """lowering -> dtype -> rank -> {worst, exact_on_integers, cases}."""
    table: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    for case in track(CASES, "cases", console=Console(stderr=True), transient=True):
        geometry = case.geometry
        for dtype in dtypes.NAMES:
            for integers in (False, True):
                operands = case.operands(dtype, integers=integers)
                expected = case.expected(operands, dtype)
                for lowering in LOWERINGS.values():
                    if lowering.why_not(geometry, dtype) is not None:
                        continue
                    result = run_lowering(geometry, lowering, operands, dtype)
                    report = compare(result, *expected[lowering.gradient], lowering.error_factor)
                    cell = (
                        table.setdefault(lowering.name, {})
                        .setdefault(dtype, {})
                        .setdefault(str(geometry.rank), {"worst": 0.0, "exact_on_integers": True, "cases": 0})
                    )
                    cell["worst"] = max(cell["worst"], report.worst)  # type: ignore[call-overload]
                    if integers:
                        cell["exact_on_integers"] = bool(cell["exact_on_integers"]) and report.exact
                        cell["cases"] += 1  # type: ignore[operator]
    return table


def markdown(table: dict) -> str:
    """Rows are lowerings, columns dtypes; a cell holds the worst error for 1, 2 and 3 spatial dimensions."""
    lines = [
        "| lowering | bound | " + " | ".join(dtypes.NAMES) + " | integers exact |",
        "|---|---|" + "---|" * (len(dtypes.NAMES) + 1),
    ]
    for name, lowering in LOWERINGS.items():
        cells, exact = [], True
        for dtype in dtypes.NAMES:
            by_rank = table[name].get(dtype, {})
            cells.append(
                " / ".join(f"{by_rank[str(rank)]['worst']:.2f}" if str(rank) in by_rank else "-" for rank in RANKS)
                if by_rank
                else "-"
            )
            exact = exact and all(cell["exact_on_integers"] for cell in by_rank.values())
        lines.append(f"| `{name}` | {lowering.error_factor:g} | {' | '.join(cells)} | {'yes' if exact else 'no'} |")
    return "\n".join(lines)


def main() -> int:
    table = measure()
    RESULT.write_text(json.dumps({"environment": environment(), "table": table}, indent=1) + "\n")
    print(markdown(table))
    worst = max(cell["worst"] for name in table.values() for dtype in name.values() for cell in dtype.values())
    print(f"\n{len(CASES)} cases; worst error {worst:.2f} of its bound; written to {RESULT}")
    return 0 if worst <= 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
