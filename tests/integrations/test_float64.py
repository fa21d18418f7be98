"""float64 models stay in float64: numbers in the forward, and operators that onnxruntime has in float32 only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg

from .gradient_modules import Apply
from .onnx_check import compare_gradients


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "rpow": lambda x: 0.9**x,
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.1) * x,
    "hardtanh": lambda x: functional.hardtanh(x, -0.1, 0.3),
    "add-alpha": lambda x: torch.add(x, x * x, alpha=0.1),
    "sub-alpha": lambda x: torch.sub(x, x * x, alpha=0.1),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.1),
    "addcdiv": lambda x: torch.addcdiv(x, x, x + 9, value=0.1),
    "lerp": lambda x: torch.lerp(x, x * x, 0.1),
    "fill": lambda x: torch.empty_like(x).fill_(0.1) * x,
    "full": lambda x: torch.full((5,), 0.1, dtype=x.dtype) * x,
    "new_full": lambda x: x.new_full((5,), 0.1) * x,
    "arange-step": lambda x: x * torch.arange(0, 0.5, 0.1, dtype=x.dtype),
    "arange-start": lambda x: x * torch.arange(0.3, 5, dtype=x.dtype),
    "arange-down": lambda x: x * torch.arange(1, 0.5, -0.1, dtype=x.dtype),
    "linspace": lambda x: x * torch.linspace(0, 0.7, 5, dtype=x.dtype),
    "norm": lambda x: x.norm(p=3, dim=1),
    "deg2rad": torch.deg2rad,
    "sinc": torch.sinc,
    "hardsigmoid": functional.hardsigmoid,
    "addmm": lambda x: torch.addmm(x[0], x[0, :, :3], x[0], beta=0.1, alpha=0.3),
    "addmv": lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 0], beta=0.1, alpha=0.3),
    "addbmm": lambda x: torch.addbmm(x[0, :, :3], x, x.transpose(1, 2), beta=0.1, alpha=0.3),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :3], x, x.transpose(1, 2), beta=0.1, alpha=0.3),
    "prelu": lambda x: functional.prelu(x, x.new_full((1,), 0.1)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_stay_in_float64(name: str) -> None:
    compare_gradients(Apply(NUMBERS[name]), (data(2, 3, 5),), tolerance=1e-13)


COMPUTED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "quotient": lambda x, v: x / v,
    "arithmetic": lambda x, v: x * -v + (1 + v) ** 2,
    "root": lambda x, v: x / v**0.5,
    "clamp": lambda x, v: x.clamp(-0.1, v) + x.clamp(min=-v) + torch.clamp_max(x, v),
    "full": lambda x, v: x.new_full((5,), v) * torch.full_like(x, v) * x,
    "masked_fill": lambda x, v: x.masked_fill(x > v, v) * x,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_values_of_tensors_stay_in_float64(name: str) -> None:
    """`item()`, as of a loss that the forward divides by, went through float32."""
    module = Apply(lambda x: COMPUTED[name](x, x.square().mean().item()))
    compare_gradients(module, (data(2, 3, 5),), tolerance=1e-13)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_numbers_beyond_float32() -> None:
    compare_gradients(Apply(lambda x: x.masked_fill(x > 1, torch.finfo(x.dtype).min).softmax(1)), (data(4, 5),))
    compare_gradients(Apply(lambda x: x.clamp(-1e300, 0.1) * torch.full_like(x, 1e200) * 1e-200), (data(4, 5),))


FUNCTIONS = ("erf", "erfc", "atan", "asin", "acos", "tan", "sinh", "cosh", "asinh", "atanh", "log2", "log10")
POINTS = torch.tensor([1e-3, 0.1, 0.5, 0.7, 0.95], dtype=torch.float64)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions(name: str) -> None:
    x = POINTS.clone() if name.startswith("log") else torch.cat([POINTS, -POINTS])
    compare_gradients(Apply(getattr(torch, name)), (x,), tolerance=1e-14)


@pytest.mark.parametrize("name", ["erf", "erfc", "atan", "sinh", "cosh", "asinh"])
def test_elementary_functions_far_from_zero(name: str) -> None:
    x = torch.tensor([1.0, 1.5, 3, 5.5, 20, 1e3 if name == "atan" else 30, -1, -2.5, -5.5, -20], dtype=torch.float64)
    model = cg.export(Apply(getattr(torch, name)), (x,)).model
    (actual,) = cg.GradientSession(model).run({"input": x}).values()
    torch.testing.assert_close(torch.as_tensor(actual), getattr(torch, name)(x), rtol=1e-13, atol=1e-17)


def test_acosh() -> None:
    compare_gradients(Apply(torch.acosh), (POINTS + 1.01,), tolerance=1e-13)


def test_atan2_in_every_quadrant() -> None:
    angles = torch.linspace(-3.1, 3.1, 41, dtype=torch.float64)
    compare_gradients(Apply(lambda x: torch.atan2(x.sin(), x.cos())), (angles,), tolerance=1e-14)
    axes = torch.tensor([[0.0, 1, 0, -1, 0], [1.0, 0, -1, 0, 0]], dtype=torch.float64)
    module = Apply(lambda x: torch.atan2(x[0], x[1]))
    (actual,) = cg.GradientSession(cg.export(module, (axes,), verify=False).model).run({"input": axes}).values()
    torch.testing.assert_close(torch.as_tensor(actual), module(axes), rtol=1e-15, atol=1e-15)


def test_float32_models_do_not_change() -> None:
    proto = compare_gradients(Apply(lambda x: torch.add(x, x * x, alpha=0.1)), (data(2, 3).float(),))
    assert {item.data_type for item in proto.graph.initializer} <= {1, 7}


def test_tensors_made_of_numbers_alone_stay_in_the_default_type() -> None:
    x = data(3, 4)
    for forward in (lambda x: x * torch.where(x > 0, 0.3, 0.1), lambda x: x * (torch.arange(4) * 0.3)):
        module = Apply(forward)
        report = cg.export(module, (x,))
        (actual,) = cg.GradientSession(report.model).run({"input": x}).values()
        torch.testing.assert_close(torch.as_tensor(actual), module(x), rtol=1e-15, atol=0)


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "plain": ((2, 4, 9, 8), lambda: nn.Conv2d(4, 6, 3, padding=1)),
    "strided": ((2, 4, 9, 8), lambda: nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 0), groups=2)),
    "dilated": ((2, 4, 9, 8), lambda: nn.Conv2d(4, 6, 3, 2, 2, 2, bias=False)),
    "depthwise": ((2, 4, 9, 8), lambda: nn.Conv2d(4, 8, 3, groups=4)),
    "pointwise": ((2, 4, 9, 8), lambda: nn.Conv2d(4, 3, 1, 3)),
    "signal": ((2, 4, 17), lambda: nn.Conv1d(4, 3, 5, 2, 2)),
    "volume": ((2, 3, 5, 6, 4), lambda: nn.Conv3d(3, 2, (3, 2, 1), 2, 1)),
    "transposed": ((2, 4, 5, 6), lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2)),
    "transposed-even": ((2, 4, 5, 6), lambda: nn.ConvTranspose2d(4, 6, 2, 2, bias=False)),
    "transposed-far": ((2, 4, 5, 6), lambda: nn.ConvTranspose2d(4, 6, 3, 1, 0, 2, dilation=3)),
    "transposed-signal": ((2, 4, 7), lambda: nn.ConvTranspose1d(4, 3, 4, 3, 2, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_over_dynamic_sizes(name: str) -> None:
    shape, make = CONVOLUTIONS[name]
    torch.manual_seed(0)
    dimensions = {0: "n", **{axis: f"size{axis}" for axis in range(2, len(shape))}}
    other = data(3, shape[1], *(size + 1 + axis for axis, size in enumerate(shape[2:])))
    compare_gradients(
        make().double(), (data(*shape),), dynamic_shapes={"input": dimensions}, fresh=(other,), tolerance=1e-13
    )


def test_transposed_convolution_with_a_large_output_padding() -> None:
    module = nn.ConvTranspose2d(4, 6, 3, 1, 1, 2, dilation=3).double()
    compare_gradients(module, (data(2, 4, 5, 6),), tolerance=1e-13)


def test_dynamic_convolution_below_opset_18() -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ConvTranspose2d(6, 2, 3, 2)).double()
    shapes = {"input": {0: "n", 2: "h", 3: "w"}}
    compare_gradients(module, (data(2, 4, 9, 8),), dynamic_shapes=shapes, opset=13, tolerance=1e-13)


@pytest.mark.parametrize("batch", [0, 3])
def test_convolution_of_an_empty_batch(batch: int) -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3, 2), nn.ConvTranspose2d(6, 2, 3, 2)).double()
    report = cg.export(module, (data(2, 4, 9, 8),), dynamic_shapes={"input": {0: "n", 2: "h", 3: "w"}})
    x = data(batch, 4, 10, 7)
    (actual,) = cg.GradientSession(report.model).run({"input": x}).values()
    torch.testing.assert_close(torch.as_tensor(actual), module(x).detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ((2, 3, 9, 8), lambda: nn.Unfold((3, 2), stride=(2, 3), padding=(1, 2), dilation=(1, 2))),
        ((2, 12, 42), lambda: nn.Fold((7, 8), 2)),
        ((2, 12, 20), lambda: nn.Fold((9, 10), 2, stride=2)),
    ],
    ids=["unfold", "fold", "fold side by side"],
)
def test_windows_are_added_up_in_float64(shape: tuple[int, ...], make: Callable[[], nn.Module]) -> None:
    fresh = (data(3, *shape[1:]),)
    compare_gradients(make(), (data(*shape),), tolerance=1e-13, dynamic_shapes={"input": {0: "n"}}, fresh=fresh)
