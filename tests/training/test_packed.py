"""Packed sequences in training steps: PyTorch's own results for any lengths; what a graph lacks is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import convgrad_export as cg
from convgrad_export.training.randomness import SeededRandomness

from ..torch_release import no_projections

LENGTHS = torch.tensor([3, 5, 1, 4])


class Packed(nn.Module):
    """The outputs and last states of a recurrent layer over packed sequences."""

    def __init__(self, kind: type, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = kind(3, 4, 2, batch_first=True, dropout=dropout, **options)
        self.enforce_sorted = False

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.enforce_sorted)
        output, state = self.layers(packed)
        padded, found = pad_packed_sequence(output, True, padding_value=0.5, total_length=x.shape[1])
        states = state if isinstance(state, tuple) else (state,)
        ends = sum(((index + 2) * s.square().sum() for index, s in enumerate(states)), torch.zeros((), dtype=x.dtype))
        return padded.square().mean() + ends + found.sum()


KINDS: list[Any] = [
    (nn.LSTM, {}),
    pytest.param(nn.LSTM, {"bidirectional": True, "proj_size": 2}, marks=no_projections),
    (nn.GRU, {"bias": False}),
    (nn.GRU, {"bidirectional": True}),
    (nn.RNN, {"bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS.sort(descending=True)[0], torch.full((4,), 5)])
def test_values_and_gradients_are_pytorchs(kind: type, options: dict[str, Any], lengths: Tensor) -> None:
    module = Packed(kind, **options).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    module.enforce_sorted = bool((lengths.diff() <= 0).all())
    expected = torch.autograd.grad(value := module(x, lengths), list(module.parameters()))
    with SeededRandomness(torch.tensor(0), torch.tensor(0)):
        got = torch.autograd.grad(masked := module(x, lengths), list(module.parameters()))
    torch.testing.assert_close(masked, value)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("kind", "options"), [KINDS[1], KINDS[2]])
def test_steps_train_as_pytorch_does_for_other_lengths_and_batches(kind: type, options: dict[str, Any]) -> None:
    module = Packed(kind, **options).double()
    eager = copy.deepcopy(module)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    report = cg.export_training_step(
        module,
        lambda output: output,
        "sgd",
        (x, LENGTHS),
        dynamic_shapes={"x": {0: "batch"}, "lengths": {0: "batch"}},
    )
    assert report.verified
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.05)
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.05)
    for lengths in (LENGTHS, torch.tensor([5, 2]), torch.tensor([1, 1, 5, 2, 4])):
        x = torch.randn(len(lengths), 5, 3, dtype=torch.float64)
        optimizer.zero_grad()
        value = eager(x, lengths)
        value.backward()
        optimizer.step()
        assert session.step(x, lengths)["loss"] == pytest.approx(value.item(), rel=1e-9)
    for name, value in eager.named_parameters():
        np.testing.assert_allclose(session.state()[name], value.detach(), rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(("kind", "options"), [KINDS[0], KINDS[3]])
def test_dropout_between_the_layers_draws_from_the_seed(kind: type, options: dict[str, Any]) -> None:
    module, x = Packed(kind, 0.5, **options), torch.randn(4, 5, 3)
    report = cg.export_training_step(module, lambda output: output, "sgd", (x, LENGTHS))
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.0, seed=5)
    losses = [session.step(x, LENGTHS)["loss"] for _ in range(3)]
    assert len(set(losses)) == 3
    for step, loss in enumerate(losses):
        with SeededRandomness(torch.tensor(5), torch.tensor(step)), torch.no_grad():
            assert module(x, LENGTHS).item() == pytest.approx(loss, rel=1e-5)
    expected = module.eval()(x, LENGTHS)
    with SeededRandomness(torch.tensor(5), torch.tensor(0)):
        torch.testing.assert_close(module(x, LENGTHS), expected)


def test_lengths_as_numbers_and_packed_lists() -> None:
    layer = nn.GRU(3, 4).double()

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            first = self.layer(pack_padded_sequence(x, [5, 3], enforce_sorted=True))[1]
            second = self.layer(pack_sequence([x[:4, 0], x[:2, 1]]))[1]
            return first.square().sum() + second.sum()

    x = torch.randn(5, 2, 3, dtype=torch.float64)
    report = cg.export_training_step(Fixed(), lambda output: output, "sgd", (x,))
    loss = cg.TrainingSession(report.model, report.state).step(x)["loss"]
    assert loss == pytest.approx(Fixed()(x).item(), rel=1e-9)


def _reading(read: Callable[[PackedSequence], Any]) -> Callable[[PackedSequence, Tensor], Tensor]:
    return lambda packed, x: x.sum() + read(packed)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda packed, x: pad_packed_sequence(packed)[0].sum(), r"pass total_length"),
        (_reading(lambda packed: packed.data.sum()), "sum reads the data"),
        (_reading(lambda packed: packed.data.size(0)), "size reads the data"),
        (_reading(lambda packed: packed.batch_sizes[1]), "reads the data or the batch sizes"),
        (_reading(lambda packed: functional.relu(packed.data).sum()), "relu reads"),
        (
            lambda packed, x: pad_packed_sequence(PackedSequence(x[0], packed.batch_sizes), total_length=5)[0].sum(),
            "in another way than by pack_padded_sequence",
        ),
    ],
)
def test_what_a_graph_does_not_have_is_refused(function: Any, message: str) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed, _ = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
            return function(packed, x)

    with pytest.raises(cg.UnsupportedOperatorError, match=message):
        cg.export_training_step(Reading(), lambda output: output, "sgd", (torch.randn(5, 4, 3), LENGTHS))


def test_a_packed_sequence_is_no_argument() -> None:
    packed = pack_padded_sequence(torch.ones(5, 4, 3), LENGTHS, enforce_sorted=False)
    with pytest.raises(cg.ArgumentTypeError, match="args holds a PackedSequence"):
        cg.export_training_step(nn.GRU(3, 4), lambda output: output[1].sum(), "sgd", (packed,))


def test_recurrent_layers_check_their_states_again_afterwards() -> None:
    check = nn.RNNBase.check_forward_args
    with SeededRandomness(torch.tensor(0), torch.tensor(0)), pytest.raises(RuntimeError, match="hidden size"):
        nn.GRU(3, 4)(torch.ones(5, 2, 3), torch.ones(1, 3, 4))
    assert nn.RNNBase.check_forward_args is check
