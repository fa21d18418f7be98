"""`cg.export` and `cg.export_gradient`: a module whose forward or whose derivative becomes a standard ONNX model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from convgrad_export.errors import ArgumentTypeError
from convgrad_export.integrations import saving
from convgrad_export.integrations.capture import capture, capture_gradients
from convgrad_export.integrations.decompositions import onnx_decompositions
from convgrad_export.integrations.finishing import BASE_OPSET, check_model, check_opset, finish
from convgrad_export.integrations.program import CapturedProgram
from convgrad_export.integrations.report import ExportReport, describe, weight_bytes
from convgrad_export.integrations.translation import translate
from convgrad_export.integrations.verification import verify as run_verification
from convgrad_export.lowering import CPU
from convgrad_export.selection.policy import AUTO
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
        args: Example arguments; one tensor may stand for a tuple of one.
        path: The file to write. Without one the model is only returned, in the report.
        kwargs: Example keyword arguments.
        dynamic_shapes: Per argument, dimension to name: `{"x": {0: "batch", 2: "height", 3: "width"}}`, or
            torch.export's other forms.
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
        custom_translation_table,
        progress,
        target,
    )
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
            is meant: "layer4").
        of: The scalar. None or "sum": the sum of the output. An int: that class's score, `output[:, of].sum()`.
            "vjp": `(output * cotangent).sum()` with an additional input "cotangent". A function of the output and
            `of_args` that returns a scalar.
        of_args: Example tensors that `of` takes after the output: additional inputs (labels).
        of_arg_names: Their names; by default the function's parameter names.
        of_dynamic_shapes: Dynamic dimensions of `of_args`.
        hessian_vector: Also take "<name>.vector" and return "<name>.hvp", Hessian times vector.
        return_outputs: Also return the forward's outputs.
        kwargs, dynamic_shapes, opset_version, verify, samples, input_names, output_names, external_data,
        external_data_above, overwrite, lowering, provider, custom_translation_table, decompositions, progress, target:
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
        custom_translation_table,
        progress,
        target,
    )
    table = {**onnx_decompositions(opset_version), **(decompositions or {})}

    def captured() -> CapturedProgram:
        value, value_args, names, shapes = of, of_args, of_arg_names, of_dynamic_shapes
        if of == "vjp":
            value, names = _cotangent_product, ["cotangent"]
            cotangent, shapes = _cotangent(module, _tuple(args), kwargs, dynamic_shapes)
            value_args = (cotangent,)
        return capture_gradients(
            module,
            _tuple(args),
            kwargs,
            wrt=wrt,
            value=value if callable(value) else _scalar_of(of),
            value_args=value_args,
            value_arg_names=names,
            value_dynamic_shapes=shapes,
            return_outputs=return_outputs,
            hessian_vector=hessian_vector,
            dynamic_shapes=dynamic_shapes,
            unused="omit" if "parameters" in ([wrt] if isinstance(wrt, str) else wrt) else "error",
            decompositions=table,
        )

    return _export(captured, settings)


def _export(captured: Callable[[], CapturedProgram], settings: _Settings) -> ExportReport:
    check_opset(settings.opset_version)
    path = None if settings.path is None else saving.check_path(settings.path, settings.overwrite)
    if settings.target is not None:
        check_target(settings.target)
    seconds: dict[str, float] = {}
    with _steps(settings.progress, seconds) as step:
        step("capture")
        program = captured()
        step("translate")
        translation = translate(
            program,
            lowering=settings.lowering,
            provider=settings.provider,
            opset=settings.opset_version,
            custom=settings.custom_translation_table,
        )
        step("optimize")
        model = finish(translation.model, opset=settings.opset_version)
        report = ExportReport(
            path=path, opset=settings.opset_version, lowerings=translation.choices, model=model, **describe(model)
        )
        weights = weight_bytes(model)
        if weights < _PROTOBUF_LIMIT:
            step("check")
            proto = ir.to_proto(model)
            check_model(proto)
            if settings.target is not None:
                report.notes += require_web(proto, settings.target)
        elif settings.target is not None:
            report.notes.append(f"too large to be checked for {settings.target} here: convgrad check --target")
        if program.unused:
            report.notes.append(f"no gradient, the value does not depend on it: {', '.join(program.unused)}")
        if settings.verify:
            step("verify")
            _verify(program, report, settings)
        _rename(model, settings, report)
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
    random = sorted(
        {
            str(node.target)
            for node in program.graph_module.graph.nodes
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        }
    )
    if random:
        report.notes.append(f"not verified: the model draws random numbers ({', '.join(random)})")
        return
    result = run_verification(report.model, program, samples=settings.samples)
    report.errors, report.verified_sizes = result.errors, result.sizes
    report.notes += result.notes


def _rename(model: ir.Model, settings: _Settings, report: ExportReport) -> None:
    for what, values, names in (
        ("input_names", model.graph.inputs, settings.input_names),
        ("output_names", model.graph.outputs, settings.output_names),
    ):
        if names is None:
            continue
        if len(names) != len(values) or len(set(names)) != len(names):
            raise ArgumentTypeError(
                f"{what} is {list(names)}, expected {len(values)} different names for {[v.name for v in values]}"
            )
        renamed = {value.name: name for value, name in zip(values, names, strict=True)}
        for value, name in zip(values, names, strict=True):
            value.name = name
        report.errors = {renamed.get(name, name): error for name, error in report.errors.items()}
    report.inputs, report.outputs = describe(model)["inputs"], describe(model)["outputs"]


@contextlib.contextmanager
def _steps(progress: bool | None, seconds: dict[str, float]) -> Iterator[Callable[[str], None]]:
    """Times each step, and names it on the terminal while it runs."""
    from rich.console import Console

    console = Console(stderr=True, quiet=not (sys.stderr.isatty() if progress is None else progress))
    current: list[tuple[str, float]] = []

    def finish_current() -> None:
        if current:
            name, start = current.pop()
            seconds[name] = time.perf_counter() - start
            console.print(f"  {name} {seconds[name]:.1f} s", style="dim")

    with console.status("export") as status:

        def step(name: str) -> None:
            finish_current()
            status.update(f"{name} ...")
            current.append((name, time.perf_counter()))

        yield step
        finish_current()


def _tuple(args: Sequence[Any] | torch.Tensor) -> tuple[Any, ...]:
    return (args,) if isinstance(args, torch.Tensor) else tuple(args)


def _scalar_of(of: int | str | Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor] | None:
    if of is None or of == "sum":
        return None
    if isinstance(of, int) and not isinstance(of, bool):
        index = of

        def class_score(output: torch.Tensor) -> torch.Tensor:
            if (
                not isinstance(output, torch.Tensor)
                or output.dim() < 2
                or not -output.shape[1] <= index < output.shape[1]
            ):
                shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
                raise ArgumentTypeError(f"of={index} takes class {index} of an output (batch, classes), got {shape}")
            return output[:, index].sum()

        return class_score
    raise ArgumentTypeError(f"of is {of!r}, expected an int (class), 'sum', 'vjp' or a function of the output")


def _cotangent_product(output: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    return (output * cotangent).sum()


def _cotangent(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> tuple[torch.Tensor, Any]:
    """An example cotangent, and its dynamic dimensions: those of the output that are not fixed."""
    program = capture(module, args, kwargs, dynamic_shapes=dynamic_shapes)
    outputs = [spec for spec in program.outputs if spec.kind == "output"]
    if len(outputs) != 1:
        raise ArgumentTypeError(f"of='vjp' needs a forward with one tensor as its output, this one has {len(outputs)}")
    (node,) = [n for n in program.graph_module.graph.nodes if n.op == "output"]
    value = node.args[0][program.outputs.index(outputs[0])].meta["val"]
    sizes: list[int] = []
    dynamic: dict[int, str] = {}
    for axis, size in enumerate(value.shape):
        if isinstance(size, torch.SymInt):
            sizes.append(int(size.node.hint))
            dynamic[axis] = program.symbol_names.get(str(size.node.expr), f"output_dim_{axis}")
        else:
            sizes.append(int(size))
    return torch.ones(sizes, dtype=value.dtype), {"cotangent": dynamic}
