"""Modules whose forward computes gradients, in every form that users write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Apply(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)


def trunk() -> nn.Sequential:
    """Two convolutions and a smooth activation: second derivatives are not zero."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3))


class AutogradGrad(nn.Module):
    """torch.autograd.grad of a scalar, as energy models write forces."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.trunk(x).pow(2).sum(), x)
        return gradient


class AutogradGradCreateGraph(AutogradGrad):
    """Gradient of a gradient norm: second order inside one forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(self.trunk(x).pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        return second


class FuncGrad(AutogradGrad):
    """torch.func.grad with the parameters closed over."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda v: self.trunk(v).pow(2).sum())(x)


class FuncVjp(AutogradGrad):
    def forward(self, x: torch.Tensor, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, vjp = torch.func.vjp(self.trunk, x)
        return output, vjp(cotangent)[0]


class FuncJacrev(AutogradGrad):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.jacrev(lambda v: self.trunk(v).mean((2, 3)))(x)


class NNGrad(nn.Module):
    """torch.nn.grad called with tensors of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dx = nn.grad.conv2d_input(x.shape, self.weight, grad_output, stride=2, padding=1)
        dw = nn.grad.conv2d_weight(x, self.weight.shape, grad_output, stride=2, padding=1)
        return dx, dw


class FuncGradOfParameters(nn.Module):
    """torch.func.grad with respect to the module's own parameters, through functional_call."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        parameters = dict(self.trunk.named_parameters())

        def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(self.trunk, p, (x,)).pow(2).sum()

        return torch.func.grad(loss)(parameters)


def image(*size: int) -> torch.Tensor:
    return torch.randn(*(size or (2, 3, 9, 8)), generator=torch.Generator().manual_seed(7))


FORMS = [
    (AutogradGrad, (image(),)),
    (AutogradGradCreateGraph, (image(),)),
    (FuncGrad, (image(),)),
    (FuncVjp, (image(), image(2, 2, 3, 2))),
    (FuncJacrev, (image(),)),
    (NNGrad, (image(), image(2, 4, 5, 4))),
    (FuncGradOfParameters, (image(),)),
]
