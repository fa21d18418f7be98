"""Fractional max pooling as a gather: windows begin where a random number of each plane puts them.

Graham, Fractional Max-Pooling, 2014; the places are those of ATen's kernels. Autograd goes through the second gather,
which takes the maxima alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .pooling_decompositions import per_axis


def _pooling(rank: int, with_indices: bool) -> Callable[..., Any]:
    def pool(
        input: Tensor,
        kernel_size: int | Sequence[int],
        output_size: int | Sequence[int] | None = None,
        output_ratio: float | Sequence[float] | None = None,
        return_indices: bool = False,
        _random_samples: Tensor | None = None,
    ) -> Any:
        batched = input.dim() == rank + 2
        x = input if batched else input.unsqueeze(0)
        kernel = per_axis(kernel_size, rank)
        if output_size is None:
            if output_ratio is None:
                raise ValueError(f"fractional_max_pool{rank}d needs an output_size or an output_ratio")
            ratios = per_axis(output_ratio, rank)
            outputs = [int(size * ratio) for size, ratio in zip(x.shape[2:], ratios, strict=True)]
        else:
            outputs = per_axis(output_size, rank)
        samples = _random_samples
        if samples is None:
            samples = torch.rand(x.shape[0], x.shape[1], rank, dtype=x.dtype, device=x.device)
        found = _pooled(x, kernel, outputs, samples[: x.shape[0]])
        values, indices = found if batched else (each.squeeze(0) for each in found)
        return (values, indices) if with_indices or return_indices else values

    return pool


def _pooled(x: Tensor, kernel: Sequence[int], outputs: Sequence[int], samples: Tensor) -> tuple[Tensor, Tensor]:
    rank, lead = len(kernel), x.shape[:2]
    # The kernel for images takes the first number for the width, the one for volumes for the depth.
    order = (1, 0) if rank == 2 else range(rank)
    position: Any = 0  # in the plane as one row: (samples, channels, *outputs, *kernel)
    for axis, column in enumerate(order):
        starts = _starts(samples[..., column], x.shape[2 + axis], kernel[axis], outputs[axis])
        along = starts.unsqueeze(-1) + torch.arange(kernel[axis], device=x.device)
        shape = [*lead, *[1] * (2 * rank)]
        shape[2 + axis], shape[2 + rank + axis] = outputs[axis], kernel[axis]
        position = position * x.shape[2 + axis] + along.reshape(shape)
    windows = position.flatten(2 + rank)
    plane = x.flatten(2)
    taken = plane.detach().gather(2, windows.flatten(2)).reshape(windows.shape)
    indices = windows.gather(-1, taken.argmax(-1, keepdim=True)).squeeze(-1)
    return plane.gather(2, indices.flatten(2)).reshape(indices.shape), indices


def _starts(sample: Tensor, size: Any, kernel: int, outputs: int) -> Tensor:
    """Of each plane's windows along an axis; the last one ends where the plane does."""
    last = torch.full([], size - kernel, dtype=torch.int64, device=sample.device)
    places = torch.arange(outputs, device=sample.device)
    step = last.to(sample.dtype) / max(outputs - 1, 1)
    sample = sample.unsqueeze(-1)
    starts = ((places + sample) * step).to(torch.int64) - (sample * step).to(torch.int64)
    return torch.where(places == outputs - 1, last, starts)


FRACTIONAL_RANKS: Mapping[Any, int] = {
    torch.nn.functional.fractional_max_pool2d: 2,
    torch.nn.functional.fractional_max_pool2d_with_indices: 2,
    torch.nn.functional.fractional_max_pool3d: 3,
    torch.nn.functional.fractional_max_pool3d_with_indices: 3,
}
FRACTIONAL: Mapping[Any, Callable[..., Any]] = {
    function: _pooling(rank, with_indices="indices" in function.__name__) for function, rank in FRACTIONAL_RANKS.items()
}
