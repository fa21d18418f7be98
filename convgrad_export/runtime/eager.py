"""Drop-in replacements for torch.nn.grad and `aten::convolution_backward`, run by onnxruntime.

Each call looks up a session for its geometry in a bounded cache; the batch is dynamic in it, so that most new batch
sizes cost nothing (one sample may have another lowering; a weight gradient in onnxruntime's blocked layout is for one
size). torch tensors or numpy arrays go in, the same kind comes out.
A tracer (torch.export, make_fx) or compiler records `aten::convolution_backward` (`by_torch.py`, `compiled.py`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from .. import dtypes
from ..arguments import as_mask, as_shape, as_text
from ..errors import ArgumentTypeError, DeviceError, DTypeError, GeometryError, UnsupportedLoweringError
from ..geometry import ConvGeometry
from ..lowering import GRADIENTS, LOWERINGS, Lowering, candidates, preferred_opset
from ..selection.policy import AUTO, choose
from ..selection.tuned import is_tuned
from . import tensors
from .compiled import one_call
from .cuda_options import CudaOptions
from .providers import Providers, resolve
from .session_cache import MAX_SESSIONS, cached_session, thread_count

Ints: TypeAlias = "int | Sequence[int]"
Padding: TypeAlias = "int | str | Sequence[int] | Sequence[tuple[int, int]]"

_INPUT_DOC = """torch.nn.grad.conv{rank}d_input on onnxruntime: the gradient with respect to the convolution's input.

    Args:
        input_size: shape of the forward input, (N, C, {spatial}).
        weight: shape (M, C/groups, {kernel}).
        grad_output: gradient of the loss with respect to the forward output, shape (N, M, {output}).
        stride, dilation: one integer, or one per spatial axis.
        padding: zeros on each side, an integer or one per axis; also (begin, end) pairs, "same" or "valid".
        groups: number of groups.
        lowering: "auto", "tuned", or a name from `convgrad_export.lowerings("conv{rank}d_input")`.
        providers: onnxruntime execution providers; None follows the tensors' device.

    Returns:
        Shape `input_size`, dtype and device of `grad_output`; a torch tensor or a numpy array, as the arguments.
        Differentiable like torch.nn.grad's, in reverse and forward mode and under torch.func's transforms; under
        `torch.vmap` sample by sample. Traced or compiled (torch.export, make_fx, torch.compile), it is
        `aten::convolution_backward`.

    Raises:
        GeometryError, ArgumentTypeError, DTypeError, DeviceError, UnsupportedLoweringError, ProviderError.
    """

_WEIGHT_DOC = """torch.nn.grad.conv{rank}d_weight on onnxruntime: the gradient with respect to the convolution's weight.

    Args:
        input: the forward input, shape (N, C, {spatial}).
        weight_size: shape of the weight, (M, C/groups, {kernel}).
        grad_output: gradient of the loss with respect to the forward output, shape (N, M, {output}).
        stride, padding, dilation, groups, lowering, providers: as in `conv{rank}d_input`.

    Returns:
        Shape `weight_size`, dtype and device of `grad_output`; a torch tensor or a numpy array, as the arguments.
        Differentiable like torch.nn.grad's, in reverse and forward mode and under torch.func's transforms; under
        `torch.vmap` sample by sample. Traced or compiled (torch.export, make_fx, torch.compile), it is
        `aten::convolution_backward`.

    Raises:
        GeometryError, ArgumentTypeError, DTypeError, DeviceError, UnsupportedLoweringError, ProviderError.
    """


class InputGradient(Protocol):
    """Signature of `conv1d_input`, `conv2d_input` and `conv3d_input`."""

    def __call__(
        self,
        input_size: Sequence[int],
        weight: Any,
        grad_output: Any,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        *,
        lowering: str = AUTO,
        providers: Providers = None,
    ) -> Any: ...


class WeightGradient(Protocol):
    """Signature of `conv1d_weight`, `conv2d_weight` and `conv3d_weight`."""

    def __call__(
        self,
        input: Any,
        weight_size: Sequence[int],
        grad_output: Any,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        *,
        lowering: str = AUTO,
        providers: Providers = None,
    ) -> Any: ...


def _input_gradient(rank: int) -> InputGradient:
    def gradient(
        input_size: Sequence[int],
        weight: Any,
        grad_output: Any,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        *,
        lowering: str = AUTO,
        providers: Providers = None,
    ) -> Any:
        _check_operands({"weight": weight, "grad_output": grad_output})
        geometry = ConvGeometry.from_backward(
            grad_output.shape,
            as_shape(input_size, "input_size"),
            weight.shape,
            stride,
            padding,
            dilation,
            groups,
            rank=rank,
            names=("grad_output", "input_size", "weight"),
        )
        _check_lowering(lowering, ("input",))
        operands = {"weight": weight, "grad_output": grad_output}
        return differentiable(geometry, ("input",), operands, lowering, providers)["input"]

    _describe(gradient, f"conv{rank}d_input", _INPUT_DOC, rank)
    return one_call(gradient)


def _weight_gradient(rank: int) -> WeightGradient:
    def gradient(
        input: Any,
        weight_size: Sequence[int],
        grad_output: Any,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        *,
        lowering: str = AUTO,
        providers: Providers = None,
    ) -> Any:
        _check_operands({"input": input, "grad_output": grad_output})
        geometry = ConvGeometry.from_backward(
            grad_output.shape,
            input.shape,
            as_shape(weight_size, "weight_size"),
            stride,
            padding,
            dilation,
            groups,
            rank=rank,
            names=("grad_output", "input", "weight_size"),
        )
        _check_lowering(lowering, ("weight",))
        operands = {"input": input, "grad_output": grad_output}
        return differentiable(geometry, ("weight",), operands, lowering, providers)["weight"]

    _describe(gradient, f"conv{rank}d_weight", _WEIGHT_DOC, rank)
    return one_call(gradient)


def _describe(function: Any, name: str, doc: str, rank: int) -> None:
    letters = {key: ", ".join(f"{letter}{axis}" for axis in range(rank)) for key, letter in _LETTERS.items()}
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc.format(rank=rank, **letters)


_LETTERS = {"spatial": "I", "kernel": "K", "output": "O"}

conv1d_input, conv2d_input, conv3d_input = (_input_gradient(rank) for rank in (1, 2, 3))
conv1d_weight, conv2d_weight, conv3d_weight = (_weight_gradient(rank) for rank in (1, 2, 3))


@one_call
def convolution_backward(
    grad_output: Any,
    input: Any,
    weight: Any,
    bias_sizes: Sequence[int] | None,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    output_mask: Sequence[bool],
    *,
    lowering: str = AUTO,
    providers: Providers = None,
) -> tuple[Any, Any, Any]:
    """`torch.ops.aten.convolution_backward` on onnxruntime: every gradient of one convolution in one graph.

    Args:
        grad_output: shape (N, M, *O). input: shape (N, C, *I). weight: shape (M, C/G, *K), (C, M/G, *K) if transposed.
        bias_sizes: [M], or None.
        stride, padding, dilation, transposed, output_padding, groups: of the forward call.
        output_mask: which of (grad_input, grad_weight, grad_bias) to compute.
        lowering: "auto", "tuned", or a catalogue name; it applies to its own gradient, the policy chooses the others.
        providers: onnxruntime execution providers; None follows the tensors' device.

    Returns:
        (grad_input, grad_weight, grad_bias), None where the mask is False.

    Raises:
        GeometryError, ArgumentTypeError, DTypeError, DeviceError, UnsupportedLoweringError, ProviderError.
    """
    operands = {"input": input, "weight": weight, "grad_output": grad_output}
    _check_operands(operands)
    geometry = ConvGeometry.from_backward(
        grad_output.shape,
        input.shape,
        weight.shape,
        stride,
        padding,
        dilation,
        groups,
        transposed=transposed,
        output_padding=output_padding,
    )
    mask = as_mask(output_mask)
    if bias_sizes is not None:
        given = as_shape(bias_sizes, "bias_sizes")
        if given != (geometry.out_channels,) and (mask[2] or given != (0,)):
            raise GeometryError(
                f"bias_sizes is {given}, expected ({geometry.out_channels},): one for each output channel"
            )
    gradients = tuple(name for name, wanted in zip(GRADIENTS, mask, strict=True) if wanted)
    _check_lowering(lowering, GRADIENTS)
    if not gradients:
        return (None, None, None)
    results = differentiable(geometry, gradients, operands, lowering, providers)
    return (results.get("input"), results.get("weight"), results.get("bias"))


def differentiable(
    geometry: ConvGeometry, gradients: tuple[str, ...], operands: dict[str, Any], lowering: str, providers: Providers
) -> dict[str, Any]:
    """`compute`, recorded by autograd where a torch operand requires a gradient, has a tangent, or is a transform's."""
    if tensors.is_torch(operands["grad_output"]) and any(map(_is_differentiated, operands.values())):
        if tensors.in_functionalize():
            from .by_torch import gradients_by_torch

            return gradients_by_torch(geometry, gradients, operands)
        from .second_order import compute_recorded

        return compute_recorded(geometry, gradients, operands, lowering, providers)
    return compute(geometry, gradients, operands, lowering, providers)


def _is_differentiated(value: Any) -> bool:
    torch = sys.modules["torch"]
    if (value.requires_grad and torch.is_grad_enabled()) or tensors.is_transformed(value):
        return True
    if not _in_dual_level():
        return False
    # torch's older vmap cannot be asked for a tangent
    batched = torch._C._functorch.is_legacy_batchedtensor(value)
    return batched or torch.autograd.forward_ad.unpack_dual(value).tangent is not None


def _in_dual_level() -> bool:
    """Outside of one no tensor has a tangent, and asking a tensor for it takes longer."""
    level: int = sys.modules["torch"].autograd.forward_ad._current_level
    return level >= 0


def compute(
    geometry: ConvGeometry, gradients: tuple[str, ...], operands: dict[str, Any], lowering: str, providers: Providers
) -> dict[str, Any]:
    """The gradients of one checked convolution, by name."""
    grad_output = operands["grad_output"]
    if tensors.is_torch(grad_output) and not all(map(tensors.is_readable, operands.values())):
        from .by_torch import gradients_by_torch

        return gradients_by_torch(geometry, gradients, operands)
    if providers is None and tensors.is_torch(grad_output) and grad_output.device.type == "cuda":
        providers = CudaOptions(device_id=grad_output.device.index or 0)
    wanted = resolve(providers)
    dtype = dtypes.name_of(tensors.type_name(grad_output))
    provider, threads = wanted[0][0], thread_count()
    chosen = (_lowerings if is_tuned(lowering) else _known_lowerings)(
        geometry, gradients, dtype, lowering, provider, threads
    )
    session = cached_session(geometry, chosen, dtype, wanted, any_form=lowering == AUTO)
    feeds = {name: _as_array(operands[name]) for name in session.input_names}
    results = session.run(feeds)
    return {gradient: results[f"grad_{gradient}"] for gradient in gradients}


def _lowerings(
    geometry: ConvGeometry,
    gradients: tuple[str, ...],
    dtype: str,
    lowering: str,
    provider: str,
    threads: int | None,
) -> dict[str, Lowering]:
    opset = preferred_opset(dtype, provider)
    return {
        gradient: choose(gradient, geometry, dtype, lowering=lowering, provider=provider, opset=opset, threads=threads)
        for gradient in gradients
    }


# A choice that depends on its arguments alone, unlike one by the tuning cache's file.
_known_lowerings = functools.lru_cache(maxsize=4 * MAX_SESSIONS)(_lowerings)


def _as_array(value: Any) -> Any:
    return value if tensors.is_torch(value) else np.asarray(value)


def _check_lowering(lowering: Any, gradients: Sequence[str]) -> None:
    """A name that another gradient's lowering has would be passed over in silence; the policy checks the rest."""
    entry = LOWERINGS.get(as_text(lowering, "lowering"))
    if entry is not None and entry.gradient not in gradients:
        names = ", ".join(other.name for gradient in gradients for other in candidates(gradient))
        raise UnsupportedLoweringError(
            f"lowering {lowering!r} computes the {entry.gradient} gradient, expected one of {AUTO}, {names}"
        )


def _check_operands(operands: dict[str, Any]) -> None:
    for name, value in operands.items():
        if not tensors.is_torch(value) and not tensors.is_array(value):
            raise ArgumentTypeError(f"{name} is a {type(value).__name__}, expected a torch tensor or a numpy array")
        tensors.check_dense(value, name)
    if len({tensors.is_torch(value) for value in operands.values()}) > 1:
        kinds = ", ".join(f"{name} is a {type(value).__name__}" for name, value in operands.items())
        raise ArgumentTypeError(f"{kinds}: expected all torch tensors or all numpy arrays")
    found = {name: dtypes.name_of(tensors.type_name(value), name) for name, value in operands.items()}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} is {dtype}" for name, dtype in found.items())
        raise DTypeError(f"{listed}: expected one dtype")
    devices = {name: str(getattr(value, "device", "cpu")) for name, value in operands.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} is on {device}" for name, device in devices.items())
        raise DeviceError(f"{listed}: expected one device")
    device = next(iter(devices.values()))
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise DeviceError(f"tensors are on {device}, expected cpu or cuda: onnxruntime cannot read other memory")
