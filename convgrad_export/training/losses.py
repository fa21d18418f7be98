"""Losses by name, as torch functions that a trace takes apart."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import as_number
from ..errors import ArgumentTypeError, DTypeError, UnsupportedOperatorError

_BY_NAME: Mapping[str, Callable[..., Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "bce_with_logits": functional.binary_cross_entropy_with_logits,
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "huber": functional.huber_loss,
    "smooth_l1": functional.smooth_l1_loss,
    "nll": functional.nll_loss,
}
NAMES = tuple(_BY_NAME)


@dataclass(frozen=True)
class Loss:
    """A scalar of a module's output and further tensors.

    Attributes:
        function: (output, *targets) -> 0-d tensor.
        target_names: names of the further tensors, which become inputs of the step.
        output: name of the one that it takes of several outputs; None for the module's result as it is.
    """

    function: Callable[..., Tensor]
    target_names: tuple[str, ...]
    output: str | None = None

    def check_targets(self, targets: Sequence[Tensor]) -> None:
        """Refuse class indices in a type that PyTorch's loss or its ONNX form does not take.

        Raises:
            DTypeError: with the type that is expected.
        """
        base = self.function.func if isinstance(self.function, functools.partial) else self.function
        mixed = base is functional.cross_entropy or isinstance(base, torch.nn.CrossEntropyLoss)  # or probabilities
        if not mixed and base is not functional.nll_loss and not isinstance(base, torch.nn.NLLLoss):
            return
        for name, target in zip(self.target_names, targets, strict=True):
            if target.dtype != torch.int64 and not (mixed and target.is_floating_point()):
                raise DTypeError(
                    f"{name} is {target.dtype}, expected torch.int64 class indices"
                    f"{' or floating-point probabilities' if mixed else ''}: pass {name}.long()"
                )

    def call(self, output: Any, *targets: Tensor) -> Tensor:
        """The loss; a module's own tensors (class weights) follow the output's dtype, as in float64 comparisons.

        Raises:
            UnsupportedOperatorError: the module changes its buffers: a step keeps the state of one module only.
        """
        if not isinstance(self.function, torch.nn.Module):
            return self.function(output, *targets)
        dtype = output.dtype if isinstance(output, Tensor) else None
        own = {
            name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            for name, tensor in (*self.function.named_parameters(), *self.function.named_buffers())
        }
        buffers = {name: own[name].clone() for name, _ in self.function.named_buffers()}
        own.update(buffers)
        result = torch.func.functional_call(self.function, own, (output, *targets))
        if changed := [name for name, given in buffers.items() if own[name] is not given or given._version]:
            raise UnsupportedOperatorError(
                f"loss {type(self.function).__name__} changes its buffers {', '.join(changed)}, which a step would not "
                "carry on: compute the loss in a module that holds it beside the network and takes the targets as "
                "arguments, and pass loss=lambda output: output. Where the new values do not matter, call .eval() on it"
            )
        return result


def scalar(value: Any) -> Tensor:
    """A loss as a 0-d tensor.

    Raises:
        ArgumentTypeError: no tensor with one element.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentTypeError(f"loss must return a tensor with one element, got {got}")
    return value.reshape(())


def resolve_loss(loss: Any, label_smoothing: float = 0.0) -> Loss:
    """The loss as a function with named targets.

    Args:
        loss: one of `NAMES`; a torch.nn loss module; or a function of the output and any number of targets.
        label_smoothing: for ``"cross_entropy"`` (Szegedy et al., arXiv:1512.00567, section 7).

    Raises:
        ArgumentTypeError: another loss, or smoothing of another loss than cross entropy.
    """
    label_smoothing = as_number(label_smoothing, "label_smoothing", minimum=0, maximum=1)
    if isinstance(loss, str):
        if loss not in _BY_NAME:
            raise ArgumentTypeError(
                f"loss is {loss!r}, expected one of: {', '.join(NAMES)}, a loss module or a function"
            )
        function = _BY_NAME[loss]
        if label_smoothing:
            if loss != "cross_entropy":
                raise ArgumentTypeError(
                    f"label_smoothing is {label_smoothing} with loss {loss!r}, expected cross_entropy"
                )
            function = functools.partial(functional.cross_entropy, label_smoothing=label_smoothing)
        return Loss(function, ("target",))
    if label_smoothing:
        raise ArgumentTypeError("label_smoothing is only for loss='cross_entropy'; a loss module has its own")
    if isinstance(loss, type):
        raise ArgumentTypeError(f"loss is the class {loss.__name__}, expected an instance of it")
    if not callable(loss):
        raise ArgumentTypeError(f"loss is a {type(loss).__name__}, expected a name, a loss module or a function")
    called = loss.forward if isinstance(loss, torch.nn.Module) else loss
    if getattr(called, "__func__", None) is torch.nn.Module.forward:
        called = loss  # a module whose __call__ is its own needs no forward (timm's JsdCrossEntropy)
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        return Loss(loss, ("target",))
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if not required:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ArgumentTypeError(f"loss {name} takes no output, expected (output, *targets)")
    return Loss(loss, tuple(p.name for p in required[1:]))
