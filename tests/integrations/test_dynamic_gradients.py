"""Gradients over dynamic sizes, verified at the example's and at further ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

import convgrad_export as cg

from .gradient_modules import Apply
from .onnx_check import compare_gradients


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


@pytest.mark.parametrize("groups", [1, 2])
def test_group_norm_in_float64_over_dynamic_sizes(groups: int) -> None:
    """Its variance is divided by a number made of the sizes, which the translation had in float32."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(groups, 4), nn.Tanh()).double()
    exported(net, image(2, 3, 9, 8, dtype=torch.float64), {0: "n", 2: "h"})


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "stride": 1, "ceil_mode": True}])
def test_max_pooling_of_a_dynamic_length(options: dict[str, Any]) -> None:
    """PyTorch's kernel for rows makes a number of the length; so does torch.export."""
    net = nn.Sequential(nn.Conv1d(3, 4, 2), nn.MaxPool1d(3, **options), nn.Conv1d(4, 2, 2))
    exported(net, torch.randn(2, 3, 17), {0: "n", 2: "length"})


SPATIAL_TRANSFORMERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sampled": lambda x: functional.grid_sample(x, _grid(x, False), align_corners=False),
    "corners": lambda x: functional.grid_sample(x, _grid(x, True), align_corners=True),
    "volume": lambda x: functional.affine_grid(
        x.flatten(1)[:, :12].reshape(-1, 3, 4), [x.shape[0], 1, 2, *x.shape[2:]], align_corners=False
    ),
}


def _grid(x: Tensor, align_corners: bool) -> Tensor:
    return functional.affine_grid(x.flatten(1)[:, :6].reshape(-1, 2, 3), list(x.shape), align_corners=align_corners)


@pytest.mark.parametrize("name", SPATIAL_TRANSFORMERS)
def test_affine_grids_of_dynamic_sizes(name: str) -> None:
    exported(Apply(SPATIAL_TRANSFORMERS[name]), image(2, 3, 5, 6), {0: "n", 2: "h", 3: "w"})


def test_a_grid_that_pytorch_refuses_is_refused_in_its_words() -> None:
    module = Apply(lambda x: functional.affine_grid(x, [2, 3, 4, 4], align_corners=False))
    with pytest.raises(cg.CaptureError, match="Expected a batch of 2D affine matrices"):
        cg.export(module, (torch.randn(2, 3, 3),))


class Penalty(nn.Module):
    """The squared norm of a network's input gradient."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Tanh(), nn.Conv2d(4, 2, 3))

    def forward(self, input: Tensor) -> Tensor:
        with torch.enable_grad():
            x = input.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).square().sum(), x, create_graph=True)[0].square().sum()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch-untracked": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    "batch-eval": lambda: nn.BatchNorm2d(4).eval(),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance-tracked": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "instance-eval": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
    "group": lambda: nn.GroupNorm(2, 4),
    "half": lambda: nn.BatchNorm2d(4).half(),
}


@pytest.mark.parametrize("name", NORMS)
def test_second_derivatives_of_norms_over_a_dynamic_batch(name: str) -> None:
    norm = NORMS[name]()
    for tensor in (*norm.parameters(), *norm.buffers()):
        torch.nn.init.uniform_(tensor.data, 0.5, 1.5) if tensor.is_floating_point() else None
    module = Penalty(norm).train(norm.training)
    x = image(2, 3, 9, 8)
    if name == "half":
        module, x = module.half(), x.half()
    exported(module, x, {0: "n"})


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, (2, 3), stride=2, groups=2, dilation=(2, 1)),
    "same": lambda: nn.Conv2d(4, 3, (3, 2), padding="same", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_hessian_vector_products_of_convolutions_at_any_size(name: str) -> None:
    """PyTorch's second derivative with respect to a weight made numbers of all sizes."""
    torch.manual_seed(0)
    module = nn.Sequential(CONVOLUTIONS[name](), nn.Tanh())
    report = cg.export_gradient(
        module,
        (image(2, 4, 7, 6),),
        wrt=["inputs", "parameters"],
        hessian_vector=True,
        dynamic_shapes={"input": {0: "n", 2: "h"}},
    )
    assert [(size["n"], size["h"]) for size in report.verified_sizes] == [(2, 7), (3, 7), (2, 8)]


def test_a_strided_gradient_penalty_takes_heights_with_another_remainder() -> None:
    """PyTorch's second derivative held for heights with the example's remainder only."""
    penalty = Penalty(nn.Conv2d(4, 4, 2, stride=2))
    report = cg.export_gradient(penalty, (image(2, 3, 9, 8),), wrt="parameters", dynamic_shapes={"input": {2: "h"}})
    assert [size["h"] for size in report.verified_sizes] == [9, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_penalty_takes_any_batch(dtype: torch.dtype) -> None:
    """PyTorch's second derivative took a cotangent for a weight with the batch as its channels."""
    penalty = Penalty(nn.Conv2d(4, 4, 2, stride=2)).to(dtype)
    x = image(2, 3, 9, 8).to(dtype)
    report = cg.export_gradient(penalty, (x,), wrt="parameters", dynamic_shapes={"input": {0: "n"}})
    assert [size["n"] for size in report.verified_sizes] == [2, 3]


def test_norms_stay_fused_where_nothing_needs_their_second_derivative() -> None:
    report = exported(nn.BatchNorm2d(4), image(2, 4, 9, 8), {0: "n"})
    assert report.operators["BatchNormalization"] == 2


def test_a_size_that_the_forward_fixes_is_refused_beside_a_norm_too() -> None:
    class Fixed(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * int(input.shape[0])

    with pytest.raises(cg.DynamicShapeError, match="only works for size 4"):
        cg.export(Fixed(3), (torch.randn(4, 3),), dynamic_shapes={"input": {0: "n"}})


class Tangent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(), Apply(lambda x: x * int(x.shape[0])))

    def forward(self, input: Tensor) -> Tensor:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(self.net(forward_ad.make_dual(input, input.cos()))).tangent
            assert tangent is not None
            return tangent


@pytest.mark.parametrize(
    ("module", "place"),
    [
        (
            Tangent(),
            r"at .*test_dynamic_gradients.py:\d+, in .*in module 'net\.1', in a forward-mode derivative",
        ),
        (nn.Sequential(nn.ReLU(), Apply(lambda x: x * int(x.shape[0]))), r"at .*gradients.py:\d+, in .*in module '1'"),
    ],
)
def test_what_fixes_a_size_is_named(module: nn.Module, place: str) -> None:
    with pytest.raises(cg.DynamicShapeError, match=rf"size 2: it is fixed {place}.*Declare it static"):
        cg.export_gradient(module, (image(2, 3, 6, 6),), dynamic_shapes=({0: "n"},))


def test_a_length_is_named_with_what_to_write_instead() -> None:
    module = nn.Sequential(nn.ReLU(), Apply(lambda x: x.sum() / len(x)))
    args, place = (image(2, 3, 6, 6),), r"at .*gradients.py:\d+, in .*in module '1'"
    with pytest.raises(cg.DynamicShapeError, match=rf"{place}: len\(\) of a tensor .*Write x\.shape\[0\]"):
        cg.export(module, args, dynamic_shapes=({0: "n"},))
    assert cg.export(module, args, dynamic_shapes=({2: "h"},)).verified


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "generalized-mean": lambda x: functional.avg_pool2d(x.clamp(min=1e-6).pow(3), (x.size(-2), x.size(-1))).pow(1 / 3),
    "average-with-stride": lambda x: functional.avg_pool2d(x, x.shape[2:], stride=x.shape[2:]),
    "average-divisor": lambda x: functional.avg_pool2d(x, x.shape[2:], divisor_override=7),
    "largest": lambda x: functional.max_pool2d(x, x.shape[2:]),
    "largest-and-where": lambda x: sum(functional.max_pool2d(x, x.shape[2:], return_indices=True)),
    "one-axis": lambda x: functional.avg_pool1d(x[:, 0], x.shape[3:]) + functional.max_pool1d(x[:, 0], x.size(3)),
    "volume": lambda x: (
        functional.avg_pool3d(x, (x.shape[1], *x.shape[2:])) + functional.max_pool3d(x, (x.shape[1], *x.shape[2:]))
    ),
    "windows": lambda x: functional.avg_pool2d(x, 2) + functional.max_pool2d(x, (2, 2)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_pooling_over_whole_dynamic_sizes(name: str) -> None:
    fresh = (image(2, 3, 7, 5).exp(),)
    compare_gradients(Apply(WHOLE[name]), (image(2, 3, 6, 9).exp(),), dynamic_shapes=({2: "h", 3: "w"},), fresh=fresh)


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


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_rules_for_one_sample_are_for_a_batch_that_is_fixed(dynamic: bool) -> None:
    module = nn.Sequential(nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 16, 1))
    shapes = {"input": {0: "n"}} if dynamic else None
    one, four = (
        cg.export_gradient(module, (image(n, 48, 7, 7),), wrt="parameters", dynamic_shapes=shapes, verify=False)
        for n in (1, 4)
    )
    assert ([c.lowering for c in one.lowerings] == [c.lowering for c in four.lowerings]) == dynamic


class Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


@pytest.mark.parametrize(
    "net",
    [
        torch.nn.Sequential(torch.nn.Conv1d(3, 3, 5, stride=2)),
        torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2), torch.nn.AvgPool1d(2), torch.nn.Conv1d(4, 3, 2)),
    ],
    ids=["stride", "pooling"],
)
def test_a_cotangent_follows_the_input_behind_a_stride(net: torch.nn.Module) -> None:
    """At half the size the output has one position, and broadcast against the example's cotangent: it was refused."""
    shapes = {"input": {0: "batch", 2: "length"}}
    report = cg.export_gradient(net, (torch.randn(2, 3, 12),), wrt="parameters", of="vjp", dynamic_shapes=shapes)
    assert report.verified
    assert not report.notes


def test_a_cotangent_of_one_position_that_follows_from_a_dynamic_size_is_refused() -> None:
    with pytest.raises(cg.DynamicShapeError, match=r"axis 3 of the example's output has one position.*larger example"):
        cg.export_gradient(nn.Conv2d(2, 3, 3), (torch.randn(2, 2, 9, 3),), of="vjp", dynamic_shapes={"input": {3: "w"}})


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


def _first_tripled(x: Tensor) -> Tensor:
    y = x.clone()
    y[:1] = y[:1] * 3
    return y


OF_FEW_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x.prod(0),
    "product-kept": lambda x: torch.prod(x, -2, keepdim=True) * x,
    "product-of-all": lambda x: x.prod() + x.sum(dtype=torch.float64).to(x.dtype),
    "first": lambda x: x[:1],
    "last": lambda x: x[-1:] * x,
    "first-summed": lambda x: x[:1].sum(0),
    "assigned": _first_tripled,
    "rolled": lambda x: x.roll(1, 0) * x,
    "rolled-both": lambda x: x.roll((-2, 7), (0, 1)) * x,
    "rolled-flat": lambda x: x.roll(-3) * x,
}


@pytest.mark.parametrize("name", OF_FEW_ROWS)
def test_rows_that_an_empty_batch_lacks(name: str) -> None:
    """A trace takes the first row of an open number of them as one; derivatives of PyTorch's do, and a remainder."""
    module = Apply(OF_FEW_ROWS[name])
    report = cg.export_gradient(module, (torch.randn(4, 6),), of=squares, dynamic_shapes={"input": {0: "batch"}})
    session = cg.GradientSession(report.model)
    for batch in (0, 1, 2, 5):
        x = torch.randn(batch, 6, requires_grad=True)
        value = squares(module(x))
        value.backward()
        found = session.run({"input": x.detach()})
        torch.testing.assert_close(found["value"], value.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["input.grad"], x.grad, rtol=1e-4, atol=1e-4)
