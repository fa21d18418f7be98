"""`generate_artifacts`, as in onnxruntime-training: a training, an eval and an optimizer model, and a checkpoint.

The signature and the files are those of `onnxruntime.training.artifacts` 1.19.2, so that a script changes its import.
The models hold standard operators only and run on any onnxruntime build; the checkpoint is a safetensors file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from ..arguments import as_names, check_flags
from ..errors import ArgumentTypeError
from ..files import staged, write_atomically
from ..integrations.capture import state_inputs
from ..integrations.decompositions import onnx_decompositions
from ..integrations.finishing import BASE_OPSET, check_model, check_opset, finish
from ..integrations.half_widening import has_bfloat16, widen_half
from ..integrations.outputs import named_outputs, updated
from ..integrations.program import CapturedProgram, GraphInput, GraphOutput, TracedOutput
from ..integrations.tracing import swapped_tensors, trace_function
from ..integrations.translation import translate
from ..tensor_names import GRADIENT, LEARNING_RATE, LOSS, RESET, SEED, STEP
from .api import BATCH, OWN, RETURNED
from .artifact_arguments import (
    LossType,
    OptimType,
    default_shapes,
    file_paths,
    frozen_names,
    loss_input,
    module_and_batch,
    resolve_optimizer_type,
)
from .backward import gradients, leaves
from .checkpoint import save_checkpoint
from .cumulative import cumulative_averages
from .losses import Loss, scalar
from .module_state import StandIns, copied_arguments, refuse_held_state
from .onnx_module import OnnxModule
from .optimizers import ResolvedOptimizer, resolve_optimizer
from .randomness import SeededRandomness
from .step import drop_input, is_state, refuse_unseeded_randomness
from .step_arguments import (
    StepInputs,
    check_names,
    trainable_parameters,
    untrained_loss_parameters,
)
from .surroundings import Autocast, apart
from .update import apply_rules
from .verification import Settings, verify_step

__all__ = ["LossType", "OptimType", "generate_artifacts"]


def generate_artifacts(
    model: torch.nn.Module | onnx.ModelProto | str | os.PathLike[str],
    requires_grad: Sequence[str] | None = None,
    frozen_params: Sequence[str] | None = None,
    loss: LossType | Any | None = None,
    optimizer: OptimType | Any | None = None,
    artifact_directory: str | os.PathLike[str] | None = None,
    prefix: str = "",
    ort_format: bool = False,
    custom_op_library: Any = None,
    additional_output_names: Sequence[str] | None = None,
    nominal_checkpoint: bool = False,
    loss_input_names: Sequence[str] | None = None,
    *,
    args: Sequence[Any] | Tensor | None = None,
    dynamic_shapes: Any = None,
    opset_version: int = BASE_OPSET,
    overwrite: bool = True,
    verify: bool = True,
) -> None:
    """Write ``training_model.onnx``, ``eval_model.onnx``, ``optimizer_model.onnx`` and ``checkpoint``.

    Args:
        model: a torch module (then `args` is needed), or an ONNX forward model, whose operators have to be among
            `onnx_module.OPERATORS`. A module in training mode trains as it is, with the parts in eval mode that are
            (a frozen BatchNorm); one in eval mode trains in training mode. Its modes are the same afterwards.
        requires_grad: parameters to train, of an ONNX model any floating-point initializers; by default those with
            requires_grad, or all weights of an ONNX model.
        frozen_params: parameters that stay as they are; other initializers of an ONNX model may be among them.
            BatchNorm's statistics named here still follow the batches, and count among the checkpoint's parameters.
        loss: `LossType`, or what `export_training_step` takes. None: the model's first output is the loss.
        optimizer: `OptimType`, or what `export_training_step` takes. None writes no optimizer model.
        artifact_directory: the current folder by default.
        prefix: put before each file name.
        additional_output_names: of the forward's outputs that `training.api.Module` returns after the loss. By default
            a torch module's are all returned, and an ONNX model's are not, as in onnxruntime-training; the files hold
            all of them.
        loss_input_names: of the output that the loss takes, where there are several, and of the targets.
        args: example batch: the forward's arguments, then the targets. For ONNX models made up from declared shapes.
        dynamic_shapes: as in `export_training_step`; by default the first axis of every input is the batch, and the
            axes that an ONNX model leaves open are dynamic.
        overwrite: as onnxruntime-training does by default; False keeps existing files.
        verify: run three steps of each model beside float64 eager PyTorch before anything is written, and one more at
            another size of each dynamic dimension: losses, outputs, gradients, buffers, and the optimizer's update.

    Raises:
        ArgumentTypeError: an option without a meaning here (`ort_format`, `custom_op_library`, `nominal_checkpoint`), a
            name the model does not have or may not have (``step``, ``loss``), or a torch module without `args`.
        UnsupportedOperatorError: an operator of the ONNX model that is not known, with its name; or the model has lost
            parameters of the module that it was exported from, and `requires_grad` does not say what to train.
        VerificationError: a model disagrees with PyTorch; nothing was written.
    """
    for name, value in (
        ("ort_format", ort_format),
        ("custom_op_library", custom_op_library),
        ("nominal_checkpoint", nominal_checkpoint),
    ):
        if value is not None and not (isinstance(value, bool | int | str) and not value):
            raise ArgumentTypeError(
                f"{name} is {value!r:.80}: not supported, the models are standard ONNX for any onnxruntime"
            )
    check_opset(opset_version)
    check_flags(overwrite=overwrite, verify=verify)
    for name, names, example in (
        ("additional_output_names", additional_output_names, "logits"),
        ("requires_grad", requires_grad, "fc.weight"),
        ("frozen_params", frozen_params, "fc.weight"),
    ):
        if names is not None:
            as_names(names, name, example)
    paths = file_paths(artifact_directory, prefix, overwrite)
    module, batch, resolved = module_and_batch(model, loss, args, loss_input_names, requires_grad or ())
    untrained_loss_parameters(resolved, optimizer, module)
    frozen = frozen_names(module, requires_grad, frozen_params)
    parameters = trainable_parameters(module, frozen)
    if isinstance(module, OnnxModule) and requires_grad is None:
        module.refuse_dropped(parameters)
    chosen = None if optimizer is None else resolve_optimizer(resolve_optimizer_type(optimizer), parameters)
    shapes = dynamic_shapes if dynamic_shapes is not None else default_shapes(module, batch, resolved)
    models: dict[str, onnx.ModelProto] = {}
    updated: dict[str, Tensor] = {}

    def add(key: str, program: CapturedProgram, learning_rate: float = 0.0) -> None:
        models[key] = _model(program, opset_version)
        if verify:
            _verify(models[key], program, key, learning_rate)

    with _modes_kept(module), apart() as autocast:
        if not module.training:
            module.train()
        program = _forward(module, batch, resolved, shapes, parameters, opset_version, autocast)
        if chosen is not None:
            # As in PyTorch, a parameter that gets no gradient stays, weight decay or not.
            updated = {n: p for n, p in parameters.items() if n in chosen.rules and n not in program.unused}
            chosen.check_steps(updated)
        returned = _returned(program, additional_output_names, isinstance(module, OnnxModule))
        add("training_model", program)
        evaluated = _forward(module.eval(), batch, resolved, shapes, {}, opset_version, autocast)
        add("eval_model", evaluated)
        for key, forward in (("training_model", program), ("eval_model", evaluated)):
            # in eval mode a forward may return less
            names = returned or [output.name for output in forward.outputs if output.kind in ("value", "output")]
            kept = [output.name for output in forward.outputs if output.name in names]
            models[key].metadata_props.add(key=RETURNED, value=json.dumps(sorted(kept, key=names.index)))
            given = [spec.name for spec in forward.inputs if spec.kind == "user" and spec.name not in OWN]
            models[key].metadata_props.add(key=BATCH, value=json.dumps(given))
        if chosen is not None:
            add("optimizer_model", _optimizer_program(chosen, updated, opset_version), chosen.learning_rate)
    held = state_inputs(module)
    state = {spec.name: spec.value.detach() for spec in held}
    if chosen is not None:
        state.update(_optimizer_state(chosen, updated))
    # BatchNorm's statistics that a script counts among an ONNX model's parameters are exchanged with them.
    named = [spec.name for spec in held if spec.kind == "parameter" or spec.name in (frozen_params or ())]
    metadata = {
        "trained": "\n".join(parameters),
        "parameters": "\n".join(named),
        "learning_rate": repr(chosen.learning_rate if chosen is not None else 1e-3),
    }
    with staged(paths["checkpoint"].parent) as temporary:
        for key, proto in models.items():
            write_atomically(temporary / paths[key].name, proto.SerializeToString(deterministic=True))
        save_checkpoint(temporary / paths["checkpoint"].name, state, metadata=metadata)


def _verify(model: onnx.ModelProto, program: CapturedProgram, key: str, learning_rate: float) -> None:
    """Run a model beside PyTorch; gradients are added up in every second run, and an optimizer's are drawn.

    Raises:
        VerificationError, DynamicShapeError: as `verify_step`.
    """
    rate = learning_rate or 1e-3  # a warm-up starts at 0, where no update shows
    settings: Settings = {
        SEED: lambda number: number,
        STEP: lambda number: number,
        RESET: lambda number: number % 2 == 0,
        LEARNING_RATE: lambda _: rate,
    }
    state = {spec.name: spec.value.detach() for spec in program.inputs if is_state(spec)}
    optimizer = key == "optimizer_model"
    drawn = [name for name in state if name.endswith(GRADIENT)] if optimizer else []
    verify_step(model, program, state, settings, drawn=drawn, what=key.replace("_", " "))


@contextlib.contextmanager
def _modes_kept(module: torch.nn.Module) -> Iterator[None]:
    """Give every submodule its own mode back, whatever happens."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training  # not train(), which would reach the parts below


def _returned(program: CapturedProgram, names: Sequence[str] | None, from_onnx: bool) -> list[str] | None:
    """What `training.api.Module` returns: the loss, then the outputs of these names; None for all.

    Raises:
        ArgumentTypeError: the forward has no output of a name.
    """
    if names is None:
        return [LOSS] if from_onnx else None
    available = [output.name for output in program.outputs if output.kind == "output"]
    full = {name: name if name in available else f"output.{name}" for name in names}
    if unknown := [name for name in names if full[name] not in available]:
        raise ArgumentTypeError(
            f"additional_output_names names {', '.join(unknown)}, the forward's outputs are {', '.join(available)}"
        )
    return [LOSS, *full.values()]


def _forward(
    module: torch.nn.Module,
    batch: tuple[Any, ...],
    loss: Loss,
    dynamic_shapes: Any,
    parameters: Mapping[str, Tensor],
    opset: int,
    autocast: Autocast,
) -> CapturedProgram:
    """Loss and outputs; with parameters to train also their gradients, added to what was there before."""
    inputs = StepInputs.of(module, batch, loss, dynamic_shapes, parameters)
    state, users, labels = inputs.state, inputs.batch, inputs.labels
    check_names(module, (*state, *users, *labels), (LEARNING_RATE, SEED, STEP, RESET, LOSS))
    training = bool(parameters)
    counters = (
        GraphInput(SEED, "user", torch.tensor(0, dtype=torch.int64)),
        GraphInput(STEP, "user", torch.tensor(0, dtype=torch.int64)),
    )
    reset = (GraphInput(RESET, "user", torch.tensor(True)),) if training else ()
    sums = tuple(
        GraphInput(f"{name}{GRADIENT}", "buffer", torch.zeros_like(tensor.detach()))
        for name, tensor in parameters.items()
    )
    specs = (*users, *labels, *counters, *reset, *state, *sums)
    unused: list[str] = []
    references: dict[str, str] = {}

    def traced(values: Mapping[str, Tensor]) -> list[TracedOutput]:
        trained = leaves(parameters, values)
        own = StandIns(state, trained, values)
        given = copied_arguments((*users, *labels), values)
        zero = torch.zeros((), dtype=torch.int64)
        random = SeededRandomness(values.get(SEED, zero), values.get(STEP, zero))
        with cumulative_averages(module), swapped_tensors(module, state, own.tensors), random:
            with autocast():
                result = inputs.arguments.call(module, given)
                first = loss_input(result, loss, isinstance(module, OnnxModule))
                value = scalar(loss.call(first, *(given[s.name] for s in labels)))
            found = gradients(value, trained) if training else {}
        outputs = [TracedOutput(GraphOutput(LOSS, "value"), value.detach())]
        named = named_outputs(result, (LOSS, *(spec.name for spec in specs)))
        outputs += [TracedOutput(output.spec, output.tensor.detach()) for output in named]
        if not training:
            return outputs
        unused[:] = [name for name in trained if name not in found]
        references.clear()  # a trace may run twice
        references.update(own.references())
        for name, gradient in found.items():
            before = values[f"{name}{GRADIENT}"]
            total = torch.where(values[RESET], torch.zeros_like(before), before) + gradient
            outputs.append(updated(f"{name}{GRADIENT}", total))
        return outputs + own.outputs()

    program = trace_function(traced, specs, decompositions=onnx_decompositions(opset))
    refuse_held_state(program, state, parameters, references)
    refuse_unseeded_randomness(program)
    program.unused = tuple(unused)
    for name in (SEED, STEP, *(f"{name}{GRADIENT}" for name in unused)):
        drop_input(program, name)
    return program


def _optimizer_state(optimizer: ResolvedOptimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {STEP: torch.tensor(optimizer.step, dtype=torch.int64)}
    for name, tensor in parameters.items():
        initial = optimizer.initial_state(name, tensor.detach())
        state.update({f"{name}.{key}": value for key, value in initial.items()})
    return state


def _optimizer_program(optimizer: ResolvedOptimizer, parameters: Mapping[str, Tensor], opset: int) -> CapturedProgram:
    """Gradients in, new parameters and state out."""
    state = _optimizer_state(optimizer, parameters)
    double = any(tensor.dtype == torch.float64 for tensor in parameters.values())
    rate = torch.tensor(optimizer.learning_rate, dtype=torch.float64 if double else torch.float32)
    specs = [GraphInput(LEARNING_RATE, "user", rate)]
    for name, tensor in parameters.items():
        specs.append(GraphInput(name, "parameter", tensor.detach()))
        specs.append(GraphInput(f"{name}{GRADIENT}", "buffer", torch.zeros_like(tensor.detach())))
    specs += [GraphInput(name, "buffer", value) for name, value in state.items()]

    def traced(values: Mapping[str, Tensor]) -> list[TracedOutput]:
        step = values[STEP] + 1
        outputs = [updated(STEP, step)]
        with torch.no_grad():
            gradients = {name: values[f"{name}{GRADIENT}"] for name in parameters}
            for name, (new, new_state) in apply_rules(gradients, values, optimizer, step.to(torch.float64)).items():
                outputs.append(updated(name, new))
                outputs += [updated(f"{name}.{key}", tensor) for key, tensor in new_state.items()]
        return outputs

    return trace_function(traced, specs, decompositions=onnx_decompositions(opset))


def _model(program: CapturedProgram, opset: int) -> onnx.ModelProto:
    as_inputs: Callable[[GraphInput], bool] = lambda spec: spec.kind != "constant"  # noqa: E731
    if has_bfloat16(program.graph_module):
        widen_half(program.graph_module)
    model = finish(translate(program, opset=opset, as_inputs=as_inputs).model, opset=opset)
    proto = ir.to_proto(model)
    check_model(proto)
    return proto
