"""A small result file with known figures, for the tests of reports and resuming."""

from __future__ import annotations

from typing import Any

from convgrad_export.bench.layer import multiplications
from convgrad_export.bench.networks import NETWORKS
from convgrad_export.bench.plan import Item
from convgrad_export.bench.results import Results

ENVIRONMENT = {
    "cpu": "a processor",
    "cores": 2,
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
}


def timing(milliseconds: float) -> dict[str, Any]:
    return {"min_ms": milliseconds, "median_ms": 2 * milliseconds, "rounds": 7}


def record(item: Item, times: dict[str, float], **more: Any) -> dict[str, Any]:
    return {
        "operation": item.operation,
        "batch": item.geometry.batch,
        "threads": item.threads,
        "geometry": item.geometry.to_dict(),
        "uses": [list(use) for use in item.uses],
        "multiplications": multiplications(item.geometry),
        "choices": {
            "policy": "weight.matmul_taps",
            "policy_8": "weight.winograd6",
            "tuned": None,
            "textbook": "weight.swapped_conv",
        },
        "times": {name: timing(value) for name, value in times.items()},
        "errors": {},
        "wrong": {},
        "failed": {},
        "rounds": {"kept": 7, "discarded": 1, "disturbed": 0, "stolen_s": 0.0, "foreign_s": 0.0},
        "commit": "abc1234",
        **more,
    }


def example() -> Results:
    """Two weight gradients of ResNet-18: one at twice eager's speed, one at half of it."""
    layers = {layer.name: layer for layer in NETWORKS["resnet18"]()}
    results = Results(dict(ENVIRONMENT))
    for name, torch_ms, memory in (("layer1", 20.0, 6_422_528), ("layer2", 5.0, 12_845_056)):
        item = Item("weight", layers[name].geometry(8), 1, [("resnet18", name, layers[name].count)])
        times = {
            "torch": torch_ms,
            "weight.matmul_taps": 10.0,
            "weight.im2col": 9.5,
            "weight.winograd6": 4.0,
            "weight.swapped_conv": 40.0,
            "ort_training": 20.0,
            "gemm": 10.0,
        }
        results.records[item.key] = record(item, times, memory={"weight.matmul_taps": memory})
    return results
