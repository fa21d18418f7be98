"""The scriptable six: scripted, traced, saved, reloaded, and exported with dynamo=False."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

SIZES = {1: (11,), 2: (9, 8), 3: (6, 7, 5)}
OTHER_SIZES = {1: (14,), 2: (12, 7), 3: (7, 9, 4)}


class Gradients1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(integers(6, 2, 3, seed=1))

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        dx = cg.torchscript.conv1d_input(x.size(), self.weight, g, [2], [1], [2], 2)
        return dx, cg.torchscript.conv1d_weight(x, self.weight.size(), g, [2], [1], [2], 2)


class Gradients2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(integers(6, 2, 3, 2, seed=1))

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        dx = cg.torchscript.conv2d_input(x.size(), self.weight, g, [2, 3], [1, 0], [1, 2], 2)
        return dx, cg.torchscript.conv2d_weight(x, self.weight.size(), g, [2, 3], [1, 0], [1, 2], 2)


class Gradients3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(integers(6, 2, 3, 2, 1, seed=1))

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        dx = cg.torchscript.conv3d_input(x.size(), self.weight, g, 2, 1, 1, 2)
        return dx, cg.torchscript.conv3d_weight(x, self.weight.size(), g, 2, 1, 1, 2)


class ListsOfOne2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(integers(6, 2, 3, 2, seed=1))

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        dx = cg.torchscript.conv2d_input(x.size(), self.weight, g, [2], [1], [2], 2)
        return dx, cg.torchscript.conv2d_weight(x, self.weight.size(), g, [2], [1], [2], 2)


class ListsOfOne3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(integers(6, 2, 3, 2, 1, seed=1))

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        dx = cg.torchscript.conv3d_input(x.size(), self.weight, g, [2], [1], [1], 2)
        return dx, cg.torchscript.conv3d_weight(x, self.weight.size(), g, [2], [1], [1], 2)


ATTRIBUTES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (Gradients1d, {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}),
    "2d": (Gradients2d, {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
    "3d": (Gradients3d, {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}),
    "2d, lists of one": (ListsOfOne2d, {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}),
    "3d, lists of one": (ListsOfOne3d, {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}),
}


def integers(*shape: int, seed: int) -> Tensor:
    """Small integers: every sum is exact in float32, so results can be compared exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


def case(kind: str, size: Sequence[int], batch: int = 2) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    build, attributes = ATTRIBUTES[kind]
    module = build()
    x = integers(batch, 4, *size, seed=2)
    forward = getattr(nn.functional, f"conv{kind[0]}d")
    output = forward(x, module.weight, **attributes)
    g = integers(*output.shape, seed=3)
    leaves = x.clone().requires_grad_(), module.weight
    expected = torch.autograd.grad(forward(*leaves, **attributes), leaves, g)
    return module, (x, g), expected


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_eager_scripted_saved_and_traced_agree_with_autograd_exactly(kind: str) -> None:
    module, args, expected = case(kind, SIZES[int(kind[0])])
    scripted = torch.jit.script(module)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    reloaded = torch.jit.load(buffer)
    traced = torch.jit.trace(module, args)
    for run in (module, scripted, reloaded, traced):
        for actual, wanted in zip(run(*args), expected, strict=True):
            assert torch.equal(actual, wanted)
    _, other_args, other_expected = case(kind, OTHER_SIZES[int(kind[0])], batch=3)
    for run in (scripted, reloaded, traced):
        for actual, wanted in zip(run(*other_args), other_expected, strict=True):
            assert torch.equal(actual, wanted)


def _scripted(module: nn.Module, args: tuple[Tensor, Tensor]) -> Any:
    return torch.jit.script(module)


def _traced(module: nn.Module, args: tuple[Tensor, Tensor]) -> Any:
    return torch.jit.trace(module, args)


def _plain(module: nn.Module, args: tuple[Tensor, Tensor]) -> Any:
    return module


@pytest.mark.parametrize("opset", [11, 13, 16, 18])
@pytest.mark.parametrize("prepare", [_scripted, _traced, _plain])
@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_dynamo_false_export_with_dynamic_sizes(kind: str, prepare: Callable[..., Any], opset: int) -> None:
    cg.register_torchscript_symbolics()
    rank = int(kind[0])
    module, args, _ = case(kind, SIZES[rank])
    axes = {name: {0: "n", **{2 + i: f"{name}{i}" for i in range(rank)}} for name in ("x", "g")}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            prepare(module, args),
            args,
            file,
            dynamo=False,
            opset_version=opset,
            input_names=["x", "g"],
            dynamic_axes=axes,
        )
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model, full_check=True)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", opset)}
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    _, (x, g), expected = case(kind, OTHER_SIZES[rank], batch=3)
    for actual, wanted in zip(session.run(None, {"x": x.numpy(), "g": g.numpy()}), expected, strict=True):
        assert torch.equal(torch.from_numpy(actual), wanted)


class CallsScripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gradient = torch.jit.script(cg.torchscript.conv1d_input)

    def forward(self, x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        return self.gradient(x.size(), weight, g, [3], [2], [1], 2)


class CallsPlain(nn.Module):
    def forward(self, x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        return cg.torchscript.conv1d_input(list(x.shape), weight, g, [3], [2], [1], 2)


@pytest.mark.parametrize(
    ("prepare", "module", "follows"),
    [
        (_plain, CallsPlain, True),
        (_scripted, CallsScripted, True),
        (_plain, CallsScripted, False),
        (_traced, CallsScripted, False),
    ],
)
def test_a_trace_follows_sizes_but_not_into_a_scripted_function(
    prepare: Callable[..., Any], module: type[nn.Module], follows: bool
) -> None:
    """As documented: what does not follow is PyTorch's tracer, of which a scripted function sees numbers only."""
    cg.register_torchscript_symbolics()
    x, weight = integers(2, 4, 11, seed=0), integers(6, 2, 3, seed=1)
    g = integers(2, 6, 5, seed=2)  # 11 and 12 positions give 5
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            prepare(module(), (x, weight, g)),
            (x, weight, g),
            file,
            dynamo=False,
            opset_version=13,
            input_names=["x", "w", "g"],
            dynamic_axes={"x": {2: "length"}, "g": {2: "out"}},
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    feeds = {"x": integers(2, 4, 12, seed=3).numpy(), "w": weight.numpy(), "g": g.numpy()}
    (actual,) = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    assert actual.shape[2] == (12 if follows else 11)
    assert ("x" in {value.name for value in session.get_inputs()}) == follows
    if follows:
        assert torch.equal(torch.from_numpy(actual), torch.nn.grad.conv1d_input((2, 4, 12), weight, g, 3, 2, 1, 2))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_of_no_samples_gives_zeros_and_is_refused_when_scripted(rank: int, groups: int) -> None:
    """PyTorch's convolution over no channels, which the samples are here, has a wrong shape or divides by zero."""
    x = torch.empty((0, 4, *SIZES[rank]), requires_grad=True)
    g = torch.empty((0, 6, *SIZES[rank]))
    size = [6, 4 // groups, *[3] * rank]
    function = getattr(cg.torchscript, f"conv{rank}d_weight")
    gradient = function(x, size, g, 1, 1, 1, groups)
    assert torch.equal(gradient, torch.zeros(size))
    gradient.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    scripted = torch.jit.script(function)
    with pytest.raises(torch.jit.Error, match="input has no samples"):
        scripted(x, size, g, 1, 1, 1, groups)
    assert scripted(torch.zeros(1, 4, *SIZES[rank]), size, torch.zeros(1, 6, *SIZES[rank]), 1, 1, 1, groups).sum() == 0


def test_ordinary_convolutions_still_export_after_registration() -> None:
    cg.register_torchscript_symbolics()
    cg.register_torchscript_symbolics()
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1))
    x = torch.randn(1, 3, 6, 5)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=False, opset_version=13, input_names=["x"])
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_signatures_are_those_of_torch_nn_grad() -> None:
    import inspect

    for name in cg.torchscript.__all__:
        ours = inspect.signature(getattr(cg.torchscript, name)).parameters
        theirs = inspect.signature(getattr(torch.nn.grad, name)).parameters
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
