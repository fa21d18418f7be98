"""Functions at arguments far from the example's, where torch.onnx's own translations overflow, cancel or round."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.integrations.compile_backend import convgrad_ort

from .gradient_modules import Apply

INF, NAN = math.inf, math.nan
TINY = [1e-9, -1e-9, 1e-5, 0.0, -0.3, 0.7, 20.0, INF]
WIDE = [-200.0, 0.0, 200.0, -INF, INF]
LARGE = [2**31 - 2, 2**53 + 1, -7, 50331650, 0]
NORMAL = [-8.0, -0.5, 0.0, 0.5, 1.0, 3.0, 5.0, 9.0]
CASES: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "log1p": (torch.log1p, [*TINY, -1.0]),
    "expm1": (torch.expm1, [*TINY, -30.0, -INF]),
    "logaddexp": (lambda x: torch.logaddexp(x, x.flip(0) * 0.5), WIDE),
    "logaddexp-equal": (lambda x: torch.logaddexp(x, x), WIDE),
    "logaddexp2": (lambda x: torch.logaddexp2(x, x.flip(0) * 0.5), WIDE),
    "logcumsumexp": (lambda x: torch.logcumsumexp(x, 0), [-200.0, -150.0, 0.0, 5.0, 200.0, 3.0]),
    "remainder": (lambda x: torch.remainder(x, 0.75) + torch.remainder(x, -3.0), [1e6, -1e6, 1e15, -50.5, 0.0]),
    "hypot": (lambda x: torch.hypot(x, x.flip(0)), [INF, 3.0, 0.0, 0.0, 4.0, -INF]),
    "fmax": (
        lambda x: torch.fmax(x, x.flip(0)) - torch.fmin(x * 2, x.flip(0)),
        [NAN, 3.0, 0.0, NAN, 4.0, -1.0, NAN, 2.0],
    ),
    "fmax-gradient": (
        lambda x: torch.func.grad(lambda v: (torch.fmax(v, 1 - v) + 2 * torch.fmin(v, v.flip(0))).nansum())(x),
        [0.5, 3.0, 0.0, 2.0, 4.0, -1.0],
    ),
    "asinh": (torch.asinh, [1e-9, -2.0, 1e9, -1e30, INF, -INF]),
    "acosh": (lambda x: torch.acosh(x + 1), [0.0, 1.0, 1e9, 1e30, INF]),
    "erfc": (torch.erfc, [*NORMAL, INF, -INF]),
    "erfcx": (torch.special.erfcx, [*NORMAL, 1e10, INF]),
    "log_ndtr": (torch.special.log_ndtr, [*NORMAL, -1e4, INF, -INF]),
    "logcumsumexp-gradient": (
        lambda x: torch.func.grad(lambda v: torch.logcumsumexp(v, 0).sum())(x),
        [-200.0, -150.0, 0.0, 5.0, 200.0, 3.0],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_values_far_from_the_examples(name: str, dtype: torch.dtype) -> None:
    function, values = CASES[name]
    x = torch.tensor(values, dtype=dtype)
    report = cg.export(Apply(function), (torch.linspace(0.1, 0.9, len(values), dtype=dtype),))
    (actual,) = cg.GradientSession(report.model).run({"input": x}).values()
    tolerance = 4e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(actual, function(x.double()).to(dtype), rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_erfc_of_other_types(dtype: torch.dtype) -> None:
    x = torch.tensor([-2, 0, 1, 2], dtype=dtype)
    report = cg.export(Apply(torch.erfc), (x,))
    (actual,) = cg.GradientSession(report.model).run({"input": x}).values()
    torch.testing.assert_close(actual, torch.erfc(x))


@pytest.mark.parametrize("correction", [0, 1, 2, 5, 0.5])
@pytest.mark.parametrize("dim", [None, 1, (0, 2)])
def test_a_variance_of_too_few_elements(dim: Any, correction: float) -> None:
    """Not a number where they are equal, infinite where not; one element is equal to itself."""

    def spread(x: Tensor) -> tuple[Tensor, ...]:
        return (*torch.var_mean(x, dim, correction=correction), torch.std(x, dim, correction=correction, keepdim=True))

    for x in (torch.randn(2, 1, 2), torch.randn(1, 1, 1, dtype=torch.float64), torch.ones(2, 1, 1)):
        torch._dynamo.reset()
        actual = torch.compile(spread, backend=convgrad_ort)(x)
        torch.testing.assert_close(actual, spread(x), equal_nan=True)


@pytest.mark.parametrize("rounding", ["floor", "trunc"])
def test_integers_that_float32_does_not_hold_are_divided_as_integers(rounding: str) -> None:
    def divided(x: Tensor) -> Tensor:
        by_number = torch.div(x, 128, rounding_mode=rounding)
        return torch.stack([by_number, torch.div(x, torch.full_like(x, -3), rounding_mode=rounding)])

    report = cg.export(Apply(divided), (torch.arange(len(LARGE)),))
    x = torch.tensor(LARGE)
    (actual,) = cg.GradientSession(report.model).run({"input": x}).values()
    assert torch.equal(actual, divided(x))


@pytest.mark.parametrize("include_self", [True, False])
def test_a_scattered_mean_and_its_gradient(include_self: bool) -> None:
    index = torch.tensor([0, 2, 2, 2, 0])

    def mean(x: Tensor) -> Tensor:
        return x.scatter_reduce(0, index, x[:5].sin(), "mean", include_self=include_self)

    assert cg.export(Apply(mean), (torch.randn(6),)).verified
    assert cg.export_gradient(Apply(mean), (torch.randn(6),), of=lambda y: y.square().sum()).verified
    module = Apply(lambda x: x.scatter_reduce(0, index, x * 3, "mean", include_self=include_self))
    assert cg.export(module, (torch.arange(6) - 2,)).verified


@pytest.mark.parametrize("reduce", ["sum", "prod", "amax", "add", "set"])
def test_a_scatter_reads_the_part_of_its_source_that_the_index_names(reduce: str) -> None:
    index = torch.tensor([[0, 2, 1], [1, 0, 2]])

    def scattered(x: Tensor) -> Tensor:
        if reduce == "set":
            return x.scatter(1, index, x.sin())
        if reduce == "add":
            return x.scatter_add(1, index, x.sin())
        return x.scatter_reduce(1, index, x.sin(), reduce)

    assert cg.export(Apply(scattered), (torch.randn(4, 5),)).verified  # PyTorch itself has no gradient of this


def test_a_matrix_that_is_transposed_times_a_vector_plus_another() -> None:
    function = lambda x: torch.addmv(x.sum(0), x.t(), x[:, 0], beta=0.5, alpha=2)  # noqa: E731
    assert cg.export_gradient(Apply(function), (torch.randn(3, 5),), return_outputs=True).verified


def test_the_compile_backend_is_right_there_too() -> None:
    def function(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        mean = x.scatter_reduce(0, index, x, "mean")
        return (
            torch.logaddexp(x, x + 1),
            torch.log1p(x * 1e-9),
            mean,
            torch.div(index + 2**31, 3, rounding_mode="floor"),
        )

    x, index = torch.tensor([-200.0, 1.0, 200.0]), torch.tensor([0, 0, 2])
    torch.testing.assert_close(torch.compile(function, backend="convgrad_ort")(x, index), function(x, index))


NO_AXIS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: x.sum().max(0)[0] * x,
    "median": lambda x: x.sum().median(0)[0] * x.median(),
    "scatter": lambda x: x.sum().scatter(0, torch.tensor(0), x.mean()) * x,
    "scatter-number": lambda x: x.sum().scatter(0, torch.tensor(0), 2.0) * x,
    "scatter-add": lambda x: x.sum().scatter_add(0, torch.tensor(0), x.mean()) * x,
    "copysign": lambda x: torch.copysign(x, x.sin() - 0.2) + torch.copysign(x, -1.0),
}


@pytest.mark.parametrize("name", NO_AXIS)
def test_numbers_without_an_axis(name: str) -> None:
    of = lambda output: output.square().sum()  # noqa: E731
    assert cg.export_gradient(Apply(NO_AXIS[name]), (torch.randn(5),), of=of, return_outputs=True).verified


def test_the_sign_of_zero_is_copied() -> None:
    x = torch.tensor([1.0, -2.0, 3.0, 0.0])
    report = cg.export(Apply(lambda x: torch.copysign(torch.ones_like(x), x)), (x,))
    (actual,) = cg.GradientSession(report.model).run({"input": torch.tensor([0.0, -0.0, INF, -INF])}).values()
    assert actual.tolist() == [1.0, -1.0, 1.0, -1.0]


def test_sums_of_integers_in_a_type_of_their_own() -> None:
    def sums(x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(torch.int16)
        return x.sum(dtype=torch.int32), x.sum(0, dtype=torch.int32), x.cumsum(0, dtype=torch.int32), x.sum()

    x = torch.tensor([[1, 2], [30000, 30000]])
    report = cg.export(Apply(sums), (x,))
    for actual, expected in zip(cg.GradientSession(report.model).run(None, {"input": x}), sums(x), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_the_compile_backend_leaves_results_of_another_type_to_pytorch() -> None:
    """torch.any of uint8 is uint8, where ONNX has a boolean."""
    x = torch.tensor([0, 3], dtype=torch.uint8)
    found = torch.compile(lambda x: x.any(), backend=convgrad_ort)(x)
    assert found.dtype == torch.uint8
    assert found == 1


@pytest.mark.parametrize("number", [2, 1, 0, -1, 0.5, True])
def test_booleans_are_compared_with_numbers_as_integers(number: float) -> None:
    def compared(x: Tensor) -> Tensor:
        return torch.stack([x == number, x != number, x < number, x <= number, x > number, x >= number])

    x = torch.tensor([True, False])
    torch._dynamo.reset()
    assert torch.equal(torch.compile(compared, backend=convgrad_ort)(x), compared(x))


@pytest.mark.parametrize(
    "pooled",
    [
        lambda x: functional.avg_pool1d(x[0], 2),
        lambda x: functional.avg_pool2d(x, (3, 2), 2, (1, 0), divisor_override=4),
        lambda x: functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        lambda x: functional.avg_pool2d(x, 2, 3, 1, ceil_mode=True),
        lambda x: functional.avg_pool3d(x, 2),
    ],
)
def test_integers_are_averaged_as_integers(pooled: Callable[[Tensor], Tensor]) -> None:
    """Rounded towards zero, and not as float32."""
    x = torch.randint(-50, 50, (2, 3, 6, 7), generator=torch.Generator().manual_seed(0))
    module = Apply(lambda factor: pooled(x) * factor)
    report = cg.export(module, (torch.ones(1, dtype=torch.int64),))
    found = cg.GradientSession(report.model).run({"input": torch.tensor([3])})["output"]
    assert found.dtype == torch.int64
    assert torch.equal(found, pooled(x) * 3)
    torch._dynamo.reset()
    compiled = torch.compile(pooled, backend=convgrad_ort)(x)
    assert compiled.dtype == torch.int64
    assert torch.equal(compiled, pooled(x))
