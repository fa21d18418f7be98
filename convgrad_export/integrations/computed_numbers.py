"""Operators that take a number which the forward computes from a tensor: `item()` of a loss, of a learned slope.

A trace knows no value of it. PyTorch decides in some of these operators whether it is 1, or negative, at which the
trace would end; for others torch.onnx has float attributes, which hold constants only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import computed_losses
from .computed_losses import reduced
from .norms_in_steps import FORWARD_NORMS


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


def reverse_subtract(input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    return torch.rsub(input * alpha, other)


def index_add(input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Tensor:
    return torch.index_add(input, dim, index, source * alpha)


def scatter(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    return torch.scatter(input, dim, index, _as_tensor(value, input).expand(index.shape))


def _sum_with(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def weighted(input: Tensor, first: Tensor, second: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        return input * beta + product(first, second) * alpha

    return weighted


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


def celu(input: Tensor, alpha: Any = 1.0) -> Tensor:
    return torch.where(input > 0, input, torch.expm1(input.clamp(max=0) / alpha) * alpha)


def hardtanh(input: Tensor, min_val: Any = -1.0, max_val: Any = 1.0) -> Tensor:
    """The derivative at the bounds is 0, that of clamp 1."""
    low, high = (_as_tensor(value, input) for value in (min_val, max_val))
    return torch.where(input <= low, low, torch.where(input >= high, high, input))


def softshrink(input: Tensor, lambd: Any = 0.5) -> Tensor:
    return torch.where(input.abs() <= _as_tensor(lambd, input), 0.0, input - input.sign() * lambd)


def logit(input: Tensor, eps: Any = None) -> Tensor:
    return torch.logit(input.clamp(eps, 1 - eps))


def x_log1p_y(input: Any, other: Any) -> Tensor:
    return torch.special.xlog1py(_as_tensor(input, other), _as_tensor(other, input))


def nan_to_num(input: Tensor, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Tensor:
    limits = torch.finfo(input.dtype)
    replaced = (
        (input != input, 0.0 if nan is None else nan),
        (input == math.inf, limits.max if posinf is None else posinf),
        (input == -math.inf, limits.min if neginf is None else neginf),
    )
    result = input
    for where, value in replaced:
        result = torch.where(where, _as_tensor(value, input), result)
    return result


def quantile(input: Tensor, q: Any, *args: Any, **kwargs: Any) -> Tensor:
    return torch.quantile(input, _as_tensor(q, input), *args, **kwargs)


def nanquantile(input: Tensor, q: Any, *args: Any, **kwargs: Any) -> Tensor:
    return torch.nanquantile(input, _as_tensor(q, input), *args, **kwargs)


def pad(input: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor:
    inside = functional.pad(torch.ones_like(input), pad)
    return torch.where(inside > 0, functional.pad(input, pad), _as_tensor(value, input))


def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: Any = None) -> Tensor:
    normal = input * torch.rsqrt(input.square().mean(list(range(-len(normalized_shape), 0)), keepdim=True) + eps)
    return normal if weight is None else normal * weight


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: Any = 1.0, weight: Tensor | None = None
) -> Tensor:
    distance = (input - target).abs()
    loss = torch.where(
        distance <= _as_tensor(delta, input), distance * distance * 0.5, (distance - delta * 0.5) * delta
    )
    return reduced(loss if weight is None else loss * weight, None, None, reduction)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: Any = 1.0,
) -> Tensor:
    distance = (input - target).abs()
    below = distance < _as_tensor(beta, input)
    loss = torch.where(below, distance * distance * 0.5 / beta, distance - beta * 0.5)
    return reduced(loss, size_average, reduce, reduction)


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
    "addmm": _sum_with(torch.mm),
    "addmv": _sum_with(torch.mv),
    "addr": _sum_with(torch.outer),
    "baddbmm": _sum_with(torch.bmm),
    "addbmm": _sum_with(lambda first, second: torch.bmm(first, second).sum(0)),
    "index_add": index_add,
    "scatter": scatter,
    "logit": logit,
    "addcmul": addcmul,
    "addcdiv": addcdiv,
    "lerp": lerp,
    "pow": power,
    "nan_to_num": nan_to_num,
}
_ACTIVATIONS: Mapping[str, Callable[..., Tensor]] = {
    "leaky_relu": leaky_relu,
    "elu": elu,
    "celu": celu,
    "hardtanh": hardtanh,
}
OF_COMPUTED: Mapping[Any, Callable[..., Tensor]] = {
    **dict(_all_forms()),
    **FORWARD_NORMS,
    **computed_losses.OF_COMPUTED,
    **dict.fromkeys((torch.quantile, Tensor.quantile), quantile),
    **dict.fromkeys((torch.nanquantile, Tensor.nanquantile), nanquantile),
    functional.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    torch.celu: celu,
    torch.celu_: _in_place(celu),
    torch.rsub: reverse_subtract,
    torch.special.xlog1py: x_log1p_y,
    functional.softshrink: softshrink,
    functional.pad: pad,
    functional.huber_loss: huber_loss,
    functional.smooth_l1_loss: smooth_l1_loss,
    Tensor.__pow__: power,
    Tensor.__ipow__: _in_place(power),
    Tensor.__rpow__: power_of_number,
    functional.softplus: softplus,
    functional.scaled_dot_product_attention: attention,
}
