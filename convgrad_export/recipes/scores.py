"""The number that attributions and attacks differentiate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import as_int
from ..errors import ArgumentTypeError


def check_network(network: Any, name: str = "network") -> Any:
    """The network that a recipe calls; a function will do, too.

    Raises:
        ArgumentTypeError: nothing that could be called, or a class.
    """
    if callable(network) and not isinstance(network, type):
        return network
    kind = f"the class {network.__name__}" if isinstance(network, type) else f"a {type(network).__name__}"
    raise ArgumentTypeError(f"{name} is {kind}, expected a torch.nn.Module")


def check_target(target: int | None) -> int | None:
    """A class index, or None for the best class.

    Raises:
        ArgumentTypeError: neither.
    """
    return None if target is None else int(as_int(target, "target"))


def check_logits(output: object) -> Tensor:
    """What a network gave, if it is one tensor (N, classes, ...).

    Raises:
        ArgumentTypeError: anything else.
    """
    if isinstance(output, Tensor) and output.dim() > 1:
        return output
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ArgumentTypeError(f"the network's output is {shape}, expected (batch, classes, ...)")


def class_score(output: object, target: int | None) -> Tensor:
    """Sum over the batch of one class's score, or of the best class's for None.

    Args:
        output: logits of shape (N, classes), or (N, classes, ...) for dense predictions, which are averaged over space.

    Raises:
        ArgumentTypeError: as `check_logits`, or a class that the output does not have.
    """
    logits = check_logits(output)
    if logits.dim() > 2:
        logits = logits.flatten(2).mean(2)
    if target is None:
        return logits.amax(1).sum()
    if not -logits.shape[1] <= target < logits.shape[1]:
        raise ArgumentTypeError(f"target is class {target}, the network has {logits.shape[1]}")
    return logits[:, target].sum()


def label_loss(output: object, label: object) -> Tensor:
    """Cross entropy, summed over the batch: a sample's gradient does not depend on the batch it is in.

    Not the negative log of a gathered probability: gather counts a label of -1 from the end in ONNX.

    Args:
        output: logits of shape (N, classes), or (N, classes, ...) for dense predictions. label: int64, (N, ...).

    Raises:
        ArgumentTypeError: as `check_logits`, or labels of another type or shape, or of a class that the output does not
            have.
    """
    logits = check_logits(output)
    if not isinstance(label, Tensor) or label.dtype != torch.int64:
        raise ArgumentTypeError(f"label is {_kind(label)}, expected an int64 tensor of classes")
    expected = (logits.shape[0], *logits.shape[2:])
    if label.dim() != len(expected) or not all(map(_agree, label.shape, expected)):
        raise ArgumentTypeError(f"label has shape {tuple(label.shape)}, expected {expected}: a class for each sample")
    try:
        return functional.cross_entropy(logits, label, reduction="sum")
    except IndexError as error:
        raise ArgumentTypeError(
            f"label holds a class that the network does not have, it has {logits.shape[1]}"
        ) from error


def check_beside(value: object, x: Tensor, name: str) -> None:
    """Refuse what does not broadcast to x's shape, or would enlarge it.

    Raises:
        ArgumentTypeError: no tensor, or another shape.
    """
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}, expected a tensor")
    pairs = zip(reversed(value.shape), reversed(x.shape), strict=False)
    if value.dim() > x.dim() or not all(own == 1 or _agree(own, other) for own, other in pairs):
        raise ArgumentTypeError(f"{name} has shape {tuple(value.shape)}, expected {tuple(x.shape)}")


def _agree(size: object, other: object) -> bool:
    """Whether two sizes are equal; those of a trace are symbols, and are compared when its model runs."""
    return size == other if isinstance(size, int) and isinstance(other, int) else True


def _kind(value: object) -> str:
    return f"of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def input_gradient(network: torch.nn.Module, x: Tensor, target: int | None) -> Tensor:
    """d score / d x, shape of x.

    Raises:
        ArgumentTypeError: as `class_score`, `as_leaf` and `gradient_of`.
    """
    with torch.enable_grad():
        leaf = as_leaf(x)
        return gradient_of(class_score(network(leaf), target), leaf)


def as_leaf(x: Tensor) -> Tensor:
    """A tensor with the values of `x` that a gradient can be taken with respect to.

    Raises:
        ArgumentTypeError: no tensor of floating-point numbers.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ArgumentTypeError(f"x is {_kind(x)}, expected a tensor of floating-point numbers")
    return x.detach().requires_grad_()


def gradient_of(score: Tensor, leaf: Tensor) -> Tensor:
    """d score / d leaf.

    Raises:
        ArgumentTypeError: the score does not depend on it.
    """
    (gradient,) = torch.autograd.grad(score, leaf, allow_unused=True) if score.requires_grad else (None,)
    if gradient is None:
        raise ArgumentTypeError(
            "the network's output does not depend on its input by operations that have a gradient (nothing does in "
            "torch.inference_mode)"
        )
    return gradient
