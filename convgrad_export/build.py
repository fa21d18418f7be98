"""`build_model` and `lowerings`: one gradient operator as a standard ONNX model, and the catalogue behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import dtypes
from .arguments import as_bool, as_int, as_mask, as_sizes, check_error_factor, check_threads
from .emit.dynamic import emit_dynamic_model
from .emit.onnx import MAX_OPSET, MIN_OPSET, GradientRequest, emit_model
from .errors import ArgumentTypeError, GeometryError, UnsupportedLoweringError
from .geometry import ConvGeometry
from .lowering import CPU, as_provider, candidates
from .operators import CONVOLUTION_BACKWARD, Operator, operator
from .runtime.convolution_entries import described_gradients
from .runtime.formula import write_entries
from .selection.policy import AUTO, choose, is_way
from .selection.reduced_arithmetic import DEFAULT_ERROR_FACTOR
from .selection.tuned import TUNED, is_measured, is_tuned

if TYPE_CHECKING:
    import onnx

DYNAMIC = ("batch", "channels", "space", "kernel")
BATCH_NAME = "batch"


def build_model(
    operator_name: str,
    *,
    input_shape: Sequence[int] | None = None,
    weight_shape: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    output_mask: Sequence[bool] = (True, True, True),
    dtype: Any = "float32",
    dynamic: Sequence[str] = (BATCH_NAME,),
    opset_version: int = 18,
    lowering: str = AUTO,
    provider: str = CPU,
    threads: int | None = None,
    max_error_factor: float = DEFAULT_ERROR_FACTOR,
    max_workspace: int | None = None,
    inline: bool = True,
) -> onnx.ModelProto:
    """One gradient operator as an ONNX model of standard operators.

    With ``dynamic=()`` or ``("batch",)`` the model is specialised to the geometry and holds the chosen lowering. Its
    inputs are the operands alone, ``weight, grad_output`` or ``input, grad_output``, and its outputs ``grad_input``,
    ``grad_weight``, ``grad_bias``. With any other dimension dynamic it is the canonical function of
    `convgrad_export.functions`, with torch.nn.grad's own inputs, ``input_size`` or ``weight_size`` among them.

    Args:
        operator_name: ``"conv1d_input"`` to ``"conv3d_weight"``, or ``"convolution_backward"`` for several gradients.
        input_shape: (N, C, *I) of the forward call. weight_shape: (M, C/G, *K), or (C, M/G, *K) when `transposed`.
            Either may be None when every dimension is dynamic.
        stride, padding, dilation, groups, transposed, output_padding: as in the forward call; padding also as
            (begin, end) pairs, ``"same"`` or ``"valid"``.
        output_mask: which of (input, weight, bias) convolution_backward gives.
        dtype: float32, float64, float16 or bfloat16, by name or as a numpy or torch dtype.
        dynamic: any of ``"batch"``, ``"channels"``, ``"space"``, ``"kernel"``.
        opset_version: of the standard operators, 13 to 23; 15 or newer for a canonical function.
        lowering: ``"auto"``, ``"tuned"`` for the fastest in the tuning cache (``"tuned:PATH"`` names the file), or a
            name from `lowerings`.
        provider: the onnxruntime execution provider the model is meant for, ``"cpu"`` and ``"cuda"`` for short; it need
            not be installed.
        threads: number of threads the model is meant for; None stands for several. The best lowering for one thread is
            often another.
        max_error_factor: what ``"auto"`` may take, in units of the direct form's error bound: 1 keeps to direct forms,
            2 admits Winograd tiles of 4, 8 every Winograd form.
        max_workspace: most bytes of intermediate tensors at the batch of `input_shape`; None for no limit.
        inline: False keeps the canonical function as a ``convgrad`` function node; a model specialised to a geometry
            has none.

    Raises:
        GeometryError: shapes or attributes that no convolution has. DTypeError: another dtype.
        UnsupportedLoweringError: the lowering does not apply, the provider has no kernel for the dtype, or there is no
            function to keep.
        ProviderError: `provider` names no execution provider. ArgumentTypeError: an argument of the wrong type.
    """
    op = operator(operator_name, "operator_name")
    name = dtypes.name_of(dtype)
    opset, provider = _opset(opset_version), as_provider(provider)
    dims = _dynamic(dynamic)
    check_threads(threads)
    check_error_factor(max_error_factor)
    inline = as_bool(inline, "inline")
    if not set(dims) <= {BATCH_NAME}:
        _refuse_for_function(op, dims, transposed, output_padding, lowering, max_workspace)
        attributes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return emit_dynamic_model(op, name, opset, dims, input_shape, weight_shape, inline=inline, **attributes)
    if not inline:
        raise UnsupportedLoweringError(
            f"inline is False (--keep-function), but with dynamic {dims} the model is a lowering of standard operators "
            f"and holds no function to keep: name another of {DYNAMIC} for the canonical function, or leave it out"
        )
    if input_shape is None or weight_shape is None:
        missing = "input_shape" if input_shape is None else "weight_shape"
        raise GeometryError(f"{missing} is missing: only a model with dynamic={DYNAMIC} needs no shapes")
    geometry = ConvGeometry.from_forward(
        input_shape,
        weight_shape,
        stride,
        padding,
        dilation,
        groups,
        transposed=transposed,
        output_padding=output_padding,
        rank=op.rank,
        names=("input_shape", "weight_shape"),
    )
    gradients = _masked(op, output_mask)
    chosen = {
        gradient: choose(
            gradient,
            geometry,
            name,
            lowering=lowering,
            provider=provider,
            opset=opset,
            threads=threads,
            max_error_factor=max_error_factor,
            max_workspace=max_workspace,
        )
        for gradient in gradients
    }
    if not is_way(lowering) and all(entry.name != lowering for entry in chosen.values()):
        raise UnsupportedLoweringError(
            f"lowering is {lowering!r}, which gives none of {op.name}'s gradients ({', '.join(gradients)}). "
            f"Lowerings that do: {', '.join(x.name for g in gradients for x in candidates(g))}"
        )
    emitted = geometry.with_batch(BATCH_NAME) if BATCH_NAME in dims else geometry
    model = emit_model(GradientRequest(emitted, chosen, name, opset, provider), op.name)
    model.metadata_props.update(
        {
            "convgrad.op": op.name,
            "convgrad.geometry": json.dumps(geometry.to_dict()),
            "convgrad.lowering": ",".join(entry.name for entry in chosen.values()),
            "convgrad.dtype": name,
        }
    )
    if is_tuned(lowering):
        model.metadata_props["convgrad.selection"] = TUNED
    import onnx_ir

    proto = onnx_ir.to_proto(model)
    if lowering == AUTO and provider == CPU and name == "float32":
        names = {gradient: entry.name for gradient, entry in chosen.items()}
        write_entries(proto, described_gradients(emitted, names))
    return proto


def _refuse_for_function(
    op: Operator, dims: tuple[str, ...], transposed: bool, output_padding: Any, lowering: str, max_workspace: int | None
) -> None:
    """Refuse what a model of a canonical function, whose dimensions `dims` are dynamic, has no place for.

    Raises:
        UnsupportedLoweringError, GeometryError: with the option.
    """
    if op.name == CONVOLUTION_BACKWARD or transposed:
        raise UnsupportedLoweringError(
            f"dynamic is {dims} for {'a transposed ' if transposed else ''}{op.name}: only the batch can be "
            f"dynamic there; the six conv*d_input and conv*d_weight functions take every dimension"
        )
    if any(extra := as_sizes(output_padding, op.rank or 0, "output_padding", minimum=0)):
        raise GeometryError(f"output_padding is {extra}, expected 0: only a transposed convolution has it")
    if lowering != AUTO:
        raise UnsupportedLoweringError(
            f"lowering is {lowering!r} with dynamic {dims}: a lowering is built for fixed sizes, expected "
            f"'auto' for the canonical function"
        )
    if max_workspace is not None:
        raise UnsupportedLoweringError(
            f"max_workspace is {max_workspace} with dynamic {dims}: the canonical function's intermediate "
            f"tensors have no fixed size, expected None"
        )


@dataclass(frozen=True)
class LoweringInfo:
    """One entry of the catalogue, as asked for a geometry.

    Attributes:
        name: pass it as ``lowering=``.
        gradient: ``"input"``, ``"weight"`` or ``"bias"``.
        summary: what the formula does. when: which convolutions it is for.
        why_not: why it does not apply to the geometry asked about; None when it does, or when none was given.
        chosen: it is what ``"auto"`` takes for that geometry.
        tuned: it is what ``"tuned"`` takes; False everywhere when the tuning cache has not measured the geometry.
    """

    name: str
    gradient: str
    summary: str
    when: str
    why_not: str | None = None
    chosen: bool = False
    tuned: bool = False


def lowerings(
    operator_name: str,
    *,
    input_shape: Sequence[int] | None = None,
    weight_shape: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    dtype: Any = "float32",
    opset_version: int = 18,
    provider: str = CPU,
) -> list[LoweringInfo]:
    """The catalogue for one operator; with shapes, also which entries apply, why not, and which one is chosen.

    Args and errors: as in `build_model`. Give both shapes, or neither and none of the other options.
    """
    op, provider = operator(operator_name, "operator_name"), as_provider(provider)
    name, opset = dtypes.name_of(dtype), _opset(opset_version)
    entries = [entry for gradient in op.gradients for entry in candidates(gradient)]
    if input_shape is None and weight_shape is None:
        _refuse_without_shapes(
            stride=(stride, 1),
            padding=(padding, 0),
            dilation=(dilation, 1),
            groups=(groups, 1),
            transposed=(transposed, False),
            output_padding=(output_padding, 0),
            dtype=(name, "float32"),
            opset_version=(opset, 18),
            provider=(provider, CPU),
        )
        return [LoweringInfo(entry.name, entry.gradient, entry.summary, entry.when) for entry in entries]
    if input_shape is None or weight_shape is None:
        raise GeometryError("give input_shape and weight_shape both, or neither")
    geometry = ConvGeometry.from_forward(
        input_shape,
        weight_shape,
        stride,
        padding,
        dilation,
        groups,
        transposed=transposed,
        output_padding=output_padding,
        rank=op.rank,
        names=("input_shape", "weight_shape"),
    )
    chosen = {choose(g, geometry, name, provider=provider, opset=opset).name for g in op.gradients}
    tuned = {
        choose(g, geometry, name, lowering=TUNED, provider=provider, opset=opset).name
        for g in op.gradients
        if is_measured(g, geometry, name, provider)
    }
    return [
        LoweringInfo(
            entry.name,
            entry.gradient,
            entry.summary,
            entry.when,
            entry.why_not(geometry, name, provider, opset),
            entry.name in chosen,
            entry.name in tuned,
        )
        for entry in entries
    ]


def _refuse_without_shapes(**given: tuple[Any, Any]) -> None:
    """Refuse options, by name with their defaults, that the catalogue of no convolution in particular would not read.

    Raises:
        GeometryError: one of them is given, that is differs from its default.
    """
    for name, (value, default) in given.items():
        if type(value) is not type(default) or value != default:
            raise GeometryError(
                f"{name} is {value!r:.80} without shapes, and the list alone depends on nothing: give input_shape and "
                f"weight_shape, or leave {name} out"
            )


def _opset(version: Any) -> int:
    opset: int = as_int(version, "opset_version")
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UnsupportedLoweringError(f"opset_version is {opset}, expected {MIN_OPSET} to {MAX_OPSET}")
    return opset


def _dynamic(dynamic: Any) -> tuple[str, ...]:
    if isinstance(dynamic, str) or not isinstance(dynamic, Sequence | set | frozenset):
        raise ArgumentTypeError(f"dynamic is {dynamic!r}, expected a sequence of names from {DYNAMIC}")
    unknown = [name for name in dynamic if name not in DYNAMIC]
    if unknown:
        raise GeometryError(f"dynamic holds {unknown}, expected names from {DYNAMIC}")
    return tuple(name for name in DYNAMIC if name in dynamic)


def _masked(op: Operator, output_mask: Sequence[bool]) -> tuple[str, ...]:
    wanted = as_mask(output_mask)
    if op.name != CONVOLUTION_BACKWARD:
        if not all(wanted):
            raise GeometryError(f"output_mask is {wanted}, but {op.name} has one gradient: leave it out")
        return op.gradients
    gradients = tuple(name for name, want in zip(op.gradients, wanted, strict=True) if want)
    if not gradients:
        raise GeometryError("output_mask leaves out all three gradients, expected at least one True")
    return gradients
