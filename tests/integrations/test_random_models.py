"""Models with random numbers: they are not compared with PyTorch, so what they draw is tested here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnxscript import opset18 as op
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg

from .gradient_modules import Apply


def drawn(function: Callable[[Tensor], object], x: Tensor) -> list[np.ndarray]:
    report = cg.export(Apply(function), (x,))
    return [
        np.asarray(value, np.float64) for value in cg.GradientSession(report.model).run({"input": x.numpy()}).values()
    ]


@pytest.mark.parametrize(
    "function",
    [lambda x: functional.dropout(x, 0.3), torch.bernoulli, lambda x: torch.empty_like(x).bernoulli_(0.7) * x],
    ids=["dropout", "bernoulli", "bernoulli_"],
)
def test_two_draws_from_one_tensor_are_two(function: Callable[[Tensor], Tensor]) -> None:
    first, second = drawn(lambda x: (function(x), function(x)), torch.full((100, 100), 0.7))
    assert 0.3 < (first != second).mean() < 0.6  # 2 * 0.3 * 0.7
    assert abs((first != 0).mean() - 0.7) < 0.05


def test_uniform_numbers_lie_between_their_limits() -> None:
    """PyTorch's decomposition has no translation; Laplace's distribution draws by it."""
    first, second, noise = drawn(
        lambda x: (
            torch.empty_like(x).uniform_(-1, 3),
            torch.empty_like(x).uniform_(-1, 3),
            torch.distributions.Laplace(x, 2.0).rsample(),
        ),
        torch.ones(100, 100),
    )
    assert (first != second).mean() > 0.99
    assert -1 <= first.min() < -0.95 < 2.95 < first.max() <= 3
    assert abs(first.mean() - 1) < 0.05
    assert abs(np.median(noise) - 1) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dropout_keeps_the_mean_and_drops_everything_at_one(dtype: torch.dtype) -> None:
    some, none = drawn(
        lambda x: (functional.dropout(x, 0.2), functional.dropout(x, 1.0)), torch.ones(100, 100, dtype=dtype)
    )
    assert abs(some.mean() - 1) < 0.05
    np.testing.assert_allclose(some.max(), 1.25, rtol=1e-3)
    assert not none.any()


def test_dropout_and_its_gradient_have_one_mask() -> None:
    report = cg.export_gradient(nn.Dropout(0.5), (torch.ones(8, 8),), return_outputs=True)
    result = cg.GradientSession(report.model).run({"input": torch.ones(8, 8).numpy()})
    np.testing.assert_array_equal(result["output"], result["input.grad"])


def test_draws_without_replacement_differ_and_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(4000, 4)
    (indices,) = drawn(lambda x: torch.multinomial(x, 2), probabilities)
    assert indices.shape == (4000, 2)
    assert (indices[:, 0] != indices[:, 1]).all()
    assert not (indices == 1).any()
    assert abs((indices[:, 0] == 2).mean() - 0.6) < 0.04
    again, single = drawn(
        lambda x: (torch.multinomial(x[0], 9, replacement=True), torch.multinomial(x[0], 1)), probabilities
    )
    assert again.shape == (9,)
    assert single.shape == (1,)


def test_normal_draws_one_number_for_each_element_of_the_result() -> None:
    (values,) = drawn(lambda x: torch.normal(x.mean(), x), torch.full((50, 50), 2.0))
    assert 1.5 < values.std() < 2.5
    assert 1.5 < values.mean() < 2.5


def test_a_random_model_that_does_not_run_is_refused() -> None:
    def no_dropout(x: Any, p: float, train: bool) -> tuple[Any, Any]:
        return op.Dropout(x, 1.0, True)

    table = {torch.ops.aten.native_dropout.default: no_dropout}
    with pytest.raises(cg.VerificationError, match="fails on inputs"):
        cg.export(nn.Dropout(0.5), (torch.ones(3),), custom_translation_table=table)


def test_looking_at_a_random_model_leaves_the_generator_where_it_was() -> None:
    before = torch.get_rng_state()
    report = cg.export(nn.Dropout(0.5), (torch.ones(3),))
    assert torch.equal(torch.get_rng_state(), before)
    assert "random numbers" in report.notes[0]
