"""Elementary functions that onnxruntime's CPU provider has in float32 only, for float64 from those it has in both."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convgrad_export.integrations.error_functions import erfc_of_positive

aten = torch.ops.aten
_LARGE = 1e9  # its square and the square plus 1 are one


@functools.cache
def _erf_series() -> list[float]:
    """Maclaurin coefficients in x*x of erf(x) / x, for |x| <= 1, where the next term is below 2**-56."""
    terms = range(19)
    return [2 / math.sqrt(math.pi) * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in terms]


def erf(x: Tensor) -> Tensor:
    """The error function to a few units in the last place, from polynomials and exp."""
    size = x.abs()
    square = torch.minimum(size, torch.ones_like(size)).square()
    near = torch.zeros_like(x)
    for coefficient in reversed(_erf_series()):
        near = near * square + coefficient
    return torch.where(size < 1, x * near, torch.sign(x) * (1 - erfc_of_positive(size)))


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
    near = torch.log1p(size + size * size / (1 + (size * size + 1).sqrt()))
    return torch.sign(x) * torch.where(size > _LARGE, size.log() + math.log(2), near)


def acosh(x: Tensor) -> Tensor:
    near = (x + (x - 1).sqrt() * (x + 1).sqrt()).log()
    return torch.where(x > _LARGE, x.log() + math.log(2), near)


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
    for function in (erf, atan, atan2, asin, acos, tan, sinh, cosh, asinh, acosh, atanh, log2, log10)
}
"""ATen overload to decomposition; other types keep the ONNX operator."""
