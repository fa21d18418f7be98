"""Random rounding where operators pick elements, which no runtime rounds anew."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg
from convgrad_export.integrations.rounding import RandomRounding

EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda scores: scores.amax(1),
    "aminmax": lambda scores: torch.aminmax(scores, dim=1).max,
    "max": lambda scores: scores.max(),
    "median": lambda scores: scores.median(),
    "infinity norm": lambda scores: torch.linalg.vector_norm(scores, math.inf, dim=1),
    "matrix norm": lambda scores: torch.linalg.matrix_norm(scores, 1),
    "scatter": lambda scores: scores.new_zeros(2).scatter_reduce(0, torch.arange(6) % 2, scores.flatten(), "amax"),
}


class Cancelled(nn.Module):
    """The sum of a gradient behind a normalization: zero, but for rounding."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.scores, self.function = nn.LayerNorm(6), nn.Linear(6, 3), function
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        value = self.function(self.scores(self.norm(x)).mean(1)).square().sum()
        return torch.autograd.grad(value, x)[0].mean(2)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_the_gradient_of_an_extreme_is_judged_where_it_cancels(extreme: str) -> None:
    """A maximum that moved away from the element that it is has no element equal to it: the bound was NaN."""
    torch.manual_seed(0)
    report = cg.export(Cancelled(EXTREMES[extreme]), (torch.randn(2, 4, 6),), samples=1)
    error = report.errors["output"]
    assert error.cancelled
    assert error.relative < error.bound < 1e-3


@pytest.mark.parametrize("storage", [torch.float32, None])
def test_elements_that_an_operator_picks_stay_as_they_are(storage: torch.dtype | None) -> None:
    """A mask of the largest ones (`scores < scores.topk(2).values[..., -1:]`) would lose one of them."""
    x = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    places = torch.arange(50).expand(4, -1)
    with RandomRounding(2.0**-21, storage, 0):
        picked = x.topk(50).values, x.sort().values, x.cummax(1).values, x.gather(1, places), x[:, places[0]], x.abs()
        power = torch.linalg.vector_norm(x, 3.0, dim=1)
    for values in picked:
        assert torch.isin(values, torch.cat([x, x.abs()])).all()
    assert not torch.equal(power, torch.linalg.vector_norm(x, 3.0, dim=1))
