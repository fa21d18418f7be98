"""Forwards in which PyTorch's own Python code looks at values: masked transformers, validated distributions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MultivariateNormal, Normal
from torch.nn.modules import transformer

import convgrad_export as cg
from convgrad_export.integrations.capture import capture

from .onnx_check import compare_gradients


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, mask=mask)


@pytest.mark.parametrize("causal", [True, False])
def test_an_encoder_applies_the_mask_that_it_is_given(causal: bool) -> None:
    """PyTorch compares the mask with the causal one, which no graph can; one model is right for both."""
    generator = torch.Generator().manual_seed(5)
    x, any_mask = torch.randn(2, 5, 4, generator=generator), torch.eye(5).roll(1, 0).bool()
    mask = torch.ones(5, 5).triu(1).bool() if causal else any_mask
    compare_gradients(Masked().eval(), (x, any_mask), fresh=(x, mask))


DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: Normal(x[:, 0], x[:, 1].exp()).log_prob(x[:, 2]),
    "categorical": lambda x: Categorical(logits=x).entropy(),
}


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("function", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_distributions_with_their_default_validation(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(6))
    assert cg.export_gradient(Function(function), (x,), of=torch.sum, dynamic_shapes={"x": {0: "batch"}}).verified


def test_a_trace_leaves_the_checks_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distribution, "_validate_args", True)  # torch.compile turns it off for the whole process
    detect = transformer._detect_is_causal_mask
    capture(Function(DISTRIBUTIONS["normal"]), (torch.randn(2, 3),))
    assert transformer._detect_is_causal_mask is detect
    assert Distribution._validate_args
    with pytest.raises(ValueError, match="scale_tril"):
        MultivariateNormal(torch.zeros(2), scale_tril=torch.full((2, 2), torch.nan))
