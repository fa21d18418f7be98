"""The part of a traced step that follows the gradients: accumulation, clipping, and the optimizer's update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..integrations.program import GraphInput, GraphOutput, TracedOutput
from .losses import Loss
from .optimizers import ResolvedOptimizer

LEARNING_RATE, STEP = "learning_rate", "step"
GRADIENT_NORM, MICRO_STEP, GRADIENT_SUM = "gradient_norm", "micro_step", "grad_sum"


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
    """State of the optimizer and of the accumulation, zero at first."""
    result = [GraphInput(STEP, "buffer", torch.zeros((), dtype=torch.int64))]
    if options.accumulation > 1:
        result.append(GraphInput(MICRO_STEP, "buffer", torch.zeros((), dtype=torch.int64)))
    for name, tensor in parameters.items():
        rule = options.optimizer.rules.get(name)
        if rule is None:
            continue
        if options.accumulation > 1:
            result.append(GraphInput(f"{name}.{GRADIENT_SUM}", "buffer", torch.zeros_like(tensor.detach())))
        for key, value in rule.optimizer.initial_state(tensor.detach()).items():
            result.append(GraphInput(f"{name}.{key}", "buffer", value))
    return result


def update(gradients: Mapping[str, Tensor], values: Mapping[str, Tensor], options: StepOptions) -> list[TracedOutput]:
    """New parameters and optimizer state."""
    outputs: list[TracedOutput] = []

    def put(name: str, tensor: Tensor) -> None:
        outputs.append(TracedOutput(GraphOutput(f"{name}.updated", "buffer", name), tensor))

    gradients = {name: g for name, g in gradients.items() if name in options.optimizer.rules}
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
        norm = torch.stack([(g * g).sum() for g in gradients.values()]).sum().sqrt()
        factor = torch.clamp(options.clip_norm / (norm + 1e-6), max=1.0)  # torch's clip_grad_norm_
        gradients = {name: g * factor for name, g in gradients.items()}
        outputs.append(TracedOutput(GraphOutput(GRADIENT_NORM, "output"), norm))
    step = values[STEP] + 1
    put(STEP, step if due is None else torch.where(due, step, values[STEP]))
    count = step.to(torch.float64)
    for name, gradient in gradients.items():
        rule = options.optimizer.rules[name]
        parameter = values[name].detach()
        names = rule.optimizer.initial_state(parameter)
        old = {key: values[f"{name}.{key}"] for key in names}
        rate = values[LEARNING_RATE].to(parameter.dtype)
        if rule.learning_rate_scale != 1.0:
            rate = rate * rule.learning_rate_scale
        new, new_state = rule.optimizer.update(parameter, gradient, old, rate, count)
        put(name, new if due is None else torch.where(due, new, parameter))
        for key, tensor in new_state.items():
            put(f"{name}.{key}", tensor if due is None else torch.where(due, tensor, old[key]))
    return outputs
