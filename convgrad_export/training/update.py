"""The part of a traced step that follows the gradients: accumulation, clipping, and the optimizer's update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, ConstantGradientError
from ..integrations.half_widening import HALF, computed
from ..integrations.outputs import updated
from ..integrations.program import GraphInput, GraphOutput, TracedOutput
from ..tensor_names import GRADIENT_NORM, LEARNING_RATE, MICRO_STEP, STEP
from .losses import Loss
from .optimizers import SGD, Adam, AdamW, ResolvedOptimizer, RMSprop, State

GRADIENT_SUM = "grad_sum"
_ELEMENTWISE = (SGD, Adam, AdamW, RMSprop)  # an update function of the user's may look at the whole tensor
_SHORT = 4096  # elements; copying a longer vector four times takes as long as starting its own nodes
_UPDATING: ContextVar[bool] = ContextVar("updating", default=False)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def is_updating() -> bool:
    """Whether what is computed now follows the gradients; verification tells rounding before and after them apart."""
    return _UPDATING.get()


def _marked(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    @functools.wraps(function)
    def marked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        before = _UPDATING.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _UPDATING.reset(before)

    return marked


@dataclass(frozen=True)
class StepOptions:
    """What the traced step does besides forward and backward."""

    loss: Loss
    optimizer: ResolvedOptimizer
    accumulation: int
    clip_norm: float | None
    clip_value: float | None
    return_outputs: bool


def optimizer_inputs(parameters: Mapping[str, Tensor], options: StepOptions) -> list[GraphInput]:
    """State of the optimizer, zero at first or from the steps it has made, and of the accumulation."""
    result = [GraphInput(STEP, "buffer", torch.tensor(options.optimizer.step, dtype=torch.int64))]
    if options.accumulation > 1:
        result.append(GraphInput(MICRO_STEP, "buffer", torch.zeros((), dtype=torch.int64)))
    for name, tensor in parameters.items():
        if name not in options.optimizer.rules:
            continue
        if options.accumulation > 1:
            result.append(GraphInput(f"{name}.{GRADIENT_SUM}", "buffer", torch.zeros_like(tensor.detach())))
        for key, value in options.optimizer.initial_state(name, tensor.detach()).items():
            result.append(GraphInput(f"{name}.{key}", "buffer", value))
    return result


def calls_before(values: Mapping[str, Tensor], options: StepOptions) -> Tensor:
    """Number of calls before this one, a 0-d int64 tensor: each draws random numbers of its own."""
    if options.accumulation == 1:
        return values[STEP]
    return values[STEP] * options.accumulation + values[MICRO_STEP]


@_marked
def update(gradients: Mapping[str, Tensor], values: Mapping[str, Tensor], options: StepOptions) -> list[TracedOutput]:
    """New parameters and optimizer state.

    Raises:
        ConstantGradientError: the optimizer holds none of the parameters that have gradients.
    """
    outputs: list[TracedOutput] = []

    def put(name: str, tensor: Tensor) -> None:
        outputs.append(updated(name, tensor))

    gradients = {name: g for name, g in gradients.items() if name in options.optimizer.rules}
    if not gradients:
        raise ConstantGradientError("the loss depends on none of the parameters that the optimizer holds")
    due: Tensor | None = None
    if options.accumulation > 1:
        micro = values[MICRO_STEP] + 1
        due = micro >= options.accumulation
        put(MICRO_STEP, torch.where(due, torch.zeros_like(micro), micro))
        sums = {name: values[f"{name}.{GRADIENT_SUM}"] + g for name, g in gradients.items()}
        for name, total in sums.items():
            put(f"{name}.{GRADIENT_SUM}", torch.where(due, torch.zeros_like(total), total))
        gradients = {name: total / options.accumulation for name, total in sums.items()}
    if options.clip_value is not None:
        gradients = {name: g.clamp(-options.clip_value, options.clip_value) for name, g in gradients.items()}
    if options.clip_norm is not None:
        norm, gradients = _clipped(gradients, options.clip_norm)
        outputs.append(TracedOutput(GraphOutput(GRADIENT_NORM, "output"), norm))
    step = values[STEP] + 1
    put(STEP, step if due is None else torch.where(due, step, values[STEP]))
    count = step.to(torch.float64)
    for name, (new, new_state) in apply_rules(gradients, values, options.optimizer, count).items():
        put(name, new if due is None else torch.where(due, new, values[name].detach()))
        for key, tensor in new_state.items():
            put(f"{name}.{key}", tensor if due is None else torch.where(due, tensor, values[f"{name}.{key}"]))
    return outputs


def _clipped(gradients: Mapping[str, Tensor], limit: float) -> tuple[Tensor, dict[str, Tensor]]:
    """torch.nn.utils.clip_grad_norm_: the joint norm, in the widest of the gradients' types, and what is left of them.

    Half gradients are squared and scaled in float32, as PyTorch's kernels do.
    """
    wide = functools.reduce(torch.promote_types, (g.dtype for g in gradients.values()), torch.float32)
    squares = [computed(g) for g in gradients.values()]
    norm = torch.stack([(g * g).sum().to(wide) for g in squares]).sum().sqrt()
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    return norm, {
        name: (wider * factor.to(wider.dtype)).to(gradients[name].dtype)
        for name, wider in zip(gradients, squares, strict=True)
    }


@_marked
def apply_rules(
    gradients: Mapping[str, Tensor], values: Mapping[str, Tensor], optimizer: ResolvedOptimizer, count: Tensor
) -> dict[str, tuple[Tensor, State]]:
    """New parameter and state of everything in `gradients` that has a rule, in that order.

    Short vectors (biases, BatchNorm's scales) under the same rule are updated as one: a network has many, and a dozen
    nodes for each take longer to start than to run. The result is the same bit for bit, the formulas being elementwise.

    Args:
        values: parameters, state as ``<parameter>.<name>``, and the learning rate.
        count: 0-d float64 number of this update, from 1.
    """
    ruled = [name for name in gradients if name in optimizer.rules]
    groups: dict[Any, list[str]] = {}
    for name in ruled:
        rule, parameter = optimizer.rules[name], values[name]
        short = parameter.dim() == 1 and parameter.numel() <= _SHORT and type(rule.optimizer) in _ELEMENTWISE
        groups.setdefault((rule, parameter.dtype) if short else name, []).append(name)
    results: dict[str, tuple[Tensor, State]] = {}
    for names in groups.values():
        rule, first = optimizer.rules[names[0]], values[names[0]].detach()
        elementwise = type(rule.optimizer) in _ELEMENTWISE
        rate = values[LEARNING_RATE].to(torch.float32 if elementwise and first.dtype in HALF else first.dtype)
        if rule.learning_rate_scale != 1.0:
            rate = rate * rule.learning_rate_scale
        kept = {key: value.dtype for key, value in rule.optimizer.initial_state(first).items()}

        def joined(tensors: list[Tensor], elementwise: bool = elementwise) -> Tensor:
            tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            return computed(tensor) if elementwise else tensor

        old = {key: joined([values[f"{name}.{key}"] for name in names]) for key in kept}
        parameter = joined([values[name].detach() for name in names])
        gradient = joined([gradients[name] for name in names])
        new, new_state = rule.optimizer.update(parameter, gradient, old, rate, count)
        _check_update(names[0], parameter, new, old, new_state)
        new, new_state = new.to(first.dtype), {key: tensor.to(kept[key]) for key, tensor in new_state.items()}
        if len(names) == 1:
            results[names[0]] = new, new_state
            continue
        stop = 0
        for name in names:
            start, stop = stop, stop + values[name].numel()
            results[name] = new[start:stop], {key: tensor[start:stop] for key, tensor in new_state.items()}
    return {name: results[name] for name in ruled}


def _check_update(name: str, parameter: Tensor, new: Tensor, old: State, new_state: State) -> None:
    """Refuse what an update function of the user's returns in another shape, which no memory of the state would fit.

    Raises:
        ArgumentTypeError: with the shapes, or with the names of its state.
    """
    if set(new_state) != set(old):
        raise ArgumentTypeError(f"the update function returned the state {sorted(new_state)}, expected {sorted(old)}")
    states = ((f"{key} of {name}", tensor, new_state[key]) for key, tensor in old.items())
    for what, before, after in ((f"parameter {name}", parameter, new), *states):
        got = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
        if got != tuple(before.shape):
            raise ArgumentTypeError(
                f"the update function returned {got} for {what}, expected a tensor of shape {tuple(before.shape)}"
            )
