"""Packed sequences in a traced forward: padded ones with a mask, so that the lengths stay an input of the graph.

`pack_padded_sequence` makes tensors whose sizes are the lengths' values, which no graph has. While `PaddedPacking` is
active, or a training step's `SeededRandomness`, it gives the padded tensor with step and sample as one axis instead,
the recurrent layers hold a sample's state from its last step on, and `pad_packed_sequence` fills what lies behind it.
The results are PyTorch's own. What would see the difference (the data or the batch sizes read directly, a padded length
that the data decide) is refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedOperatorError

_UNKNOWN = 0  # of the longest sequence: the least that `pad_packed_sequence` compares with the length it is given
_MISSING = object()
_PROPERTIES = tuple(getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "is_cuda", "requires_grad"))
RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_TAKEN = (torch._pad_packed_sequence, *RECURRENT)


@dataclass(frozen=True)
class _Packing:
    """`lengths` of the samples; `steps` and `count`, the padded tensor's first two sizes, time first."""

    lengths: Tensor
    steps: Any
    count: Any

    def mask(self, rank: int) -> Tensor:
        """Which elements belong to a sequence, for a tensor of this rank, time first."""
        inside = torch.arange(self.steps, dtype=torch.int64)[:, None] < self.lengths
        return inside.reshape(self.steps, self.count, *(1,) * (rank - 2))


class PackedSequences:
    """The packed sequences of one forward."""

    def __init__(self) -> None:
        # by id, beside the tensor itself, so that no other gets its id
        self._data: dict[int, tuple[Tensor, _Packing]] = {}
        self._sizes: dict[int, tuple[Tensor, _Packing]] = {}

    def pack(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """What `torch._pack_padded_sequence` returns: data and batch sizes, or what stands for them."""
        padded = input.transpose(0, 1) if batch_first else input
        packing = _Packing(lengths, padded.shape[0], padded.shape[1])
        sizes = lengths.clone()
        self._sizes[id(sizes)] = sizes, packing
        return self._packed(padded, packing), sizes

    def _packed(self, padded: Tensor, packing: _Packing) -> Tensor:
        data = padded.reshape(packing.steps * packing.count, *padded.shape[2:])
        self._data[id(data)] = data, packing
        return data

    def pad(self, data: Tensor, sizes: Tensor, batch_first: bool, value: float, length: Any) -> tuple[Tensor, Tensor]:
        """What `torch._pad_packed_sequence` returns: the padded tensor, and the lengths.

        Raises:
            UnsupportedOperatorError: the length is to be that of the longest sequence.
        """
        packing = self._packing(data, sizes)
        if isinstance(length, int) and length == _UNKNOWN:
            raise UnsupportedOperatorError(
                "pad_packed_sequence gives as many steps as the longest sequence of a batch has, which no graph knows: "
                "pass total_length, the length that was packed (total_length=x.size(1) for a batch_first x)"
            )
        padded = data.reshape(packing.steps, packing.count, *data.shape[1:])
        padded = padded.masked_fill(~packing.mask(padded.dim()), value)
        if length != packing.steps:
            more = padded.new_full((max(length - packing.steps, 0), *padded.shape[1:]), value)
            padded = torch.cat([padded, more])[:length]
        return padded.transpose(0, 1) if batch_first else padded, packing.lengths.clone()

    def run(
        self,
        function: Callable[..., Any],
        dropped: Callable[[Tensor], Tensor],
        data: Tensor,
        sizes: Tensor,
        state: Any,
        weights: Sequence[Tensor],
        bias: bool,
        layers: int,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        """What torch.lstm, gru, rnn_tanh and rnn_relu return for packed sequences: data and last states.

        Args:
            dropped: dropout between the layers.
        """
        packing = self._packing(data, sizes)
        states = state if isinstance(state, tuple) else (state,)
        directions = 2 if bidirectional else 1
        each = len(weights) // (layers * directions)
        padded = data.reshape(packing.steps, packing.count, *data.shape[1:])
        mask = packing.mask(3)
        ends: list[Sequence[Tensor]] = []
        for layer in range(layers):
            if layer:
                padded = dropped(padded)
            outputs = []
            for direction in range(directions):
                row = layer * directions + direction
                own = weights[row * each : (row + 1) * each]
                start = [part[row : row + 1] for part in states]
                steps = range(packing.steps)[::-1] if direction else range(packing.steps)
                output, end = _unrolled(function, padded, mask, start, own, bias, train, steps)
                outputs.append(output)
                ends.append(end)
            padded = torch.cat(outputs, -1)
        return self._packed(padded, packing), *(torch.cat(parts) for parts in zip(*ends, strict=True))

    def _packing(self, data: Tensor, sizes: Tensor) -> _Packing:
        _, packing = self._sizes.get(id(sizes), (None, None))
        if packing is None or self._data.get(id(data), (None, None))[1] is not packing:
            raise _refusal("a packed sequence was made in another way than by pack_padded_sequence in the forward")
        return packing

    def read(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
        """What a function of torch gets to know of a packed sequence, `_MISSING` if it is none of its arguments.

        Raises:
            UnsupportedOperatorError: what it asks for is not that of PyTorch's packed sequences.
        """
        if not self._sizes or func is torch.Tensor.dim or func in _PROPERTIES or func in _TAKEN:
            return _MISSING
        given = {id(leaf) for leaf in _leaves((*args, *(kwargs or {}).values()))}
        if given.isdisjoint(self._data) and given.isdisjoint(self._sizes):
            return _MISSING
        first = id(args[0]) if args else 0
        if first in self._sizes:
            packing = self._sizes[first][1]
            if func is torch.Tensor.__getitem__ and args[1:] == (0,):
                return packing.count
            if func is torch.Tensor.size and args[1:] == (0,):
                return _UNKNOWN
        elif func is torch.Tensor.size and args[1:] == (-1,):
            return _MISSING
        raise _refusal(f"{getattr(func, '__name__', func)} reads the data or the batch sizes of a packed sequence")


class PaddedPacking(TorchFunctionMode):
    """While active, packed sequences are padded ones; dropout between recurrent layers draws as PyTorch's does."""

    def __init__(self) -> None:
        super().__init__()
        self._packed = PackedSequences()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> PaddedPacking:
        self._open.enter_context(unchecked_sizes())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = self._packed.read(func, args, kwargs)
        if not is_missing(known):
            return known
        if func is torch._pack_padded_sequence:
            return self._packed.pack(*args)
        if func is torch._pad_packed_sequence:
            return self._packed.pad(*args)
        if func in RECURRENT and not isinstance(args[3], bool):  # the batch sizes come second
            data, sizes, state, weights, bias, layers, p, train, bidirectional = args
            dropped = functools.partial(functional.dropout, p=p, training=train)
            return self._packed.run(func, dropped, data, sizes, state, weights, bias, layers, train, bidirectional)
        if func in RECURRENT:
            _fix_length(args[0].shape[1 if args[8] else 0])
        result = func(*args, **(kwargs or {}))
        return _of_three_axes(result, args[1]) if func is torch.lstm else result


def _fix_length(length: Any) -> None:
    """Make numbers of the dynamic sizes that the number of a recurrent layer's steps follows from.

    PyTorch unrolls the steps. Where the length is a dynamic size itself it makes a number of that one, which is an
    error with the place; one that is computed from it (by a convolution) it mistakes, and ends within the layer.
    """
    if isinstance(length, torch.SymInt):
        for symbol in length.node.expr.free_symbols:
            int(length.node.shape_env.create_symintnode(symbol, hint=None))


def _of_three_axes(result: tuple[Tensor, ...], start: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A recurrent layer's output and last states; PyTorch before 2.13 gives an LSTM's a further axis in a trace."""
    output, *ends = result
    pairs = zip(ends, start, strict=True)
    return output, *(end if end.dim() == before.dim() else end.reshape(before.shape) for end, before in pairs)


def is_missing(value: Any) -> bool:
    return value is _MISSING


def _leaves(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _refusal(what: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"{what}, whose sizes depend on the values of the lengths: no graph has them. Pack in the forward, hand the "
        "packed sequence to recurrent layers alone, and pad it again (total_length=...) before anything else"
    )


def _unrolled(
    function: Callable[..., Any],
    padded: Tensor,
    mask: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: bool,
    train: bool,
    steps: Sequence[int],
) -> tuple[Tensor, Sequence[Tensor]]:
    """One layer in one direction: outputs of all steps, zero outside of the sequences, and the last states."""
    outputs: dict[int, Tensor] = {}
    for step in steps:
        inside = mask[step : step + 1]
        start = tuple(state) if len(state) > 1 else state[0]
        made = function(padded[step : step + 1], start, weights, bias, 1, 0.0, train, False, False)
        output, *new = _of_three_axes(made, state)
        state = [torch.where(inside, after, before) for after, before in zip(new, state, strict=True)]
        outputs[step] = output.masked_fill(~inside, 0.0)
    return torch.cat([outputs[step] for step in sorted(outputs)]), state


@contextlib.contextmanager
def unchecked_sizes() -> Iterator[None]:
    """While active, recurrent layers do not compare their state's size with a packed sequence's: int() fixes a size."""
    own = torch.nn.RNNBase.check_forward_args

    def check(self: Any, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        if batch_sizes is None:
            own(self, input, hidden, batch_sizes)
        else:
            self.check_input(input, batch_sizes)

    setattr(torch.nn.RNNBase, "check_forward_args", check)  # noqa: B010  # mypy: no assignment to a method
    try:
        yield
    finally:
        setattr(torch.nn.RNNBase, "check_forward_args", own)  # noqa: B010
