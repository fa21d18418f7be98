"""torch's functions that draw random numbers, by a `SeededRandomness` instead of PyTorch's generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedOperatorError
from ..integrations.fractional_pooling import FRACTIONAL_RANKS

if TYPE_CHECKING:
    from .randomness import SeededRandomness

Replacement = Callable[..., Any]
Draw = Callable[["SeededRandomness", Sequence[Any], torch.dtype], Tensor]


def refuse(function: str, **given: Any) -> None:
    """Refuse options that ask for other numbers than the seed's, or for another place.

    Raises:
        UnsupportedOperatorError: one of `given` is set.
    """
    if refused := [f"{name}={value!r}" for name, value in given.items() if value is not None and value is not False]:
        raise UnsupportedOperatorError(
            f"{function} was called with {', '.join(refused)} in the forward of a training step, which draws from its "
            "seed input into new tensors on the CPU: leave the argument out"
        )


def _check_place(function: str, layout: Any, device: Any, pin_memory: Any) -> None:
    elsewhere = device if device is not None and torch.device(device).type != "cpu" else None
    refuse(function, layout=layout if layout is not torch.strided else None, device=elsewhere, pin_memory=pin_memory)


def _creating(function: str, differentiable: bool = True) -> Callable[[Replacement], Replacement]:
    """What all functions that make a tensor take alike: where it is to lie, and whether it is a leaf of autograd's."""

    def decorated(draw: Replacement) -> Replacement:
        def created(
            mode: SeededRandomness,
            *args: Any,
            layout: Any = None,
            device: Any = None,
            requires_grad: bool = False,
            pin_memory: bool = False,
            **options: Any,
        ) -> Tensor:
            if not differentiable:
                refuse(function, requires_grad=requires_grad)
            _check_place(function, layout, device, pin_memory)
            result: Tensor = draw(mode, *args, **options)
            return result.requires_grad_() if requires_grad else result

        return created

    return decorated


def _bernoulli_(mode: SeededRandomness, tensor: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor:
    refuse("Tensor.bernoulli_", generator=generator)
    tensor.copy_(mode.keep(tensor, tensor.shape, p))
    return tensor


def _bernoulli(
    mode: SeededRandomness, input: Tensor, p: Any = None, *, generator: Any = None, out: Any = None
) -> Tensor:
    refuse("torch.bernoulli", generator=generator, out=out)
    return mode.keep(input, input.shape, input if p is None else p)


def _like(name: str, draw: Draw) -> Replacement:
    """`torch.rand_like` or `torch.randn_like`."""

    @_creating(name)
    def drawn_like(
        mode: SeededRandomness, input: Tensor, *, dtype: torch.dtype | None = None, memory_format: Any = None
    ) -> Tensor:
        # The order in memory changes no value; ONNX has one order only.
        return draw(mode, input.shape, dtype or input.dtype)

    return drawn_like


def _new(name: str, draw: Draw) -> Replacement:
    """`torch.rand` or `torch.randn`."""

    @_creating(name)
    def drawn(
        mode: SeededRandomness,
        *sizes: Any,
        size: Sequence[Any] | None = None,
        generator: Any = None,
        names: Any = None,
        out: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        refuse(name, generator=generator, names=names, out=out)
        if size is None:
            size = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        return draw(mode, size, dtype or torch.get_default_dtype())

    return drawn


def _uniform(mode: SeededRandomness, shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return mode.uniform(shape, dtype)


def _normal(mode: SeededRandomness, shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return mode.normal(shape, dtype)


def _uniform_(mode: SeededRandomness, tensor: Tensor, *limits: float, generator: Any = None, **named: float) -> Tensor:
    refuse("Tensor.uniform_", generator=generator)
    low = limits[0] if limits else named.get("from", 0.0)  # a keyword of Python's
    high = limits[1] if limits[1:] else named.get("to", 1.0)
    tensor.copy_(mode.uniform(tensor.shape, tensor.dtype) * (high - low) + low)
    return tensor


def _normal_(
    mode: SeededRandomness, tensor: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None
) -> Tensor:
    refuse("Tensor.normal_", generator=generator)
    tensor.copy_(mode.normal(tensor.shape, tensor.dtype) * std + mean)
    return tensor


def _exponential_(mode: SeededRandomness, tensor: Tensor, lambd: float = 1.0, *, generator: Any = None) -> Tensor:
    refuse("Tensor.exponential_", generator=generator)
    tensor.copy_(_exponential(mode, tensor) / lambd)
    return tensor


def _exponential(mode: SeededRandomness, like: Tensor) -> Tensor:
    """Positive numbers in the shape and the dtype of `like`: Gumbel's distribution takes their logarithm."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    drawn = -torch.log(1.0 - mode.uniform(like.shape, wide))  # of (0, 1]
    return drawn.clamp(min=2.0**-24).to(like.dtype)


def _gumbel_softmax(
    mode: SeededRandomness, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    """As in PyTorch, which draws within a function of its own."""
    soft = ((logits - _exponential(mode, logits).log()) / tau).softmax(dim)
    if not hard:
        return soft
    chosen = torch.zeros_like(logits).scatter(dim, soft.max(dim, keepdim=True)[1], 1.0)
    return chosen - soft.detach() + soft


@_creating("torch.normal")
def _normal_of(
    mode: SeededRandomness,
    mean: Any = 0.0,
    std: Any = 1.0,
    size: Sequence[Any] | None = None,
    *,
    generator: Any = None,
    out: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.normal`, of numbers and a size or of tensors."""
    refuse("torch.normal", generator=generator, out=out)
    tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*(value.shape for value in tensors)) if tensors else size
    kind = tensors[0].dtype if tensors else dtype or torch.get_default_dtype()
    return (mode.normal(shape or (), kind) * std + mean).detach()  # PyTorch's has no gradient either


@_creating("torch.randint", differentiable=False)
def _integers(
    mode: SeededRandomness,
    *numbers: Any,
    low: Any = None,
    high: Any = None,
    size: Sequence[Any] | None = None,
    generator: Any = None,
    out: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.randint`, (high, size) or (low, high, size)."""
    refuse("torch.randint", generator=generator, out=out)
    given = list(numbers)
    if given and isinstance(given[-1], (tuple, list)):
        size = given.pop()
    if high is None:
        high = given.pop()
    if low is None:
        low = given.pop() if given else 0
    return mode.integers(size or (), low, high).to(dtype or torch.int64)


def _integers_like(
    mode: SeededRandomness,
    input: Tensor,
    *numbers: Any,
    dtype: torch.dtype | None = None,
    memory_format: Any = None,
    **options: Any,
) -> Tensor:
    result: Tensor = _integers(mode, *numbers, size=input.shape, dtype=dtype or input.dtype, **options)
    return result


@_creating("torch.randperm", differentiable=False)
def _permutation(
    mode: SeededRandomness,
    n: Any,
    *,
    generator: Any = None,
    out: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The order of as many numbers, none of which equals another."""
    refuse("torch.randperm", generator=generator, out=out)
    numbers = mode.bits((n,)) * n + torch.arange(n)
    return torch.sort(numbers)[1].to(dtype or torch.int64)


def _multinomial(
    mode: SeededRandomness,
    input: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    generator: Any = None,
    out: Any = None,
) -> Tensor:
    """The first to happen of waiting times with these rates; a rate of 0 never does."""
    refuse("torch.multinomial", generator=generator, out=out)
    rates = input.detach()
    if not replacement:
        return torch.topk(_exponential(mode, rates) / rates, num_samples, largest=False)[1]
    rates = rates.unsqueeze(-2).expand(*rates.shape[:-1], num_samples, rates.shape[-1])
    return (_exponential(mode, rates) / rates).argmin(-1)


def _fractional_pooling(function: Any, rank: int) -> Replacement:
    """A number for each axis of each plane decides where the windows begin."""

    def pooled(mode: SeededRandomness, input: Tensor, *args: Any, **options: Any) -> Any:
        if options.get("_random_samples") is None:
            planes = input.shape[:2] if input.dim() == rank + 2 else [1, input.shape[0]]
            options["_random_samples"] = mode.uniform([*planes, rank], input.dtype)
        return function(input, *args, **options)

    return pooled


REPLACEMENTS: Mapping[Any, Replacement] = {
    torch.Tensor.bernoulli_: _bernoulli_,
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.rand_like: _like("torch.rand_like", _uniform),
    torch.rand: _new("torch.rand", _uniform),
    torch.Tensor.uniform_: _uniform_,
    torch.randn_like: _like("torch.randn_like", _normal),
    torch.randn: _new("torch.randn", _normal),
    torch.Tensor.normal_: _normal_,
    torch.normal: _normal_of,
    torch.Tensor.exponential_: _exponential_,
    torch.randint: _integers,
    torch.randint_like: _integers_like,
    torch.randperm: _permutation,
    torch.multinomial: _multinomial,
    torch.Tensor.multinomial: _multinomial,
    torch.nn.functional.gumbel_softmax: _gumbel_softmax,
    **{function: _fractional_pooling(function, rank) for function, rank in FRACTIONAL_RANKS.items()},
}
