"""Packed sequences in exports: held to PyTorch's own for any lengths, refused where a graph has no sizes for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import convgrad_export as cg

from ..torch_release import no_projections

LENGTHS = torch.tensor([3, 5, 1, 4])
DYNAMIC = {"x": {0: "batch"}, "lengths": {0: "batch"}}


class Packed(nn.Module):
    def __init__(self, layers: nn.Module, **packing: Any) -> None:
        super().__init__()
        self.layers, self.packing = layers, {"enforce_sorted": False, **packing}

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        output, state = self.layers(pack_padded_sequence(x, lengths, batch_first=True, **self.packing))
        padded, _ = pad_packed_sequence(output, True, total_length=x.shape[1])
        return padded, state[0] if isinstance(state, tuple) else state


LAYERS = {
    "lstm": lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2),
    "gru": lambda: nn.GRU(3, 4, batch_first=True),
    "rnn": lambda: nn.RNN(3, 4, batch_first=True, bidirectional=True),
}


@pytest.mark.parametrize("name", [pytest.param("lstm", marks=no_projections), "gru", "rnn"])
def test_gradients_of_packed_sequences_are_pytorchs(name: str) -> None:
    torch.manual_seed(0)
    report = cg.export_gradient(
        Packed(LAYERS[name]()),
        (torch.randn(4, 5, 3), LENGTHS),
        wrt=["inputs", "parameters"],
        of=lambda output: output[0].square().sum() + output[1].sum(),
        dynamic_shapes=DYNAMIC,
    )
    assert report.verified
    assert "lengths" in report.inputs
    assert [sizes["batch"] for sizes in report.verified_sizes] == [4, 5]


@no_projections
def test_an_exported_forward_takes_other_lengths() -> None:
    module = Packed(LAYERS["lstm"]()).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    report = cg.export(module, (x, LENGTHS), dynamic_shapes=DYNAMIC)
    session = cg.GradientSession(report.model)
    for lengths in (LENGTHS, torch.tensor([5, 2]), torch.tensor([1, 1, 5, 2, 4])):
        x = torch.randn(len(lengths), 5, 3, dtype=torch.float64)
        results = session.run({"x": x, "lengths": lengths})
        for result, expected in zip(results.values(), module(x, lengths), strict=True):
            torch.testing.assert_close(result, expected)


def test_dropout_between_the_layers_is_random() -> None:
    layers = nn.GRU(3, 4, 2, batch_first=True, dropout=0.5)
    report = cg.export(Packed(layers), (torch.randn(4, 5, 3), LENGTHS))
    assert any("draws random numbers" in note for note in report.notes)
    assert cg.export(Packed(layers).eval(), (torch.randn(4, 5, 3), LENGTHS)).verified


def test_lengths_that_must_be_sorted_are_refused_with_what_to_do() -> None:
    module = Packed(nn.GRU(3, 4, batch_first=True), enforce_sorted=True)
    with pytest.raises(cg.VerificationError, match="enforce_sorted=False is exported too"):
        cg.export(module, (torch.randn(4, 5, 3), LENGTHS.sort(descending=True)[0]))


def test_what_reads_the_data_is_refused() -> None:
    class Reading(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return pack_padded_sequence(x, lengths, enforce_sorted=False).data.sum()

    with pytest.raises(cg.UnsupportedOperatorError, match="sum reads the data"):
        cg.export(Reading(), (torch.randn(5, 4, 3), LENGTHS))
