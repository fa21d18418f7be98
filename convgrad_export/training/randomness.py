"""Dropout and other random draws from a seed input, the same numbers in PyTorch and in any ONNX runtime.

ONNX's own random operators hide their state and differ between runtimes. Here every draw is a hash of (seed, step,
number of the draw in the forward pass, position of the element) in int64 arithmetic, so that a step can be repeated,
resumed and compared exactly.

The hash: with p = 2**31 - 1, a key k in [0, p) and the position i, x = (48271 (i + 1) + k) mod p, then twice
x <- (x**5 + k) mod p. x**5 permutes the residues because 5 does not divide p - 1, so within p elements no value is
drawn more often than it should be. 48271 is the multiplier of Park, Miller and Stockmeyer (CACM 36:7, 1993).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import ArgumentTypeError, DTypeError, GeometryError
from ..integrations.decompositions import rrelu_slope
from ..integrations.packed import RECURRENT, PackedSequences, is_missing, unchecked_sizes
from . import attention, random_functions

Replacement = random_functions.Replacement
_P = 2**31 - 1
_MULTIPLIER = 48271
_DRAW_MULTIPLIER = 69621  # from the same paper
_BITS = 24
_SIGNIFICANT = {torch.float64: _BITS, torch.float32: _BITS, torch.float16: 11, torch.bfloat16: 8}


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
        seed: 0-d int64 tensor.
        step: 0-d int64 tensor, the number of the call; other numbers are drawn at every one.

    Attributes:
        draws: how many draws were made.
    """

    def __init__(self, seed: Tensor, step: Tensor) -> None:
        super().__init__()
        base = torch.remainder(seed, _P)
        self._base = _scrambled(torch.remainder(base * _MULTIPLIER + torch.remainder(step, _P), _P), base)
        self.draws = 0
        self.packed = PackedSequences()
        self._states: list[tuple[Tensor, int]] = []
        self._originals: list[tuple[Any, Any]] = []
        self._open: list[contextlib.ExitStack] = []

    def __enter__(self) -> SeededRandomness:
        # `torch.utils.checkpoint` notes the generator's state before it calls a part of the forward, and sets it again
        # before it calls that part a second time. What decides the draws here is how many there were.
        self._originals.append((torch.get_rng_state, torch.set_rng_state))
        _set_state_functions(self._state, self._set_state)
        self._open.append(contextlib.ExitStack())
        self._open[-1].enter_context(unchecked_sizes())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.pop().close()
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
        """The next draw as numbers in [0, 1), multiples of 2**-24, or of what a half dtype holds below 1.

        Raises:
            DTypeError: no floating-point dtype.
        """
        kept = _SIGNIFICANT.get(dtype)
        if kept is None:
            raise DTypeError(f"random numbers in [0, 1) were asked for in {dtype}, expected a floating-point dtype")
        numbers = self.bits(shape)
        if kept < _BITS:
            numbers = torch.div(numbers, 2 ** (_BITS - kept), rounding_mode="floor")
        return numbers.to(dtype) * 2.0**-kept

    def normal(self, shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """The next two draws as normally distributed numbers (Box and Muller, Ann. Math. Stat. 29, 1958).

        Raises:
            DTypeError: no floating-point dtype.
        """
        if dtype not in _SIGNIFICANT:
            raise DTypeError(f"normally distributed numbers were asked for in {dtype}, expected a floating-point dtype")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        radius = (-2.0 * torch.log(1.0 - self.uniform(shape, wide))).sqrt()  # of (0, 1]
        return (radius * torch.cos(2.0 * math.pi * self.uniform(shape, wide))).to(dtype)

    def integers(self, shape: Sequence[Any], low: Any, high: Any) -> Tensor:
        """The next draw as int64 numbers from `low` on, below `high`.

        Raises:
            ArgumentTypeError: none or more numbers than the draws tell apart.
        """
        span = high - low
        if isinstance(span, int) and not 1 <= span <= 2**_BITS:
            raise ArgumentTypeError(
                f"random integers were asked for from {low} to below {high}, expected 1 to 2**{_BITS} numbers"
            )
        return torch.div(self.bits(shape) * span, 2**_BITS, rounding_mode="floor") + low

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = self.packed.read(func, args, kwargs)
        if not is_missing(known):
            return known
        replacement = _REPLACEMENTS.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        return replacement(self, *args, **(kwargs or {}))

    def keep(self, like: Tensor, shape: Sequence[Any], probability: Any) -> Tensor:
        """A mask of zeros and ones in `like`'s dtype, one with the given probability (a number or a tensor).

        Raises:
            ArgumentTypeError: a number outside 0 to 1.
        """
        if isinstance(probability, Tensor):
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            return (self.uniform(shape, wide) < probability).to(like.dtype)
        if not 0.0 <= probability <= 1.0:
            raise ArgumentTypeError(f"bernoulli: p is {probability!r}, expected a number from 0 to 1")
        # compared as integers, so that every dtype gets the same mask
        return (self.bits(shape) < round(probability * 2**_BITS)).to(like.dtype)


def _set_state_functions(getter: Callable[[], Tensor], setter: Callable[[Tensor], None]) -> None:
    for place in (torch, torch.random):  # the second under `fork_rng`
        setattr(place, "get_rng_state", getter)  # noqa: B010  # mypy knows no functions of torch.random
        setattr(place, "set_rng_state", setter)  # noqa: B010


def _noise_shape(function: Any, input: Tensor) -> list[Any]:
    """One random number for each element, or for each channel of each sample."""
    shape, ones = list(input.shape), [1] * (input.dim() - 2)
    if function in (functional.dropout, functional.alpha_dropout):
        return shape
    name = function.__name__
    if input.dim() < 2 or (function is functional.dropout1d and input.dim() > 3):
        expected = "2 or 3" if function is functional.dropout1d else "2 or more"
        raise GeometryError(f"{name}: input has {input.dim()} dimensions, expected {expected}")
    # PyTorch takes these ranks, and no other, for samples without a batch axis.
    if (function is functional.dropout1d and input.dim() == 2) or (
        function is functional.dropout3d and input.dim() != 5
    ):
        return [shape[0], 1, *ones]
    return [*shape[:2], *ones]


def _dropout(function: Any) -> Replacement:
    alpha = function in (functional.alpha_dropout, functional.feature_alpha_dropout)

    def replacement(
        mode: SeededRandomness, input: Tensor, p: float = 0.5, training: bool = not alpha, inplace: bool = False
    ) -> Tensor:
        if not 0.0 <= p <= 1.0:
            raise ArgumentTypeError(f"{function.__name__}: p is {p!r}, expected a number from 0 to 1")
        shape = _noise_shape(function, input)
        if not training or p == 0.0:
            return input
        shift: Any = None
        if p == 1.0:
            noise: Any = 0.0
        elif alpha:  # Klambauer et al., arXiv:1706.02515, section 3
            saturation = 1.7580993408473766
            scale = 1.0 / math.sqrt((saturation * saturation * p + 1.0) * (1.0 - p))
            kept = mode.keep(input, shape, 1.0 - p)
            noise, shift = kept * scale, (kept - 1.0) * (saturation * scale) + saturation * scale * p
        else:
            noise = mode.keep(input, shape, 1.0 - p) / (1.0 - p)
        if inplace:
            input.mul_(noise)
            return input if shift is None else input.add_(shift)
        return input * noise if shift is None else input * noise + shift

    return replacement


_plain_dropout = _dropout(functional.dropout)


def _recurrent(function: Any) -> Replacement:
    """Layer by layer, with dropout from the seed in between, which PyTorch's decomposition for traces leaves out."""

    def packed(
        mode: SeededRandomness,
        data: Tensor,
        sizes: Tensor,
        hx: Any,
        weights: Any,
        bias: bool,
        layers: int,
        p: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        dropped = functools.partial(_plain_dropout, mode, p=p, training=train)
        return mode.packed.run(function, dropped, data, sizes, hx, weights, bias, layers, train, bidirectional)

    def replacement(
        mode: SeededRandomness, input: Tensor, hx: Any, weights: Any, bias: Any, layers: Any, p: Any, *options: Any
    ) -> Any:
        if not isinstance(bias, bool):  # packed: the batch sizes come second
            return packed(mode, input, hx, weights, bias, layers, p, *options)
        if not options[0] or p == 0.0 or layers == 1:
            return function(input, hx, weights, bias, layers, p, *options)
        directions, size = 2 if options[1] else 1, len(weights) // layers
        states = []
        for layer in range(layers):
            if layer:
                input = _plain_dropout(mode, input, p, True)
            own = slice(layer * directions, (layer + 1) * directions)
            start = tuple(state[own] for state in hx) if isinstance(hx, tuple) else hx[own]
            part = weights[layer * size : (layer + 1) * size]
            input, *ends = function(input, start, part, bias, 1, 0.0, *options)
            states.append(ends)
        return input, *(torch.cat(ends) for ends in zip(*states, strict=True))

    return replacement


def _scaled_dot_product_attention(
    mode: SeededRandomness,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p == 0.0:
        options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    dropped = functools.partial(_plain_dropout, mode, p=dropout_p, training=True)
    return attention.attention(dropped, query, key, value, attn_mask, is_causal, scale, enable_gqa)


def _multi_head_attention(mode: SeededRandomness, *args: Any, **kwargs: Any) -> Any:
    with mode:
        return attention.multi_head_attention_forward(*args, **kwargs)


def _rrelu(
    mode: SeededRandomness,
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    if not training:
        return functional.rrelu(input, lower, upper, False, inplace)
    slope = rrelu_slope(input, mode.uniform(input.shape, input.dtype), lower, upper)
    return input.mul_(slope) if inplace else input * slope


def _plain_rrelu(
    mode: SeededRandomness,
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    generator: Any = None,
    *,
    inplace: bool = False,
) -> Tensor:
    random_functions.refuse("torch.rrelu", generator=generator)
    return _rrelu(mode, input, lower, upper, training, inplace)


_DROPOUTS = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
)
_REPLACEMENTS: Mapping[Any, Replacement] = {
    **{function: _dropout(function) for function in _DROPOUTS},
    torch.dropout: lambda mode, input, p, train: _plain_dropout(mode, input, p, train),
    **{function: _recurrent(function) for function in RECURRENT},
    torch._pack_padded_sequence: lambda mode, *args: mode.packed.pack(*args),
    torch._pad_packed_sequence: lambda mode, *args: mode.packed.pad(*args),
    functional.scaled_dot_product_attention: _scaled_dot_product_attention,
    functional.multi_head_attention_forward: _multi_head_attention,
    **random_functions.REPLACEMENTS,
    functional.rrelu: _rrelu,
    torch.rrelu: _plain_rrelu,
    torch.rrelu_: functools.partial(_plain_rrelu, inplace=True),
}
