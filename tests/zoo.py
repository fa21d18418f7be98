"""Export input and parameter gradients of every network in `networks.py`, and say how far each is from float64 eager.

python -m tests.zoo                        all of them, written to benchmarks/zoo.json
python -m tests.zoo resnet50 vnet          some, printed only
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


def export_network(network: Network, *, samples: int = 2) -> cg.ExportReport:
    """The network in evaluation mode, every parameter made trainable; verified before it returns."""
    torch.manual_seed(0)
    module = network.build().eval()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return cg.export_gradient(
        module, network.inputs(), wrt=["inputs", "parameters"], of=mean_square, samples=samples, progress=False
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
        "export_seconds": round(seconds - report.seconds["verify"], 2),
        "verify_seconds": round(report.seconds["verify"], 2),
        "notes": report.notes,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names from tests/networks.py; all by default")
    chosen = parser.parse_args(argv).networks
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
            f"{row['export_seconds']:6.1f} s  error {row['relative_error']:.1e} of {row['bound']:.1e}",
            flush=True,
        )
    if not chosen:
        versions = {}
        for name in PACKAGES:
            versions[name] = importlib.metadata.version(name)
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(
            json.dumps({"machine": machine, "versions": versions, "passed": rows, "failed": failed}, indent=1)
        )
        print(f"{len(rows)} exported and verified, {len(failed)} failed; {RESULTS}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
