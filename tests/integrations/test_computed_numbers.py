"""Numbers that a forward takes from a tensor with `item()`, as parameters of operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from .gradient_modules import Apply
from .onnx_check import compare_gradients

POSITIONS = torch.arange(5)

OF_A_NUMBER: dict[str, Callable[[Tensor, float], Tensor]] = {
    "leaky_relu": lambda x, v: functional.leaky_relu(x, v) + functional.leaky_relu((x + 1) * 1, v, inplace=True),
    "elu": lambda x, v: functional.elu(x, v) + functional.elu(x - 1, alpha=v, inplace=True),
    "softplus": lambda x, v: functional.softplus(x * 9, v, 3.0) + functional.softplus(x * 9, 2.0, v),
    "addcmul": lambda x, v: torch.addcmul(x, x, x, value=v) + (x * 2).addcmul_(x, x, value=-v),
    "addcdiv": lambda x, v: torch.addcdiv(x, x, 1 + x * x, value=v) + (x * 2).addcdiv_(x, 1 + x * x, value=-v),
    "lerp": lambda x, v: torch.lerp(x, x * x, v) + (x * 2).lerp_(x * x, 1 - v),
    "add": lambda x, v: torch.add(x, x * x, alpha=v) - (x * 2).sub_(x * x, alpha=1 - v),
    "power": lambda x, v: (1 + x * x) ** v + (1 + x * x).pow_(v) * v**x,
    "attention": lambda x, v: functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=v),
    "remainder": lambda x, v: x % v + torch.remainder(x, -v),
    "integers": lambda x, v: x * (POSITIONS * v + POSITIONS / v + (v - POSITIONS) + POSITIONS**v + (x > 0) * v),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OF_A_NUMBER)
def test_operators_of_a_computed_number(name: str, dtype: torch.dtype) -> None:
    """PyTorch decided on the number, at which the trace ended, or torch.onnx asked for a constant."""
    module = Apply(lambda x: OF_A_NUMBER[name](x, x.square().mean().item()))
    x, fresh = (torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(n), dtype=dtype) for n in (2, 4))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    compare_gradients(module, (x,), dynamic_shapes={"input": {0: "batch"}}, fresh=(fresh,), tolerance=tolerance)


@pytest.mark.parametrize("power", [torch.tensor(1.5), torch.tensor([1.5, 0.5, -1.0, 2.0, 0.0])])
def test_powers_of_integers(power: Tensor) -> None:
    """ONNX's Pow gives the type of the base, which made an invalid model."""
    compare_gradients(Apply(lambda x: x * (POSITIONS + 1) ** power.to(x.dtype)), (torch.randn(2, 5),))
