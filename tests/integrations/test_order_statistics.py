"""Medians, k-th values, running extremes, searches and gathers: values, positions and gradients, NaN and ties too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import convgrad_export as cg
from convgrad_export.integrations.compile_backend import convgrad_ort

from .gradient_modules import Apply
from .onnx_check import compare_gradients

NAN, INF = float("nan"), float("inf")
MISSING = torch.tensor(
    [
        [0.3, NAN, -1.0, 2.0, 0.7],
        [NAN] * 5,
        [INF, 1.0, NAN, NAN, -2.0],
        [4.0, 3.0, 0.5, -0.5, 1.5],
        [1.0, 1.0, 2.0, 2.0, 0.0],
    ]
)
EDGES = torch.tensor([-1.0, 0.0, 0.5])


def _numbers(selected: tuple[Tensor, Tensor]) -> Tensor:
    """Values, NaN as zeros, and the positions."""
    return selected[0].nan_to_num(0.0, 0.0, 0.0) * (selected[1] + 1)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "median": lambda x: _numbers(x[:4].median(1)) + x[3:].median(1, keepdim=True)[0].sum(),
    "median-of-all": lambda x: x[3:].median() + x.median().nan_to_num(0.0),
    "nanmedian": lambda x: _numbers(x[:4].nanmedian(1)) + _numbers(x[3:].nanmedian(-1, keepdim=True)).sum(),
    "nanmedian-of-all": lambda x: x.nanmedian() + x[1].nanmedian().nan_to_num(0.0),
    "kthvalue": lambda x: _numbers(x[:4:3].kthvalue(2, 1)) + _numbers(x[3:].kthvalue(3, 1, keepdim=True)).sum(),
    "cummax": lambda x: _numbers(x.cummax(1)) * _numbers(x[3:].cummax(0)).sum(),
    "cummin": lambda x: _numbers(x.cummin(-1)) * _numbers(x[3:].cummin(0)).sum(),
    "searchsorted": lambda x: x[3:] * torch.searchsorted(EDGES.to(x.dtype), x[3:].detach(), right=True),
    "searchsorted-rows": lambda x: (
        x[3:] * torch.searchsorted(x[3:].detach().sort(1)[0], x[3:].detach(), out_int32=True)
    ),
    "take": lambda x: x[3:].take(torch.tensor([[0, 3], [-1, 3]])) * 2,
    "put": lambda x: x[3:].put(torch.tensor([1, 9, 1]), x[4, :3].sin(), accumulate=True) * x[3:],
    "masked_scatter": lambda x: x[3:].masked_scatter(x[3:] > 1, x[3:].sin()) * x[3:],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    compare_gradients(Apply(FUNCTIONS[name]), (MISSING.to(dtype),), tolerance=2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: _numbers(x.median(1)) * _numbers(x.kthvalue(2, 1)),
        lambda x: _numbers(x.cummax(1)) * _numbers(x.nanmedian(1, keepdim=True)),
        lambda x: x * torch.searchsorted(x.detach().sort(1)[0], x.detach().sin()),
    ],
)
@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_dynamic_batch(function: Callable[[Tensor], Tensor], size: int) -> None:
    x, fresh = torch.randn(3, 6), torch.randn(size, 6, generator=torch.Generator().manual_seed(size))
    compare_gradients(Apply(function), (x,), dynamic_shapes={"input": {0: "batch"}}, fresh=(fresh,))


INFINITE = torch.tensor([[NAN, NAN, INF], [NAN, INF, 1.0], [INF, NAN, -INF], [NAN, NAN, NAN]])


@pytest.mark.parametrize(
    "function", [lambda x: x.nanmedian(1), lambda x: x.kthvalue(1, 1), lambda x: x[:3].kthvalue(2, 1)]
)
def test_infinities_come_before_what_is_no_number(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    report = cg.export(Apply(lambda x: function(x)[0]), (torch.randn(4, 3),))
    found = cg.GradientSession(report.model).run({"input": INFINITE})["output"]
    torch.testing.assert_close(found, function(INFINITE)[0], equal_nan=True)


@pytest.mark.parametrize("function", [Tensor.median, Tensor.nanmedian])
def test_an_empty_tensor_has_no_median(function: Callable[[Tensor], Tensor]) -> None:
    report = cg.export_gradient(Apply(function), (torch.randn(3, 4),), dynamic_shapes={"input": {0: "batch"}})
    session = cg.GradientSession(report.model)
    for x in (torch.zeros(0, 4), MISSING[:, :4], MISSING[3:, :4], INFINITE.repeat(1, 2)[:, 1:5]):
        x = x.clone().requires_grad_()
        value = function(x)
        value.backward()
        found = session.run({"input": x.detach()})
        torch.testing.assert_close(found["value"], value.detach(), equal_nan=True)
        torch.testing.assert_close(found["input.grad"], x.grad)


def test_the_compile_backend_has_pytorchs_median_of_nan() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.median(1), backend=convgrad_ort)
    for ours, expected in zip(compiled(MISSING[:1]), MISSING[:1].median(1), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)
