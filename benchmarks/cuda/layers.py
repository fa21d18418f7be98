"""Single gradients of the layer tables: onnxruntime on CUDA against PyTorch's convolution_backward (cuDNN)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.cuda.timing import Budget, cudnn_benchmark, medians
from convgrad_export import CudaOptions, GradientSession
from convgrad_export.bench.networks import NETWORKS
from convgrad_export.emit.onnx import GradientRequest, emit_model
from convgrad_export.errors import ConvGradError
from convgrad_export.geometry import ConvGeometry
from convgrad_export.integrations.aten_measure import agrees
from convgrad_export.lowering import CPU, CUDA, Lowering, candidates, preferred_opset
from convgrad_export.selection.policy import choose
from convgrad_export.torch_convolution import last_axis_first

# name: (element type, allow TF32)
PRECISIONS: dict[str, tuple[str, bool]] = {
    "float32": ("float32", False),
    "tf32": ("float32", True),
    "float16": ("float16", True),
    "bfloat16": ("bfloat16", True),
}
Operands = dict[str, torch.Tensor]


def cases(networks: Sequence[str], batch: int, per_network: int | None) -> list[tuple[str, ConvGeometry]]:
    """Layers of the networks in turn: the first of each, then the second, so that a cut leaves a bit of all."""
    tables = {name: NETWORKS[name]()[:per_network] for name in networks}
    seen: dict[ConvGeometry, str] = {}
    for index in range(max(len(table) for table in tables.values())):
        for name, table in tables.items():
            if index < len(table):
                seen.setdefault(table[index].geometry(batch), f"{name} {table[index].name}")
    return [(label, geometry) for geometry, label in seen.items()]


def run(
    layers: Sequence[tuple[str, ConvGeometry]],
    precisions: Sequence[str],
    device: str,
    rounds: int,
    every_lowering: bool,
    cuda_graphs: bool,
    budget: Budget,
) -> Iterator[dict[str, Any]]:
    """One result for each layer, gradient and precision, until the budget is spent."""
    for label, geometry in layers:
        for precision in precisions:
            for gradient in ("input", "weight"):
                result: dict[str, Any] = {"layer": label, "gradient": gradient, "precision": precision}
                if budget.left <= 0:
                    yield {**result, "skipped": "no time left"}
                    continue
                try:
                    with cudnn_benchmark(PRECISIONS[precision][1]):
                        measured = _measure(gradient, geometry, precision, device, rounds, every_lowering, cuda_graphs)
                    yield {**result, **measured}
                except (torch.OutOfMemoryError, ConvGradError) as error:
                    yield {**result, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def _measure(
    gradient: str,
    geometry: ConvGeometry,
    precision: str,
    device: str,
    rounds: int,
    every_lowering: bool,
    cuda_graphs: bool,
) -> dict[str, Any]:
    dtype, tf32 = PRECISIONS[precision]
    provider = CUDA if device.startswith("cuda") else CPU
    opset = preferred_opset(dtype, provider)
    operands = _operands(geometry, dtype, device)
    kernel = _kernel(gradient, geometry, operands)
    expected = kernel()
    chosen = choose(gradient, geometry, dtype, provider=provider, opset=opset)
    lowerings = [chosen]
    if every_lowering:
        lowerings += [
            entry
            for entry in candidates(gradient)
            if entry != chosen and entry.error_factor == 1.0 and entry.why_not(geometry, dtype, provider, opset) is None
        ]
    calls: dict[str, Callable[[], Any]] = {"torch": kernel}
    left: dict[str, list[str]] = {}
    wrong: list[str] = []
    for lowering in lowerings:
        for graph in (False, True) if cuda_graphs and provider == CUDA else (False,):
            name = lowering.name + (" graph" if graph else "")
            call, left[name] = _session_call(lowering, geometry, dtype, opset, provider, tf32, graph, operands)
            if agrees(call(), expected, dtype):
                calls[name] = call
            else:
                wrong.append(name)
    times = medians(calls, device, rounds)
    return {
        "chosen": chosen.name,
        "times": times,
        "left_cuda": {name: nodes for name, nodes in left.items() if nodes},
        "wrong": wrong,
        "bytes": _bytes(gradient, operands),
    }


def _session_call(
    lowering: Lowering,
    geometry: ConvGeometry,
    dtype: str,
    opset: int,
    provider: str,
    tf32: bool,
    graph: bool,
    operands: Operands,
) -> tuple[Callable[[], torch.Tensor], list[str]]:
    """(a run of the lowering on onnxruntime over the operands, operators that left the provider)."""
    model = emit_model(GradientRequest(geometry, {lowering.gradient: lowering}, dtype, opset, provider), "gradient")
    options = CudaOptions(use_tf32=tf32, enable_cuda_graph=graph) if provider == CUDA else "cpu"
    session = GradientSession(model, options)
    feeds = {name: operands[name] for name in session.input_names}
    output = f"grad_{lowering.gradient}"
    return lambda: session.run(feeds)[output], [node.op_type for node in session.placement().left]


def _kernel(gradient: str, g: ConvGeometry, operands: Operands) -> Callable[[], torch.Tensor]:
    mask = [gradient == name for name in ("input", "weight", "bias")]
    attributes = (list(g.stride), list(g.begin), list(g.dilation), g.transposed)
    output_padding = list(g.output_padding) if g.transposed else [0] * g.rank
    tensors = (operands["grad_output"], operands["input"], operands["weight"])
    if any(lo != hi for lo, hi in g.pads):  # PyTorch pads such inputs first, so its kernel sees the padded one
        widths = last_axis_first(g.pads)

        def padded() -> torch.Tensor:
            data = torch.nn.functional.pad(tensors[1], widths)
            zero = [0] * g.rank
            call = (tensors[0], data, tensors[2], None, list(g.stride), zero, list(g.dilation), False, zero, g.groups)
            result = torch.ops.aten.convolution_backward(*call, mask)[mask.index(True)]
            if gradient == "weight":
                return result
            cut = [slice(lo, lo + size) for (lo, _), size in zip(g.pads, g.input_size, strict=True)]
            return result[(slice(None), slice(None), *cut)]

        return padded
    return lambda: torch.ops.aten.convolution_backward(*tensors, None, *attributes, output_padding, g.groups, mask)[
        mask.index(True)
    ]


def _operands(g: ConvGeometry, dtype: str, device: str) -> Operands:
    """Values -1, 0 and 1: every sum is exact in float32, with TF32 too, so results can be compared exactly."""
    generator = torch.Generator().manual_seed(0)
    shapes: Mapping[str, Any] = {"grad_output": g.output_shape, "input": g.input_shape, "weight": g.weight_shape}
    kind = getattr(torch, dtype)
    return {
        name: torch.randint(-1, 2, tuple(shape), generator=generator, dtype=torch.int8).to(device).to(kind)
        for name, shape in shapes.items()
    }


def _bytes(gradient: str, operands: Operands) -> int:
    """Bytes that a gradient has to read and write: its two operands and its result."""
    return sum(tensor.numel() * tensor.element_size() for tensor in operands.values())


def copy_bandwidth(device: str, rounds: int, elements: int) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    times = medians({"copy": lambda: target.copy_(source)}, device, rounds)
    return 2 * source.numel() * source.element_size() / (times["copy"]["median_ms"] * 1e-3)


def ratios(results: Sequence[Mapping[str, Any]], graph: bool = False) -> list[tuple[Mapping[str, Any], float]]:
    """(result, time of PyTorch / time of the chosen lowering) for what was timed."""
    found = []
    for result in results:
        name = result.get("chosen", "") + (" graph" if graph else "")
        times = result.get("times", {})
        if name in times:
            found.append((result, times["torch"]["median_ms"] / times[name]["median_ms"]))
    return found


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else float("nan")
