"""Energies and the forces that follow from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ArgumentTypeError
from .scores import as_leaf, check_network, gradient_of


class Forces(nn.Module):
    """Energy and force, the negative gradient of the energy with respect to the input.

    Args:
        energy: x to an energy for each sample, any shape; the sum is differentiated, so samples do not mix.

    forward(x) gives (energy, force of x's shape).
    """

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = check_network(energy, "energy")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = as_leaf(x)
            energy = self.energy(leaf)
            if not isinstance(energy, Tensor):
                raise ArgumentTypeError(
                    f"the network's output is {type(energy).__name__}, expected a tensor of energies"
                )
            return energy.detach(), -gradient_of(energy.sum(), leaf)
