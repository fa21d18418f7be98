"""Classifier guidance of a diffusion model, as one exported step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import as_number
from .scores import as_leaf, check_network, gradient_of, label_loss


class GuidedDiffusionStep(nn.Module):
    """One DDIM step whose noise estimate is moved by a classifier's gradient (Dhariwal and Nichol, arXiv:2105.05233,
    algorithm 2).

    Args:
        denoiser: (x, timestep) to the estimated noise, shape of x; diffusers' UNet2DModel is taken too.
        classifier: (N, C, H, W) to logits (N, classes), on noisy pictures.
        scale: of the guidance.

    forward(x, timestep, alpha, alpha_previous, label): timestep int64 (N,); alpha and alpha_previous are the cumulative
    products of the noise schedule at this step and the next, 0-d; label int64 (N,). Gives the next x.
    """

    def __init__(self, denoiser: nn.Module, classifier: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.denoiser = check_network(denoiser, "denoiser")
        self.classifier = check_network(classifier, "classifier")
        self.scale = as_number(scale, "scale", finite=True)

    def forward(self, x: Tensor, timestep: Tensor, alpha: Tensor, alpha_previous: Tensor, label: Tensor) -> Tensor:
        noise = self.denoiser(x, timestep)
        noise = noise if isinstance(noise, Tensor) else noise.sample
        with torch.enable_grad():
            leaf = as_leaf(x)
            gradient = gradient_of(-label_loss(self.classifier(leaf), label), leaf)
        noise = noise - self.scale * (1 - alpha).sqrt() * gradient
        clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return alpha_previous.sqrt() * clean + (1 - alpha_previous).sqrt() * noise
