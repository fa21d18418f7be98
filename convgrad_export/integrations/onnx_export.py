"""`cg.export` and `cg.export_gradient`: a module whose forward or whose derivative becomes a standard ONNX model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from convgrad_export.arguments import as_int, check_error_factor, check_flags, check_table, check_threads
from convgrad_export.errors import ArgumentTypeError
from convgrad_export.integrations import saving
from convgrad_export.integrations.arguments import wrt_names
from convgrad_export.integrations.capture import capture, capture_gradients
from convgrad_export.integrations.decompositions import onnx_decompositions
from convgrad_export.integrations.finishing import BASE_OPSET, check_model, check_opset, finish
from convgrad_export.integrations.half_widening import WIDENED, has_bfloat16, widen_half
from convgrad_export.integrations.program import CapturedProgram
from convgrad_export.integrations.progress import steps
from convgrad_export.integrations.renaming import check_names, rename
from convgrad_export.integrations.report import ExportReport, describe, weight_bytes
from convgrad_export.integrations.scalars import cotangent_product, example_cotangent, scalar_of
from convgrad_export.integrations.translation import translate
from convgrad_export.integrations.verification import run_once
from convgrad_export.integrations.verification import verify as run_verification
from convgrad_export.lowering import CPU, check_provider
from convgrad_export.runtime.session import GradientSession
from convgrad_export.selection.policy import AUTO
from convgrad_export.selection.reduced_arithmetic import DEFAULT_ERROR_FACTOR
from convgrad_export.web_target import check_target, require_web

PathLike = str | os.PathLike[str]
_PROTOBUF_LIMIT = 2**31 - 2**24


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What both exports take beyond the module and what to differentiate."""

    path: PathLike | None
    opset_version: int
    verify: bool
    samples: int
    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    external_data: bool | None
    external_data_above: int
    overwrite: bool
    lowering: str
    provider: str
    threads: int | None
    max_error_factor: float
    custom_translation_table: Mapping[Any, Callable[..., Any]] | None
    progress: bool | None
    target: str | None


def export(
    module: torch.nn.Module,
    args: Sequence[Any] | torch.Tensor = (),
    path: PathLike | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset_version: int = BASE_OPSET,
    verify: bool = True,
    samples: int = 3,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    external_data: bool | None = None,
    external_data_above: int = saving.EXTERNAL_DATA_ABOVE,
    overwrite: bool = False,
    lowering: str = AUTO,
    provider: str = CPU,
    threads: int | None = None,
    max_error_factor: float = DEFAULT_ERROR_FACTOR,
    custom_translation_table: Mapping[Any, Callable[..., Any]] | None = None,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    progress: bool | None = None,
    target: str | None = None,
) -> ExportReport:
    """Export `module(*args, **kwargs)` as it stands; the forward may compute gradients.

    `torch.autograd.grad`, `torch.func.grad`, `vjp`, `jacrev` and `torch.nn.grad` inside the forward become ordinary
    ONNX operators. Keywords with a name of torch.onnx.export's mean the same.

    Args:
        module: In the mode (train or eval) that the model shall have.
        args: Example arguments; one tensor may stand for a tuple of one. Tensors may be inside tuples, lists, dicts and
            dataclasses that are registered (torch.export.register_dataclass).
        path: The file to write. Without one the model is only returned, in the report.
        kwargs: Example keyword arguments.
        dynamic_shapes: Per argument, dimension to name: `{"x": {0: "batch", 2: "height", 3: "width"}}`, or
            torch.export's other forms. Nested arguments take the same nesting, with an entry for each key.
        opset_version: 13 to 23.
        verify: Compare onnxruntime with float64 eager on fresh inputs and further sizes, before anything is written.
        samples: Number of fresh inputs.
        input_names: New names for the inputs, in order. By default the forward's parameter names.
        output_names: New names for the outputs, in order.
        external_data: Weights in `<path>.data`: always, never, or above `external_data_above` bytes (None).
        external_data_above: Bytes of weights.
        overwrite: Replace an existing file.
        lowering: "auto", or one catalogue name for every convolution gradient (`convgrad lowerings` lists them).
        provider: The onnxruntime execution provider that lowerings are chosen for.
        threads: The number of threads they are chosen for; None stands for several.
        max_error_factor: What "auto" may take, in units of the direct form's error bound: 1 for direct forms only, 2
            for Winograd tiles of 4 too, 8 for tiles of 6.
        custom_translation_table: ATen overload to onnxscript function, as in torch.onnx.export.
        decompositions: ATen overload to Python function, applied before translation.
        progress: Show the step at work on the terminal; None shows it when standard error is one.
        target: "web" or "webgpu": refuse nodes that onnxruntime-web's WebAssembly or WebGPU build cannot load.

    Returns:
        Names, operators, lowerings, errors and sizes, and the model.

    Raises:
        CaptureError, ConstantGradientError, DynamicShapeError: The forward cannot be captured; with its line.
        UnsupportedOperatorError: Operators without translation, all at once, with the modules that call them.
        VerificationError: The model disagrees with eager. Nothing was written.
        OutputExistsError, OutputPathError, ArgumentTypeError: Found before any work is done.
    """
    settings = _Settings(
        path,
        opset_version,
        verify,
        samples,
        input_names,
        output_names,
        external_data,
        external_data_above,
        overwrite,
        lowering,
        provider,
        threads,
        max_error_factor,
        custom_translation_table,
        progress,
        target,
    )
    _check(settings, decompositions)
    table = {**onnx_decompositions(opset_version), **(decompositions or {})}
    return _export(
        lambda: capture(module, _tuple(args), kwargs, dynamic_shapes=dynamic_shapes, decompositions=table), settings
    )


def export_gradient(
    module: torch.nn.Module,
    args: Sequence[Any] | torch.Tensor,
    path: PathLike | None = None,
    *,
    wrt: str | Sequence[str] = "inputs",
    of: int | str | Callable[..., torch.Tensor] | None = None,
    of_args: Sequence[torch.Tensor] = (),
    of_arg_names: Sequence[str] | None = None,
    of_dynamic_shapes: Any = None,
    hessian_vector: bool = False,
    return_outputs: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset_version: int = BASE_OPSET,
    verify: bool = True,
    samples: int = 3,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    external_data: bool | None = None,
    external_data_above: int = saving.EXTERNAL_DATA_ABOVE,
    overwrite: bool = False,
    lowering: str = AUTO,
    provider: str = CPU,
    threads: int | None = None,
    max_error_factor: float = DEFAULT_ERROR_FACTOR,
    custom_translation_table: Mapping[Any, Callable[..., Any]] | None = None,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    progress: bool | None = None,
    target: str | None = None,
) -> ExportReport:
    """Export a scalar of the module's output together with its gradients.

    The model's outputs: "value", the scalar; activations named in `wrt`; one "<name>.grad" for each name; in training
    mode "<name>.updated" for each buffer that the forward changes.

    Args:
        module: As for `export`.
        args: As for `export`.
        path: As for `export`.
        wrt: "inputs", "parameters", or a list of these and of names: of inputs, parameters or submodules (whose output
            is meant: "layer4"). "parameters" are those with requires_grad=True; others can be named.
        of: The scalar. None or "sum": the sum of the output. An int: that class's score, `output[:, of].sum()`.
            "vjp": `(output * cotangent).sum()` with an additional input "cotangent". A function of the output and
            `of_args` that returns a scalar.
        of_args: Example tensors (or one) that `of` takes after the output: additional inputs (labels).
        of_arg_names: Their names; by default the function's parameter names.
        of_dynamic_shapes: Dynamic dimensions of `of_args`.
        hessian_vector: Also take "<name>.vector" and return "<name>.hvp", Hessian times vector.
        return_outputs: Also return the forward's outputs.
        kwargs, dynamic_shapes, opset_version, verify, samples, input_names, output_names, external_data,
        external_data_above, overwrite, lowering, provider, threads, max_error_factor, custom_translation_table,
        decompositions, progress, target:
            As for `export`.

    Returns:
        As for `export`.

    Raises:
        ArgumentTypeError: `wrt` names nothing, or `of` gives no scalar. ConstantGradientError: the scalar does not
        depend on something named in `wrt`. Otherwise as for `export`.
    """
    settings = _Settings(
        path,
        opset_version,
        verify,
        samples,
        input_names,
        output_names,
        external_data,
        external_data_above,
        overwrite,
        lowering,
        provider,
        threads,
        max_error_factor,
        custom_translation_table,
        progress,
        target,
    )
    _check(settings, decompositions)
    check_flags(hessian_vector=hessian_vector, return_outputs=return_outputs)
    if not isinstance(of_args, (torch.Tensor, list, tuple)):
        raise ArgumentTypeError(f"of_args is {of_args!r:.80}, expected a tuple of tensors for the function `of`")
    if of_arg_names is not None:
        check_names("of_arg_names", of_arg_names)
    given = isinstance(of_args, torch.Tensor) or len(of_args) > 0
    if not callable(of) and (given or of_arg_names is not None or of_dynamic_shapes is not None):
        raise ArgumentTypeError(
            f"of is {of!r:.80}, which takes no further tensors: of_args, of_arg_names and of_dynamic_shapes are for a "
            "function"
        )
    table = {**onnx_decompositions(opset_version), **(decompositions or {})}

    def captured() -> CapturedProgram:
        value, value_args, names, shapes = of, of_args, of_arg_names, of_dynamic_shapes
        if isinstance(of, str) and of == "vjp":  # an array would compare element by element
            value, names = cotangent_product, ["cotangent"]
            cotangent, shapes = example_cotangent(module, _tuple(args), kwargs, dynamic_shapes)
            value_args = (cotangent,)
        return capture_gradients(
            module,
            _tuple(args),
            kwargs,
            wrt=wrt,
            value=scalar_of(value),
            value_args=value_args,
            value_arg_names=names,
            value_dynamic_shapes=shapes,
            return_outputs=return_outputs,
            hessian_vector=hessian_vector,
            dynamic_shapes=dynamic_shapes,
            unused="omit" if "parameters" in wrt_names(wrt) else "error",
            decompositions=table,
        )

    return _export(captured, settings)


def _check(settings: _Settings, decompositions: Any) -> None:
    check_flags(
        verify=settings.verify,
        overwrite=settings.overwrite,
        progress=settings.progress is not None and settings.progress,
        external_data=settings.external_data is not None and settings.external_data,
    )
    if as_int(settings.external_data_above, "external_data_above") < 0:
        raise ArgumentTypeError(
            f"external_data_above is {settings.external_data_above}, expected a number of bytes, 0 or above"
        )
    check_table(settings.custom_translation_table, "custom_translation_table")
    check_table(decompositions, "decompositions")
    check_opset(settings.opset_version)
    check_threads(settings.threads)
    check_error_factor(settings.max_error_factor)
    if settings.target is not None:
        check_target(settings.target)
    samples = settings.samples
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ArgumentTypeError(f"samples is {samples!r}, expected a number of inputs to compare, at least 1")
    for what, names in (("input_names", settings.input_names), ("output_names", settings.output_names)):
        if names is not None:
            check_names(what, names)
    check_provider(settings.provider)


def _export(captured: Callable[[], CapturedProgram], settings: _Settings) -> ExportReport:
    path = None if settings.path is None else saving.check_path(settings.path, settings.overwrite)
    seconds: dict[str, float] = {}
    # Under the caller's torch.inference_mode there would be no gradients.
    with steps(settings.progress, seconds) as step, torch.inference_mode(False):
        step("capture")
        program = captured()
        widened = has_bfloat16(program.graph_module) and widen_half(program.graph_module)
        step("translate")
        translation = translate(
            program,
            lowering=settings.lowering,
            provider=settings.provider,
            threads=settings.threads,
            max_error_factor=settings.max_error_factor,
            opset=settings.opset_version,
            custom=settings.custom_translation_table,
        )
        step("optimize")
        model = finish(translation.model, opset=settings.opset_version)
        report = ExportReport(
            path=path, opset=settings.opset_version, lowerings=translation.choices, model=model, **describe(model)
        )
        weights = weight_bytes(model)
        large = weights >= _PROTOBUF_LIMIT
        if large and settings.external_data is False:
            raise ArgumentTypeError(
                f"external_data is False, but the weights take {weights:,} bytes and one file holds at most 2 GB; pass "
                "None or True"
            )
        if not large:
            step("check")
            proto = ir.to_proto(model)
            check_model(proto)
            if settings.target is not None:
                report.notes += require_web(proto, settings.target)
        elif settings.target is not None:
            report.notes.append(f"too large to be checked for {settings.target} here: convgrad check --target")
        if widened:
            report.notes.append(WIDENED)
        if program.unused:
            report.notes.append(f"no gradient, the value does not depend on it: {', '.join(program.unused)}")
        if settings.verify:
            step("verify")
            _verify(program, report, settings)
        rename(model, report, settings.input_names, settings.output_names)
        if path is not None:
            step("write")
            report.sizes = saving.save(
                model,
                path,
                external_data=settings.external_data,
                external_data_above=settings.external_data_above,
            )
        else:
            report.sizes = {"weights": weights}
    report.seconds = seconds
    return report


def _verify(program: CapturedProgram, report: ExportReport, settings: _Settings) -> None:
    random = sorted({str(node.target) for node in program.random_nodes})
    with _own_session(report) as runner:
        if random:
            run_once(runner, program)
            report.notes.append(f"not verified: the model draws random numbers ({', '.join(random)})")
            return
        result = run_verification(runner, program, samples=settings.samples)
    report.errors, report.verified_sizes = result.errors, result.sizes
    report.notes += result.notes


@contextlib.contextmanager
def _own_session(report: ExportReport) -> Iterator[GradientSession]:
    """A session of what the file says, for any runtime. Large models are read from files only, by the checker too."""
    if weight_bytes(report.model) < _PROTOBUF_LIMIT:
        yield GradientSession(report.model, blocked_layout=False)
        return
    with tempfile.TemporaryDirectory(dir=report.path.parent if report.path is not None else None) as folder:
        path = Path(folder) / "model.onnx"
        saving.save(report.model, path, external_data=True)
        onnx.checker.check_model(str(path), full_check=True)
        yield GradientSession(path, blocked_layout=False)


def _tuple(args: Sequence[Any] | torch.Tensor) -> tuple[Any, ...]:
    if not isinstance(args, (torch.Tensor, list, tuple)):
        raise ArgumentTypeError(f"args is a {type(args).__name__}, expected a tuple of the forward's arguments")
    return (args,) if isinstance(args, torch.Tensor) else tuple(args)
