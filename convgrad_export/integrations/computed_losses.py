"""Losses with a margin, a share or a small number that the forward computes, and dropout by a computed rate.

PyTorch checks each of them by a Python decision, or decides on it what to compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_Distance = Callable[[Tensor, Tensor], Tensor]


def reduced(loss: Tensor, size_average: bool | None, reduce: bool | None, reduction: str) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: Any = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    return reduced((-target * (input1 - input2) + margin).clamp_min(0), size_average, reduce, reduction)


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: Any = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    apart = torch.where(target != 1, (margin - input).clamp_min(0), 0.0)
    return reduced(apart + torch.where(target != -1, input, 0.0), size_average, reduce, reduction)


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: Any = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    along = target.dim()
    first, second = ((each * each).sum(along) + 1e-12 for each in (input1, input2))  # PyTorch's own number
    cosine = (input1 * input2).sum(along) / (first * second).sqrt()
    apart = torch.where(target == -1, (cosine - margin).clamp_min(0), 0.0)
    return reduced(torch.where(target == 1, 1 - cosine, 0.0) + apart, size_average, reduce, reduction)


def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: Any = 1e-6, keepdim: bool = False) -> Tensor:
    return torch.norm(x1 - x2 + eps, p, -1, keepdim)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: Any = 1.0,
    p: float = 2,
    eps: Any = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return pairwise_distance(a, b, p, eps)

    return reduced(_of_triplets(anchor, positive, negative, distance, margin, swap), size_average, reduce, reduction)


def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: _Distance | None = None,
    margin: Any = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    distance = distance_function or pairwise_distance
    return reduced(_of_triplets(anchor, positive, negative, distance, margin, swap), None, None, reduction)


def _of_triplets(
    anchor: Tensor, positive: Tensor, negative: Tensor, distance: _Distance, margin: Any, swap: bool
) -> Tensor:
    to_negative = distance(anchor, negative)
    if swap:
        to_negative = torch.minimum(to_negative, distance(positive, negative))
    return (margin + distance(anchor, positive) - to_negative).clamp_min(0)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: Any = 0.0,
) -> Tensor:
    """Between the one without smoothing and the one of nothing but it: PyTorch's is linear in the share."""
    sharp, smooth = (
        functional.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, share)
        for share in (0.0, 1.0)
    )
    return sharp * (1 - label_smoothing) + smooth * label_smoothing


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: Any = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    loss = input.exp() - target * input if log_input else input - target * (input + eps).log()
    if full:
        stirling = target * target.log() - target + 0.5 * (2 * math.pi * target).log()
        loss = loss + stirling.masked_fill(target <= 1, 0.0)
    return reduced(loss, size_average, reduce, reduction)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: Any = 1e-8) -> Tensor:
    """The derivative is that of the norms themselves, as PyTorch has it."""

    def normal(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, 2, dim, keepdim=True)
        return x / (norm + (norm.clamp_min(eps) - norm).detach())

    x1, x2 = torch.broadcast_tensors(x1, x2)
    return (normal(x1) * normal(x2)).sum(dim)


def dropout(input: Tensor, p: Any = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training:
        return input
    rate = torch.scalar_tensor(p, dtype=input.dtype, device=input.device)
    kept = torch.where(rate < 1, 1 - rate, 1.0)  # of a rate of 1 nothing is left, whatever it is divided by
    result = torch.where(torch.rand_like(input) >= rate, input / kept, 0.0)
    return input.copy_(result) if inplace else result


OF_COMPUTED: Mapping[Any, Callable[..., Tensor]] = {
    functional.margin_ranking_loss: margin_ranking_loss,
    functional.hinge_embedding_loss: hinge_embedding_loss,
    functional.cosine_embedding_loss: cosine_embedding_loss,
    functional.triplet_margin_loss: triplet_margin_loss,
    functional.triplet_margin_with_distance_loss: triplet_margin_with_distance_loss,
    functional.cross_entropy: cross_entropy,
    functional.poisson_nll_loss: poisson_nll_loss,
    torch.pairwise_distance: pairwise_distance,
    torch.cosine_similarity: cosine_similarity,
    functional.dropout: dropout,
    torch.dropout: dropout,
}
