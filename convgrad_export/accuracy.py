"""How large an error a gradient may have, from the length of its sums.

For one element ``sum of a_i b_i`` over L products, computed with unit roundoff u and rounded once more where the result
is stored with unit roundoff u_out, the bound is

    min(L, 6 sqrt(L)) * u * sum |a_i| |b_i|  +  u_out * |result|  +  L * smallest subnormal

The first factor is the smaller of the worst case (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1)
and the probabilistic bound with lambda = 6, which fails with probability below 2 L exp(-18) (Higham and Mary, SIAM J.
Sci. Comput. 41, 2019). ``sum |a||b|`` is the same gradient on absolute values in float64, so every element has a bound
of its own. Errors are reported as multiples of it: a right answer stays below 1, and a wrong one is far above.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dtypes
from .geometry import ConvGeometry

_SMALLEST = {"float32": 2.0**-149, "float64": 2.0**-1074, "float16": 2.0**-24, "bfloat16": 2.0**-133}


@dataclass(frozen=True)
class ErrorReport:
    """Comparison of a result with its float64 reference.

    Attributes:
        worst: largest error in units of the bound; infinity where a value or the shape is wrong outright.
        largest: largest absolute error.
        exact: every element equals the reference rounded to the result's dtype.
    """

    worst: float
    largest: float
    exact: bool

    @property
    def within(self) -> bool:
        return self.worst <= 1.0


def error_bound(
    reference: np.ndarray, magnitude: np.ndarray, sum_length: int, dtype: str, compute_dtype: str | None = None
) -> np.ndarray:
    """The bound above, element by element, in float64.

    Args:
        reference: the exact gradient, float64. magnitude: the same gradient on absolute values, float64.
        sum_length: L. dtype: what the result is stored in. compute_dtype: what the sums are computed in.
    """
    computed = compute_dtype or dtype
    terms = max(1, sum_length)
    growth = min(terms, 6.0 * math.sqrt(terms)) * dtypes.unit_roundoff(computed)
    stored = dtypes.unit_roundoff(dtype) if computed != dtype else 0.0
    smallest = terms * _SMALLEST[computed] + (_SMALLEST[dtype] if computed != dtype else 0.0)
    with np.errstate(invalid="ignore"):  # infinite references have no bound
        return np.asarray(growth * magnitude + stored * np.abs(reference) + smallest)


def compare(result: np.ndarray, reference: np.ndarray, bound: np.ndarray, error_factor: float = 1.0) -> ErrorReport:
    """Error of `result` in units of ``error_factor * bound``.

    With a factor above 1 (Winograd forms, whose tiles mix neighbouring elements) the bound of an element is the largest
    in the tensor. NaN and infinity must stand where the reference has them.
    """
    if result.shape != reference.shape:
        return ErrorReport(math.inf, math.inf, False)
    if result.size == 0:
        return ErrorReport(0.0, 0.0, True)
    got = result.astype(np.float64)
    special = ~np.isfinite(reference)
    if not np.array_equal(got[special], reference[special], equal_nan=True) or not np.isfinite(got[~special]).all():
        return ErrorReport(math.inf, math.inf, False)
    limit = bound if error_factor == 1.0 else np.full_like(bound, error_factor * bound[~special].max(initial=0.0))
    error = np.abs(got[~special] - reference[~special])
    with np.errstate(over="ignore"):
        exact = bool(np.array_equal(reference.astype(result.dtype).astype(np.float64), got, equal_nan=True))
    if error.size == 0:
        return ErrorReport(0.0, 0.0, exact)
    ratio = np.divide(error, limit[~special], out=np.zeros_like(error), where=error > 0)
    return ErrorReport(float(ratio.max()), float(error.max()), exact)


def reference_gradients(geometry: ConvGeometry, operands: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All three gradients by float64 autograd, PyTorch's own kernels with oneDNN off.

    Args:
        operands: ``input``, ``weight`` and ``grad_output``; rounded values are taken as they are.

    Returns:
        ``input``, ``weight`` and ``bias``, float64.
    """
    import torch

    from .torch_convolution import forward

    values = {name: torch.from_numpy(np.ascontiguousarray(array, np.float64)) for name, array in operands.items()}
    input, weight = values["input"].requires_grad_(), values["weight"].requires_grad_()
    bias = torch.zeros(geometry.out_channels, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        # torch 2.13 warns about Intel GPUs whenever oneDNN is switched off
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        with torch.enable_grad(), torch.backends.mkldnn.flags(enabled=False):
            output = forward(geometry, input, weight)
            output = output + bias.reshape(-1, *[1] * geometry.rank)
            gradients = torch.autograd.grad(output, (input, weight, bias), values["grad_output"])
    return {name: value.numpy() for name, value in zip(("input", "weight", "bias"), gradients, strict=True)}


def reference_and_bounds(
    geometry: ConvGeometry, operands: Mapping[str, Any], dtype: str, compute_dtype: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(reference, bound) for each gradient of `geometry` on `operands`, which hold values representable in `dtype`."""
    reference = reference_gradients(geometry, operands)
    magnitude = reference_gradients(geometry, {name: np.abs(value) for name, value in operands.items()})
    return {
        name: (
            reference[name],
            error_bound(reference[name], magnitude[name], int(geometry.sum_length(name)), dtype, compute_dtype),
        )
        for name in reference
    }
