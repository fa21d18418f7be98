"""What a call costs beside its arithmetic, on a layer that has almost none: `python -m benchmarks.calls`.

A squeeze-and-excite layer (480 to 20 channels on one position), batch 1, one thread: PyTorch, onnxruntime alone,
`GradientSession.run` and the eager functions, on numpy arrays and on torch tensors. Results are compared with PyTorch's
before the clock starts. Prints microseconds a call as Markdown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import convgrad_export as cg
from benchmarks.environment import environment
from benchmarks.timing import rounds_of

ROUNDS = 30
INPUT_SHAPE, WEIGHT_SHAPE, OUTPUT_SHAPE = (1, 480, 1, 1), (20, 480, 1, 1), (1, 20, 1, 1)


def contenders() -> dict[str, Callable[[], Any]]:
    """Every way to the same input gradient."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(WEIGHT_SHAPE, generator=generator) - 0.5
    grad_output = torch.rand(OUTPUT_SHAPE, generator=generator) - 0.5
    tensors = {"weight": weight, "grad_output": grad_output}
    arrays = {name: value.numpy() for name, value in tensors.items()}
    model = cg.build_model("conv2d_input", input_shape=INPUT_SHAPE, weight_shape=WEIGHT_SHAPE, dynamic=(), threads=1)
    session = cg.GradientSession(model, threads=1)
    return {
        "torch.nn.grad.conv2d_input": lambda: torch.nn.grad.conv2d_input(INPUT_SHAPE, weight, grad_output),
        "onnxruntime.InferenceSession.run": lambda: session.inference_session.run(None, arrays)[0],
        "GradientSession.run, numpy": lambda: session.run(arrays)["grad_input"],
        "GradientSession.run, torch": lambda: session.run(tensors)["grad_input"],
        "convgrad_export.conv2d_input, numpy": lambda: cg.conv2d_input(INPUT_SHAPE, *arrays.values()),
        "convgrad_export.conv2d_input, torch": lambda: cg.conv2d_input(INPUT_SHAPE, *tensors.values()),
    }


def main() -> None:
    torch.set_num_threads(1)
    calls = contenders()
    (_, first), *others = calls.items()
    expected = np.asarray(first())
    for name, call in others:
        np.testing.assert_allclose(np.asarray(call()), expected, rtol=1e-5, atol=1e-6, err_msg=name)
    found = environment()
    versions = found["versions"]
    print(f"{found['cpu']}, one thread; torch {versions['torch']}, onnxruntime {versions['onnxruntime']}")
    print("\n| call | microseconds (minimum) | median |\n|---|---|---|")
    for name, result in rounds_of(calls, ROUNDS).items():
        print(f"| {name} | {1e3 * result['min_ms']:.0f} | {1e3 * result['median_ms']:.0f} |")


if __name__ == "__main__":
    main()
