"""Convolutions of any geometry by PyTorch, whose operators pad both ends of an axis alike. Needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

from .geometry import ConvGeometry


def last_axis_first(ends: Iterable[tuple[Any, Any]]) -> list[Any]:
    """(begin, end) of every axis as `torch.nn.functional.pad` takes them."""
    return [amount for pair in reversed(list(ends)) for amount in pair]


def forward(geometry: ConvGeometry, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The forward operator that the geometry describes."""
    g = geometry
    begin, extra, symmetric = list(g.begin), g.output_padding, all(lo == hi for lo, hi in g.pads)
    if not symmetric:
        begin, extra = [0] * g.rank, (0,) * g.rank
        if not g.transposed:
            input = functional.pad(input, last_axis_first(g.pads))
    result = torch.convolution(input, weight, None, g.stride, begin, g.dilation, g.transposed, extra, g.groups)
    if symmetric or not g.transposed:
        return result
    # Padding of a transposed convolution cuts its result, output padding lengthens the end.
    ends = [(-lo, more - hi) for (lo, hi), more in zip(g.pads, g.output_padding, strict=True)]
    return functional.pad(result, last_axis_first(ends))
