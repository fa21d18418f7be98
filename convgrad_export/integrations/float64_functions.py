"""Elementary functions that onnxruntime's CPU provider has in float32 only, for float64 from those it has in both."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

aten = torch.ops.aten


@functools.cache
def _erf_series() -> tuple[list[float], list[float]]:
    """Maclaurin coefficients in x*x of erf(x) / x, and Chebyshev coefficients of exp(x*x) * erfc(x).

    The first series is for |x| <= 1, where its next term is below 2**-56. The second is for 1 <= |x| <= 6, in the
    variable t = 2 / (1 + |x|) mapped from its range to [-1, 1], in which the function is smooth.
    """
    terms = range(19)
    small = [2 / math.sqrt(math.pi) * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in terms]
    count = 32
    nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    arguments = 2 / ((nodes + _ERF_SHIFT) * _ERF_SCALE) - 1
    values = np.array([math.erfc(a) * math.exp(a * a) for a in arguments])
    angles = np.pi * np.outer(np.arange(24), np.arange(count) + 0.5) / count
    large = 2 / count * (np.cos(angles) @ values)
    large[0] /= 2
    return small, [float(c) for c in large]


# t runs from 2/7 (x = 6) to 1 (x = 1); u = t / _ERF_SCALE - _ERF_SHIFT from -1 to 1
_ERF_SCALE = (1 - 2 / 7) / 2
_ERF_SHIFT = 2 / 7 / _ERF_SCALE + 1


def _erf_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """erf(x) for |x| <= 1, and erfc(|x|) for 1 <= |x| <= 6; beyond, something no larger."""
    small, large = _erf_series()
    size = x.abs()
    square = torch.minimum(size, torch.ones_like(size)).square()
    near = torch.zeros_like(x)
    for coefficient in reversed(small):
        near = near * square + coefficient
    limited = torch.minimum(torch.maximum(size, torch.ones_like(size)), torch.ones_like(size) * 6.0)
    u = 2 / (1 + limited) / _ERF_SCALE - _ERF_SHIFT
    later, latest = torch.zeros_like(x), torch.zeros_like(x)
    for coefficient in reversed(large[1:]):  # Clenshaw, Math. Comp. 9 (1955)
        latest, later = 2 * u * latest - later + coefficient, latest
    return x * near, torch.exp(-size.square()) * (u * latest - later + large[0])


def erf(x: Tensor) -> Tensor:
    """The error function to a few units in the last place, from polynomials and exp."""
    near, tail = _erf_parts(x)
    return torch.where(x.abs() < 1, near, torch.sign(x) * (1 - tail))


def erfc(x: Tensor) -> Tensor:
    """1 - erf(x), without cancellation up to x = 6, where it is 2e-17."""
    near, tail = _erf_parts(x)
    return torch.where(x.abs() < 1, 1 - near, torch.where(x > 0, tail, 2 - tail))


def atan(x: Tensor) -> Tensor:
    """From the series, after the argument is halved three times: tan(a/2) = tan(a) / (1 + sqrt(1 + tan(a)^2))."""
    large = x.abs() > 1
    t = torch.where(large, 1 / torch.where(large, x, torch.ones_like(x)), x)
    for _ in range(3):
        t = t / (1 + (1 + t * t).sqrt())
    square, series = t * t, torch.zeros_like(t)
    for n in reversed(range(12)):  # |t| <= tan(pi / 32): the next term is below 2**-80
        series = series * square + (-1) ** n / (2 * n + 1)
    angle = 8 * t * series
    return torch.where(large, torch.sign(x) * (math.pi / 2) - angle, angle)


def atan2(y: Tensor, x: Tensor) -> Tensor:
    """The angle of (x, y). Zeros of either sign are one here, so the angle of (-1, -0.0) is pi."""
    both_zero = (x == 0) & (y == 0)
    angle = atan(y / torch.where(both_zero, torch.ones_like(x), x))
    half_turn = torch.where(y < 0, -torch.ones_like(angle), torch.ones_like(angle)) * math.pi
    return torch.where(x < 0, angle + half_turn, angle)


def asin(x: Tensor) -> Tensor:
    return atan(x / ((1 - x) * (1 + x)).sqrt())


def acos(x: Tensor) -> Tensor:
    return 2 * atan(((1 - x) / (1 + x)).sqrt())


def tan(x: Tensor) -> Tensor:
    return x.sin() / x.cos()


def sinh(x: Tensor) -> Tensor:
    return (torch.expm1(x) - torch.expm1(-x)) / 2


def cosh(x: Tensor) -> Tensor:
    return (x.exp() + (-x).exp()) / 2


def asinh(x: Tensor) -> Tensor:
    size = x.abs()
    return torch.sign(x) * torch.log1p(size + size * size / (1 + (size * size + 1).sqrt()))


def acosh(x: Tensor) -> Tensor:
    return (x + ((x - 1) * (x + 1)).sqrt()).log()


def atanh(x: Tensor) -> Tensor:
    return (torch.log1p(x) - torch.log1p(-x)) / 2


def log2(x: Tensor) -> Tensor:
    return x.log() / math.log(2)


def log10(x: Tensor) -> Tensor:
    return x.log() / math.log(10)


def _in_float64(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def decomposed(*tensors: Tensor) -> Tensor:
        return function(*tensors) if all(x.dtype == torch.float64 for x in tensors) else NotImplemented

    return decomposed


TABLE: dict[Any, Callable[..., Any]] = {
    getattr(aten, function.__name__).default: _in_float64(function)
    for function in (erf, erfc, atan, atan2, asin, acos, tan, sinh, cosh, asinh, acosh, atanh, log2, log10)
}
"""ATen overload to decomposition; other types keep the ONNX operator."""
