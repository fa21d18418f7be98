"""`embedding_bag` as rows that are looked up and reduced: ATen's kernel has a backward pass that ONNX lacks."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """The sum, mean or maximum of each bag's rows; those of `padding_idx` do not count, and empty bags are zeros."""
    rows = torch.nn.functional.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    counts = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counts = input != (padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if offsets is None:
        return _reduced(rows, counts.unsqueeze(-1), mode)
    bags = offsets.shape[0] - int(include_last_offset)
    # A bag of no rows starts where the next one does.
    bag = (torch.arange(input.shape[0], device=input.device).unsqueeze(1) >= offsets).to(torch.int64).sum(1) - 1
    if mode == "max":
        inside = bag == torch.arange(bags, device=input.device).unsqueeze(1)
        return _reduced(rows.unsqueeze(0), (inside & counts).unsqueeze(-1), mode)
    taken = torch.where(counts.unsqueeze(-1), rows, 0.0)
    # One more for what lies behind the last offset.
    total = taken.new_zeros([bags + 1, weight.shape[1]]).index_add(0, bag, taken)[:bags]
    if mode == "sum":
        return total
    return total / taken.new_zeros([bags + 1]).index_add(0, bag, counts.to(taken.dtype))[:bags, None].clamp(min=1)


def _reduced(rows: Tensor, counts: Tensor, mode: str) -> Tensor:
    """Over the last axis but one; `counts` says which rows are in the bag."""
    if mode == "max":
        if isinstance(rows.shape[-2], int) and rows.shape[-2] == 0:
            return rows.sum(-2)
        largest = torch.where(counts, rows, -torch.inf).max(-2)[0]  # the first one where several are, as in the kernel
        return torch.where(counts.any(-2), largest, 0.0)
    total = torch.where(counts, rows, 0.0).sum(-2)
    return total if mode == "sum" else total / counts.to(rows.dtype).sum(-2).clamp(min=1)
