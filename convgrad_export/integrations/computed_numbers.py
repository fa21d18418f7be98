"""Operators that take a number which the forward computes from a tensor: `item()` of a loss, of a learned slope.

A trace knows no value of it. PyTorch decides in some of these operators whether it is 1, or negative, at which the
trace would end; for others torch.onnx has float attributes, which hold constants only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def takes_computed(*arguments: Any) -> bool:
    """Whether one of a call's arguments is such a number."""
    return any(isinstance(argument, torch.SymFloat) for argument in arguments)


def _as_tensor(value: Any, other: Any) -> Tensor:
    """A number as a tensor without axes, in the type in which it meets `other`; a tensor as it is."""
    if isinstance(value, Tensor):
        return value
    dtype = other.dtype if other.is_floating_point() else torch.get_default_dtype()
    return torch.scalar_tensor(value, dtype=dtype, device=other.device)


def add(input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    return torch.add(input, other * alpha)


def subtract(input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    return torch.sub(input, other * alpha)


def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1) -> Tensor:
    return input + tensor1 * value * tensor2


def addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1) -> Tensor:
    return input + tensor1 * value / tensor2


def lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:
    return torch.lerp(input, end, _as_tensor(weight, input))


def power(input: Any, exponent: Any) -> Tensor:
    return torch.pow(_as_tensor(input, exponent), _as_tensor(exponent, input))


def power_of_number(exponent: Tensor, input: Any) -> Tensor:
    return power(input, exponent)


def leaky_relu(input: Tensor, negative_slope: Any = 0.01) -> Tensor:
    return torch.where(input > 0, input, input * negative_slope)


def elu(input: Tensor, alpha: Any = 1.0) -> Tensor:
    return torch.where(input > 0, input, torch.expm1(input.clamp(max=0)) * alpha)


def softplus(input: Tensor, beta: Any = 1, threshold: Any = 20) -> Tensor:
    """The kernel's: above the threshold the input itself."""
    limit = torch.full_like(input, threshold)
    scaled = input * beta
    return torch.where(scaled > limit, input, torch.log1p(torch.exp(torch.minimum(scaled, limit))) / beta)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The scale in the query, where PyTorch asks for its sign."""
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "enable_gqa": enable_gqa}
    return functional.scaled_dot_product_attention(query * scale, key, value, attn_mask, scale=1.0, **options)


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def written(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(function(input.clone(), *args, **kwargs))  # the derivative may need what it was

    return written


def _either(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In place or not, by the flag of torch.nn.functional's activations."""

    @functools.wraps(function)
    def activation(*args: Any, inplace: bool = False, **kwargs: Any) -> Tensor:
        return (_in_place(function) if inplace else function)(*args, **kwargs)

    return activation


def _all_forms() -> Iterator[tuple[Any, Callable[..., Tensor]]]:
    """Function, method and method in place of each operator."""
    for name, replacement in _OPERATORS.items():
        yield getattr(torch, name), replacement
        yield getattr(Tensor, name), replacement
        yield getattr(Tensor, f"{name}_"), _in_place(replacement)
    for name, activation in _ACTIVATIONS.items():
        yield getattr(functional, name), _either(activation)
        yield getattr(functional, f"{name}_"), _in_place(activation)


_OPERATORS: Mapping[str, Callable[..., Tensor]] = {
    "add": add,
    "sub": subtract,
    "subtract": subtract,
    "addcmul": addcmul,
    "addcdiv": addcdiv,
    "lerp": lerp,
    "pow": power,
}
_ACTIVATIONS: Mapping[str, Callable[..., Tensor]] = {"leaky_relu": leaky_relu, "elu": elu}
OF_COMPUTED: Mapping[Any, Callable[..., Tensor]] = {
    **dict(_all_forms()),
    Tensor.__pow__: power,
    Tensor.__ipow__: _in_place(power),
    Tensor.__rpow__: power_of_number,
    functional.softplus: softplus,
    functional.scaled_dot_product_attention: attention,
}
