"""Inputs like an example's, on which an exported model is compared with eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from convgrad_export.integrations.program import GraphInput

# How many values of an example are looked at for equal ones, and the part that must differ.
_COMPARED, _MOSTLY = 4096, 0.99


def fresh_input(spec: GraphInput, shape: Sequence[int], random: np.random.Generator) -> torch.Tensor:
    """Values drawn from the example's own: labels stay labels, an image keeps its range, different values different.

    Values that differ are drawn once each as far as they reach, since a sort or a maximum has no one gradient where two
    are equal; floating-point ones are moved towards each other as well. Zeros become numbers from 0 to 1; another
    constant (a noise level, say) shrinks by up to a tenth: targets stay probabilities.
    """
    example = spec.value.detach()
    count = int(np.prod(shape))
    values = example.reshape(-1)
    if values.numel() == 0:
        return torch.zeros(tuple(shape), dtype=example.dtype)
    different = values.numel() > 1 and _differ(values)
    if different and count <= values.numel():
        drawn = values[torch.from_numpy(random.permutation(values.numel())[:count])]
    else:
        drawn = _drawn(values, count, random)
    if different and _continuous(values):
        part = torch.from_numpy(random.uniform(0.0, 0.25, count)).to(example.dtype)
        drawn = drawn + part * (_drawn(values, count, random) - drawn)
    drawn = drawn.reshape(tuple(shape)).clone()
    if example.is_floating_point() and bool((values == values[0]).all()):
        noise = torch.from_numpy(np.asarray(random.uniform(0.0, 1.0, tuple(shape)))).to(example.dtype)
        drawn = drawn * (1 - 0.1 * noise) if bool(values[0]) else drawn + noise
    return drawn


def in_order(users: Sequence[GraphInput], fresh: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drawn integers in ascending order, from the example's first to its last one, where the example's are.

    They may be places where parts begin: the offsets of an `EmbeddingBag`, whose first one has to be 0.

    Returns:
        Those inputs alone that had to be changed for it, by name.
    """
    changed = {}
    for spec in users:
        example, drawn = spec.value.detach(), fresh[spec.name]
        if example.dtype not in (torch.int32, torch.int64) or example.dim() != 1 or not drawn.numel():
            continue
        if example.numel() < 2 or not bool((example.diff() >= 0).all()):
            continue
        ordered = drawn.sort()[0]
        ordered[-1], ordered[0] = example[-1], example[0]
        if not torch.equal(ordered, drawn):
            changed[spec.name] = ordered
    return changed


def in_rows(
    users: Sequence[GraphInput], fresh: Mapping[str, torch.Tensor], random: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Rows along the last axis that are the example's as they stand, in another order, for tables of two or three axes.

    The columns may be of different kinds: the boxes of `torchvision.ops.roi_align` begin with the number of an image.

    Returns:
        Those inputs alone that had to be changed for it, by name.
    """
    changed = {}
    for spec in users:
        example, drawn = spec.value.detach(), fresh[spec.name]
        if example.dim() not in (2, 3) or not example.numel() or not drawn.numel():
            continue
        if example.shape[-1] != drawn.shape[-1]:
            continue
        rows, count = example.reshape(-1, example.shape[-1]), drawn.numel() // drawn.shape[-1]
        few = count <= len(rows)
        chosen = random.permutation(len(rows))[:count] if few else random.integers(0, len(rows), count)
        changed[spec.name] = rows[torch.from_numpy(chosen)].reshape(drawn.shape)
    return changed


def _drawn(values: torch.Tensor, count: int, random: np.random.Generator) -> torch.Tensor:
    return values[torch.from_numpy(random.integers(0, values.numel(), count))]


def _differ(values: torch.Tensor) -> bool:
    """Whether no two of the first values are equal, or hardly any: random float32 numbers may meet."""
    if values.is_complex():
        return False
    some = values[:_COMPARED].double()
    return some.unique().numel() >= some.numel() * _MOSTLY


def _continuous(values: torch.Tensor) -> bool:
    """Numbers that may be anything between the example's: neither integers nor halves, whose few values would meet."""
    wide = values.dtype in (torch.float32, torch.float64)
    return wide and bool(values.isfinite().all()) and not bool((values == values.round()).all())
