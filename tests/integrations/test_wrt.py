"""What `wrt` names, and that it names something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg

from .gradient_modules import image


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def frozen() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).requires_grad_(False)


@pytest.mark.parametrize(
    ("module", "wrt", "message"),
    [
        (Doubles(), "parameters", r"wrt is 'parameters', which names nothing: Doubles has no parameter"),
        (Doubles(), [], r"wrt is \[\], which names nothing: expected inputs"),
        (Doubles(), "", r"wrt names ''"),
        (frozen(), "parameters", r"names nothing: every parameter .*requires_grad=False \(0\.weight, .*name those"),
    ],
)
def test_wrt_that_names_nothing_is_refused(module: nn.Module, wrt: Any, message: str) -> None:
    with pytest.raises(cg.ArgumentTypeError, match=message):
        cg.export_gradient(module, (image(),), wrt=wrt)


def test_parameters_are_those_that_require_a_gradient_and_others_can_be_named() -> None:
    module = frozen()
    module[1].weight.requires_grad_()
    report = cg.export_gradient(module, (image(),), wrt="parameters")
    assert list(report.outputs) == ["value", "1.weight.grad"]
    report = cg.export_gradient(module, (image(),), wrt=["parameters", "0.bias"])
    assert list(report.outputs) == ["value", "1.weight.grad", "0.bias.grad"]


def test_a_name_without_influence_is_refused_with_advice_that_can_be_followed() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * 2 + torch.zeros_like(y)

    with pytest.raises(cg.ConstantGradientError, match=r"does not depend on y.*Leave the name out of wrt\.$"):
        cg.export_gradient(Half(), (image(), image()))
