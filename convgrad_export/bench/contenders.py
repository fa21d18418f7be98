"""What is timed on a layer: every applicable lowering, PyTorch, the forward operator, and a GEMM as the roofline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..build import build_model
from ..emit.onnx import GradientRequest, emit_model
from ..geometry import ConvGeometry
from ..lowering import Lowering, candidates
from ..lowering.kernels import CPU
from ..reference import FORWARD, INPUT, WEIGHT
from ..runtime.blocked import in_blocked_layout
from ..selection.policy import choose
from ..selection.runner import open_session
from ..selection.tuned import TUNED, is_measured

TORCH, ORT_FORWARD, CONV_GRAD, GEMM = "torch", "onnxruntime", "ort_training", "gemm"
SESSION = "session"  # the policy's model as GradientSession runs it, where that is not the lowering itself
# lowerings whose kernels work in small blocks, whatever the size of the layer
SPARING = frozenset({"input.conv_transpose", "input.conv_transpose_crop", "input.flipped_conv", "input.conv"})
_GEMM_SIDE = 1024
GEMM_MULTIPLICATIONS = _GEMM_SIDE**3


@dataclass(frozen=True)
class Call:
    """One way to compute the result: `run` computes it, `result` computes it as an array of its own."""

    run: Callable[[], object]
    result: Callable[[], np.ndarray]
    error_factor: float = 1.0


def operands(geometry: ConvGeometry, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 operands in [-0.5, 0.5), in PyTorch's memory, which is aligned for every kernel."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = {"input": geometry.input_shape, "weight": geometry.weight_shape, "grad_output": geometry.output_shape}
    return {name: (torch.rand(shape, generator=generator) - 0.5).numpy() for name, shape in shapes.items()}


def onnx_call(model: bytes, feeds: Mapping[str, np.ndarray], threads: int, *, arena: bool = True) -> Call:
    """A model on onnxruntime: inputs are read in place, the output is allocated in every run, as in eager PyTorch."""
    runner = open_session(model, CPU, threads, arena=arena)
    values = {value.name: feeds[value.name] for value in runner.get_inputs()}
    # Not `run_with_ort_values`, whose checks take 40 microseconds in onnxruntime 1.32; this copies nothing either.
    return Call(lambda: runner.run(None, values), lambda: np.array(runner.run(None, values)[0]))


def lowering_call(
    lowering: Lowering, geometry: ConvGeometry, feeds: Mapping[str, np.ndarray], threads: int, *, arena: bool = True
) -> Call:
    """One lowering of the catalogue, built for any batch size, as `build_model` does by default."""
    request = GradientRequest(geometry.with_batch("batch"), {lowering.gradient: lowering}, "float32")
    model = ir.to_proto(emit_model(request, "gradient")).SerializeToString()
    call = onnx_call(model, feeds, threads, arena=arena)
    return Call(call.run, call.result, lowering.error_factor)


def session_model(operation: str, geometry: ConvGeometry, threads: int) -> bytes | None:
    """The policy's model as `GradientSession` rewrites it for this machine; None where it runs the file as it is."""
    if operation == FORWARD or geometry.transposed:
        return None
    model = build_model(f"conv{geometry.rank}d_{operation}", **geometry.to_dict(), dynamic=(), threads=threads)
    content = model.SerializeToString()
    found = in_blocked_layout(content, threads=threads)
    return found if isinstance(found, bytes) and found is not content else None


def applicable(operation: str, geometry: ConvGeometry) -> list[Lowering]:
    """The lowerings that can compute this gradient of this geometry in float32 on the CPU."""
    return [entry for entry in candidates(operation) if entry.why_not(geometry) is None]


def column_bytes(geometry: ConvGeometry) -> int:
    """A generous guess of what a lowering with a column buffer, or one copy for each tap, allocates."""
    g = geometry
    elements = max(
        math.prod(g.input_shape), math.prod(g.output_shape), g.in_channels * math.prod(g.output_size) * g.batch
    )
    return int(4 * elements * 2 * (g.taps + 2))


def forward_call(geometry: ConvGeometry, feeds: Mapping[str, np.ndarray], threads: int) -> Call:
    """The forward operator as one ONNX node, its weight an input as in training."""
    from onnx import TensorProto, helper

    g = geometry
    attributes: dict[str, Any] = {
        "strides": list(g.stride),
        "pads": g.onnx_pads,
        "dilations": list(g.dilation),
        "group": g.groups,
    }
    if g.transposed:
        attributes["output_padding"] = list(g.output_padding)
    node = helper.make_node("ConvTranspose" if g.transposed else "Conv", ["input", "weight"], ["output"], **attributes)
    inputs = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *g.input_shape[1:]]),
        helper.make_tensor_value_info("weight", TensorProto.FLOAT, g.weight_shape),
    ]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", *g.output_shape[1:]])]
    graph = helper.make_graph([node], "forward", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnx_call(model.SerializeToString(), feeds, threads)


def gemm_call(threads: int) -> Call:
    """onnxruntime's MatMul of two square matrices: the speed that no formula made of GEMMs can pass."""
    from onnx import TensorProto, helper

    shape = (_GEMM_SIDE, _GEMM_SIDE)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("a", "b", "c")]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "gemm", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    rng = np.random.default_rng(0)
    feeds = {name: rng.random(shape, np.float32) for name in ("a", "b")}
    return onnx_call(model.SerializeToString(), feeds, threads)


def torch_call(operation: str, geometry: ConvGeometry, feeds: Mapping[str, np.ndarray]) -> Call:
    """PyTorch eager: torch.nn.grad, or aten.convolution_backward where torch.nn.grad has no such convolution.

    Uneven padding, which PyTorch's operator lacks, is applied to the input before the clock starts, and the padding's
    share of the input gradient is cut off as a view: what a training step of such a layer costs at least.
    """
    import torch
    from torch.nn import functional, grad

    from ..torch_convolution import last_axis_first

    g = geometry
    data, weight = torch.from_numpy(feeds["input"]), torch.from_numpy(feeds["weight"])
    begin = list(g.begin)
    inner: tuple[Any, ...] = (...,)
    if any(lo != hi for lo, hi in g.pads):
        data = functional.pad(data, last_axis_first(g.pads))
        inner = (..., *(slice(lo, lo + size) for (lo, _), size in zip(g.pads, g.input_size, strict=True)))
        begin = [0] * g.rank
    arguments = (list(g.stride), begin, list(g.dilation))

    if operation == FORWARD:

        def run() -> torch.Tensor:
            with torch.no_grad():
                return torch.convolution(data, weight, None, *arguments, g.transposed, list(g.output_padding), g.groups)

        return Call(run, lambda: run().numpy())
    grad_output = torch.from_numpy(feeds["grad_output"])
    if g.transposed:
        mask = [operation == INPUT, operation == WEIGHT, False]

        def run() -> torch.Tensor:
            results = torch.ops.aten.convolution_backward(
                grad_output, data, weight, None, *arguments, True, list(g.output_padding), g.groups, mask
            )
            return results[mask.index(True)]
    elif operation == INPUT:
        function = getattr(grad, f"conv{g.rank}d_input")
        size = tuple(data.shape)

        def run() -> torch.Tensor:
            return function(size, weight, grad_output, *arguments, g.groups)[inner]
    else:
        function = getattr(grad, f"conv{g.rank}d_weight")
        size = tuple(weight.shape)

        def run() -> torch.Tensor:
            return function(data, size, grad_output, *arguments, g.groups)

    return Call(run, lambda: np.ascontiguousarray(run().numpy()))


def choices(operation: str, geometry: ConvGeometry, threads: int) -> dict[str, str | None]:
    """Names of the lowerings that stand for a rule: the policy's, the tuned one, and the textbook's.

    ``policy`` is what `GradientSession` runs, ``file`` the lowering in the model's file.
    ``tuned`` is None where the tuning cache has not measured the layer. The textbook form is the convolution over
    swapped axes (weight) or the transposed convolution (input) that other exporters and onnx-ad emit.
    """
    if operation == FORWARD:
        return {}
    textbook = {INPUT: "input.conv" if geometry.transposed else "input.conv_transpose", WEIGHT: "weight.swapped_conv"}
    file = choose(operation, geometry, threads=threads).name
    return {
        "policy": file if session_model(operation, geometry, threads) is None else SESSION,
        "file": file,
        "policy_8": choose(operation, geometry, max_error_factor=8.0, threads=threads).name,
        "tuned": _tuned(operation, geometry, threads),
        "textbook": textbook[operation],
    }


def _tuned(operation: str, geometry: ConvGeometry, threads: int) -> str | None:
    if not is_measured(operation, geometry, "float32", CPU, threads):
        return None
    return choose(operation, geometry, lowering=TUNED, threads=threads).name
