"""Gradients over dynamic sizes, verified at the example's and at further ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg

from .gradient_modules import Apply


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def squares(output: Tensor) -> Tensor:
    return output.square().sum()


def exported(module: nn.Module, x: Tensor, dimensions: dict[int, str], **options: Any) -> cg.ExportReport:
    report = cg.export_gradient(
        module, (x,), of=squares, wrt=["inputs", "parameters"], dynamic_shapes={"input": dimensions}, **options
    )
    assert report.verified
    return report


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_over_a_dynamic_batch(training: bool) -> None:
    exported(nn.InstanceNorm2d(4, affine=True).train(training), image(2, 4, 9, 8), {0: "n"})


STATISTICS: dict[str, tuple[Callable[[Tensor], Tensor], dict[int, str]]] = {
    "std-height": (lambda x: x.std((2, 3)), {2: "h"}),
    "std-biased": (lambda x: x.std((2, 3), correction=0), {2: "h", 3: "w"}),
    "var-batch": (lambda x: x.var(0), {0: "n"}),
    "var-all": (lambda x: x.var(), {0: "n", 2: "h"}),
    "minibatch-std": (lambda x: x * x.std(0).mean(), {0: "n"}),
    "masked-by-size": (lambda x: x[:, :, :2] * (torch.arange(9) < x.shape[2]).sum() + 2 * torch.arange(6), {2: "h"}),
    "sizes-in-integers": (lambda x: x[:, :, 0] * (torch.arange(6) * x.shape[2]) + x.shape[2] / 3, {2: "h"}),
    "scaled-by-size": (lambda x: x * (1 / x.shape[2]) + x.shape[2] / 3, {2: "h"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_over_a_dynamic_axis(name: str, dtype: torch.dtype) -> None:
    function, dimensions = STATISTICS[name]
    exported(Apply(function), image(4, 3, 6, 6, dtype=dtype), dimensions)


SPLITS: dict[str, tuple[Callable[[Tensor], Tensor], dict[int, str]]] = {
    "halves-of-a-batch": (lambda x: (lambda a, b: a.sum() * b)(*x.chunk(2)), {0: "n"}),  # classifier-free guidance
    "thirds-of-a-height": (lambda x: x.chunk(3, 2)[1].exp() + 1, {2: "h"}),
    "by-sizes": (lambda x: x.split([2, x.shape[2] - 2], 2)[1].exp(), {2: "h"}),
    "unsafe": (lambda x: torch.unsafe_chunk(x, 2, -1)[1], {3: "w"}),
}


@pytest.mark.parametrize("opset", [16, 18])
@pytest.mark.parametrize("name", SPLITS)
def test_parts_of_a_dynamic_size(name: str, opset: int) -> None:
    function, dimensions = SPLITS[name]
    report = exported(Apply(function), image(4, 3, 9, 6), dimensions, opset_version=opset)
    assert not [operator for operator in report.operators if "Sequence" in operator]


class Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (3, 4)])
def test_a_cotangent_has_the_examples_sizes_at_one_and_none(shape: tuple[int, int]) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    report = cg.export_gradient(module, (torch.randn(shape),), of="vjp", dynamic_shapes={"input": {0: "batch"}})
    assert report.verified
    assert report.inputs["cotangent"] == ["batch", 3]


@pytest.mark.parametrize("names", [("a", "b"), (torch.export.Dim.AUTO, torch.export.Dim.AUTO)], ids=["names", "auto"])
def test_two_names_of_one_size_are_verified_at_another(names: tuple[Any, Any]) -> None:
    shapes = ({0: names[0]}, {0: names[1]})
    report = cg.export(Product(), (torch.randn(3, 2), torch.randn(3, 2)), dynamic_shapes=shapes)
    assert [set(sizes.values()) for sizes in report.verified_sizes] == [{3}, {4}]


@pytest.mark.parametrize("sizes", [(4, 1), (1, 4), (1, 2), (3, 2)])
def test_one_name_is_one_size_in_the_examples(sizes: tuple[int, int]) -> None:
    x, y = (torch.randn(size, 2) for size in sizes)
    with pytest.raises(cg.DynamicShapeError, match=f"'n' is {sizes[1]} in 'y' and {sizes[0]} in 'x'"):
        cg.export(Product(), (x, y), dynamic_shapes=({0: "n"}, {0: "n"}))
