"""Forward-mode derivatives inside a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

import convgrad_export as cg


class Tangent(nn.Module):
    """Value and directional derivative, by torch.func.jvp or by dual numbers."""

    def __init__(self, net: nn.Module, *, dual: bool = False) -> None:
        super().__init__()
        self.net, self.dual = net, dual

    def forward(self, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        if not self.dual:
            return torch.func.jvp(self.net, (x,), (direction,))
        with forward_ad.dual_level():
            value, tangent = forward_ad.unpack_dual(self.net(forward_ad.make_dual(x, direction)))
            return value, tangent


class Direction(nn.Module):
    """A function of a network, a place and a direction."""

    def __init__(self, net: nn.Module, function: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x: Tensor, direction: Tensor) -> Tensor:
        return self.function(self.net, x, direction)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "running": lambda: nn.BatchNorm2d(8).eval(),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
    "group": lambda: nn.GroupNorm(4, 8),
    "layer": lambda: nn.LayerNorm([6, 5]),
    "layer_plain": lambda: nn.LayerNorm(5, elementwise_affine=False),
}


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_norms_inside_a_network(name: str, dual: bool) -> None:
    torch.manual_seed(0)
    norm = NORMS[name]()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    module = Tangent(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.SiLU(), nn.Conv2d(8, 2, 3)), dual=dual)
    args = torch.randn(2, 3, 8, 7), torch.randn(2, 3, 8, 7)
    report = cg.export(module, args)
    assert report.verified
    found = cg.GradientSession(report.model).run({"x": args[0], "direction": args[1]})
    for result, expected in zip(found.values(), module.double()(*(a.double() for a in args)), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


def _dual(net: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(x, v))).tangent


FORWARD: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "dual numbers": _dual,
    "jvp": lambda net, x, v: torch.func.jvp(net, (x,), (v,))[1],
    "jvp of grad": lambda net, x, v: torch.func.jvp(torch.func.grad(lambda y: net(y).square().sum()), (x,), (v,))[1],
}


@pytest.mark.parametrize("name", FORWARD)
def test_a_dynamic_batch(name: str) -> None:
    """The tangent of a parameter is a zero without memory, a sum with which made a number of the batch."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8).eval()
    nn.init.normal_(norm.weight)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.MaxPool2d(2), nn.SiLU(), nn.Flatten(), nn.Linear(72, 4))
    module, shapes = Direction(net, FORWARD[name]), {"x": {0: "n"}, "direction": {0: "n"}}
    report = cg.export(module, (torch.randn(2, 3, 8, 9), torch.randn(2, 3, 8, 9)), dynamic_shapes=shapes)
    args = torch.randn(5, 3, 8, 9), torch.randn(5, 3, 8, 9)
    (found,) = cg.GradientSession(report.model).run(None, {"x": args[0], "direction": args[1]})
    expected = module.double()(*(a.double() for a in args))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x + torch.ones_like(x),
        lambda x: x.sin() + x.detach(),
        lambda x: torch.where(x > 0, x * x, x.detach()) - torch.tensor([2.0, 1.0, 0.0], dtype=x.dtype),
        lambda x: torch.zeros_like(x) + x * x,
    ],
)
def test_dual_numbers_meet_tensors_without_a_tangent(function: Callable[[Tensor], Tensor]) -> None:
    """Their tangents are zeros without memory, too, of the batch's size."""
    module, shapes = Direction(nn.Identity(), lambda _, x, v: _dual(function, x, v)), ({0: "n"}, {0: "n"})
    report = cg.export(module, (torch.randn(2, 3), torch.randn(2, 3)), dynamic_shapes=shapes)
    args = torch.randn(5, 3), torch.randn(5, 3)
    (found,) = cg.GradientSession(report.model).run(None, {"x": args[0], "direction": args[1]})
    torch.testing.assert_close(found, module(*args))


def _assigned(columns: Any, value: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    def function(net: nn.Module, x: Tensor) -> Tensor:
        y = net.bias.expand_as(x).clone()
        y[:, columns] = value(x)[:, columns]
        return y * y

    return function


BESIDE_CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cat": lambda net, x: torch.cat([x * x, net.bias.expand_as(x)], 1).square(),
    "cat-zeros": lambda _, x: torch.cat((x.new_zeros(x.shape[0], 1), x * x), dim=1).square(),
    "stack": lambda _, x: torch.stack([x, torch.ones_like(x), x.square()], -1).prod(-1) * x,
    "hstack": lambda _, x: torch.hstack([torch.ones_like(x), x]).sin(),
    "not-finite": lambda _, x: torch.cat([torch.full_like(x, torch.inf), x * x], 1)[:, 3:],
    "product": lambda _, x: x.prod(1, keepdim=True) * x,
    "slice": _assigned(slice(1, None), lambda x: x.sin()),
    "column": _assigned(1, lambda x: x.square()),
    "zeros": lambda _, x: torch.zeros_like(x).slice_scatter(x[:, :2], 1, 0, 2) * x,
}


@pytest.mark.parametrize("mode", FORWARD)
@pytest.mark.parametrize("name", BESIDE_CONSTANTS)
def test_parts_without_a_tangent(name: str, mode: str) -> None:
    """PyTorch took the sizes of such a part as numbers, or asked for its storage."""
    net = nn.Linear(3, 3)
    function = BESIDE_CONSTANTS[name]
    module = Direction(net, lambda net, x, v: FORWARD[mode](lambda y: function(net, y), x, v))
    shapes = {"x": {0: "n"}, "direction": {0: "n"}}
    report = cg.export(module, (torch.randn(2, 3), torch.randn(2, 3)), dynamic_shapes=shapes)
    session = cg.GradientSession(report.model)
    for batch in (0, 1, 5):
        args = torch.randn(batch, 3), torch.randn(batch, 3)
        (found,) = session.run(None, dict(zip(shapes, args, strict=True)))
        torch.testing.assert_close(found, module(*args).detach(), rtol=1e-4, atol=1e-5)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "factor": lambda x: (x * 2).sin(),
    "size": lambda x: x.sin() * x.shape[0],
    "quotients": lambda x: (1 - x) / 2 + 3 / (x.square() + 1) - x.sin().mul_(0.5),
    "without axes": lambda x: x * (x.square().sum() * 2 + 1),
}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.LayerNorm(3)])
def test_norms_of_dual_numbers_over_a_dynamic_batch(norm: nn.Module) -> None:
    """Gradients are not compared: those of PyTorch's own tangents take the saved statistics as constants."""
    module = Direction(norm, lambda net, x, v: _dual(lambda y: net(y).sin(), x, v))
    args = torch.randn(4, 3), torch.randn(4, 3)
    assert cg.export(module, args, dynamic_shapes=({0: "n"}, {0: "n"})).verified


@pytest.mark.parametrize("name", NUMBERS)
def test_dual_numbers_meet_python_numbers(name: str) -> None:
    """Their tangents are on the device meta, which fixed a dynamic batch and broke off a gradient."""
    module = Direction(nn.Identity(), lambda _, x, v: _dual(NUMBERS[name], x, v))
    args = torch.randn(4, 3), torch.randn(4, 3)
    report = cg.export_gradient(module, args, of="sum", wrt="inputs", dynamic_shapes=({0: "n"}, {0: "n"}))
    assert report.verified


def test_a_view_that_is_changed_in_place_is_named() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 1:] += x[:, 1:]
        return y

    module = Direction(nn.Identity(), lambda _, x, v: _dual(function, x, v))
    args = torch.randn(2, 3), torch.randn(2, 3)
    with pytest.raises(cg.CaptureError, match=r"test_forward_mode\.py:\d+, in function .*Assign to the part"):
        cg.export(module, args, dynamic_shapes=({0: "n"}, {0: "n"}))
    assert cg.export(module, args).verified


def test_the_tangent_of_a_max_poolings_gradient_goes_to_the_recorded_positions() -> None:
    """In windows side by side it went to the maxima of the direction: that stands where the input was."""
    module = Direction(nn.MaxPool2d(2), FORWARD["jvp of grad"])
    args = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    report = cg.export(module, args, verify=False)
    (found,) = cg.GradientSession(report.model).run(None, {"x": args[0], "direction": args[1]})
    torch.testing.assert_close(found, module(*args))


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (lambda x: functional.group_norm(x, 3), "not divisible"),
        (lambda x: functional.layer_norm(x, (4,)), "those that are normalized"),
        (lambda x: functional.batch_norm(x[:1, :, :1, :1], None, None, training=True), "more than 1 value"),
        (lambda x: functional.instance_norm(x[:, :, :1, :1]), "more than 1 value"),
    ],
)
def test_norms_that_pytorch_refuses(norm: Callable[[Tensor], Tensor], message: str) -> None:
    class Normed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.jvp(norm, (x,), (x,))[1]

    with pytest.raises(cg.CaptureError, match=message):
        cg.export(Normed(), (torch.randn(2, 8, 3, 5),))
