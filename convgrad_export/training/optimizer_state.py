"""What a torch optimizer holds of its own: the state of steps that it has made already, and its groups' rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, GeometryError


def own_state(name: str, tensor: Tensor, optimizer: torch.optim.Optimizer, initial: Mapping[str, Tensor]) -> Any:
    """A parameter's state tensors and its number of steps; None where the optimizer has not updated it yet.

    Args:
        name, tensor: the parameter.
        initial: the state before the first step, whose names are torch's.

    Raises:
        GeometryError: the state is of another shape than the parameter.
    """
    held = optimizer.state.get(tensor)
    if not held:
        return None
    state = {}
    for key, zeros in initial.items():
        value = held.get(key)
        if value is None:  # SGD makes its buffer in the first step
            state[key] = zeros
            continue
        if value.shape != zeros.shape:
            raise GeometryError(
                f"optimizer: {key} of {name} has shape {tuple(value.shape)}, expected the parameter's "
                f"{tuple(zeros.shape)}: make a new optimizer for this module"
            )
        state[key] = value.detach().to(zeros.dtype).clone()
    # SGD does not count; all that matters is whether the next step is the first.
    return state, int(held["step"]) if "step" in held else int(held.get("momentum_buffer") is not None)


def check_same_step(steps: Mapping[str, int], step: int) -> None:
    """Refuse parameters that have made different numbers of steps: an exported step counts them together.

    Args:
        steps: number of updates so far, by name, of the parameters whose formula reads it.
        step: the number that the exported step starts from.

    Raises:
        ArgumentTypeError: with one such parameter.
    """
    if other := next((name for name, count in steps.items() if count != step), None):
        raise ArgumentTypeError(
            f"optimizer: {other} has made {steps[other]} steps, other parameters {step}, and an exported step counts "
            "them together: export before the first step, or make a new optimizer"
        )


def rate_scale(group: Mapping[str, Any], first: Mapping[str, Any]) -> float:
    """A group's learning rate in units of the first group's, which is the runtime input.

    Where a warm-up starts at 0, the rates that its schedule leads to (`initial_lr`) have the ratio.

    Raises:
        ArgumentTypeError: the first group's is 0.
    """
    base, rate = float(first["lr"]), float(group["lr"])
    if base == rate == 0.0:
        base, rate = float(first.get("initial_lr", 0.0)), float(group.get("initial_lr", 0.0))
    if base == 0.0 and rate != 0.0:
        raise ArgumentTypeError(
            "optimizer: the first group's lr is 0, so the other groups have no ratio to it: put another group first"
        )
    return rate / base if base else 1.0
