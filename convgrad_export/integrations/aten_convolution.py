"""`aten.convolution_backward` as forward ATen operators: reading the call, choosing, running the emitter.

Works on real, fake and symbolic tensors. Results have eager's dtype, device and memory format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import dtypes
from ..arguments import as_bool, as_mask, as_sizes
from ..emit.aten import run_function, run_lowering, run_transposed_input
from ..errors import ArgumentTypeError, DeviceError, DTypeError, GeometryError
from ..geometry import ConvGeometry
from ..lowering import GRADIENTS
from ..runtime.tensors import check_dense
from ..selection.aten_policy import AUTO, FASTEST, check_lowering, choose_aten

aten = torch.ops.aten
KERNEL = "aten.convolution_backward"
Plan = dict[str, Any]  # gradient -> Lowering, the name of a dynamic form, or None for PyTorch's kernel


@dataclass(frozen=True)
class ConvolutionCall:
    """One checked call of `aten.convolution_backward`.

    Attributes:
        geometry: with every size an integer: a symbolic size is replaced by its value in the example.
        dynamic: a spatial size or the number of channels is symbolic. A symbolic batch alone is not dynamic.
        mask: which of (input, weight, bias).
    """

    geometry: ConvGeometry
    dynamic: bool
    mask: tuple[bool, bool, bool]
    dtype: str
    device: str

    @property
    def gradients(self) -> tuple[str, ...]:
        return tuple(name for name, wanted in zip(GRADIENTS, self.mask, strict=True) if wanted)


def read_call(
    grad_output: Any,
    input: Any,
    weight: Any,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: Any,
    output_padding: Any,
    groups: Any,
    output_mask: Any,
) -> ConvolutionCall:
    """Check the arguments of a call, tensors real or fake.

    Raises:
        GeometryError: shapes and attributes that no forward call has. DTypeError, DeviceError: mixed or unsupported.
        ArgumentTypeError: an argument of the wrong type.
    """
    operands = {"grad_output": grad_output, "input": input, "weight": weight}
    for name, value in operands.items():
        if not isinstance(value, torch.Tensor):
            raise ArgumentTypeError(f"{name} is a {type(value).__name__}, expected a tensor")
        check_dense(value, name)
    found = {name: dtypes.name_of(value.dtype, name) for name, value in operands.items()}
    if len(set(found.values())) > 1:
        raise DTypeError(f"{_listed(found)}: expected one dtype")
    devices = {name: str(value.device) for name, value in operands.items()}
    if len(set(devices.values())) > 1:
        raise DeviceError(f"{_listed(devices)}: expected one device")
    shapes = {name: [_example(size) for size in value.shape] for name, value in operands.items()}
    transposed = as_bool(transposed, "transposed")
    # Autograd passes output_padding through unchanged for a plain convolution, where it means nothing.
    geometry = ConvGeometry.from_backward(
        shapes["grad_output"],
        shapes["input"],
        shapes["weight"],
        [_example(value) for value in stride],
        [_example(value) for value in padding],
        [_example(value) for value in dilation],
        groups,
        transposed=transposed,
        output_padding=[_example(value) for value in output_padding] if transposed else 0,
    )
    wanted = as_mask(output_mask)
    if wanted[2] and bias_sizes is not None and [_example(size) for size in bias_sizes] != [geometry.out_channels]:
        raise GeometryError(
            f"bias_sizes is {list(bias_sizes)}, expected [{geometry.out_channels}]: one for each output channel"
        )
    fixed = [*input.shape[1:], *weight.shape, *grad_output.shape[1:]]
    dynamic = any(_is_symbolic(size) for size in fixed)
    return ConvolutionCall(geometry, dynamic, wanted, found["grad_output"], grad_output.device.type)


def has_no_form(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether PyTorch takes a call and no lowering can: complex numbers and integers, sizes without an example."""
    return any(
        str(tensor.dtype).removeprefix("torch.") not in dtypes.NAMES or any(_is_unbacked(size) for size in tensor.shape)
        for tensor in tensors
    )


def plan(call: ConvolutionCall, lowering: str = AUTO, gradients: Sequence[str] | None = None) -> Plan:
    """For each gradient asked for: its lowering, the name of the dynamic form, or None to keep PyTorch's kernel."""
    wanted = call.gradients if gradients is None else gradients
    if not call.dynamic:
        device = f"cuda {torch.cuda.get_device_name()}" if call.device == "cuda" else call.device
        return {g: choose_aten(g, call.geometry, call.dtype, lowering=lowering, device=device) for g in wanted}
    if lowering == FASTEST:
        return dict.fromkeys(wanted)
    return {gradient: f"{gradient}.dynamic" for gradient in wanted}


def run_plan(call: ConvolutionCall, plan: Plan, arguments: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The gradients of `plan`, computed from the call's own arguments; None for those that are not in it."""
    grad_output, input, weight, bias_sizes = arguments[:4]
    memory_format = _memory_format(call, input, weight, arguments)
    results: dict[str, Any] = {}
    kept = [name for name, chosen in plan.items() if chosen is None]
    if kept:
        mask = [name in kept for name in GRADIENTS]
        sizes = [call.geometry.out_channels] if bias_sizes is None and mask[2] else bias_sizes
        outputs = aten.convolution_backward.default(*arguments[:3], sizes, *arguments[4:10], mask)
        results.update({name: outputs[index] for index, name in enumerate(GRADIENTS) if name in kept})
    for name, chosen in plan.items():
        if chosen is None:
            continue
        operand = {"input": weight, "weight": input, "bias": None}[name]
        if isinstance(chosen, str):
            value = _run_dynamic(name, call.geometry, grad_output, input, weight)
        else:
            value = run_lowering(chosen, call.geometry, grad_output, operand)
        results[name] = _in_memory_format(value, torch.contiguous_format if name == "bias" else memory_format)
    return results.get("input"), results.get("weight"), results.get("bias")


def _run_dynamic(gradient: str, g: ConvGeometry, grad_output: Any, input: Any, weight: Any) -> Any:
    """The canonical functions; sizes are read from the tensors, so they stay symbolic."""
    attributes = {"stride": g.stride, "padding": g.begin, "dilation": g.dilation}
    if gradient == "bias":
        return aten.sum.dim_IntList(grad_output, [0, *range(2, 2 + g.rank)])
    if gradient == "input" and g.transposed:
        return run_transposed_input(grad_output, weight, tuple(input.shape), attributes, g.groups)
    attributes["groups"] = g.groups  # type: ignore[assignment]
    if gradient == "input":
        return run_function(f"conv{g.rank}d_input", (tuple(input.shape), weight, grad_output), attributes)
    data, rows = (grad_output, input) if g.transposed else (input, grad_output)
    return run_function(f"conv{g.rank}d_weight", (data, tuple(weight.shape), rows), attributes)


def decomposition(lowering: str = AUTO) -> Callable[..., tuple[Any, Any, Any]]:
    """A function with `aten.convolution_backward`'s signature that computes it with forward operators."""
    check_lowering(lowering)

    def convolution_backward(*arguments: Any, **named: Any) -> tuple[Any, Any, Any]:
        full = normalized(arguments, named)
        call = read_call(*full)
        return run_plan(call, plan(call, lowering), full)

    return convolution_backward


_NAMES = tuple(argument.name for argument in aten.convolution_backward.default._schema.arguments)


def normalized(arguments: Sequence[Any], named: dict[str, Any]) -> tuple[Any, ...]:
    """All eleven arguments by position."""
    given = dict(zip(_NAMES, arguments, strict=False)) | named
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise ArgumentTypeError(f"convolution_backward lacks the arguments {', '.join(missing)}")
    full = {name: given[name] for name in _NAMES}
    weight = full["weight"]
    if isinstance(weight, torch.Tensor) and weight.dim() > 2:
        # One entry stands for every axis; torch.nn.grad passes such lists.
        for name in ("stride", "padding", "dilation", "output_padding"):
            full[name] = list(as_sizes(full[name], weight.dim() - 2, name, minimum=0))
    return tuple(full.values())


def _memory_format(call: ConvolutionCall, input: Any, weight: Any, arguments: Sequence[Any]) -> torch.memory_format:
    """The memory format that eager's kernel gives its results: decided by PyTorch itself where it says."""
    if call.geometry.rank == 1 or input.device.type == "meta":
        return torch.contiguous_format
    if any(_is_symbolic(size) and size.node.hint is None for size in (*input.shape, *weight.shape)):
        return torch.contiguous_format
    select = getattr(torch._C, "_select_conv_backend", None)
    determine = getattr(torch._C, "_conv_determine_backend_memory_format", None)
    if select is None or determine is None:
        wide = torch.channels_last if call.geometry.rank == 2 else torch.channels_last_3d
        either = any(value.is_contiguous(memory_format=wide) and not value.is_contiguous() for value in (input, weight))
        return wide if either else torch.contiguous_format
    stride, padding, dilation, transposed, output_padding, groups = arguments[4:10]
    backend = select(
        input,
        weight,
        bias=None,
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=transposed,
        output_padding=output_padding,
        groups=groups,
        bias_sizes=arguments[3],
    )
    return determine(input, weight, backend)


def _in_memory_format(value: Any, memory_format: torch.memory_format) -> Any:
    if value.is_contiguous(memory_format=memory_format):
        return value
    return aten.clone.default(value, memory_format=memory_format)


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, torch.SymInt) and value.node.maybe_as_int() is None


def _is_unbacked(value: Any) -> bool:
    return _is_symbolic(value) and not value.node.has_hint()


def _example(value: Any) -> Any:
    """An integer: a symbolic one's value in the example, if it has one."""
    if not isinstance(value, torch.SymInt):
        return value
    known = value.node.maybe_as_int()
    if known is None:
        known = value.node.hint if value.node.has_hint() else None
    if known is None:
        raise GeometryError(f"size {value} is unbacked: it has no example value to check the call with")
    return known


def _listed(values: dict[str, str]) -> str:
    return ", ".join(f"{name} is {value}" for name, value in values.items())
