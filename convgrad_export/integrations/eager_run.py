"""A captured function run by PyTorch itself, in a wider type than the module's own.

Verification holds onnxruntime against float64. Making the inputs and the weights float64 is not enough for that: a
module that casts (`images.float() / 255`), makes a float32 tensor (`torch.arange(n, dtype=torch.float32)`) or holds one
that is no parameter would bring float32 back in, and most operators refuse two types at once. `WidenedCasts` reads
every such type as the wider one while the function runs.

PyTorch's backward kernel of batch norms is wrong for some layouts of its operands; here it never sees them
(`CanonicalLayouts`).

A module that does not run in float64 all the same (it asserts its input's type, or reads a float32 bit by bit) is run
in its own types, and the run says so.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convgrad_export.errors import ConvGradError, VerificationError
from convgrad_export.integrations.compiled_modules import as_written
from convgrad_export.integrations.fresh_inputs import in_order, in_rows
from convgrad_export.integrations.one_at_a_time import ONE_AT_A_TIME
from convgrad_export.integrations.program import CapturedProgram, GraphInput

_BITS = (torch.ops.aten.view.dtype,)  # another type for the same bytes: no cast


class WidenedCasts(TorchDispatchMode):
    """While active, floating-point types narrower than `dtype` (float32 or float64) are read as `dtype`.

    Operators below autograd see the wider type where they are asked for a narrower one, and wide copies of narrower
    tensors. A narrow tensor that an operator writes to stays what it is. What PyTorch makes in its default type, of no
    floating-point tensor at all (`torch.zeros(3)`, `count / 2`), is made in the wider one: the default itself is the
    whole process's, and other threads would see another.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._wider = {torch.float16: dtype, torch.bfloat16: dtype}
        if dtype == torch.float64:
            self._wider |= {torch.float32: torch.float64, torch.complex64: torch.complex128}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BITS or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        declared = func._schema.arguments
        written = {argument.name for argument in declared if argument.alias_info and argument.alias_info.is_write}
        names = [argument.name for argument in declared[: len(args)]]
        args = tuple(a if name in written else self._widened(a) for name, a in zip(names, args, strict=True))
        kwargs = {name: a if name in written else self._widened(a) for name, a in kwargs.items()}
        result = func(*args, **kwargs)
        if written or not self._is_narrow(result) or _holds_floats((args, kwargs)):
            return result
        if any(argument.name == "dtype" and argument.kwarg_only for argument in declared):
            return func(*args, **kwargs | {"dtype": self._wider[result.dtype]})
        try:
            args, kwargs = _integers_as((args, kwargs), self._dtype)
            return func(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError):  # it takes integers alone
            return result

    def _is_narrow(self, result: Any) -> bool:
        return isinstance(result, torch.Tensor) and result.dtype in self._wider

    def _widened(self, argument: Any) -> Any:
        return pytree.tree_map(self._widened_leaf, argument)

    def _widened_leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return self._wider.get(leaf, leaf)
        if isinstance(leaf, torch.Tensor) and leaf.dtype in self._wider:
            return leaf.to(self._wider[leaf.dtype])
        return leaf


def _holds_floats(arguments: Any) -> bool:
    tensors = (leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor))
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors)


def _integers_as(arguments: Any, dtype: torch.dtype) -> Any:
    """The tensors of integers in another type; what is true or false decides something, unless it is all there is."""
    kinds = {leaf.dtype for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)}
    kinds = kinds - {torch.bool} or kinds
    return pytree.tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype in kinds else leaf, arguments
    )


_EMBEDDING_BAGS = (torch.ops.aten._embedding_bag.default, torch.ops.aten._embedding_bag_forward_only.default)


class CanonicalLayouts(TorchDispatchMode):
    """While active, kernels get no operands with which they compute something else from run to run.

    The backward of batch norms gets its operands in rows, whatever strides they came with: torch 2.13's takes the
    gradient's memory for that of the input's layout, or the other way round, where the one is channels last and the
    other is not: of one sample that is flattened and transposed behind the norm, say. Bags of embeddings whose offsets
    fall are refused: PyTorch reads past their end, and may find that out or not.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            args = (*(operand.clone(memory_format=torch.contiguous_format) for operand in args[:2]), *args[2:])
        if func in _EMBEDDING_BAGS and (args[2].diff() < 0).any():
            raise ValueError("the offsets of embedding_bag are not in order")
        if func is torch.ops.aten.equal.default:
            # Tensors that are numbers to TorchScript's interpreter come as Python's, which other operators take.
            args = tuple(torch.as_tensor(operand) for operand in args)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class EagerRun:
    """A run's outputs by name; `refusal` says why the type that was asked for was not to be had, or is None."""

    outputs: dict[str, torch.Tensor]
    refusal: str | None = None


def run_eagerly(
    program: CapturedProgram, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype, amount: float = 0.0, seed: int = 0
) -> EagerRun:
    """The captured Python function run by PyTorch, in `dtype` if the function runs in it and in its own types if not.

    oneDNN is off. Nothing of the capture, of the decompositions or of the translation takes part in this.

    Args:
        program: its parameters and buffers are taken along.
        inputs: the user inputs, by name.
        dtype: float32 or float64; floating-point tensors that are narrower are widened to it.
        amount, seed: of the random relative change of every tensor, see `perturbed`.

    Raises:
        VerificationError: The function does not run on these inputs at all.
    """
    try:
        return EagerRun(_run(program, inputs, None if is_double(program) else dtype, amount, seed))
    except Exception as refused:
        refusal = _described(refused)
    try:
        outputs = _run(program, inputs, None, amount, seed)
    except ConvGradError:
        raise
    except Exception as failed:
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        # PyTorch's own text calls it in the way of ONNX
        packed = (
            ": pack_padded_sequence with enforce_sorted=False is exported too"
            if "enforce_sorted" in str(failed)
            else ""
        )
        raise VerificationError(
            f"the module itself fails in PyTorch on inputs {shapes} with values drawn from the example's: "
            f"{_described(failed)}. Nothing was compared or written. Make it take any such values{packed}, or pass "
            "verify=False"
        ) from failed
    note = f"compared with PyTorch in the module's own types, since it does not run in {dtype}: {refusal}"
    if note not in program.notes:
        program.notes.append(note)
    return EagerRun(outputs, refusal)


def taken(
    program: CapturedProgram, users: Sequence[GraphInput], fresh: dict[str, torch.Tensor], random: np.random.Generator
) -> tuple[dict[str, torch.Tensor], EagerRun]:
    """Drawn inputs, or such as keep an order or the rows of the example's, where PyTorch refuses them otherwise.

    Returns:
        Them, and the float64 run on them.

    Raises:
        VerificationError: PyTorch takes none of them.
    """
    try:
        return fresh, run_eagerly(program, fresh, torch.float64)
    except VerificationError as error:
        refused = error
    ordered = in_order(users, fresh)
    rows = in_rows(users, fresh, random)
    for changed in (ordered, rows, rows | ordered):
        if changed:
            with contextlib.suppress(VerificationError):
                return fresh | changed, run_eagerly(program, fresh | changed, torch.float64)
    raise refused


def eager(
    program: CapturedProgram, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype, amount: float = 0.0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The outputs of `run_eagerly`, whose arguments and errors these are."""
    return run_eagerly(program, inputs, dtype, amount, seed).outputs


def _run(
    program: CapturedProgram, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype | None, amount: float, seed: int
) -> dict[str, torch.Tensor]:
    values = {}
    for index, spec in enumerate(program.inputs):
        if spec.kind == "constant":
            continue  # the function holds these itself
        tensor = inputs[spec.name].clone() if spec.kind == "user" else spec.value
        kept = tensor.is_floating_point() and not tensor.is_inference()  # autograd refuses an inference tensor itself
        tensor = tensor.detach() if kept else tensor.detach().clone()
        if dtype is not None and tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize:
            tensor = tensor.to(dtype)
        moved = perturbed(tensor, amount, 1000 * seed + index)
        if amount and spec.kind == "user" and moved.is_floating_point() and moved.numel():
            moved = moved.clamp(tensor.min(), tensor.max())  # a loss may refuse a target just outside of [0, 1]
        values[spec.name] = moved.requires_grad_(spec.value.requires_grad)
    casts = contextlib.nullcontext() if dtype is None else WidenedCasts(dtype)
    with ONE_AT_A_TIME, as_written(), quietly(onednn=False), torch.enable_grad(), casts, CanonicalLayouts():
        outputs = program.function(values)
    return {output.spec.name: output.tensor.detach() for output in outputs}


@contextlib.contextmanager
def quietly(*, onednn: bool) -> Iterator[None]:
    """While active, oneDNN is on or off, and PyTorch warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oneDNN switch talks about other hardware
        with torch.backends.mkldnn.flags(enabled=onednn):
            yield


def is_double(program: CapturedProgram) -> bool:
    """Whether all parameters are float64, or the inputs where there are no parameters.

    Such a module runs as it is: what it keeps in float32, be it a tensor made of Python numbers alone
    (``torch.where(mask, 0.3, 0.1)``), is float32 in the export too.
    """
    floats = [spec for spec in program.inputs if spec.value.is_floating_point()]
    deciding = [spec for spec in floats if spec.kind == "parameter"] or [s for s in floats if s.kind == "user"]
    return bool(deciding) and all(spec.value.dtype == torch.float64 for spec in deciding)


def perturbed(tensor: torch.Tensor, amount: float, seed: int) -> torch.Tensor:
    """Each element moved by up to `amount` of itself; integers as they are."""
    if amount == 0.0 or not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(seed)
    return tensor * (1 + amount * (2 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 1))


def _described(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}".rstrip(".") if lines else type(error).__name__
