"""Matrix functions in products and sums: what orthogonal parametrizations compute (torch.nn.utils.parametrizations)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Terms of the Taylor series at a norm of at most 1: the first that is left out is below half a unit in the last place.
_TERMS = {torch.float64: 18, torch.float32: 11}
# A norm of 2**digits moves a rotation's angle by a whole turn within its last place.
_SQUARINGS = {torch.float64: 53, torch.float32: 24}


def matrix_exp(x: Tensor) -> Tensor:
    """Scaling and squaring (Higham, Functions of Matrices, section 10.3), NaN from a norm on that leaves no digit.

    How often the result is squared depends on the norm; it is kept where that is enough. PyTorch's own is off by up to
    2**-36 in float64 where it takes few terms (norms around 0.01), this one is not.
    """
    if x.dtype not in _TERMS:
        return NotImplemented
    norm = x.abs().sum(-2, keepdim=True).amax(-1, keepdim=True)
    halvings = torch.where(norm > 1, torch.ceil(torch.log2(torch.where(norm > 1, norm, 1.0))), 0.0)
    squarings = _SQUARINGS[x.dtype]
    factor = torch.ones_like(halvings)
    for number in range(squarings):  # a power of two by another function would not be exact
        factor = torch.where(halvings > number, 0.5 * factor, factor)
    scaled = x * factor
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    result = identity + scaled / _TERMS[x.dtype]
    for term in range(_TERMS[x.dtype] - 1, 0, -1):
        result = identity + torch.matmul(scaled, result) / term
    for number in range(squarings):
        result = torch.where(halvings > number, torch.matmul(result, result), result)
    return torch.where(halvings > squarings, math.nan, result)


def householder_product(x: Tensor, tau: Tensor) -> Tensor:
    """The first columns of a product of reflections, one for each element of `tau`, from the last one on."""
    *_, rows, columns = x.shape
    count = tau.shape[-1]
    if not all(isinstance(size, int) for size in (rows, columns, count)):
        return NotImplemented
    position = torch.arange(rows, device=x.device).unsqueeze(1)
    result = torch.eye(rows, columns, dtype=x.dtype, device=x.device).expand(x.shape)
    for number in reversed(range(count)):
        below = torch.where(position > number, x[..., number : number + 1], 0.0)
        vector = torch.where(position == number, 1.0, below)  # what lies above belongs to another matrix
        factor = tau[..., number : number + 1].unsqueeze(-1)
        result = result - torch.matmul(vector * factor, torch.matmul(vector.mT, result))
    return result


TABLE: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.linalg_matrix_exp.default: matrix_exp,
    torch.ops.aten.linalg_householder_product.default: householder_product,
}
