"""Attention with dropout written out, so that its draws can come from a seed: PyTorch has it in one operator."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def attention(
    dropped: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` by its documentation, with `dropped` on the weights.

    A row whose mask lets nothing through is 0, as in PyTorch's own kernels.
    """
    if enable_gqa:  # groups of query heads share a key and a value
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    hidden: Tensor | None = None
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = ~attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
        hidden = attn_mask == -math.inf
    if hidden is None:
        weights = torch.softmax(scores, -1)
    else:
        # a row of -inf alone has no softmax: finite scores there, and zeros afterwards
        nothing = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden, -math.inf).masked_fill(nothing, 0.0)
        weights = torch.softmax(scores, -1).masked_fill(hidden, 0.0)
    return dropped(weights) @ value


def seen_inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch.nn.functional that does not hand itself over to a mode, so that a mode sees what it calls."""
    # It asks this first, and the mode would otherwise be off in its body.
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


multi_head_attention_forward = seen_inside(functional.multi_head_attention_forward)
