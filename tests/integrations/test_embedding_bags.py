"""`nn.EmbeddingBag`: sums, means and maxima of rows, with bags of one length and of any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg

from .onnx_check import compare_gradients

ROWS, OFFSETS = torch.tensor([1, 2, 0, 3, 3, 1, 2]), torch.tensor([0, 3, 3, 5])


class Bags(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(4, 3, **options)

    def forward(self, rows: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        found: Tensor = self.bag(rows, offsets, weights)
        return found


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -3}], ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str, options: dict[str, int]) -> None:
    module = Bags(mode=mode, **options)
    fresh = (torch.tensor([2, 2, 3, 0, 2]), torch.tensor([0, 2, 4]))  # a bag of padding alone, or of one row
    compare_gradients(
        module, (ROWS, OFFSETS), dynamic_shapes={"rows": {0: "rows"}, "offsets": {0: "bags"}}, fresh=fresh
    )
    pairs = torch.tensor([[1, 2], [2, 2], [3, 3]])
    compare_gradients(module, (pairs[:2],), dynamic_shapes={"rows": {0: "bags"}}, fresh=(pairs,))


def test_weighted_bags_and_a_last_offset() -> None:
    module = Bags(mode="sum", include_last_offset=True, padding_idx=1)
    compare_gradients(module, (ROWS, torch.tensor([0, 3, 3, 7]), torch.rand(7)))


def test_offsets_are_drawn_in_order() -> None:
    """They were drawn in any, which PyTorch refuses."""
    assert cg.export(Bags(mode="mean"), (ROWS, OFFSETS)).verified
    step = cg.export_training_step(
        Bags(sparse=True), lambda out, target: (out - target).square().mean(), "sgd", (ROWS, OFFSETS, torch.ones(4, 3))
    )
    assert step.verified


def test_integers_in_order_stay_in_any_order_where_pytorch_takes_them() -> None:
    seen: list[list[int]] = []

    class Labelled(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            if type(labels) is Tensor:
                seen.append(labels.tolist())
            return x.gather(1, labels[:, None])

    cg.export(Labelled(), (torch.randn(6, 6), torch.arange(6)), samples=4)
    assert any(labels != sorted(labels) for labels in seen)
