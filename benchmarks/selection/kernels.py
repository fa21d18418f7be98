"""Single kernels measured on this machine: what the cost model's shipped constants are fitted to.

    python -m benchmarks.selection.kernels

One small onnxruntime session for each operator and shape, one thread, minimum of the rounds. The constants of each kind
of work are the non-negative least squares fit, in relative error, to that kind's kernels alone, so each stands for what
it is called. Writes kernels.json beside this file and convgrad_export/selection/costs.json.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

import convgrad_export
from benchmarks.environment import environment
from convgrad_export.lowering import CPU
from convgrad_export.selection import runner
from convgrad_export.selection.calibration import KINDS, probe_model
from convgrad_export.selection.cost_model import UNITS, step_amounts
from convgrad_export.selection.graph_walk import graph_steps

RESULT = Path(__file__).parent / "kernels.json"
SHIPPED = Path(convgrad_export.__file__).parent / "selection" / "costs.json"
SHARED = 0.55  # of its time on one thread is what shared work is taken to need on two


def kernels() -> dict[str, list[Any]]:
    """Models by kind of work."""
    image = [(4, 16, 28), (4, 64, 28), (2, 256, 14), (8, 64, 56), (8, 3, 112), (8, 512, 7)]
    result: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for m, k, n in ((64, 64, 784), (64, 6272, 64), (64, 6272, 576), (256, 256, 784), (512, 512, 512), (16, 3136, 16),
                    (576, 64, 784), (3, 12544, 64), (1000, 32, 1000), (8, 8, 8)):  # fmt: skip
        result["gemm"].append(probe_model([[m, k], [k, n]], [("MatMul", ["x0", "x1"], {})]))
        transposed = [("Transpose", ["x1"], {"perm": [1, 0]}), ("MatMul", ["x0", "y0"], {})]
        result["gemm"].append(probe_model([[m, k], [n, k]], transposed))
    for batch, m, k, n in (
        (8, 576, 64, 784),
        (96, 9, 64, 12),
        (384, 14, 112, 16),
        (32, 8, 1568, 72),
        (36, 128, 64, 64),
    ):
        result["gemm"].append(probe_model([[batch, m, k], [batch, k, n]], [("MatMul", ["x0", "x1"], {})]))
    for (batch, c, size), filters, kernel in itertools.product(image, (32, 128), (1, 3)):
        shape, pads = [batch, c, size, size], {"pads": [kernel // 2] * 4}
        result["conv"].append(probe_model([shape, [filters, c, kernel, kernel]], [("Conv", ["x0", "x1"], pads)]))
        result["deconv"].append(
            probe_model([shape, [c, filters, kernel, kernel]], [("ConvTranspose", ["x0", "x1"], pads)])
        )
    for batch, c, size, kernel in ((4, 32, 28, 3), (8, 96, 14, 3), (2, 64, 28, 7)):
        shape, attributes = [batch, c, size, size], {"pads": [kernel // 2] * 4, "group": c}
        for kind, op in (("conv", "Conv"), ("deconv", "ConvTranspose")):
            result[kind].append(probe_model([shape, [c, 1, kernel, kernel]], [(op, ["x0", "x1"], attributes)]))
    for size, kernel in ((64, 3), (256, 7), (128, 14)):  # a weight gradient's Conv: few positions, a large kernel
        shapes = [[size, 4, 16, 16], [size, 4, kernel, kernel]]
        result["conv"].append(probe_model(shapes, [("Conv", ["x0", "x1"], {"pads": [1] * 4})]))
    for batch, c, size, kernel in ((4, 64, 28, 3), (8, 256, 14, 3), (2, 16, 56, 5), (8, 32, 7, 3), (4, 64, 28, 1)):
        sizes = {"size": [size, size], "block": [kernel, kernel]}
        result["col2im"].append(
            probe_model(
                [[batch, c * kernel * kernel, size * size]],
                [("Col2Im", ["x0", "size", "block"], {"pads": [kernel // 2] * 4})],
                sizes,
            )
        )
    for c, size in ((16, 30), (64, 58), (256, 16), (128, 58), (512, 30), (64, 114), (512, 114), (1024, 58), (2048, 9)):
        sliced = {"starts": [1, 1], "stops": [size - 1, size - 1], "axes": [1, 2], "steps": [1, 1]}
        result["copy"].append(probe_model([[c, size, size]], [("Slice", ["x0", *sliced], {})], sliced))
        pads = {"pads": [0, 1, 1, 0, 1, 1]}
        result["copy"].append(probe_model([[c, size, size]], [("Pad", ["x0", "pads"], {})], pads))
        result["copy"].append(probe_model([[c, size, size]] * 4, [("Concat", ["x0", "x1", "x2", "x3"], {"axis": 0})]))
        result["copy"].append(probe_model([[8, c // 8, size * size]], [("Transpose", ["x0"], {"perm": [1, 0, 2]})]))
        result["transposed"].append(probe_model([[c, size * size]], [("Transpose", ["x0"], {"perm": [1, 0]})]))
        stepped = {"starts": [0, 0], "stops": [size, size], "axes": [1, 2], "steps": [2, 2]}
        result["strided"].append(probe_model([[c, size, size]], [("Slice", ["x0", *stepped], {})], stepped))
        result["elementwise"].append(probe_model([[c, size, size]] * 2, [("Mul", ["x0", "x1"], {})]))
        axes = {"axes": [0, 2, 3]}
        result["reduced"].append(
            probe_model([[4, c, size, size]], [("ReduceSum", ["x0", "axes"], {"keepdims": 0})], axes)
        )
    for length in (16, 64):
        result["call"].append(probe_model([[4]], [("Neg", [f"y{i - 1}" if i else "x0"], {}) for i in range(length)]))
    return result


def milliseconds(model: Any) -> float:
    """Minimum over as many calls as fit in a tenth of a second, between 5 and 40."""
    session = runner.open_session(model.SerializeToString(), CPU, 1)
    binding = session.io_binding()
    rng = np.random.default_rng(0)
    feeds = {
        v.name: rng.random([d.dim_value for d in v.type.tensor_type.shape.dim], np.float32) for v in model.graph.input
    }
    for name, value in runner.place(feeds, "float32", CPU).items():
        binding.bind_ortvalue_input(name, value)
    for value in session.get_outputs():
        binding.bind_output(value.name, "cpu")
    times: list[float] = []
    end = time.perf_counter() + 0.1
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 40):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def counted(model: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for step in graph_steps(model):
        for key, count in step_amounts(step).items():
            total[key] = total.get(key, 0.0) + count
    return total


def main() -> int:
    costs = dict.fromkeys(UNITS, 0.0)
    record = []
    models = kernels()
    for kind in ("call", *(name for name in models if name != "call")):
        keys = KINDS[kind]
        measured = [(counted(model), milliseconds(model)) for model in models[kind]]
        rows, target = [], []
        for counts, ms in measured:
            known = sum(count * costs[key] for key, count in counts.items() if key not in keys) * 1e-6
            left = max(ms - known, 0.1 * ms)
            rows.append([counts.get(key, 0.0) * 1e-6 / left for key in keys])
            target.append(1.0)
        matrix = np.array(rows)
        scale = np.sqrt((matrix**2).sum(0))
        scale[scale == 0] = 1.0
        solution, _ = nnls(matrix / scale, np.array(target))
        costs.update({key: float(f"{value:.4g}") for key, value in zip(keys, solution / scale, strict=True)})
        for counts, ms in measured:
            predicted = sum(count * costs[key] for key, count in counts.items()) * 1e-6
            record.append({"kind": kind, "amounts": counts, "ms": round(ms, 5), "predicted_ms": round(predicted, 5)})
        errors = [entry["predicted_ms"] / entry["ms"] for entry in record if entry["kind"] == kind]
        print(f"{kind:<12} {len(errors)} kernels, predicted / measured {min(errors):.2f} to {max(errors):.2f}")
    RESULT.write_text(json.dumps({"environment": environment(), "kernels": record}) + "\n")
    where = environment()
    content = {
        "source": f"{where['cpu']}, onnxruntime {where['versions']['onnxruntime']}",
        "unit": "nanoseconds",
        "one": costs,
        "two": {key: float(f"{cost * (SHARED if UNITS[key][1] else 1):.4g}") for key, cost in costs.items()},
    }
    SHIPPED.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(costs, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
