"""Formulas for convolution gradients and the catalogue that lists them."""

from .catalogue import GRADIENTS, LOWERINGS, Lowering, by_name, candidates
from .kernels import CPU, CUDA, as_provider, check_provider, compute_dtype, cuda_kernel, preferred_opset, widened

__all__ = [
    "CPU",
    "CUDA",
    "GRADIENTS",
    "LOWERINGS",
    "Lowering",
    "as_provider",
    "by_name",
    "candidates",
    "check_provider",
    "compute_dtype",
    "cuda_kernel",
    "preferred_opset",
    "widened",
]
