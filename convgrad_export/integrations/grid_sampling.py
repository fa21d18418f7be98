"""`grid_sample` and `affine_grid` in small steps that autograd goes through: any size, two or three dimensions.

At the border the steps have the derivative of PyTorch's kernels: 0 with respect to a position that lies exactly on it,
where that of a clamp is 1. A spatial transformer that starts as the identity has all of its border there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_MODES, _PADDINGS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
_BILINEAR, _NEAREST = 0, 1
_ZEROS, _REFLECTION = 0, 2


def grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """Pictures by PyTorch's own Python decomposition, volumes by the sum of their corners."""
    if input.dim() == 5 and interpolation_mode in (_BILINEAR, _NEAREST):
        return _sampled_volume(input, grid, interpolation_mode, padding_mode, align_corners)
    if input.dim() != 4:
        return torch._C._VariableFunctions.grid_sampler(input, grid, interpolation_mode, padding_mode, align_corners)
    if interpolation_mode == _BILINEAR and padding_mode != _ZEROS:
        sizes = list(reversed(input.shape[2:]))  # the last axis is the first coordinate
        places = [
            _padded(_positions(grid[..., i].detach(), size, align_corners), size, padding_mode, align_corners)
            for i, size in enumerate(sizes)
        ]
        inside = torch.stack([(p > 0) & (p < size - 1) for p, size in zip(places, sizes, strict=True)], -1)
        grid = torch.where(inside, grid, grid.detach())
    return torch._decomp.decompositions._grid_sampler_2d(input, grid, interpolation_mode, padding_mode, align_corners)


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """torch.nn.functional.grid_sample: `grid_sampler` with the modes by name."""
    return grid_sampler(input, grid, _MODES.index(mode), _PADDINGS.index(padding_mode), bool(align_corners))


def affine_grid_generator(theta: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """theta (n, axes, axes + 1) times the coordinates of each position; ATen's backward takes no dynamic size."""
    axes = len(size) - 2
    rows = theta.reshape([theta.shape[0], *[1] * axes, *theta.shape[1:]])
    grid = rows[..., axes]
    for axis, length in enumerate(size[2:]):
        steps = torch.arange(length, device=theta.device, dtype=theta.dtype) * 2 - (length - 1)
        steps = steps / (torch.sym_max(length - 1, 1) if align_corners else length)
        grid = grid + steps.reshape([-1, *[1] * (axes - axis)]) * rows[..., axes - 1 - axis]
    return grid


def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """torch.nn.functional.affine_grid; what that one refuses it refuses here, in its own words."""
    axes = len(size) - 2
    fits = axes in (2, 3) and theta.dim() == 3 and tuple(theta.shape[1:]) == (axes, axes + 1)
    empty = any(isinstance(length, int) and length <= 0 for length in size)
    if not fits or empty or not theta.is_floating_point():
        return functional.affine_grid(theta, list(size), align_corners)
    return affine_grid_generator(theta, size, bool(align_corners))


def _positions(coordinates: Tensor, size: Any, align_corners: bool) -> Tensor:
    """Coordinates from -1 to 1 as positions along an axis, rounded as PyTorch's kernels round."""
    return (coordinates + 1) / 2 * (size - 1) if align_corners else ((coordinates + 1) * size - 1) / 2


def _padded(positions: Tensor, size: Any, padding_mode: int, align_corners: bool) -> Tensor:
    """Positions moved to where the padding takes its values from; with a derivative of 0 on the border and behind."""
    if padding_mode == _ZEROS:
        return positions
    if padding_mode == _REFLECTION:
        low, span = (0.0, size - 1) if align_corners else (-0.5, size)
        distance = (positions - low).abs()
        turns = (distance.detach() / torch.sym_max(span, 1)).floor()
        rest = distance - turns * span
        positions = torch.where(torch.remainder(turns, 2) == 0, rest, span - rest) + low
    inside = (positions > 0) & (positions < size - 1)
    return torch.where(inside, positions, positions.detach().clamp(0, size - 1))


def _sampled_volume(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    sizes = input.shape[2:]
    places = [
        _padded(_positions(grid[..., 2 - axis], size, align_corners), size, padding_mode, align_corners)
        for axis, size in enumerate(sizes)
    ]
    nearest = interpolation_mode == _NEAREST
    first = [(place.round() if nearest else place.floor()).detach() for place in places]
    flat = input.flatten(2)
    result: Any = 0.0
    for corner in itertools.product((0,) if nearest else (0, 1), repeat=3):
        at = [low + step for low, step in zip(first, corner, strict=True)]
        within = [(index >= 0) & (index < size) for index, size in zip(at, sizes, strict=True)]
        inside = within[0] & within[1] & within[2]
        z, y, x = (torch.where(inside, index, 0.0).to(torch.int64) for index in at)
        position = ((z * sizes[1] + y) * sizes[2] + x).flatten(1).unsqueeze(1)
        values = flat.gather(2, position.expand(-1, flat.shape[1], -1)).unflatten(2, grid.shape[1:4])
        shares = [
            place - low if step else low + 1 - place for place, low, step in zip(places, first, corner, strict=True)
        ]
        weight = torch.ones_like(shares[0]) if nearest else math.prod(shares[1:], start=shares[0])
        result = result + values * torch.where(inside, weight, 0.0).unsqueeze(1)
    return result
