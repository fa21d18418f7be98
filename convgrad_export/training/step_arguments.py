"""What `export_training_step` is given: which parameters train, and what of a batch is a target."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..arguments import LARGEST, as_names
from ..errors import ArgumentTypeError, DTypeError
from ..integrations.arguments import CallArguments, forward_signature, named_tensors, unwrapped
from ..integrations.capture import state_inputs
from ..integrations.program import GraphInput
from .losses import Loss
from .module_state import refuse_shared_memory


@dataclass(frozen=True)
class StepInputs:
    """What a traced step reads of the caller's.

    Attributes:
        arguments: how the forward is called.
        state: the module's parameters and buffers. batch: the forward's tensors. labels: the loss's targets.
    """

    arguments: CallArguments
    state: tuple[GraphInput, ...]
    batch: tuple[GraphInput, ...]
    labels: tuple[GraphInput, ...]

    @classmethod
    def of(
        cls,
        module: torch.nn.Module,
        args: Sequence[Any] | Tensor,
        loss: Loss,
        dynamic_shapes: Any,
        trained: Mapping[str, Tensor],
    ) -> StepInputs:
        """The inputs of a step that trains the parameters `trained`.

        Raises:
            ArgumentTypeError, DTypeError: as `split_batch`, `split_shapes` and `refuse_shared_memory`.
        """
        inputs, targets = split_batch(module, args, loss)
        arguments = CallArguments(module, inputs, None)
        state = state_inputs(module)
        refuse_shared_memory(state, trained)
        own_shapes, target_shapes = split_shapes(arguments, loss, dynamic_shapes)
        batch = arguments.inputs(state, own_shapes)
        named = dict(zip(loss.target_names, targets, strict=True))
        return cls(arguments, state, batch, named_tensors(named, target_shapes, (*state, *batch)))


def check_numbers(max_grad_norm: Any, max_grad_value: Any, accumulation: Any) -> None:
    for name, value in (("max_grad_norm", max_grad_norm), ("max_grad_value", max_grad_value)):
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if value is not None and not (number and value > 0):  # infinity too, for the norm alone
            raise ArgumentTypeError(f"{name} is {value!r:.80}, expected a number above 0 or None")
    whole = isinstance(accumulation, numbers.Integral) and not isinstance(accumulation, bool)
    if not whole or not 1 <= int(accumulation) <= LARGEST:
        raise ArgumentTypeError(f"gradient_accumulation is {accumulation!r}, expected an integer from 1 to {LARGEST}")


def check_names(module: torch.nn.Module, specs: Sequence[GraphInput], reserved: Sequence[str]) -> None:
    """Refuse a parameter, buffer, argument or target under a name that the exported models use, or that another has.

    Raises:
        ArgumentTypeError: with all such names.
    """
    own = Counter(spec.name for spec in specs)
    count = own + Counter(reserved)
    if twice := [name for name in count if count[name] > 1 and not (name in own and name in reserved)]:
        raise ArgumentTypeError(f"two inputs of the step are called {', '.join(twice)}: rename an argument or a target")
    if clash := [name for name in reserved if name in own]:
        raise ArgumentTypeError(
            f"{type(module).__name__}, its forward or the loss has the name(s) {', '.join(clash)}, which the training "
            "step needs for inputs and outputs of its own: rename them"
        )


def untrained_loss_parameters(loss: Loss, optimizer: Any, module: torch.nn.Module) -> list[str]:
    """Names of a loss module's own parameters: they are constants of the step.

    Raises:
        ArgumentTypeError: the optimizer or the module holds one of them, so that it was meant to be trained.
    """
    if not isinstance(loss.function, torch.nn.Module):
        return []
    named = {name: tensor for name, tensor in loss.function.named_parameters() if tensor.requires_grad}
    meant = {id(tensor) for tensor in module.parameters()}
    if isinstance(optimizer, torch.optim.Optimizer):
        meant.update(id(tensor) for group in optimizer.param_groups for tensor in group["params"])
    if held := [name for name, tensor in named.items() if id(tensor) in meant]:
        raise ArgumentTypeError(
            f"loss {type(loss.function).__name__} has the parameters {', '.join(held)}, which the optimizer or the "
            "module holds, but a step trains what the module's forward uses alone: compute the loss in a module that "
            "holds both and takes the targets as arguments, and pass loss=lambda output: output"
        )
    return list(named)


def trainable_parameters(module: torch.nn.Module, frozen: Sequence[str]) -> dict[str, Tensor]:
    """Parameters that are updated, by name; a frozen module's parameters are frozen.

    Raises:
        ArgumentTypeError: `frozen` names nothing, or everything. DTypeError: a complex parameter or buffer.
    """
    complex_names = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_complex()]
    if complex_names:
        raise DTypeError(
            f"{', '.join(complex_names)} of {type(module).__name__} is complex, which ONNX operators do not take: make "
            "the real and the imaginary part two tensors, and compute with these"
        )
    frozen = as_names(frozen, "frozen", "fc.weight")
    parameters = dict(module.named_parameters())
    modules = {name for name, _ in module.named_modules() if name}
    every_name = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    unknown = [name for name in frozen if name not in every_name and name not in modules]
    if unknown:
        raise ArgumentTypeError(
            f"frozen names no parameter and no submodule of {type(module).__name__}: {', '.join(unknown)}"
        )
    fixed = {
        id(tensor)
        for name, tensor in module.named_parameters(remove_duplicate=False)
        if any(name == f or name.startswith(f"{f}.") for f in frozen)
    }
    trainable: dict[str, Tensor] = {
        name: tensor
        for name, tensor in parameters.items()
        if tensor.requires_grad and tensor.is_floating_point() and id(tensor) not in fixed
    }
    if not trainable:
        raise ArgumentTypeError(f"{type(module).__name__} has no parameter left to train")
    return trainable


def split_batch(
    module: torch.nn.Module, args: Sequence[Any] | Tensor, loss: Loss
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The forward's arguments and the targets."""
    if not isinstance(args, (Tensor, list, tuple)):
        raise ArgumentTypeError(
            f"args is a {type(args).__name__}, expected a tuple: the forward's arguments, then the loss's targets"
        )
    values = (args,) if isinstance(args, Tensor) else tuple(args)
    count = len(loss.target_names)
    if len(values) < count + 1:
        needed = ", ".join(loss.target_names)
        raise ArgumentTypeError(
            f"args has {len(values)} values, expected {type(module).__name__}.forward's arguments followed by the "
            f"loss's {count} target(s): {needed}"
        )
    inputs, targets = values[: len(values) - count], list(values[len(values) - count :])
    if any(isinstance(value, PackedSequence) for value in values):
        raise ArgumentTypeError(
            "args holds a PackedSequence, whose tensors have another size for every batch: pass the padded tensor and "
            "the lengths, and call pack_padded_sequence in the forward"
        )
    if strange := [type(t).__name__ for t in targets if not isinstance(t, Tensor)]:
        raise ArgumentTypeError(f"args ends with {', '.join(strange)}, expected tensors for the loss's targets")
    if complex_targets := [n for n, t in zip(loss.target_names, targets, strict=True) if t.is_complex()]:
        raise DTypeError(
            f"{', '.join(complex_targets)} of the loss is complex, which ONNX operators do not take: pass the real and "
            "the imaginary part as two targets"
        )
    loss.check_targets(targets)
    try:
        forward_signature(unwrapped(module)).bind(*inputs)
    except TypeError as error:
        raise ArgumentTypeError(
            f"args: {type(module).__name__}.forward does not take the first {len(inputs)} of {len(values)} values, the "
            f"rest being the loss's targets ({', '.join(loss.target_names) or 'none'}): {error}"
        ) from error
    return inputs, targets


def split_shapes(arguments: CallArguments, loss: Loss, dynamic_shapes: Any) -> tuple[Any, Any]:
    """dynamic_shapes of the forward's arguments, and of the loss's targets.

    A target that the forward has an argument of the same name of is the model's input "<name>_input": it goes by that
    name, or has the dimensions of the argument.

    Raises:
        ArgumentTypeError: no dict and no sequence, a name that neither has, or another number of entries than of both.
    """
    of_both = (
        f"the forward's arguments ({', '.join(arguments.argument_names)}) and the loss's targets "
        f"({', '.join(loss.target_names) or 'none'})"
    )
    if dynamic_shapes is None or isinstance(dynamic_shapes, Mapping):
        named = dict(dynamic_shapes or {})
        targets = {}
        for name in loss.target_names:
            shared = name in arguments.examples
            if shared and f"{name}_input" not in arguments.examples and f"{name}_input" in named:
                targets[name] = named.pop(f"{name}_input")
            elif name in named:
                targets[name] = named[name] if shared else named.pop(name)
        if unknown := arguments.unknown(named):
            raise ArgumentTypeError(
                f"dynamic_shapes names {', '.join(map(repr, unknown))}, expected names of {of_both}"
            )
        return named or None, targets or None
    if not isinstance(dynamic_shapes, (list, tuple)):
        raise ArgumentTypeError(
            f"dynamic_shapes is {dynamic_shapes!r:.80}, expected a dict by argument or a tuple in their order"
        )
    count = len(loss.target_names)
    shapes = tuple(dynamic_shapes)
    if len(shapes) != len(arguments.argument_names) + count:
        raise ArgumentTypeError(f"dynamic_shapes has {len(shapes)} entries, expected one for each of {of_both}")
    return (shapes[: len(shapes) - count], shapes[len(shapes) - count :]) if count else (shapes, None)
