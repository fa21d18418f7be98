"""Dropout and other random draws from a seed input, the same numbers in PyTorch and in any ONNX runtime.

ONNX's own random operators hide their state and differ between runtimes. Here every draw is a hash of (seed, step,
number of the draw in the forward pass, position of the element) in int64 arithmetic, so that a step can be repeated,
resumed and compared exactly.

The hash: with p = 2**31 - 1, a key k in [0, p) and the position i, x = (48271 (i + 1) + k) mod p, then twice
x <- (x**5 + k) mod p. x**5 permutes the residues because 5 does not divide p - 1, so within p elements no value is
drawn more often than it should be. 48271 is the multiplier of Park, Miller and Stockmeyer (CACM 36:7, 1993).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_P = 2**31 - 1
_MULTIPLIER = 48271
_DRAW_MULTIPLIER = 69621  # from the same paper
_BITS = 24


def _scrambled(x: Tensor, key: Tensor) -> Tensor:
    """(x**5 + key) mod p; every product stays below 2**62."""
    square = torch.remainder(x * x, _P)
    return torch.remainder(torch.remainder(square * square, _P) * x + key, _P)


def random_bits(shape: Sequence[Any], key: Tensor) -> Tensor:
    """int64 numbers in [0, 2**24), one for each element of `shape`.

    Args:
        key: 0-d int64 tensor in [0, 2**31 - 1).
    """
    count: Any = 1
    for size in shape:
        count = count * size
    positions = torch.arange(count, dtype=torch.int64)
    x = torch.remainder((positions + 1) * _MULTIPLIER + key, _P)
    x = _scrambled(_scrambled(x, key), key)
    # the upper 24 bits: what float32 holds below 1 without rounding up to it
    return torch.div(x, 128, rounding_mode="floor").reshape(tuple(shape))


class SeededRandomness(TorchFunctionMode):
    """While active, random functions of torch draw from a seed instead of PyTorch's generator.

    Args:
        seed: 0-d int64 tensor. step: 0-d int64 tensor; other numbers are drawn at every step.

    Attributes:
        draws: how many draws were made.
    """

    def __init__(self, seed: Tensor, step: Tensor) -> None:
        super().__init__()
        base = torch.remainder(seed, _P)
        self._base = _scrambled(torch.remainder(base * _MULTIPLIER + torch.remainder(step, _P), _P), base)
        self.draws = 0
        self._states: list[tuple[Tensor, int]] = []
        self._originals: list[tuple[Any, Any]] = []

    def __enter__(self) -> SeededRandomness:
        # `torch.utils.checkpoint` notes the generator's state before it calls a part of the forward, and sets it again
        # before it calls that part a second time. What decides the draws here is how many there were.
        self._originals.append((torch.get_rng_state, torch.set_rng_state))
        _set_state_functions(self._state, self._set_state)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _set_state_functions(*self._originals.pop())

    def _state(self) -> Tensor:
        token = torch.empty(0, dtype=torch.uint8)
        self._states.append((token, self.draws))
        return token

    def _set_state(self, new_state: Tensor) -> None:
        # a state that was noted outside says nothing about these draws
        self.draws = next((draws for token, draws in self._states if token is new_state), self.draws)

    def bits(self, shape: Sequence[Any]) -> Tensor:
        """The next draw, as `random_bits`."""
        self.draws += 1
        number = torch.full_like(self._base, self.draws)
        key = _scrambled(torch.remainder(self._base + number * _DRAW_MULTIPLIER, _P), self._base)
        return random_bits(shape, key)

    def uniform(self, shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """The next draw as numbers in [0, 1)."""
        return self.bits(shape).to(dtype) * 2.0**-_BITS

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        return replacement(self, *args, **(kwargs or {}))

    def keep(self, like: Tensor, shape: Sequence[Any], probability: Any) -> Tensor:
        """A mask of zeros and ones in `like`'s dtype, one with the given probability (a number or a tensor)."""
        if isinstance(probability, Tensor):
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            return (self.uniform(shape, wide) < probability).to(like.dtype)
        # compared as integers, so that every dtype gets the same mask
        return (self.bits(shape) < round(probability * 2**_BITS)).to(like.dtype)


def _set_state_functions(getter: Callable[[], Tensor], setter: Callable[[Tensor], None]) -> None:
    for place in (torch, torch.random):  # the second under `fork_rng`
        setattr(place, "get_rng_state", getter)  # noqa: B010  # mypy knows no functions of torch.random
        setattr(place, "set_rng_state", setter)  # noqa: B010


def _dropout(
    mode: SeededRandomness, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if not training or p == 0.0:
        return input
    if p == 1.0:
        return input * 0.0
    return input * (mode.keep(input, input.shape, 1.0 - p) / (1.0 - p))


def _channel_dropout(
    mode: SeededRandomness, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if not training or p == 0.0:
        return input
    if p == 1.0:
        return input * 0.0
    shape = [*input.shape[:2], *[1] * (input.dim() - 2)]
    return input * (mode.keep(input, shape, 1.0 - p) / (1.0 - p))


def _alpha_dropout(
    mode: SeededRandomness, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    """Klambauer et al., arXiv:1706.02515, section 3."""
    if not training or p == 0.0:
        return input
    alpha = 1.7580993408473766
    scale = 1.0 / math.sqrt((alpha * alpha * p + 1.0) * (1.0 - p))
    kept = mode.keep(input, input.shape, 1.0 - p)
    return input * (kept * scale) + (kept - 1.0) * (alpha * scale) + alpha * scale * p


def _bernoulli_(mode: SeededRandomness, tensor: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor:
    tensor.copy_(mode.keep(tensor, tensor.shape, p))
    return tensor


def _bernoulli(
    mode: SeededRandomness, input: Tensor, p: Any = None, *, generator: Any = None, out: Any = None
) -> Tensor:
    return mode.keep(input, input.shape, input if p is None else p)


def _rand_like(mode: SeededRandomness, input: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    wanted = dtype or input.dtype
    return mode.uniform(input.shape, wanted)


def _rand(mode: SeededRandomness, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
    return mode.uniform(shape, dtype or torch.get_default_dtype())


_REPLACEMENTS: Mapping[Any, Callable[..., Tensor]] = {
    functional.dropout: _dropout,
    functional.dropout1d: _channel_dropout,
    functional.dropout2d: _channel_dropout,
    functional.dropout3d: _channel_dropout,
    functional.alpha_dropout: _alpha_dropout,
    torch.Tensor.bernoulli_: _bernoulli_,
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.rand_like: _rand_like,
    torch.rand: _rand,
}
