"""Names that exported models give to what the module has no name for; sessions read them without torch."""

from __future__ import annotations

from collections.abc import Container

# Put behind a tensor's own name.
UPDATED = ".updated"  # the new value of a parameter, a buffer or an optimizer's tensor
GRADIENT = ".grad"
HESSIAN_PRODUCT = ".hvp"

# Inputs and outputs of a training step, and of the models of `generate_artifacts`.
LEARNING_RATE = "learning_rate"
SEED = "seed"
RESET = "lazy_reset_grad"  # whether the gradients start anew
STEP, MICRO_STEP = "step", "micro_step"  # updates so far; calls since the last one, where gradients are accumulated
LOSS, GRADIENT_NORM = "loss", "gradient_norm"


def inner_name(name: str, used: Container[str | None]) -> str:
    """What an inner tensor is called instead of `name`, which an input, an output or a parameter has."""
    name = f"{name}_inner"
    while name in used:
        name += "_"
    return name
