"""Modules whose forward computes gradients: ready for `convgrad_export.export`.

Each takes a network and its settings, and has a forward that is plain PyTorch: it runs in eager as well.
"""

from .attack import FGSM, PGD
from .attribution import GradCAM, IntegratedGradients, Saliency
from .diffusion import GuidedDiffusionStep
from .forces import Forces

__all__ = ["FGSM", "PGD", "Forces", "GradCAM", "GuidedDiffusionStep", "IntegratedGradients", "Saliency"]
