"""The number that attributions and attacks differentiate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import as_int
from ..errors import ArgumentTypeError


def check_target(target: int | None) -> int | None:
    """A class index, or None for the best class.

    Raises:
        ArgumentTypeError: neither.
    """
    return None if target is None else int(as_int(target, "target"))


def class_score(logits: Tensor, target: int | None) -> Tensor:
    """Sum over the batch of one class's score, or of the best class's for None.

    Args:
        logits: shape (N, classes), or (N, classes, ...) for dense predictions, which are averaged over space.

    Raises:
        ArgumentTypeError: fewer than two dimensions, or a class that the output does not have.
    """
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ArgumentTypeError(f"the network's output is {shape}, expected (batch, classes, ...)")
    if logits.dim() > 2:
        logits = logits.flatten(2).mean(2)
    if target is None:
        return logits.amax(1).sum()
    if not -logits.shape[1] <= target < logits.shape[1]:
        raise ArgumentTypeError(f"target is class {target}, the network has {logits.shape[1]}")
    return logits[:, target].sum()


def input_gradient(network: torch.nn.Module, x: Tensor, target: int | None) -> Tensor:
    """d score / d x, shape of x."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(class_score(network(leaf), target), leaf)
    return gradient
