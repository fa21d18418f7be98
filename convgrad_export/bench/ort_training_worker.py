"""onnxruntime-training's ConvGrad, timed on request. Run by a Python that has onnxruntime-training.

    python ort_training_worker.py

Reads one JSON object a line from standard input and answers each with one on standard output:

    {"command": "prepare", "folder": F, "gradient": "input" | "weight", "attributes": {...}, "threads": n}
        Loads F/input.npy, F/weight.npy and F/grad_output.npy, runs the gradient once and writes F/result.npy.
    {"command": "time", "repeats": n}    n runs; answers {"seconds": s}
    {"command": "release"}               drops the session

An answer with "error" says what went wrong. The first line answers nothing: it gives the version and the process id.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

OPERANDS = {"dY": "grad_output", "X": "input", "W": "weight"}
OUTPUTS = {"input": "dX", "weight": "dW"}


def import_onnxruntime() -> Any:
    """Its package imports two training modules that need torch, which neither this worker nor ConvGrad does."""
    for name in ("onnxruntime.training.optim", "onnxruntime.training.amp"):
        sys.modules.setdefault(name, types.ModuleType(name))
    import onnxruntime

    return onnxruntime


def conv_grad_model(gradient: str, shapes: dict[str, tuple[int, ...]], attributes: dict[str, Any]) -> bytes:
    """One ConvGrad node that computes one gradient."""
    wanted = OUTPUTS[gradient]
    node = helper.make_node(
        "ConvGrad",
        list(OPERANDS),
        [name if name == wanted else "" for name in OUTPUTS.values()],
        domain="com.microsoft",
        **attributes,
    )
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[operand]) for name, operand in OPERANDS.items()
    ]
    graph = helper.make_graph(
        [node], "conv_grad", inputs, [helper.make_tensor_value_info(wanted, TensorProto.FLOAT, None)]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return bytes(model.SerializeToString())


class Worker:
    """The prepared call, if any."""

    def __init__(self, onnxruntime: Any) -> None:
        self.onnxruntime = onnxruntime
        self.session: Any = None
        self.feeds: dict[str, Any] = {}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        folder = Path(request["folder"])
        arrays = {name: np.load(folder / f"{operand}.npy") for name, operand in OPERANDS.items()}
        shapes = {operand: arrays[name].shape for name, operand in OPERANDS.items()}
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = request["threads"]
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = self.onnxruntime.InferenceSession(
            conv_grad_model(request["gradient"], shapes, request["attributes"]),
            options,
            providers=["CPUExecutionProvider"],
        )
        self.feeds = {name: self.onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        np.save(folder / "result.npy", self.session.run_with_ort_values(None, self.feeds)[0].numpy())
        return {}

    def time(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(request["repeats"]):
            self.session.run_with_ort_values(None, self.feeds)
        return {"seconds": time.perf_counter() - start}

    def release(self, request: dict[str, Any]) -> dict[str, Any]:
        self.session, self.feeds = None, {}
        return {}


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # onnxruntime may print to standard output
    os.dup2(2, 1)
    onnxruntime = import_onnxruntime()
    worker = Worker(onnxruntime)
    print(json.dumps({"version": onnxruntime.__version__, "process": os.getpid()}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request["command"])(request)
        except Exception as error:  # a layer it cannot do must not end the comparison of the others
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(answer), file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
