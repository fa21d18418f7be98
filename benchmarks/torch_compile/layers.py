"""Which lowerings beat PyTorch's convolution_backward under Inductor, layer by layer: the ATen policy rests on this.

    python -m benchmarks.torch_compile.layers [--batch 8] [--rounds 7] [--threads 1 2] [--layers SUBSTRING ...]

For each layer and gradient the same call is compiled once as it is (Inductor keeps aten.convolution_backward as an
extern kernel) and once for each lowering, in one process. Integer-valued operands make every direct lowering
comparable bit for bit before it is timed. Rounds alternate between the contenders; a round in which the host took the
core away (steal in /proc/stat) is repeated. Writes layers.json beside this file and prints time of the kernel / time
of the lowering: above 1 the lowering is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.timing import rounds_of
from convgrad_export.geometry import ConvGeometry
from convgrad_export.integrations.compile_backend import convgrad
from convgrad_export.lowering import LOWERINGS
from convgrad_export.selection.aten_policy import FASTEST, choose_aten, why_not

RESULT = Path(__file__).parent / "layers.json"

# name: C, M, size, kernel, stride, padding, dilation, groups
LAYERS: dict[str, tuple[int, int, tuple[int, ...], int, int, int, int, int]] = {
    "resnet18 conv1": (3, 64, (224, 224), 7, 2, 3, 1, 1),
    "resnet18 layer1": (64, 64, (56, 56), 3, 1, 1, 1, 1),
    "resnet18 layer3": (256, 256, (14, 14), 3, 1, 1, 1, 1),
    "resnet50 256->64 1x1": (256, 64, (56, 56), 1, 1, 0, 1, 1),
    "resnet50 64->256 1x1": (64, 256, (56, 56), 1, 1, 0, 1, 1),
    "resnet50 512->2048 1x1": (512, 2048, (7, 7), 1, 1, 0, 1, 1),
    "resnet50 256->512 1x1 s2": (256, 512, (56, 56), 1, 2, 0, 1, 1),
    "mobilenet_v2 dw 32 112": (32, 32, (112, 112), 3, 1, 1, 1, 32),
    "mobilenet_v2 dw 96 112 s2": (96, 96, (112, 112), 3, 2, 1, 1, 96),
    "mobilenet_v2 dw 144 56": (144, 144, (56, 56), 3, 1, 1, 1, 144),
    "mobilenet_v2 dw 384 14": (384, 384, (14, 14), 3, 1, 1, 1, 384),
    "mobilenet_v2 dw 960 7": (960, 960, (7, 7), 3, 1, 1, 1, 960),
    "mobilenet_v2 16->96 1x1": (16, 96, (112, 112), 1, 1, 0, 1, 1),
    "mobilenet_v2 960->160 1x1": (960, 160, (7, 7), 1, 1, 0, 1, 1),
    "convnext stem 4x4 s4": (3, 96, (224, 224), 4, 4, 0, 1, 1),
    "convnext dw 96 56 k7": (96, 96, (56, 56), 7, 1, 3, 1, 96),
    "convnext dw 384 14 k7": (384, 384, (14, 14), 7, 1, 3, 1, 384),
    "convnext down 2x2 s2": (96, 192, (56, 56), 2, 2, 0, 1, 1),
    "resnext50 g32 256 14": (256, 256, (14, 14), 3, 1, 1, 1, 32),
    "r3d_18 layer1": (64, 64, (8, 56, 56), 3, 1, 1, 1, 1),
    "r3d_18 down 1x1x1 s2": (64, 128, (8, 56, 56), 1, 2, 0, 1, 1),
    "tcn 64 d16": (64, 64, (1024,), 3, 1, 32, 16, 1),
    "wavenet 1x1 128": (128, 256, (4096,), 1, 1, 0, 1, 1),
}
CANDIDATES = {
    "input": ("input.conv_transpose", "input.flipped_conv", "input.matmul_taps", "input.pixel_shuffle"),
    "weight": (
        "weight.matmul_taps",
        "weight.im2col",
        "weight.depthwise_taps",
        "weight.depthwise_rows",
        "weight.shifted_matmul",
    ),
}


def compiled(geometry: ConvGeometry, gradient: str, lowering: str | None) -> Callable[..., torch.Tensor]:
    """The gradient as a compiled function of (grad_output, input, weight); `lowering` None keeps the kernel."""
    mask = [gradient == name for name in ("input", "weight", "bias")]
    index = mask.index(True)
    call = (list(geometry.stride), list(geometry.begin), list(geometry.dilation), False, [0] * geometry.rank)

    def backward(grad_output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        result = torch.ops.aten.convolution_backward(grad_output, input, weight, None, *call, geometry.groups, mask)
        return result[index]

    if lowering is None:
        return torch.compile(backward, backend="inductor", dynamic=False)
    return torch.compile(backward, backend=convgrad, options={"lowering": lowering}, dynamic=False)


def measure(name: str, gradient: str, batch: int, threads: list[int], rounds: int) -> dict[str, Any]:
    c, m, size, kernel, stride, padding, dilation, groups = LAYERS[name]
    rank = len(size)
    shape, weight_shape = (batch, c, *size), (m, c // groups, *[kernel] * rank)
    geometry = ConvGeometry.from_forward(shape, weight_shape, stride, padding, dilation, groups)
    generator = torch.Generator().manual_seed(0)
    operands = [
        torch.randint(-1, 2, tuple(each), generator=generator).float()
        for each in (geometry.output_shape, shape, weight_shape)
    ]
    chosen = choose_aten(gradient, geometry, "float32", lowering=FASTEST)
    result: dict[str, Any] = {"layer": name, "gradient": gradient, "batch": batch, "threads": {}}
    result["policy"] = chosen.name if chosen else "kernel"
    for count in threads:
        torch.set_num_threads(count)
        torch._dynamo.reset()  # compiled code depends on the thread count
        torch._dynamo.config.recompile_limit = 64  # one entry a contender
        kernel_call = compiled(geometry, gradient, None)
        expected = kernel_call(*operands)
        contenders = {"kernel": lambda kernel_call=kernel_call: kernel_call(*operands)}
        for lowering in CANDIDATES[gradient]:
            if why_not(LOWERINGS[lowering], geometry, "float32") is not None:
                continue
            function = compiled(geometry, gradient, lowering)
            torch.testing.assert_close(function(*operands), expected, rtol=0, atol=0)
            contenders[lowering] = lambda function=function: function(*operands)
        result["threads"][count] = rounds_of(contenders, rounds)
    return result


def line(result: dict[str, Any]) -> str:
    cells = []
    for count, timing in result["threads"].items():
        kernel = timing["kernel"]["min_ms"]
        ratios = " ".join(f"{n.split('.')[1]} {kernel / t['min_ms']:.2f}" for n, t in timing.items() if n != "kernel")
        cells.append(f"{count} thread{'s' * (count > 1)}: kernel {kernel:.2f} ms; {ratios}")
    return f"{result['layer']:<28} {result['gradient']:<6} [{result['policy']}] " + " | ".join(cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", nargs="*", default=[""], help="substrings of layer names")
    options = parser.parse_args()
    started, results = time.time(), []
    for name in LAYERS:
        if not any(part in name for part in options.layers):
            continue
        for gradient in ("input", "weight"):
            results.append(measure(name, gradient, options.batch, options.threads, options.rounds))
            print(line(results[-1]), flush=True)
    record = {"environment": environment(), "seconds": round(time.time() - started), "results": results}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
