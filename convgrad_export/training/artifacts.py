"""`generate_artifacts`, as in onnxruntime-training: a training, an eval and an optimizer model, and a checkpoint.

The signature and the files are those of `onnxruntime.training.artifacts` 1.19.2, so that a script changes its import.
The models hold standard operators only and run on any onnxruntime build; the checkpoint is a safetensors file.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from ..errors import ArgumentTypeError
from ..files import check_output, staged, write_atomically
from ..integrations.arguments import CallArguments, named_tensors
from ..integrations.capture import state_inputs
from ..integrations.decompositions import onnx_decompositions
from ..integrations.finishing import BASE_OPSET, check_model, finish
from ..integrations.outputs import flat_output_names, named_outputs, updated
from ..integrations.program import CapturedProgram, GraphInput, GraphOutput, TracedOutput
from ..integrations.tracing import swapped_tensors, trace_function
from ..integrations.translation import translate
from .api import RETURNED
from .backward import gradients, leaves
from .checkpoint import save_checkpoint
from .cumulative import cumulative_averages
from .losses import Loss, resolve_loss, scalar
from .module_state import StandIns, copied_arguments, refuse_held_state, refuse_shared_memory
from .onnx_module import OnnxModule
from .optimizers import SGD, AdamW, ResolvedOptimizer, resolve_optimizer
from .randomness import SeededRandomness
from .step import LOSS, drop_input, refuse_unseeded_randomness
from .step_arguments import check_names, split_batch, split_shapes, trainable_parameters, untrained_loss_parameters
from .update import apply_rules

RESET, LEARNING_RATE, SEED, STEP = "lazy_reset_grad", "learning_rate", "seed", "step"
GRADIENT = ".grad"


class LossType(enum.Enum):
    """onnxruntime-training's losses."""

    MSELoss = "mse"
    CrossEntropyLoss = "cross_entropy"
    BCEWithLogitsLoss = "bce_with_logits"
    L1Loss = "l1"


class OptimType(enum.Enum):
    """onnxruntime-training's optimizers; SGD is plain, AdamW has torch's defaults."""

    AdamW = "adamw"
    SGD = "sgd"


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
) -> None:
    """Write ``training_model.onnx``, ``eval_model.onnx``, ``optimizer_model.onnx`` and ``checkpoint``.

    Args:
        model: a torch module (then `args` is needed), or an ONNX forward model, whose operators have to be among
            `onnx_module.OPERATORS`. A module in training mode trains as it is, with the parts in eval mode that are
            (a frozen BatchNorm); one in eval mode trains in training mode. Its modes are the same afterwards.
        requires_grad: parameters to train, of an ONNX model any floating-point initializers; by default those with
            requires_grad, or all weights of an ONNX model.
        frozen_params: parameters that stay as they are; other initializers of an ONNX model may be among them.
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

    Raises:
        ArgumentTypeError: an option without a meaning here (`ort_format`, `custom_op_library`, `nominal_checkpoint`), a
            name the model does not have or may not have (``step``, ``loss``), or a torch module without `args`.
        UnsupportedOperatorError: an operator of the ONNX model that is not known, with its name.
    """
    for name, value in (
        ("ort_format", ort_format),
        ("custom_op_library", custom_op_library),
        ("nominal_checkpoint", nominal_checkpoint),
    ):
        if value:
            raise ArgumentTypeError(
                f"{name} is {value!r}: not supported, the models are standard ONNX for any onnxruntime"
            )
    folder = Path(artifact_directory) if artifact_directory is not None else Path.cwd()
    paths = {
        key: check_output(folder / f"{prefix}{key}{suffix}", overwrite=overwrite)
        for key, suffix in (
            ("training_model", ".onnx"),
            ("eval_model", ".onnx"),
            ("optimizer_model", ".onnx"),
            ("checkpoint", ""),
        )
    }
    module, batch, resolved = _module_and_batch(model, loss, args, loss_input_names, requires_grad or ())
    untrained_loss_parameters(resolved, optimizer, module)
    frozen = _frozen(module, requires_grad, frozen_params)
    parameters = trainable_parameters(module, frozen)
    shapes = dynamic_shapes if dynamic_shapes is not None else _default_shapes(module, batch, resolved)
    with _modes_kept(module):
        if not module.training:
            module.train()
        programs = {"training_model": _forward(module, batch, resolved, shapes, parameters, opset_version)}
        programs["eval_model"] = _forward(module.eval(), batch, resolved, shapes, {}, opset_version)
    chosen: ResolvedOptimizer | None = None
    updated: dict[str, Tensor] = {}
    if optimizer is not None:
        chosen = resolve_optimizer(_optimizer(optimizer), parameters)
        # As in PyTorch, a parameter that gets no gradient stays, weight decay or not.
        unreached = programs["training_model"].unused
        updated = {n: p for n, p in parameters.items() if n in chosen.rules and n not in unreached}
        chosen.check_steps(updated)
        programs["optimizer_model"] = _optimizer_program(chosen, updated, opset_version)
    protos = {key: _model(program, opset_version) for key, program in programs.items()}
    returned = _returned(programs["training_model"], additional_output_names, isinstance(module, OnnxModule))
    for key in ("training_model", "eval_model"):  # in eval mode a forward may return less
        names = returned or [output.name for output in programs[key].outputs if output.kind in ("value", "output")]
        kept = [output.name for output in programs[key].outputs if output.name in names]
        protos[key].metadata_props.add(key=RETURNED, value=json.dumps(sorted(kept, key=names.index)))
    state = {spec.name: spec.value.detach() for spec in state_inputs(module)}
    if chosen is not None:
        state.update(_optimizer_state(chosen, updated))
    metadata = {
        "trained": "\n".join(parameters),
        "parameters": "\n".join(spec.name for spec in state_inputs(module) if spec.kind == "parameter"),
        "learning_rate": repr(chosen.learning_rate if chosen is not None else 1e-3),
    }
    with staged(folder) as temporary:
        for key, proto in protos.items():
            write_atomically(temporary / paths[key].name, proto.SerializeToString(deterministic=True))
        save_checkpoint(temporary / paths["checkpoint"].name, state, metadata=metadata)


@contextlib.contextmanager
def _modes_kept(module: torch.nn.Module) -> Iterator[None]:
    """Give every submodule its own mode back, whatever happens."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training  # not train(), which would reach the parts below


def _module_and_batch(
    model: Any, loss: Any, args: Any, loss_input_names: Sequence[str] | None, trainable: Sequence[str]
) -> tuple[torch.nn.Module, tuple[Any, ...], Loss]:
    resolved = Loss(_first_output, ()) if loss is None else resolve_loss(_loss(loss))
    if loss_input_names is not None:
        if len(loss_input_names) != len(resolved.target_names) + 1:
            raise ArgumentTypeError(
                f"loss_input_names has {len(loss_input_names)} names, expected the output and "
                f"{len(resolved.target_names)} target(s)"
            )
        resolved = Loss(resolved.function, tuple(loss_input_names[1:]), loss_input_names[0])
    if isinstance(model, torch.nn.Module):
        if args is None:
            raise ArgumentTypeError("args is missing: a torch module needs an example batch, the targets last")
        return model, (args,) if isinstance(args, Tensor) else tuple(args), resolved
    if not isinstance(model, (onnx.ModelProto, str, os.PathLike)):
        raise ArgumentTypeError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module or an ONNX model or file"
        )
    if loss is LossType.CrossEntropyLoss and loss_input_names is None:
        resolved = Loss(resolved.function, ("labels",))  # the name that onnxruntime-training gives this target
    module = OnnxModule(model, trainable)
    if args is None:
        inputs = module.example_inputs()
        with torch.no_grad():
            output = module.eval()(*inputs)  # in training mode it would move BatchNorm's statistics
        module.train()
        args = (*inputs, *(_target_like(_loss_input(output, resolved, True), resolved) for _ in resolved.target_names))
    return module, (args,) if isinstance(args, Tensor) else tuple(args), resolved


def _target_like(output: Tensor, loss: Loss) -> Tensor:
    """An example target: class indices for cross entropy, values like the output's otherwise."""
    if loss.function is resolve_loss("cross_entropy").function:
        return torch.zeros([output.shape[0], *output.shape[2:]], dtype=torch.int64)
    return torch.zeros_like(output)


def _first_output(result: Any) -> Any:
    return torch.utils._pytree.tree_leaves(result)[0]


def _loss_input(result: Any, loss: Loss, from_onnx: bool) -> Any:
    """What of a forward's result the loss takes: the output of its name, or the result as it is.

    Raises:
        ArgumentTypeError: none of several outputs has the name, or the loss of an ONNX model's has none.
    """
    flat = torch.utils._pytree.tree_leaves(result)
    if len(flat) == 1 and (from_onnx or loss.output is not None):
        return flat[0]
    if loss.output is None and not (from_onnx and loss.target_names):
        return result
    names = flat_output_names(result, flat)
    if loss.output not in names:
        raise ArgumentTypeError(
            f"the model has the outputs {', '.join(names)}, of which loss_input_names has to name the one that the "
            f"loss takes, before the targets; got {loss.output!r}"
        )
    return flat[names.index(loss.output)]


def _loss(loss: Any) -> Any:
    return loss.value if isinstance(loss, LossType) else loss


def _optimizer(optimizer: Any) -> Any:
    if isinstance(optimizer, OptimType):
        return AdamW() if optimizer is OptimType.AdamW else SGD()
    return optimizer


def _frozen(
    module: torch.nn.Module, requires_grad: Sequence[str] | None, frozen_params: Sequence[str] | None
) -> list[str]:
    names = [name for name, _ in module.named_parameters()]
    others = module.initializers if isinstance(module, OnnxModule) else ()  # they stay as they are in any case
    known = {"requires_grad": names, "frozen_params": [*names, *others]}
    for option, given in (("requires_grad", requires_grad), ("frozen_params", frozen_params)):
        if unknown := [name for name in given or () if name not in known[option]]:
            raise ArgumentTypeError(f"{option} names no parameter of the model: {', '.join(unknown)}")
    if both := set(requires_grad or ()) & set(frozen_params or ()):
        raise ArgumentTypeError(f"requires_grad and frozen_params both name {', '.join(sorted(both))}")
    frozen = [name for name in frozen_params or () if name in names]
    if requires_grad is not None:
        if fixed := [name for name in requires_grad if not module.get_parameter(name).requires_grad]:
            raise ArgumentTypeError(
                f"requires_grad names {', '.join(fixed)}, which the module itself freezes: call requires_grad_() on it"
            )
        frozen += [name for name in names if name not in requires_grad]
    return frozen


def _default_shapes(module: torch.nn.Module, batch: Sequence[Any], loss: Loss) -> tuple[Any, ...]:
    if isinstance(module, OnnxModule) and all(isinstance(value, Tensor) for value in batch):
        return module.dynamic_shapes(batch, loss.output)
    return tuple({0: "batch"} if isinstance(value, Tensor) and value.dim() else None for value in batch)


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
) -> CapturedProgram:
    """Loss and outputs; with parameters to train also their gradients, added to what was there before."""
    inputs, targets = split_batch(module, batch, loss)
    arguments = CallArguments(module, inputs, None)
    state = state_inputs(module)
    refuse_shared_memory(state, parameters)
    own_shapes, target_shapes = split_shapes(arguments, loss, dynamic_shapes)
    users = arguments.inputs(state, own_shapes)
    labels = named_tensors(dict(zip(loss.target_names, targets, strict=True)), target_shapes, (*state, *users))
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

    def traced(values: Mapping[str, Tensor]) -> list[TracedOutput]:
        trained = leaves(parameters, values)
        own = StandIns(state, trained, values)
        given = copied_arguments((*users, *labels), values)
        zero = torch.zeros((), dtype=torch.int64)
        random = SeededRandomness(values.get(SEED, zero), values.get(STEP, zero))
        with cumulative_averages(module), swapped_tensors(module, state, own.tensors), random:
            result = arguments.call(module, given)
            first = _loss_input(result, loss, isinstance(module, OnnxModule))
            value = scalar(loss.call(first, *(given[s.name] for s in labels)))
            found = gradients(value, trained) if training else {}
        outputs = [TracedOutput(GraphOutput(LOSS, "value"), value.detach())]
        named = named_outputs(result, (LOSS, *(spec.name for spec in specs)))
        outputs += [TracedOutput(output.spec, output.tensor.detach()) for output in named]
        if not training:
            return outputs
        unused[:] = [name for name in trained if name not in found]
        for name, gradient in found.items():
            before = values[f"{name}{GRADIENT}"]
            total = torch.where(values[RESET], torch.zeros_like(before), before) + gradient
            outputs.append(updated(f"{name}{GRADIENT}", total))
        return outputs + own.outputs()

    program = trace_function(traced, specs, decompositions=onnx_decompositions(opset))
    refuse_held_state(program, state, parameters)
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
    model = finish(translate(program, opset=opset, as_inputs=as_inputs).model, opset=opset)
    proto = ir.to_proto(model)
    check_model(proto)
    return proto
