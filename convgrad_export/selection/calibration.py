"""The cost model's constants: shipped ones, the same everywhere, and ones measured on this machine in seconds.

A measurement runs a few small graphs, one for each kind of work, and compares their times with what the shipped
constants predict for the same graphs; the constants of that kind are scaled by the ratio. The result is kept beside the
tuning cache, under the same key of processor and versions.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TuningCacheError
from ..files import write_atomically
from ..lowering import CPU
from . import runner
from .cache import cache_path
from .cost_model import UNITS, Costs, step_amounts
from .graph_walk import graph_steps
from .machine import machine

_FORMAT = "convgrad cost calibration"
_ROUNDS = 7
_BATCH, _CHANNELS, _SIZE = 4, 64, 28


@functools.cache
def shipped() -> Costs:
    """Constants fitted to the measurements in benchmarks/selection; they do not depend on this machine."""
    content = json.loads((Path(__file__).parent / "costs.json").read_text())
    return Costs(content["one"], content["two"], content["source"])


def calibrate(seconds: float = 10.0) -> Costs:
    """Measure this machine's constants, at one thread and at two.

    Args:
        seconds: an upper limit; kinds of work that are left then keep the shipped constants.

    Raises:
        MissingDependencyError: no onnxruntime.
    """
    end = time.monotonic() + seconds * 0.9
    base = shipped()
    measured: dict[int, dict[str, float]] = {1: dict(base.one), 2: dict(base.two)}
    for kind, model in probes().items():
        steps = graph_steps(model)
        feeds = {
            value.name: np.zeros([dimension.dim_value for dimension in value.type.tensor_type.shape.dim], np.float32)
            for value in model.graph.input
        }
        for threads, costs in measured.items():
            if time.monotonic() > end:
                break
            took = _milliseconds(model.SerializeToString(), feeds, threads)
            counts: dict[str, float] = {}
            for step in steps:
                for key, count in step_amounts(step).items():
                    counts[key] = counts.get(key, 0.0) + count
            reference = base.one if threads == 1 else base.two
            fixed = sum(count * reference[key] for key, count in counts.items() if key not in KINDS[kind]) * 1e-6
            scaled = sum(count * reference[key] for key, count in counts.items() if key in KINDS[kind]) * 1e-6
            if scaled > 0:
                # A probe that is faster than its other parts alone says nothing; a factor of 20 is another fault.
                ratio = min(20.0, max(0.05, (took - fixed) / scaled))
                for key in KINDS[kind]:
                    costs[key] = reference[key] * ratio
    return Costs(measured[1], measured[2], "measured on this machine")


def calibrated(path: str | os.PathLike[str] | None = None, *, again: bool = False) -> Costs:
    """This machine's constants, measured on first use and kept in a file.

    Args:
        path: of the file; None for ``calibration.json`` beside the tuning cache. again: measure even if it is there.

    Raises:
        TuningCacheError: the file there is something else.
    """
    target = Path(path) if path is not None else cache_path().with_name("calibration.json")
    here = machine(CPU)
    if target.exists() and not again:
        content = _read(target)
        if content["machine"] == here:
            return Costs(content["one"], content["two"], "measured on this machine")
    costs = calibrate()
    content = {"format": _FORMAT, "machine": here, "one": dict(costs.one), "two": dict(costs.two)}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, (json.dumps(content, indent=1) + "\n").encode(), overwrite=True)
    return costs


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        sound = content["format"] == _FORMAT and all(
            set(content[key]) == set(UNITS) and all(0 <= float(cost) < 1e12 for cost in content[key].values())
            for key in ("one", "two")
        )
        sound = sound and isinstance(content["machine"], dict)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise TuningCacheError(f"{path} is not an intact cost calibration: delete it, and it is measured again")
    return content


def _milliseconds(model: bytes, feeds: dict[str, np.ndarray], threads: int) -> float:
    session = runner.open_session(model, CPU, threads)
    binding = session.io_binding()
    for name, value in runner.place(feeds, "float32", CPU).items():
        binding.bind_ortvalue_input(name, value)
    for value in session.get_outputs():
        binding.bind_output(value.name, "cpu")
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


# Which constants a probe scales.
KINDS: dict[str, tuple[str, ...]] = {
    "gemm": tuple(key for key in UNITS if key.startswith("gemm")),
    "conv": tuple(key for key in UNITS if key.startswith("conv")),
    "deconv": tuple(key for key in UNITS if key.startswith("deconv")),
    "col2im": ("col2im",),
    "copy": ("copy_near", "copy_far", "copy_memory", "copy_row"),
    "strided": ("strided",),
    "transposed": ("transposed",),
    "elementwise": ("elementwise",),
    "reduced": ("reduced",),
    "call": ("call",),
}


def probes() -> dict[str, Any]:
    """One small model for each kind of work, by the names of `KINDS`."""
    image = [_BATCH, _CHANNELS, _SIZE, _SIZE]
    makers: dict[str, Callable[[], Any]] = {
        "gemm": lambda: probe_model([[384, 576], [576, 384]], [("MatMul", ["x0", "x1"], {})]),
        "conv": lambda: probe_model([image, [_CHANNELS, _CHANNELS, 3, 3]], [("Conv", ["x0", "x1"], {"pads": [1] * 4})]),
        "deconv": lambda: probe_model(
            [image, [_CHANNELS, _CHANNELS, 3, 3]], [("ConvTranspose", ["x0", "x1"], {"pads": [1] * 4})]
        ),
        "col2im": lambda: probe_model(
            [[_BATCH, _CHANNELS * 9, _SIZE * _SIZE]],
            [("Col2Im", ["x0", "size", "block"], {"pads": [1] * 4})],
            {"size": [_SIZE, _SIZE], "block": [3, 3]},
        ),
        "copy": lambda: _sliced([512, 66, 66], [1, 1], [65, 65]),
        "strided": lambda: _sliced([64, 112, 112], [0, 0], [112, 112], [1, 2]),
        "transposed": lambda: probe_model([[512, 1024]], [("Transpose", ["x0"], {"perm": [1, 0]})]),
        "elementwise": lambda: probe_model([[64, 56, 56]] * 2, [("Add", ["x0", "x1"], {})]),
        "reduced": lambda: probe_model(
            [[8, 64, 56, 56]], [("ReduceSum", ["x0", "axes"], {"keepdims": 0})], {"axes": [0, 2, 3]}
        ),
        "call": lambda: probe_model([[4]], [("Neg", [f"y{index - 1}" if index else "x0"], {}) for index in range(64)]),
    }
    return {name: make() for name, make in makers.items()}


def _sliced(shape: list[int], starts: list[int], stops: list[int], steps: list[int] | None = None) -> Any:
    constants = {"starts": starts, "stops": stops, "axes": [1, 2], "steps": steps or [1, 1]}
    return probe_model([shape], [("Slice", ["x0", *constants], {})], constants)


def probe_model(
    shapes: list[list[int]],
    nodes: list[tuple[str, list[str], dict[str, Any]]],
    constants: dict[str, list[int]] | None = None,
) -> Any:
    """A chain of nodes over inputs x0, x1, ...; node i writes y<i>."""
    import onnx
    from onnx import helper

    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node(op, inputs, [f"y{index}"], **attributes)
            for index, (op, inputs, attributes) in enumerate(nodes)
        ],
        "probe",
        [helper.make_tensor_value_info(f"x{index}", float32, shape) for index, shape in enumerate(shapes)],
        [helper.make_tensor_value_info(f"y{len(nodes) - 1}", float32, None)],
        [onnx.numpy_helper.from_array(np.array(value, np.int64), name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)
