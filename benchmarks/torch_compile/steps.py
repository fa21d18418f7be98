"""Compiled training steps with and without the pass, beside eager and onnxruntime.

    python -m benchmarks.torch_compile.steps [--networks NAME ...] [--threads 1 2] [--rounds 7] [--table]

Each step is forward, mean square loss and backward into the parameters' gradients. The gradients of every backend are
compared with eager float64 before anything is timed; an error over 4 times PyTorch's own (eager or Inductor) fails.
Contenders alternate within one process. Writes steps.json beside this file, in which rows that were not measured anew
stay, and README.md from it; --table writes README.md alone. Needs torchvision.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import environment
from benchmarks.timing import rounds_of
from convgrad_export.integrations.compile_backend import convgrad, convgrad_ort
from tests.networks import declare_torchvision_operators

RESULT = Path(__file__).parent / "steps.json"
README = Path(__file__).parent / "README.md"


def _vision(name: str) -> nn.Module:
    declare_torchvision_operators()
    import torchvision

    return torchvision.models.get_model(name, weights=None)


class ConvNextBlocks(nn.Module):
    """The first stage of ConvNeXt-tiny (Liu et al., arXiv:2201.03545) with its stem: three blocks of 96 channels."""

    def __init__(self) -> None:
        super().__init__()
        features = _vision("convnext_tiny").features
        self.stem, self.blocks = features[0], features[1]
        for module in self.blocks.modules():
            if type(module).__name__ == "StochasticDepth":
                module.p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


class TemporalNetwork(nn.Sequential):
    """Six causal dilated levels of 64 channels after Bai et al., arXiv:1803.01271."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for level in range(6):
            dilation = 2**level
            layers += [nn.ConstantPad1d((2 * dilation, 0), 0.0), nn.Conv1d(64, 64, 3, dilation=dilation), nn.ReLU()]
        super().__init__(*layers)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: _vision("resnet18"), (8, 3, 128, 128)),
    "mobilenet_v2": (lambda: _vision("mobilenet_v2"), (8, 3, 128, 128)),
    "convnext_tiny_stage1": (ConvNextBlocks, (8, 3, 128, 128)),
    "r3d_18": (lambda: _vision("r3d_18"), (1, 3, 8, 56, 56)),
    "tcn": (TemporalNetwork, (8, 64, 1024)),
}
BACKENDS: dict[str, Any] = {"eager": None, "inductor": "inductor", "convgrad": convgrad, "convgrad_ort": convgrad_ort}


def step_of(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss = module(x).square().mean()
        loss.backward()
        return loss

    parameters = list(module.parameters())
    return step


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None])


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    module, x = build().train(), torch.randn(shape)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    exact = copy.deepcopy(module).double()
    with torch.backends.mkldnn.flags(enabled=False):
        step_of(exact, x.double())()
    reference = gradients(exact)
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    steps, errors = {}, {}
    for backend, target in BACKENDS.items():
        own = copy.deepcopy(module)
        compiled = own if target is None else torch.compile(own, backend=target, dynamic=False)
        steps[backend] = step_of(compiled, x)
        steps[backend]()
        errors[backend] = ((gradients(own) - reference).norm() / reference.norm()).item()
    # A sign of a pre-activation near zero that rounding flips changes a whole row: PyTorch's own figures set the scale.
    allowed = 4 * max(errors["eager"], errors["inductor"]) + 1e-7
    for backend, error in errors.items():
        if error > allowed:
            raise SystemExit(f"{name}, {backend}: relative error {error:.1e}, allowed {allowed:.1e}: {errors}")
    return {"network": name, "shape": shape, "threads": threads, "errors": errors, "times": rounds_of(steps, rounds)}


HEAD = """# Training steps under torch.compile

One step is forward, mean square loss and backward into every parameter's gradient, float32. `inductor` is
`torch.compile` alone, which calls PyTorch's convolution_backward; `convgrad` is the same with the pass; `convgrad_ort`
runs both graphs on onnxruntime. Median milliseconds of {rounds} alternating rounds in one process; in brackets the
minima's ratio inductor / backend, above 1 where the backend is faster. Before timing, every backend's gradients are
compared with eager float64. Rows marked \\* are no comparison: other work had a core at the time (eager itself took
longer at two threads than at one), so their figures only say that the steps ran.

{cpu}, {cores} cores, {versions}. Written by `python -m benchmarks.torch_compile.steps`; the figures are in
[steps.json](steps.json), those of single layers, which the rules in `selection/aten_policy.py` rest on, in
[layers.json](layers.json).

"""


def readme(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    environment = record["environment"]
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "onnxruntime"))
    kept = sorted({timing["rounds"] for result in record["results"] for timing in result["times"].values()})
    rounds = str(kept[0]) if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
    text = HEAD.format(cpu=environment["cpu"], cores=environment["cores"], versions=versions, rounds=rounds)
    columns = ("network", "input", "threads", *BACKENDS)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    eager = {(r["network"], r["threads"]): r["times"]["eager"]["median_ms"] for r in record["results"]}
    for result in record["results"]:
        key = (result["network"], result["threads"])
        disturbed = eager[key] > eager.get((key[0], 1), eager[key])
        base = result["times"]["inductor"]["min_ms"]
        cells = [result["network"] + " \\*" * disturbed, "x".join(map(str, result["shape"])), str(result["threads"])]
        cells += [f"{timing['median_ms']:.1f} ({base / timing['min_ms']:.2f})" for timing in result["times"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return text + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="write README.md from steps.json, measure nothing")
    options = parser.parse_args()
    if not options.table:
        rows = json.loads(RESULT.read_text())["results"] if RESULT.exists() else []
        measured = {(row["network"], row["threads"]): row for row in rows}
        for name in options.networks:
            for threads in options.threads:
                row = measure(name, threads, options.rounds)
                measured[name, threads] = row
                times = {key: round(value["median_ms"], 1) for key, value in row["times"].items()}
                print(name, threads, times, file=sys.stderr, flush=True)
        order = list(NETWORKS)
        results = sorted(measured.values(), key=lambda row: (order.index(row["network"]), row["threads"]))
        RESULT.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    README.write_text(readme(json.loads(RESULT.read_text())))
    print(README.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
