"""Adversarial examples, for testing a network's robustness where it is deployed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import as_number
from ..errors import ArgumentTypeError
from .scores import as_leaf, check_beside, check_network, gradient_of, label_loss


def _loss_gradient(network: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = as_leaf(x)
        # the sum, so that a picture's gradient does not depend on the batch it is in
        return gradient_of(label_loss(network(leaf), label), leaf)


def _range(low: float, high: float) -> tuple[float, float]:
    low, high = as_number(low, "low"), as_number(high, "high")
    if not low < high:
        raise ArgumentTypeError(f"low is {low} and high {high}, expected low below high")
    return low, high


class FGSM(nn.Module):
    """Fast gradient sign method (Goodfellow et al., arXiv:1412.6572, section 4).

    Args:
        network: (N, C, *I) to logits (N, classes). epsilon: largest change of an element.
        low, high: range of valid pictures.

    forward(x, label), label int64 (N,), gives the attacked picture, shape of x.
    """

    def __init__(self, network: nn.Module, epsilon: float = 8 / 255, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        self.network, self.epsilon = check_network(network), as_number(epsilon, "epsilon", above=0, finite=True)
        self.low, self.high = _range(low, high)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        step = self.epsilon * _loss_gradient(self.network, x, label).sign()
        return (x + step).clamp(self.low, self.high)


class PGD(nn.Module):
    """One step of projected gradient descent (Madry et al., arXiv:1706.06083, section 2.1); call it repeatedly.

    Args:
        network, low, high: as for `FGSM`. epsilon: radius of the ball around the original. step: size of one step.

    forward(x, original, label) gives the next picture, shape of x, projected into the ball around `original`.
    """

    def __init__(
        self, network: nn.Module, epsilon: float = 8 / 255, step: float = 2 / 255, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__()
        self.network, self.epsilon = check_network(network), as_number(epsilon, "epsilon", above=0, finite=True)
        self.step = as_number(step, "step", above=0, finite=True)
        self.low, self.high = _range(low, high)

    def forward(self, x: Tensor, original: Tensor, label: Tensor) -> Tensor:
        check_beside(original, x, "original")
        moved = x + self.step * _loss_gradient(self.network, x, label).sign()
        near = original + (moved - original).clamp(-self.epsilon, self.epsilon)
        return near.clamp(self.low, self.high)
