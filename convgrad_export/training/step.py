"""`export_training_step`: forward, loss, backward and optimizer update as one ONNX model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from ..arguments import check_error_factor, check_flags, check_threads
from ..errors import UnsupportedOperatorError
from ..files import staged, written_file
from ..integrations import saving
from ..integrations.arguments import check_module
from ..integrations.capture import state_inputs
from ..integrations.decompositions import onnx_decompositions
from ..integrations.finishing import BASE_OPSET, check_model, check_opset, complete_shapes, finish
from ..integrations.half_widening import WIDENED, has_bfloat16, widen_half
from ..integrations.outputs import named_outputs
from ..integrations.program import CapturedProgram, GraphInput, GraphOutput, TracedOutput
from ..integrations.report import ExportReport, describe
from ..integrations.tracing import swapped_tensors, trace_function
from ..integrations.translation import translate
from ..lowering import CPU, check_provider
from ..selection.policy import AUTO, check_name
from ..selection.reduced_arithmetic import DEFAULT_ERROR_FACTOR
from ..tensor_names import GRADIENT_NORM, LEARNING_RATE, LOSS, SEED, STEP
from .backward import gradients, leaves
from .checkpoint import checkpoint_path, save_checkpoint
from .cumulative import cumulative_averages
from .losses import resolve_loss, scalar
from .module_state import StandIns, copied_arguments, refuse_held_state
from .optimizers import resolve_optimizer
from .preparation import METADATA
from .randomness import SeededRandomness
from .step_arguments import (
    StepInputs,
    check_names,
    check_numbers,
    trainable_parameters,
    untrained_loss_parameters,
)
from .surroundings import Autocast, apart
from .update import StepOptions, calls_before, optimizer_inputs, update
from .verification import Settings, verify_step


@dataclass
class TrainingStepReport(ExportReport):
    """An `ExportReport` with what the step carries from one call to the next.

    Attributes:
        checkpoint: the safetensors file with the initial state, None when no path was given.
        state: name of each state input to its initial value.
        learning_rate: the optimizer's own, a default for the runtime input.
    """

    checkpoint: Path | None = None
    state: dict[str, Tensor] = field(default_factory=dict, repr=False)
    learning_rate: float = 1e-3


def export_training_step(
    module: torch.nn.Module,
    loss: Any,
    optimizer: Any,
    args: Sequence[Any] | Tensor,
    path: str | os.PathLike[str] | None = None,
    *,
    frozen: Sequence[str] = (),
    dynamic_shapes: Any = None,
    label_smoothing: float = 0.0,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    gradient_accumulation: int = 1,
    return_outputs: bool = False,
    opset_version: int = BASE_OPSET,
    verify: bool = True,
    lowering: str = AUTO,
    provider: str = CPU,
    threads: int | None = None,
    max_error_factor: float = DEFAULT_ERROR_FACTOR,
    overwrite: bool = False,
) -> TrainingStepReport:
    """Export one step of training: loss, gradients, and the optimizer's update, for any onnxruntime build.

    The model's inputs: the batch (the forward's arguments, then the loss's targets), ``learning_rate``, ``seed`` where
    the forward draws random numbers, and the state: parameters and buffers under their PyTorch names, the optimizer's
    tensors as ``<parameter>.<name>``, and the int64 counter ``step``. Its outputs: ``loss``, and ``<state>.updated``
    for each state tensor that changes. `TrainingSession` feeds one back into the other.

    Args:
        module: in the mode it trains in: in training mode BatchNorm uses the batch's statistics and updates its own.
            Hooks that its parameters have from ``register_hook`` become part of the step.
        loss: ``"cross_entropy"``, ``"bce_with_logits"``, ``"mse"``, ``"l1"``, ``"huber"``, ``"smooth_l1"``, ``"nll"``,
            a torch.nn loss module, or a function of the output and any number of targets. Parameters of a loss module
            are constants.
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"rmsprop"``, an instance of `convgrad_export.training`'s
            classes, a torch.optim instance (its parameter groups are kept, and its state if it has made steps), or an
            update function.
        args: example batch: the forward's arguments, then the targets.
        path: the model file; the initial state goes to ``<path without .onnx>.checkpoint.safetensors``.
        frozen: names of parameters, or of modules, that stay as they are; so do those with requires_grad=False.
        dynamic_shapes: ``{"x": {0: "batch"}, "target": {0: "batch"}}``, or a sequence in the order of `args`.
        label_smoothing: for ``"cross_entropy"``.
        max_grad_norm: scale the gradients so that their joint 2-norm is at most this (torch's clip_grad_norm_); the
            norm before scaling becomes the output ``gradient_norm``. Only parameters that the optimizer updates count:
            those that are frozen, or that a torch.optim instance does not hold, add nothing to the norm.
        max_grad_value: clamp each element of these gradients to this magnitude, before the norm is taken.
        gradient_accumulation: number of calls whose gradients are averaged before they are clipped and each update.
        return_outputs: also return the forward's outputs. ``output.`` is put before a name that something else has,
            ``loss`` or an input.
        opset_version: 13 to 23.
        verify: run three steps beside float64 eager PyTorch before anything is written, and one more at another size of
            each dynamic dimension.
        lowering, provider, threads, max_error_factor: as in `convgrad_export.export`.
        overwrite: replace existing files.

    Raises:
        ArgumentTypeError: a loss, optimizer, name or option that does not exist, or a batch that does not fit.
        DTypeError: class indices in another type than int64, or a complex target.
        ProviderError: a provider's name that is none.
        UnsupportedOperatorError: operators without a translation, or that draw random numbers in a way not known here;
            a parameter with a hook that runs after its gradient was accumulated.
        VerificationError: the model disagrees with PyTorch; nothing was written.
        CaptureError, ConstantGradientError, DynamicShapeError, OutputExistsError, OutputPathError: as in `export`.
    """
    check_opset(opset_version)
    check_threads(threads)
    check_error_factor(max_error_factor)
    check_numbers(max_grad_norm, max_grad_value, gradient_accumulation)
    check_flags(return_outputs=return_outputs, verify=verify, overwrite=overwrite)
    check_provider(provider)
    check_name(lowering)
    target_path = None if path is None else saving.check_path(path, overwrite)
    if target_path is not None:
        saving.check_path(checkpoint_path(target_path), overwrite)
    check_module(module)
    resolved_loss = resolve_loss(loss, label_smoothing)
    loss_constants = untrained_loss_parameters(resolved_loss, optimizer, module)
    parameters = trainable_parameters(module, frozen)
    options = StepOptions(
        resolved_loss,
        resolve_optimizer(optimizer, parameters),
        int(gradient_accumulation),
        None if max_grad_norm is None else float(max_grad_norm),
        None if max_grad_value is None else float(max_grad_value),
        bool(return_outputs),
    )
    with apart() as autocast:
        program = _capture(module, args, options, dynamic_shapes, parameters, opset_version, autocast)
        widened = has_bfloat16(program.graph_module) and widen_half(program.graph_module)
        translation = translate(
            program,
            lowering=lowering,
            provider=provider,
            opset=opset_version,
            as_inputs=lambda spec: spec.kind != "constant",
            threads=threads,
            max_error_factor=max_error_factor,
        )
        model = finish(translation.model, opset=opset_version)
        complete_shapes(model)
        # copies: the module may train on before a session takes the report's state
        state = {spec.name: spec.value.detach().clone() for spec in program.inputs if is_state(spec)}
        model.metadata_props[METADATA] = _metadata(module, options, state)
        report = TrainingStepReport(
            path=target_path,
            opset=opset_version,
            lowerings=translation.choices,
            model=model,
            state=state,
            learning_rate=options.optimizer.learning_rate,
            **describe(model),
        )
        if options.optimizer.states:
            report.notes.append(f"the optimizer's state was taken over, at step {options.optimizer.step}")
        if widened:
            report.notes.append(WIDENED)
        if program.unused:
            report.notes.append(f"not trained, the loss does not depend on it: {', '.join(program.unused)}")
        if loss_constants:
            report.notes.append(f"not trained, the loss's own: {', '.join(loss_constants)}")
        check_model(ir.to_proto(model))
        if verify:
            rate = options.optimizer.learning_rate or 1e-3  # a warm-up starts at 0, where no update shows
            settings: Settings = {LEARNING_RATE: lambda _: rate, SEED: lambda number: number}
            verification = verify_step(model, program, state, settings)
            report.errors, report.verified_sizes = verification.errors, verification.sizes
            report.notes += verification.notes
    if target_path is not None:
        report.checkpoint = checkpoint_path(target_path)
        file = written_file(target_path)  # external data lies beside the file itself, not beside a link to it
        outdated, elsewhere = [saving.data_path(file).name], [report.checkpoint]
        with staged(file.parent, outdated=outdated, elsewhere=elsewhere) as folder:  # never beside another's state
            report.sizes = saving.save(model, folder / file.name)
            save_checkpoint(folder / report.checkpoint.name, state)
        report.sizes["checkpoint"] = report.checkpoint.stat().st_size
    return report


def _capture(
    module: torch.nn.Module,
    args: Sequence[Any] | Tensor,
    options: StepOptions,
    dynamic_shapes: Any,
    parameters: Mapping[str, Tensor],
    opset: int,
    autocast: Autocast,
) -> CapturedProgram:
    inputs = StepInputs.of(module, args, options.loss, dynamic_shapes, parameters)
    state, batch, labels = inputs.state, inputs.batch, inputs.labels
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
    rate = GraphInput(LEARNING_RATE, "user", torch.tensor(options.optimizer.learning_rate, dtype=dtype))
    seed = GraphInput(SEED, "user", torch.tensor(0, dtype=torch.int64))
    extra = optimizer_inputs(parameters, options)
    specs = (*batch, *labels, rate, seed, *state, *extra)
    reserved = [LEARNING_RATE, SEED, LOSS, *(spec.name for spec in extra)]
    if options.clip_norm is not None:
        reserved.append(GRADIENT_NORM)
    check_names(module, (*batch, *labels, *state), reserved)
    unused: list[str] = []
    references: dict[str, str] = {}
    draws: list[int] = []

    def traced(values: Mapping[str, Tensor]) -> list[TracedOutput]:
        trained = leaves(parameters, values)
        own = StandIns(state, trained, values)
        given = copied_arguments((*batch, *labels), values)
        # the seed is no input of a step that draws nothing
        random = SeededRandomness(values.get(SEED, torch.zeros_like(values[STEP])), calls_before(values, options))
        with swapped_tensors(module, state, own.tensors), cumulative_averages(module), random:
            with autocast():
                result = inputs.arguments.call(module, given)
                value = scalar(options.loss.call(result, *(given[s.name] for s in labels)))
            found = gradients(value, trained)
        draws[:] = [random.draws]
        references.clear()  # a trace may run twice
        references.update(own.references())
        unused[:] = [name for name in trained if name not in found]
        outputs = [TracedOutput(GraphOutput(LOSS, "value"), value.detach())]
        if options.return_outputs:
            outputs += named_outputs(result, (LOSS, GRADIENT_NORM, *(spec.name for spec in specs)))
        with torch.no_grad():
            outputs += update(found, {**values, **trained}, options)
        return outputs + own.outputs(but={output.spec.target for output in outputs})

    program = trace_function(traced, specs, decompositions=onnx_decompositions(opset))
    program.unused = tuple(unused)
    options.optimizer.check_steps(name for name in options.optimizer.rules if name not in unused)
    refuse_held_state(program, state, options.optimizer.rules, references)
    refuse_unseeded_randomness(program)
    if not draws[0]:
        drop_input(program, SEED)
    return program


def refuse_unseeded_randomness(program: CapturedProgram) -> None:
    random = sorted(
        {
            f"{node.target} (called by {node.meta.get('nn_module_path') or 'the top module'})"
            for node in program.random_nodes
        }
    )
    if random:
        raise UnsupportedOperatorError(
            "a training step draws its random numbers from the seed input, which is not possible for "
            f"{', '.join(random)}. Use dropout, bernoulli, multinomial, rand, randn, randint or randperm, or pass the "
            "random tensor as an argument."
        )


def drop_input(program: CapturedProgram, name: str) -> None:
    """Remove an input that nothing reads."""
    placeholders = [node for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    kept = []
    for node, spec in zip(placeholders, program.inputs, strict=True):
        if spec.name == name and not node.users:
            program.graph_module.graph.erase_node(node)
        else:
            kept.append(spec)
    program.inputs = tuple(kept)
    program.graph_module.recompile()


def is_state(spec: GraphInput) -> bool:
    return spec.kind in ("parameter", "buffer")


def _metadata(module: torch.nn.Module, options: StepOptions, state: Mapping[str, Tensor]) -> str:
    import json

    trained = sorted(options.optimizer.rules)
    not_persistent = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    }
    aliases = {alias: spec.name for spec in state_inputs(module) for alias in spec.aliases}
    return json.dumps(
        {
            "version": 1,
            "learning_rate": options.optimizer.learning_rate,
            "accumulation": options.accumulation,
            "targets": [re.sub(r"\s", "", name) for name in options.loss.target_names],
            "state": sorted(state),
            "trained": trained,
            # how `state` differs from module.state_dict(): further names of tied tensors, and what it leaves out
            "aliases": {alias: name for alias, name in aliases.items() if alias not in not_persistent},
            "not_persistent": sorted(not_persistent.intersection(state)),
        },
        sort_keys=True,
    )
