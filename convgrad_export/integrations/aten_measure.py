"""Measure on this GPU which convolution gradients of a step a lowering computes faster than PyTorch's kernel.

    from convgrad_export.integrations.aten_measure import measure_step

    measure_step(lambda: loss(model(x)).backward())
    model = torch.compile(model, backend="convgrad")  # rewrites where a lowering won, and nothing else

Kernel and lowerings are compiled by Inductor one by one, compared on integer-valued operands, and timed in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .. import dtypes
from ..errors import DeviceError
from ..geometry import ConvGeometry
from ..lowering import LOWERINGS
from ..selection import aten_measurements
from ..selection.aten_measurements import AtenMeasurement, worth_measuring
from ..selection.aten_policy import why_not
from .aten_convolution import normalized, read_call
from .compile_backend import convgrad

TARGET = torch.ops.aten.convolution_backward.default
Timer = Callable[[Mapping[str, Callable[[], Any]]], dict[str, float]]

CANDIDATES = {
    "input": ("input.conv_transpose", "input.flipped_conv", "input.matmul_taps", "input.pixel_shuffle"),
    "weight": (
        "weight.depthwise_taps",
        "weight.depthwise_rows",
        "weight.matmul_taps",
        "weight.im2col",
        "weight.shifted_matmul",
    ),
}
_ROUNDS, _REPEATS = 9, 5


class _Recorder(TorchDispatchMode):
    """Notes the convolution_backward calls of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[str, ConvGeometry, str], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is TARGET:
            call = read_call(*normalized(args, dict(kwargs or {})))
            for gradient in call.gradients:
                self.calls[gradient, call.geometry, call.dtype] = None
        return func(*args, **(kwargs or {}))


def calls_of(step: Callable[[], Any]) -> list[tuple[str, ConvGeometry, str]]:
    """The distinct (gradient, geometry, dtype) that an eager step computes."""
    with _Recorder() as recorder:
        step()
    return list(recorder.calls)


def measure_step(
    step: Callable[[], Any], *, device: str = "cuda", seconds: float = 300.0, timer: Timer | None = None
) -> list[AtenMeasurement]:
    """Measure the gradients of one eager step that a lowering may win, and keep the results in the user's file.

    Args:
        step: runs forward and backward once. device: where its tensors lie. seconds: stop after so many; what was
            measured by then is kept. timer: milliseconds by name for calls by name; the default times CUDA events.

    Raises:
        DeviceError: a CUDA device, and this PyTorch finds none.
    """
    calls = [call for call in calls_of(step) if worth_measuring(call[0], call[1])]
    measured = measure_calls(calls, device=device, seconds=seconds, timer=timer)
    aten_measurements.add(measured)
    return measured


def measure_calls(
    calls: Iterable[tuple[str, ConvGeometry, str]],
    *,
    device: str = "cuda",
    seconds: float = 300.0,
    timer: Timer | None = None,
) -> list[AtenMeasurement]:
    """`AtenMeasurement` of each (gradient, geometry, dtype), until the time is up.

    Raises:
        DeviceError: a CUDA device, and this PyTorch finds none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            f"device is {device!r}, and this PyTorch ({torch.__version__}) finds no CUDA device: measure on "
            "the GPU that the step will run on"
        )
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    deadline = time.monotonic() + seconds
    measured = []
    for gradient, geometry, dtype in calls:
        if time.monotonic() > deadline:
            break
        torch._dynamo.reset()
        contenders = _contenders(gradient, geometry, dtype, device)
        times = (timer or event_times)(contenders)
        kernel_ms = times.pop("kernel")
        measured.append(AtenMeasurement(gradient, geometry.to_dict(), dtype, name, torch.__version__, kernel_ms, times))
    return measured


def event_times(contenders: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each call, in turns, by CUDA events; on the CPU by the clock."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(_ROUNDS):
        for name, call in contenders.items():
            samples[name].append(milliseconds(call, _REPEATS, on_cuda=torch.cuda.is_available()))
    return {name: statistics.median(values) for name, values in samples.items()}


def milliseconds(call: Callable[[], Any], repeats: int, *, on_cuda: bool) -> float:
    """Of one call: all repeats between two CUDA events, or by the clock."""
    if not on_cuda:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def _contenders(gradient: str, g: ConvGeometry, dtype: str, device: str) -> dict[str, Callable[[], Any]]:
    """PyTorch's kernel, and each lowering whose result is the kernel's, as compiled calls without arguments."""
    operands = _operands(g, dtype, device)
    kernel = _compiled(gradient, g, None)
    expected = kernel(*operands)
    contenders: dict[str, Callable[[], Any]] = {"kernel": lambda: kernel(*operands)}
    for name in CANDIDATES[gradient]:
        if why_not(LOWERINGS[name], g, dtype) is not None:
            continue
        function = _compiled(gradient, g, name)
        try:
            result = function(*operands)
        except (torch.OutOfMemoryError, RuntimeError):  # a form that needs more memory than there is cannot win
            continue
        if agrees(result, expected, dtype):
            contenders[name] = lambda function=function: function(*operands)  # type: ignore[misc]
    return contenders


def agrees(result: torch.Tensor, expected: torch.Tensor, dtype: str) -> bool:
    """Equal on integer-valued operands, but for one rounding to the type more than the kernel's."""
    room = 4 * dtypes.unit_roundoff(dtype)
    return bool(torch.allclose(result.float(), expected.float(), rtol=room, atol=0.5 if dtypes.is_half(dtype) else 0.0))


def _operands(g: ConvGeometry, dtype: str, device: str) -> list[torch.Tensor]:
    """(grad_output, input, weight) with values -1, 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    shapes: Sequence[Any] = (g.output_shape, g.input_shape, g.weight_shape)
    kind = getattr(torch, dtype)
    return [torch.randint(-1, 2, tuple(shape), generator=generator).to(kind).to(device) for shape in shapes]


def _compiled(gradient: str, g: ConvGeometry, lowering: str | None) -> Callable[..., torch.Tensor]:
    mask = [gradient == name for name in ("input", "weight", "bias")]
    attributes = (list(g.stride), list(g.begin), list(g.dilation), False, [0] * g.rank, g.groups)

    def backward(grad_output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return TARGET(grad_output, input, weight, None, *attributes, mask)[mask.index(True)]

    if lowering is None:
        return torch.compile(backward, backend="inductor", dynamic=False)
    return torch.compile(backward, backend=convgrad, options={"lowering": lowering}, dynamic=False)
