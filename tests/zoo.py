"""Export input and parameter gradients of every network in `networks.py`, and say how far each is from float64 eager.

python -m tests.zoo                        all of them, written to benchmarks/zoo.json
python -m tests.zoo resnet50 vnet          some, printed only
python -m tests.zoo resnet50 --update      some, in place of their rows in benchmarks/zoo.json
python -m tests.zoo --table                the committed results as a table, by package

Needs torchvision, timm, segmentation-models-pytorch, MONAI, transformers and diffusers; torchvision, timm and
segmentation-models-pytorch with `pip install --no-deps` beside a CPU build of torch.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import convgrad_export as cg

from .networks import NETWORKS, Network, mean_square

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "zoo.json"
PACKAGES = (
    *("torch", "onnx", "onnxruntime", "onnxscript", "torchvision", "timm", "segmentation_models_pytorch", "monai"),
    *("transformers", "diffusers"),
)


def export_network(
    network: Network, path: Path | None = None, *, samples: int = 2, training: bool = False
) -> cg.ExportReport:
    """The network in evaluation mode, every parameter made trainable; verified before it returns."""
    torch.manual_seed(0)
    module = network.build().train(training)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return cg.export_gradient(
        module, network.inputs(), path, wrt=["inputs", "parameters"], of=mean_square, samples=samples, progress=False
    )


def measure(network: Network) -> dict[str, Any]:
    start = time.perf_counter()
    report = export_network(network)
    seconds = time.perf_counter() - start
    worst = max(report.errors, key=lambda name: report.errors[name].relative / report.errors[name].bound)
    return {
        "network": network.name,
        "package": network.package,
        "gradients": sum(name.endswith(".grad") for name in report.outputs),
        "nodes": sum(report.operators.values()),
        "lowerings": sorted({choice.lowering for choice in report.lowerings}),
        "worst_output": worst,
        "relative_error": report.errors[worst].relative,
        "bound": report.errors[worst].bound,
        "cancelled": report.errors[worst].cancelled,
        "cancelled_outputs": sum(error.cancelled for error in report.errors.values()),
        "export_seconds": round(seconds - report.seconds["verify"], 2),
        "verify_seconds": round(report.seconds["verify"], 2),
        "notes": report.notes,
    }


def markdown(results: dict[str, Any]) -> str:
    """One row a package: how many networks, gradients and nodes, and the error that came closest to its bound."""
    lines = ["| package | networks | gradients | nodes | worst relative error / bound |", "|---|---|---|---|---|"]
    for package in dict.fromkeys(row["package"] for row in results["passed"]):
        rows = [row for row in results["passed"] if row["package"] == package]
        worst = max(rows, key=lambda row: row["relative_error"] / row["bound"])
        lines.append(
            f"| {package} {results['versions'][package]} | {len(rows)} | {sum(r['gradients'] for r in rows):,} "
            f"| {sum(r['nodes'] for r in rows):,} | {worst['relative_error']:.1e} / {worst['bound']:.1e} "
            f"({worst['network']}) |"
        )
    return "\n".join(lines)


def write_results(rows: list[dict[str, Any]], failed: list[dict[str, Any]]) -> None:
    """Puts new rows in place of those of the same networks, in the list's order."""
    new = {row["network"] for row in (*rows, *failed)}
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"passed": [], "failed": []}
    order = [network.name for network in NETWORKS]
    known = [row for row in old["passed"] if row["network"] not in new and row["network"] in order]
    # The load tells what the times are worth.
    load = round(os.getloadavg()[1], 1)
    results = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": load},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "passed": sorted([*known, *rows], key=lambda row: order.index(row["network"])),
        "failed": [*(row for row in old["failed"] if row["network"] not in new), *failed],
    }
    RESULTS.write_text(json.dumps(results, indent=1))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names from tests/networks.py; all by default")
    parser.add_argument("--table", action="store_true", help="print the committed results and stop")
    parser.add_argument("--update", action="store_true", help="write the named networks' rows to the results")
    options = parser.parse_args(argv)
    if options.table:
        print(markdown(json.loads(RESULTS.read_text())))
        return 0
    chosen = options.networks
    if unknown := set(chosen) - {network.name for network in NETWORKS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    rows, failed = [], []
    for network in NETWORKS:
        if chosen and network.name not in chosen:
            continue
        try:
            row = measure(network)
        except Exception as error:  # the list goes on; the exit status says that one failed
            failed.append({"network": network.name, "error": f"{type(error).__name__}: {error}"})
            print(f"{network.name:28s} FAILED {failed[-1]['error'][:600]}", flush=True)
            continue
        finally:
            gc.collect()
        rows.append(row)
        print(
            f"{network.name:28s} {row['gradients']:4d} gradients {row['nodes']:5d} nodes "
            f"{row['export_seconds']:6.1f} s  error {row['relative_error']:.1e} of {row['bound']:.1e}"
            f"{' of what cancels' * row['cancelled']}",
            flush=True,
        )
    if options.update or not chosen:
        write_results(rows, failed)
        print(f"{len(rows)} exported and verified, {len(failed)} failed; {RESULTS}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
