"""Operators whose backward ONNX lacks, replaced before autograd by code that autograd can go through.

Where ATen has a fused forward and a fused backward (grid_sample, cdist), rewriting the forward gives autograd the small
steps to differentiate, so no backward formula has to be written and second derivatives work too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """PyTorch's own Python decomposition of the 4-D case."""
    if input.dim() != 4:
        return torch._C._VariableFunctions.grid_sampler(input, grid, interpolation_mode, padding_mode, align_corners)
    return torch._decomp.decompositions._grid_sampler_2d(input, grid, interpolation_mode, padding_mode, align_corners)


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    modes, paddings = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
    return grid_sampler(input, grid, modes.index(mode), paddings.index(padding_mode), bool(align_corners))


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Pairwise distances; the gradient at distance 0 is 0, as PyTorch defines it."""
    difference = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs()
    if p == 1.0:
        return difference.sum(-1)
    if p == float("inf"):
        return difference.amax(-1)
    powers = (difference * difference if p == 2.0 else difference**p).sum(-1)
    positive = powers > 0
    safe = torch.where(positive, powers, 1.0)
    return torch.where(positive, safe.sqrt() if p == 2.0 else safe ** (1.0 / p), 0.0)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """The formula alone: PyTorch's function looks at the values of `var` first, which a trace cannot."""
    variance = var if isinstance(var, Tensor) else torch.full_like(input, var)
    if variance.dim() == input.dim() - 1:
        variance = variance.unsqueeze(-1)
    # The clamp is not part of the derivative.
    variance = variance + (variance.clamp(min=eps) - variance).detach()
    loss = 0.5 * (torch.log(variance) + (input - target) ** 2 / variance)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


_REPLACEMENTS: Mapping[Any, Callable[..., Tensor]] = {
    torch.grid_sampler: grid_sampler,
    torch.nn.functional.grid_sample: grid_sample,
    torch.cdist: cdist,
    torch.nn.functional.gaussian_nll_loss: gaussian_nll_loss,
}


class DifferentiableReplacements(TorchFunctionMode):
    """While active, calls of the functions above run their replacement."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))
