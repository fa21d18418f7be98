"""How good a choice is: the time of the chosen lowering over the best measured one, for the rules and the cost model.

    python -m benchmarks.selection.evaluate

Two sets of measurements. The tables of benchmarks/NOTES.md (15 layers, batch 8, one thread), which the rules were
written from and the cost model has never seen: its constants come from single kernels (`benchmarks.selection.kernels`).
And measurements.json, a random sample of the networks' layers (`benchmarks.selection.measure`). Writes evaluation.json.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.selection.measure import RESULT
from convgrad_export.geometry import ConvGeometry
from convgrad_export.selection.calibration import shipped
from convgrad_export.selection.cost_model import predict_ms
from convgrad_export.selection.policy import choose

NOTES = Path(__file__).parent.parent / "NOTES.md"
EVALUATION = Path(__file__).parent / "evaluation.json"

# Rows of NOTES.md: C, M, size, kernel, stride, dilation, groups.
LAYERS = {
    "64->64 56x56 k3": (64, 64, 56, 3, 1, 1, 1),
    "64->64 56x56 k1": (64, 64, 56, 1, 1, 1, 1),
    "256->64 56x56 k1": (256, 64, 56, 1, 1, 1, 1),
    "128->128 56x56 k3 s2": (128, 128, 56, 3, 2, 1, 1),
    "256->512 56x56 k1 s2": (256, 512, 56, 1, 2, 1, 1),
    "128->128 28x28 k3": (128, 128, 28, 3, 1, 1, 1),
    "256->256 14x14 k3": (256, 256, 14, 3, 1, 1, 1),
    "512->512 7x7 k3": (512, 512, 7, 3, 1, 1, 1),
    "3->64 224x224 k7 s2": (3, 64, 224, 7, 2, 1, 1),
    "64->64 28x28 k3 d2": (64, 64, 28, 3, 1, 2, 1),
    "256 in 32 groups 14x14 k3": (256, 256, 14, 3, 1, 1, 32),
    "96 56x56 k3": (96, 96, 56, 3, 1, 1, 96),
    "96 112x112 k3 s2": (96, 96, 112, 3, 2, 1, 96),
    "384 14x14 k3": (384, 384, 14, 3, 1, 1, 384),
    "192 28x28 k7": (192, 192, 28, 7, 1, 1, 192),
}
DENSE = ("conv_transpose", "flipped_conv", "col2im", "phase_conv", "", "")
DENSE += ("swapped_conv", "im2col", "matmul_taps", "", "")
DEPTHWISE = ("conv_transpose", "swapped_conv", "matmul_taps", "depthwise_taps", "depthwise_rows", "shifted_matmul")
GRADIENT = {"conv_transpose": "input", "flipped_conv": "input", "col2im": "input", "phase_conv": "input"}

Case = tuple[str, str, ConvGeometry, int, dict[str, float]]  # layer, gradient, geometry, threads, times


def noted() -> Iterable[Case]:
    """The direct forms of the tables in NOTES.md; a cell is torch's time over the lowering's."""
    seen: set[tuple[str, int]] = set()
    for line in NOTES.read_text().splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        columns = {len(DENSE): DENSE, len(DEPTHWISE): DEPTHWISE}.get(len(cells))
        if name not in LAYERS or columns is None or (name, len(cells)) in seen:
            continue
        seen.add((name, len(cells)))
        c, m, size, kernel, stride, dilation, groups = LAYERS[name]
        shape, weight = (8, c, size, size), (m, c // groups, kernel, kernel)
        geometry = ConvGeometry.from_forward(shape, weight, stride, dilation * (kernel // 2), dilation, groups)
        for gradient in ("input", "weight"):
            times = {
                f"{gradient}.{column}": 1 / statistics.fmean(float(part) for part in cell.split("-"))
                for column, cell in zip(columns, cells, strict=True)
                if column and cell != "-" and GRADIENT.get(column, "weight") == gradient
            }
            if len(times) > 1:
                yield name, gradient, geometry, 1, times


def sampled() -> Iterable[Case]:
    """measurements.json: minima over interleaved rounds."""
    for entry in json.loads(RESULT.read_text())["results"]:
        arguments = dict(entry["geometry"])
        geometry = ConvGeometry.from_dict(arguments)
        times = {name: values[0] for name, values in entry["min_median_rounds"].items()}
        if len(times) > 1:
            yield entry["layer"], entry["gradient"], geometry, entry["threads"], times


def judged(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """The two choices for each case and their regret; None where the chosen lowering was not measured."""
    rows = []
    for layer, gradient, geometry, threads, times in cases:
        best = min(times, key=lambda name: times[name])
        predicted = {name: predict_ms(name, geometry, costs=shipped(), threads=threads) for name in times}
        chosen = {
            "rules": choose(gradient, geometry).name,
            "cost model": min(predicted, key=lambda name: predicted[name]),
        }
        regret = {way: times[name] / times[best] if name in times else None for way, name in chosen.items()}
        rows.append(
            {"layer": layer, "gradient": gradient, "threads": threads, "best": best, "chosen": chosen, "regret": regret}
        )
    return rows


def summary(rows: list[dict[str, Any]], way: str) -> dict[str, Any]:
    regrets = [row["regret"][way] for row in rows if row["regret"][way] is not None]
    within = sum(regret <= 1.1 for regret in regrets)
    mean = statistics.geometric_mean(regrets)
    return {
        "count": len(regrets),
        "within_10_percent": within,
        "geometric_mean": round(mean, 3),
        "worst": round(max(regrets), 2),
    }


def main() -> int:
    record: dict[str, Any] = {"environment": environment(), "summary": {}, "choices": {}}
    for source, cases in (("NOTES.md", noted()), ("measurements.json", sampled())):
        rows = record["choices"][source] = judged(cases)
        record["summary"][source] = {way: summary(rows, way) for way in ("rules", "cost model")}
        for way, values in record["summary"][source].items():
            print(f"{source:<18} {way:<11} {values}")
        for row in rows:
            for way, regret in row["regret"].items():
                if regret is not None and regret > 1.1:
                    what = f"{row['layer']} {row['gradient']}: {row['chosen'][way]}, best {row['best']}"
                    print(f"  {regret:.2f} {way}: {what}")
    EVALUATION.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
