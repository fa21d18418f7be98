"""The backward pass of a traced training step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import ConstantGradientError, UnsupportedOperatorError
from ..integrations.tracing import run_backward


def leaves(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors to differentiate with respect to, by name, with the gradient hooks of the module's parameters.

    Args:
        parameters: the module's own.
        values: what stands for them.

    Raises:
        UnsupportedOperatorError: a parameter has a hook that runs after its gradient was accumulated.
    """
    found = {}
    for name, parameter in parameters.items():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UnsupportedOperatorError(
                f"parameter {name} has a hook from register_post_accumulate_grad_hook, which an exported step cannot "
                "run: remove it, or do its work in a register_hook or in an update function given as the optimizer"
            )
        found[name] = values[name].detach().clone().requires_grad_()  # a forward may clamp its weights
        for hook in (parameter._backward_hooks or {}).values():
            found[name].register_hook(hook)
    return found


def gradients(value: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a scalar by name, without those of tensors that it does not depend on.

    Call it where the module still holds `wanted`: `torch.utils.checkpoint` calls its part of the module again in here.

    Args:
        value: 0-d.
        wanted: from `leaves`, or a module's own parameters.

    Raises:
        ConstantGradientError: it depends on nothing.
    """
    if not value.requires_grad:
        raise ConstantGradientError(
            "the loss depends on no parameter that is trained: the forward or the loss runs under torch.no_grad, "
            "detaches, or reads tensors that are no parameters"
        )
    found = run_backward(value, list(wanted.values()))
    return {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}
