"""Every promised output exists under its name, whatever turns out to be one value."""

from __future__ import annotations

from collections.abc import Callable

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg

from .gradient_modules import image


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y).square()


class Features(nn.Module):
    """One tensor under two names, a weight, and one computation written twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        return {"features": y, "last": y, "weight": self.conv.weight, "again": x.relu(), "relu": torch.relu(x)}


def _sum_gradients(verify: bool) -> tuple[cg.ExportReport, list[str]]:
    report = cg.export_gradient(Sum(), (image(), image() * 2), wrt="inputs", verify=verify)
    return report, ["value", "x.grad", "y.grad"]


def _features(verify: bool) -> tuple[cg.ExportReport, list[str]]:
    report = cg.export(Features(), (image(),), verify=verify)
    return report, ["features", "last", "weight", "again", "relu"]


def _activation_and_output(verify: bool) -> tuple[cg.ExportReport, list[str]]:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Identity())
    report = cg.export_gradient(module, (image(),), wrt=["1", "2"], return_outputs=True, verify=verify)
    return report, ["value", "output", "1", "2", "1.grad", "2.grad"]


def _constant_gradients(verify: bool) -> tuple[cg.ExportReport, list[str]]:
    class Doubles(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * 2 + y * 2

    return cg.export_gradient(Doubles(), (image(), image()), verify=verify), ["value", "x.grad", "y.grad"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("case", [_sum_gradients, _features, _activation_and_output, _constant_gradients])
def test_outputs_of_one_value_keep_their_names(
    case: Callable[[bool], tuple[cg.ExportReport, list[str]]], verify: bool
) -> None:
    report, names = case(verify)
    assert list(report.outputs) == names
    assert not verify or list(report.errors) == names
    session = onnxruntime.InferenceSession(report.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == names


class Named(nn.Module):
    """Returns a dict with the keys that the test wants, of values that differ."""

    def __init__(self, *keys: str) -> None:
        super().__init__()
        self.conv, self.keys = nn.Conv2d(3, 3, 1), keys

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        return {key: y * (index + 1) for index, key in enumerate(self.keys)}


def test_an_output_with_the_name_of_an_input_is_told_apart() -> None:
    report = cg.export(Named("x", "y", "conv.weight"), (image(),))
    assert list(report.outputs) == list(report.errors) == ["output.x", "y", "output.conv.weight"]


def test_arguments_may_be_called_as_an_operator_whose_result_is_folded() -> None:
    """Upsampling multiplies by a constant, transposed: the result of PyTorch's operator "t" was a second "t"."""

    class Denoiser(nn.Module):
        def forward(self, x: Tensor, t: Tensor, t_inner: Tensor) -> Tensor:
            return nn.functional.interpolate(x, (7, 9), mode="bilinear") * t * t_inner

    report = cg.export_gradient(Denoiser(), (torch.randn(2, 3, 4, 5), torch.randn(2, 1, 1, 1), torch.randn(1)))
    assert report.verified
    assert list(report.inputs) == ["x", "t", "t_inner"]


def test_an_output_with_the_name_of_the_value_an_activation_or_a_gradient_is_told_apart() -> None:
    report = cg.export_gradient(
        Named("value", "conv", "x.grad", "x"),
        (image(),),
        wrt=["x", "conv"],
        of=lambda out: out["conv"].sum(),
        return_outputs=True,
    )
    names = ["value", "output.value", "output.conv", "output.x.grad", "output.x", "conv", "x.grad", "conv.grad"]
    assert list(report.outputs) == list(report.errors) == names


def test_the_value_is_told_apart_from_an_activation_of_that_name() -> None:
    module = nn.ModuleDict({"value": nn.Conv2d(3, 3, 1)})
    module.forward = lambda x: module["value"](x).square()  # type: ignore[assignment]
    report = cg.export_gradient(module, (image(),), wrt=["value"])
    assert list(report.outputs) == list(report.errors) == ["scalar_value", "value", "value.grad"]


def _renamed(**names: list[str]) -> cg.ExportReport:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    report = cg.export(module, (image(),), **names)
    session = cg.GradientSession(report.model)
    (actual,) = session.run({session.input_names[0]: image()}).values()
    torch.testing.assert_close(actual, module(image()).detach(), rtol=1e-4, atol=1e-5)
    return report


def test_a_new_name_that_a_value_inside_has_goes_to_the_input_or_output() -> None:
    inside = [value.name for node in _renamed().model.graph for value in node.outputs][:2]
    report = _renamed(input_names=[inside[0]], output_names=[inside[1]])
    assert (list(report.inputs), list(report.outputs)) == ([inside[0]], [inside[1]])
    assert (list(report.errors), len(list(report.model.graph))) == ([inside[1]], 3)
    swapped = _renamed(input_names=["output"], output_names=["input"])
    assert (list(swapped.inputs), list(swapped.outputs)) == (["output"], ["input"])


@pytest.mark.parametrize(
    "names",
    [
        {"input_names": ["0.weight"]},
        {"output_names": ["2.bias"]},
        {"output_names": ["input"]},
        {"input_names": ["output"]},
        {"input_names": ["same"], "output_names": ["same"]},
        {"input_names": [""]},
        {"input_names": [3]},
        {"output_names": "y"},
    ],
    ids=str,
)
def test_new_names_that_something_else_has_are_refused(names: dict[str, list[str]]) -> None:
    with pytest.raises(cg.ArgumentTypeError, match=next(iter(names))):
        _renamed(**names)
