"""Operators whose backward ONNX lacks, or that fix a size, replaced before autograd by code that it can go through.

Where ATen has a fused forward and a fused backward (grid_sample, cdist), rewriting the forward gives autograd the small
steps to differentiate, so no backward formula has to be written and second derivatives work too.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from convgrad_export.errors import DynamicShapeError

from .computed_losses import reduced
from .computed_numbers import OF_COMPUTED, takes_computed
from .convolutions_in_steps import CONVOLUTIONS
from .ctc_loss import ctc_loss
from .embedding_bags import embedding_bag
from .fractional_pooling import FRACTIONAL
from .global_pooling import GLOBAL, largest, unless_whole
from .grid_sampling import affine_grid, affine_grid_generator, grid_sample, grid_sampler
from .interpolation import interpolate
from .norms_in_steps import FORWARD_NORMS, NORMS
from .places import present_place
from .tangents import with_tangents


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
    return reduced(loss, None, None, reduction)


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As the kernel, whose derivative on the margin is 0; PyTorch's decomposition takes the other side there."""
    scores, labels = (input.unsqueeze(0), target.reshape(1)) if input.dim() == 1 else (input, target)
    positions = labels.unsqueeze(1)
    loss = torch.relu(margin - scores.gather(1, positions) + scores) ** p
    if weight is not None:
        loss = loss * weight[labels].unsqueeze(1)
    others = torch.arange(scores.shape[1], device=scores.device).unsqueeze(0) != positions
    loss = torch.where(others, loss, 0.0).sum(1) / scores.shape[1]
    return reduced(loss.squeeze(0) if input.dim() == 1 else loss, size_average, reduce, reduction)


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As the kernel; PyTorch 2.13's decomposition of it gives another value."""
    scores, labels = (input.unsqueeze(0), target.unsqueeze(0)) if input.dim() == 1 else (input, target)
    valid = (labels < 0).to(torch.int64).cumsum(1) == 0  # the labels up to the first negative one
    wanted = labels.clamp(min=0)
    classes = torch.arange(scores.shape[1], device=scores.device)
    is_target = ((wanted.unsqueeze(2) == classes) & valid.unsqueeze(2)).to(torch.int64).sum(1) > 0
    loss = torch.relu(1 - scores.gather(1, wanted).unsqueeze(2) + scores.unsqueeze(1))
    counted = valid.unsqueeze(2) & ~is_target.unsqueeze(1)
    loss = torch.where(counted, loss, 0.0).sum((1, 2)) / scores.shape[1]
    return reduced(loss.squeeze(0) if input.dim() == 1 else loss, size_average, reduce, reduction)


def max_pool1d(*args: Any, return_indices: bool = False, **options: Any) -> Any:
    """With the indices: the kernel for rows alone, which PyTorch takes without them, makes a number of the length."""
    found = torch.nn.functional.max_pool1d_with_indices(*args, **options)
    return found if return_indices else found[0]


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """With a dense gradient: ONNX has no sparse ones, and where an optimizer takes them their zeros change nothing."""
    return torch.nn.functional.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)


def product(
    input: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """With a one among the factors where their number is open: PyTorch's derivative takes them as at least one.

    In a forward-mode derivative one by one, for that derivative concatenates what has a tangent and what has none.
    """
    factors, axis = (input.reshape(-1), 0) if dim is None else (input, dim)
    if not input.dim() or isinstance(factors.shape[axis], int):
        is_open = any(not isinstance(size, int) for size in input.shape)
        if is_open and forward_ad._current_level >= 0 and factors.dtype.is_floating_point and factors.shape[axis]:
            total = functools.reduce(operator.mul, factors.to(dtype or factors.dtype).unbind(axis))
            return total.unsqueeze(axis) if keepdim else total
        return torch.prod(input, dtype=dtype) if dim is None else torch.prod(input, dim, keepdim, dtype=dtype)
    shape = list(factors.shape)
    shape[axis] = 1
    return torch.prod(torch.cat([factors.new_ones(shape), factors], axis), axis, keepdim, dtype=dtype)


def length(input: Tensor) -> int:
    """Python makes a number of what `len` returns, and of the dynamic size with it.

    Raises:
        DynamicShapeError: the first dimension is dynamic.
    """
    if input.dim() and isinstance(input.shape[0], torch.SymInt):
        raise DynamicShapeError(
            f"{present_place()}: len() of a tensor whose first dimension is dynamic (list() calls it, too) makes a "
            "fixed number of it, the example's. Write x.shape[0] or x.size(0) instead of len(x), or declare the "
            "dimension static"
        )
    return len(input)


_REPLACEMENTS: Mapping[Any, Callable[..., Any]] = {
    torch.grid_sampler: grid_sampler,
    torch.nn.functional.grid_sample: grid_sample,
    torch.affine_grid_generator: affine_grid_generator,
    torch.nn.functional.affine_grid: affine_grid,
    torch.cdist: cdist,
    Tensor.__len__: length,
    torch.prod: product,
    Tensor.prod: product,
    torch.nn.functional.ctc_loss: ctc_loss,
    torch.nn.functional.gaussian_nll_loss: gaussian_nll_loss,
    torch.nn.functional.multi_margin_loss: multi_margin_loss,
    torch.nn.functional.multilabel_margin_loss: multilabel_margin_loss,
    torch.nn.functional.interpolate: interpolate,
    torch.nn.functional.embedding: embedding,
    torch.nn.functional.embedding_bag: embedding_bag,
    **dict.fromkeys((torch.max_pool1d, torch.nn.functional.max_pool1d), unless_whole(max_pool1d, 1, largest)),
    **FRACTIONAL,
    **GLOBAL,
}

_IN_STEPS: Mapping[Any, Callable[..., Any]] = {**NORMS, **CONVOLUTIONS}


class DifferentiableReplacements(TorchFunctionMode):
    """While active, calls of the functions above run their replacement, as do norms in forward-mode derivatives.

    So do those that take a number which the forward computes (`computed_numbers.py`).

    Args:
        in_steps: Convolutions, batch and instance norms, too, whose second derivatives would fix a size: see
            `convolutions_in_steps.py` and `norms_in_steps.py`.

    Attributes:
        fused: Whether there was one of these.
    """

    def __init__(self, in_steps: bool = False) -> None:
        super().__init__()
        self._in_steps, self.fused = in_steps, False

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        forward = forward_ad._current_level >= 0  # inside torch.func.jvp, jacfwd, forward_ad.dual_level
        if func in NORMS or (func in CONVOLUTIONS and not forward):
            self.fused = True
            func = _IN_STEPS[func] if self._in_steps else func
        if forward:
            if func in FORWARD_NORMS:
                with self:  # whose own calls are of dual numbers
                    return FORWARD_NORMS[func](*args, **(kwargs or {}))
            args = with_tangents(func, args, kwargs or {})
        if func in OF_COMPUTED and takes_computed(*args, *(kwargs or {}).values()):
            func = OF_COMPUTED[func]
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))
