"""The error function's relatives from polynomials and exp, to a few units in the last place of every result.

torch.onnx writes erfc as 1 - erf, of which nothing is left beyond 4 in float32, and erfcx as that times exp(x**2),
which is infinite times 0. ONNX has erf only, and onnxruntime's CPU provider has that in float32 only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

aten = torch.ops.aten
_MIDDLE = 3.75  # Shepherd and Laframboise, Math. Comp. 36 (1981)
# exp(z**2) is infinite and exp(-z**2) is 0 from here on, and the square of a multiple of 1/16 is exact up to here
_FAR = {torch.float32: 16.0, torch.float64: 40.0}


def _scaled_erfc(z: float) -> float:
    """exp(z*z) * erfc(z) for z >= 0: beyond 2 by the continued fraction, where the product would lose digits."""
    if z < 2:
        return math.erfc(z) * math.exp(z * z)
    rest = z
    for n in reversed(range(1, 200)):
        rest = z + n / 2 / rest
    return 1 / (rest * math.sqrt(math.pi))


@functools.cache
def _coefficients(dtype: torch.dtype) -> list[float]:
    """Chebyshev coefficients of (1 + 2z) * exp(z*z) * erfc(z) for z >= 0, in u = (z - 3.75) / (z + 3.75)."""
    count = 64
    angles = np.pi * (np.arange(count) + 0.5) / count
    arguments = [_MIDDLE * (1 + u) / (1 - u) for u in np.cos(angles)]
    values = np.array([(1 + 2 * z) * _scaled_erfc(float(z)) for z in arguments])
    found = 2 / count * (np.cos(np.outer(np.arange(count), angles)) @ values)
    found[0] /= 2
    needed = np.flatnonzero(np.abs(found) > torch.finfo(dtype).eps / 8)[-1] + 1
    return [float(c) for c in found[:needed]]


def _scaled(z: Tensor) -> Tensor:
    """exp(z*z) * erfc(z) for z >= 0; Clenshaw, Math. Comp. 9 (1955)."""
    first, *others = _coefficients(z.dtype)
    u = 1 - 2 * _MIDDLE / (z + _MIDDLE)
    double, later = 2 * u, 0.0
    latest: Any = others[-1]
    for coefficient in reversed(others[:-1]):
        latest, later = double * latest - later + coefficient, latest
    return (u * latest - later + first) / (1 + 2 * z)


def _split_square(z: Tensor) -> tuple[Tensor, Tensor]:
    """z*z as an exact part and a small one: the rounding of a square is a relative error of its exponential."""
    limited = torch.minimum(z, torch.full_like(z, _FAR[z.dtype]))
    whole = torch.floor(limited * 16) / 16
    return whole * whole, (limited - whole) * (limited + whole)


def erfc_of_positive(z: Tensor) -> Tensor:
    square, rest = _split_square(z)
    return _scaled(z) * torch.exp(-square) * torch.exp(-rest)


def _wide(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Half types are computed in float32, and integers give floating-point numbers."""

    @functools.wraps(function)
    def decomposed(x: Tensor) -> Tensor:
        if x.dtype.is_complex:
            return NotImplemented
        result = x.dtype if x.dtype.is_floating_point else torch.get_default_dtype()
        return function(x.to(torch.float64 if result == torch.float64 else torch.float32)).to(result)

    return decomposed


@_wide
def erfc(x: Tensor) -> Tensor:
    tail = erfc_of_positive(x.abs())
    return torch.where(x < 0, 2 - tail, tail)


@_wide
def erfcx(x: Tensor) -> Tensor:
    """exp(x*x) * erfc(x)."""
    size = x.abs()
    scaled, (square, rest) = _scaled(size), _split_square(size)
    return torch.where(x < 0, 2 * torch.exp(square) * torch.exp(rest) - scaled, scaled)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.erfc.default: erfc,
    aten.special_erfc.default: erfc,
    aten.special_erfcx.default: erfcx,
}
