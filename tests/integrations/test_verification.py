"""What verification catches, and what it must not take for an error: kinks, cancellation, halves, branches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.integrations import verification
from convgrad_export.integrations.capture import capture, capture_gradients
from convgrad_export.integrations.eager_run import WidenedCasts
from convgrad_export.integrations.fresh_inputs import fresh_input
from convgrad_export.integrations.program import GraphInput
from convgrad_export.integrations.rounding import RandomRounding
from convgrad_export.recipes import GradCAM

from .gradient_modules import FORMS, Apply, image


class Answers:
    """Stands for onnxruntime: eager float32's own results, changed by the test."""

    def __init__(self, program: Any, change: Callable[[dict[str, np.ndarray]], None]) -> None:
        self._program, self._change = program, change
        self.input_names = [spec.name for spec in program.inputs if spec.kind == "user"]

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        inputs = {name: torch.from_numpy(value) for name, value in feed.items()}
        results = verification.eager(self._program, inputs, torch.float32)
        outputs = {name: value.numpy().copy() for name, value in results.items()}
        self._change(outputs)
        return outputs


def normalized() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())


def test_a_gradient_that_is_zero_but_for_rounding_is_judged_by_the_terms_that_cancel() -> None:
    report = cg.export_gradient(normalized(), (image(),), wrt="parameters", of=lambda out: out.pow(2).sum())
    bias, weight = report.errors["0.bias.grad"], report.errors["0.weight.grad"]
    assert bias.cancelled
    assert not weight.cancelled
    assert bias.relative < bias.bound < 1e-4


@pytest.mark.parametrize("part", [1e-4, 1e-2])
def test_a_wrong_gradient_is_caught_where_the_right_one_is_zero(part: float) -> None:
    """A bias gradient in which a small part of the sum is missing, far below the weights' gradients."""
    module, value = normalized(), lambda out: out.pow(2).sum()
    program = capture_gradients(module, (image(),), wrt="parameters", value=value)
    captured: dict[str, Tensor] = {}
    module[0].register_full_backward_hook(lambda _m, _i, grads: captured.update(terms=grads[0]))
    value(module(image().requires_grad_())).backward()
    missing = captured["terms"].abs().sum((0, 2, 3)).numpy() * part

    def change(outputs: dict[str, np.ndarray]) -> None:
        outputs["0.bias.grad"] -= missing

    verification.compare(Answers(program, lambda outputs: None), program, {"input": image()})
    with pytest.raises(cg.VerificationError, match=r"0\.bias\.grad.*terms that cancel"):
        verification.compare(Answers(program, change), program, {"input": image()})


class Tie(nn.Module):
    """A ReLU inside whose argument is zero but for rounding: either side is right."""

    def forward(self, x: Tensor) -> Tensor:
        third = x / 3
        return torch.relu((third + third + third - x).sum(1)) + x.sum(1)


def test_either_side_of_a_tie_is_accepted_and_a_third_value_is_not() -> None:
    x = image(1, 3, 4, 4)
    program = capture_gradients(Tie(), (x,), wrt="inputs")

    def other_side(outputs: dict[str, np.ndarray]) -> None:
        gradient = outputs["x.grad"]
        gradient[:, :, 0, 0] = np.where(gradient[:, :, 0, 0] == 1, 1.0 + 1e-7, 1.0)

    def wrong(outputs: dict[str, np.ndarray]) -> None:
        outputs["x.grad"][:, :, 0, 0] = 2.0

    verification.compare(Answers(program, other_side), program, {"x": x})
    with pytest.raises(cg.VerificationError, match=r"x\.grad"):
        verification.compare(Answers(program, wrong), program, {"x": x})


class OneTie(nn.Module):
    """A step at the first pixel alone, a small part of the result, that is up or down by rounding."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1, :1, :1]
        third = first / 3
        return torch.where(third + third + third > first, first, -first).sum() + x.sum((1, 2, 3))


def test_a_tie_that_float32_eager_takes_as_onnxruntime_does_costs_no_random_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_run(*_: Any) -> None:
        raise AssertionError("a random run")

    above = lambda x: x / 3 + x / 3 + x / 3 > x  # noqa: E731
    x = image(1, 1, 900, 900)
    tied = x[above(x) & ~above(x.double())][0]
    x[0, 0, 0, 0] = tied
    program = capture_gradients(OneTie(), (x,), wrt="inputs")
    monkeypatch.setattr(verification, "_randomly_rounded", no_run)
    error = verification.compare(Answers(program, lambda outputs: None), program, {"x": x})["x.grad"]
    assert 2.0**-16 < error.relative < error.bound < 2.0**-5
    assert not error.cancelled


def test_float64_runs_once_for_each_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what takes the time of an export of a large network, and a second size is the larger one."""
    batches: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64 and type(x) is Tensor:
                batches.append(x.shape[0])
            return (x * x).sum((1, 2, 3))

    cg.export_gradient(Counting(), (image(),), wrt="inputs", of="sum", dynamic_shapes=({0: "batch"},))
    assert batches == [2, 2, 2, 3]


def test_random_rounding_leaves_what_is_exact_and_moves_the_rest() -> None:
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float().double()
    with RandomRounding(2.0**-21, torch.float32, 0):
        grid = (torch.arange(12, dtype=torch.float64) + 0.5) * 0.5 - 0.5
        moved, view, in_place = x * 0.1, x.reshape(10, 100).T, x.clone().mul_(0.1)
    assert torch.equal(grid, (torch.arange(12, dtype=torch.float64) + 0.5) * 0.5 - 0.5)
    assert torch.equal(view, x.reshape(10, 100).T)
    for result in (moved, in_place):
        relative = (result - x * 0.1).abs() / (x * 0.1).abs()
        assert 2.0**-23 < float(relative.mean()) < float(relative.max()) <= 2.0**-21 * 1.001


@pytest.mark.parametrize("storage", [torch.float32, None])
def test_random_rounding_leaves_infinities(storage: torch.dtype | None) -> None:
    mask = torch.tensor([0.0, math.inf, -math.inf] * 20, dtype=torch.float64)
    with RandomRounding(2.0**-21, storage, 0):
        assert torch.equal(mask + 0.0, mask)


def test_a_sum_that_cancels_behind_a_mask_of_infinities_is_judged() -> None:
    """The sum of a normalization is zero but for rounding; random rounding made NaN of the mask, and of the bound."""
    mask = torch.full((4, 4), -math.inf).triu(1)
    attention = Apply(lambda x: functional.layer_norm((x @ x.mT + mask).softmax(-1) @ x, (6,)).sum())
    assert cg.export(attention, (torch.randn(2, 4, 6),)).verified


@pytest.mark.parametrize(("form", "args"), FORMS, ids=lambda value: getattr(value, "__name__", ""))
def test_random_rounding_reaches_every_form_of_gradient(form: type[nn.Module], args: tuple[Tensor, ...]) -> None:
    torch.manual_seed(0)
    program = capture(form(), args)
    inputs = dict(zip([s.name for s in program.inputs if s.kind == "user"], args, strict=True))
    exact = verification.eager(program, inputs, torch.float64)
    with RandomRounding(2.0**-21, torch.float32, 0):
        moved = verification.eager(program, inputs, torch.float64)
    for name, value in exact.items():
        distance = float((moved[name] - value).norm() / value.norm())
        assert 1e-8 < distance < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_modules_are_held_to_their_own_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)).to(dtype)
    report = cg.export_gradient(module, (image().to(dtype),), wrt=["inputs", "parameters"])
    assert report.verified
    assert any("bfloat16" in note for note in report.notes) == (dtype == torch.bfloat16)
    gradients = cg.GradientSession(report.model).run({"input": image().to(dtype)})
    x = image().to(dtype).float().requires_grad_()
    module.float()(x).sum().backward()
    for name, wanted in {"input.grad": x.grad, "0.weight.grad": module[0].weight.grad}.items():
        assert gradients[name].dtype == dtype
        error = float((gradients[name].float() - wanted).norm() / wanted.norm())
        assert error < {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype], name


class Branches(nn.Module):
    """Does something else from three pictures on; nothing of that is in a trace with two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.shape[0] > 2 else -self.conv(x)


def test_a_branch_on_a_dynamic_size_is_refused() -> None:
    with pytest.raises(cg.DynamicShapeError, match=r"'batch'.*at 3 the forward does something else.*batch <= 2"):
        cg.export(Branches(), (image(),), dynamic_shapes={"x": {0: "batch"}})
    assert cg.export(Branches(), (image(),)).verified


class Downsampled(nn.Module):
    """Adds what a stride took apart: even heights only, and eager says so for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


def test_sizes_that_eager_refuses_are_no_reason_to_refuse_the_export() -> None:
    report = cg.export(Downsampled(), (image(2, 3, 8, 8),), dynamic_shapes={"x": {2: "height"}})
    assert [sizes["height"] for sizes in report.verified_sizes] == [8, 10]


class Around(nn.Module):
    """A layer with a function of the test around it."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def _float_only(layer: nn.Module, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError("float32 only")
    return layer(x)


_KERNEL = torch.ones(3, 3, 1, 1)
_BYTES = torch.randint(0, 255, (2, 3, 6, 6), dtype=torch.uint8)
CASTING: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], nn.Module, Tensor]] = {
    "bytes": (lambda layer, x: layer(x.float() / 255), nn.Conv2d(3, 3, 3), _BYTES),
    "float32 again": (lambda layer, x: layer(x.to(torch.float32)), nn.Conv2d(3, 3, 3), image(2, 3, 6, 6)),
    "one hot": (lambda layer, x: layer(functional.one_hot(x, 5).float()), nn.Linear(5, 3), torch.tensor([0, 4])),
    "timesteps": (
        lambda layer, t: layer(t[:, None].float() * torch.arange(4, dtype=torch.float32)),
        nn.Linear(4, 3),
        torch.tensor([0, 40]),
    ),
    "closed-over kernel": (
        lambda layer, x: functional.conv2d(layer(x), _KERNEL),
        nn.Conv2d(3, 3, 3),
        image(2, 3, 6, 6),
    ),
    "timesteps of float64": (
        lambda layer, t: layer((t[:, None].float() * torch.exp(-torch.arange(64) / 8)).sin().double()),
        nn.Linear(64, 3).double(),
        torch.tensor([700, 40]),
    ),
    "float32 inside float64": (
        lambda layer, x: layer(x.float().double()),
        nn.Conv2d(3, 3, 3).double(),
        image().double(),
    ),
    "float32 inputs of float64": (
        lambda layer, x: layer(((x - x.mean()) / x.std()).softmax(1).double()),
        nn.Conv2d(3, 3, 3).double(),
        image(),
    ),
    "integers of float64": (
        lambda layer, x: layer((x / 255).exp().softmax(1).double()),
        nn.Linear(3, 3).double(),
        torch.arange(300).reshape(100, 3),
    ),
}


@pytest.mark.parametrize("case", CASTING)
def test_modules_that_cast_are_compared_with_float64(case: str) -> None:
    function, layer, x = CASTING[case]
    module = Around(function, layer)
    for report in (
        cg.export(module, (x,)),
        cg.export_gradient(module, (x,), wrt="parameters", of=lambda out: out.square().sum()),
        cg.export_training_step(module, lambda out: out.square().mean(), "sgd", (x,)),
    ):
        assert report.errors
        assert not report.notes


@pytest.mark.parametrize(
    "widen",
    [
        Tensor.double,
        lambda x: torch.cat([functional.pad(x, (1, 1)), x.flip(-1)], -1).transpose(2, 3).double(),
        lambda x: x.double() * torch.where(x > 0, 0.3, 0.1),
    ],
    ids=["cast", "moved", "picked"],
)
def test_float32_inputs_that_are_not_computed_with_are_held_to_float64(widen: Callable[[Tensor], Tensor]) -> None:
    module = Around(lambda layer, x: layer(widen(x)), nn.Conv2d(3, 3, 3).double())
    report = cg.export_training_step(module, lambda out: out.square().mean(), "sgd", (image(),))
    assert max(error.bound for error in report.errors.values()) < 1e-10


def test_a_module_that_refuses_float64_is_compared_in_its_own_types() -> None:
    module = Around(_float_only, nn.Conv2d(3, 4, 3))
    step = cg.export_training_step(module, lambda out: out.square().mean(), "sgd", (image(),))
    for report in (cg.export(module, (image(),)), step):
        assert report.verified
        assert any("own types" in note and "TypeError: float32 only" in note for note in report.notes)
    program = capture_gradients(module, (image(),), wrt="parameters")

    def wrong(outputs: dict[str, np.ndarray]) -> None:
        outputs["layer.weight.grad"][0] *= 1 + 1e-3

    verification.compare(Answers(program, lambda outputs: None), program, {"x": image()})
    with pytest.raises(cg.VerificationError, match=r"layer\.weight\.grad.*against eager"):
        verification.compare(Answers(program, wrong), program, {"x": image()})


@pytest.mark.parametrize("train", [False, True])
def test_one_normalized_sample_that_is_transposed_is_compared_with_its_right_gradient(train: bool) -> None:
    """torch 2.13's kernel takes the gradient for channels last, or for rows, when the input is the other one."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6).train(train)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    module = Around(lambda norm, x: norm(x).flatten(2).mT.tanh() * torch.arange(6), norm)
    x = torch.randn(1, 6, 4, 5)
    report = cg.export_gradient(module, (x,))
    (actual,) = cg.GradientSession(report.model).run(["x.grad"], {"x": x})
    exact = x.double().requires_grad_()
    variance, mean = torch.var_mean(exact, (0, 2, 3), correction=0, keepdim=True) if train else (torch.ones(1), 0.0)
    normalized = (exact - mean) * norm.weight.reshape(6, 1, 1) / (variance + norm.eps).sqrt()
    (expected,) = torch.autograd.grad((normalized.tanh() * torch.arange(6).reshape(6, 1, 1)).sum(), exact)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_module_that_fails_on_fresh_values_is_refused_with_its_message() -> None:
    calls: list[None] = []

    def once(layer: nn.Module, x: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) > 1:
            raise ValueError("these values are not allowed")
        return layer(x)

    with pytest.raises(cg.VerificationError, match=r"fails in PyTorch.*ValueError: these values.*verify=False"):
        cg.export(Around(once, nn.Conv2d(3, 4, 3)), (image(),))


def _weighted(out: Tensor) -> Tensor:
    return (out * torch.arange(out.shape[1]).to(out.dtype)).square().sum()


@pytest.mark.parametrize("function", [lambda _, x: x.sort(1)[0], lambda _, x: x.topk(20, 1)[0]])
@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch"}}])
def test_fresh_values_bring_no_ties_that_the_example_does_not_have(function: Any, dynamic: Any) -> None:
    x = torch.randn(4, 72, generator=torch.Generator().manual_seed(0))
    assert cg.export_gradient(Around(function, nn.Identity()), (x,), of=_weighted, dynamic_shapes=dynamic).verified


@pytest.mark.parametrize(
    "example",
    [
        torch.randn(9, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(72.0).reshape(9, 8),
        torch.randperm(72).reshape(9, 8),
    ],
)
def test_fresh_values_differ_where_the_examples_do_and_stay_in_their_range(example: Tensor) -> None:
    random = np.random.default_rng(0)
    spec = GraphInput("x", "user", example)
    first, second = (fresh_input(spec, (9, 8), random) for _ in range(2))
    assert not torch.equal(first, second)
    for fresh in (first, second):
        assert fresh.unique().numel() == 72
        assert fresh.dtype == example.dtype
        assert example.min() <= fresh.min() <= fresh.max() <= example.max()
    if not example.is_floating_point() or example[0, 1] == 1.0:
        assert torch.equal(first.unique(), example.unique())
    else:
        assert first.mean() != second.mean()
        assert fresh_input(spec, (40, 8), random).unique().numel() == 320


def test_fresh_labels_and_masks_keep_the_examples_values() -> None:
    for example in (torch.tensor([1, 4, 4, 9]), torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([True, False, True])):
        fresh = fresh_input(GraphInput("y", "user", example), (50,), np.random.default_rng(0))
        assert set(fresh.tolist()) == set(example.tolist())


COUNTS = torch.arange(1, 7).reshape(2, 3)
SOME = COUNTS > 2


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.full((2, 3), 0.3),
        lambda: torch.linspace(0, 1, 7),
        lambda: torch.empty(3).fill_(0.3),
        lambda: torch.fft.fftfreq(7),
        lambda: torch.fft.fft(COUNTS),
        lambda: COUNTS / 7,
        lambda: 0.9**COUNTS,
        lambda: SOME * 0.3,
        lambda: torch.where(SOME, COUNTS, 0.1),
        lambda: torch.exp(torch.arange(0, 8, 2) * -(math.log(10000.0) / 8)),
        lambda: torch.zeros(2, 3).masked_fill(SOME, 0.3),
        lambda: nn.functional.one_hot(COUNTS) / 3,
    ],
)
def test_what_pytorch_makes_in_its_default_type_is_made_in_the_wider_one(made: Any) -> None:
    assert made().dtype in (torch.float32, torch.complex64)
    with WidenedCasts(torch.float64):
        found = made()
    torch.set_default_dtype(torch.float64)
    try:
        expected = made()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_other_threads_keep_their_default_type_while_an_export_is_verified() -> None:
    seen = set()

    def forward(x: Tensor) -> Tensor:
        seen.add((x.dtype, torch.get_default_dtype()))
        return x * (torch.ones(3) / 7 + COUNTS[0] / 3)

    report = cg.export_gradient(Apply(forward), (torch.randn(2, 3),), dynamic_shapes=({0: "n"},))
    assert report.verified
    assert not report.notes
    assert seen == {(torch.float32, torch.float32), (torch.float64, torch.float32)}


class Regions(nn.Module):
    """Means of boxes, each of the image that its first number says, as `torchvision.ops.roi_align` has them."""

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        numbers, low, high = boxes[:, 0].long(), boxes[:, 1], boxes[:, 2]
        place = torch.arange(images.shape[-1])
        inside = torch.sigmoid(place - low[:, None]) * torch.sigmoid(high[:, None] - place)
        return (images[numbers] * inside).sum(1) / inside.sum(1)


class Pairs(nn.Module):
    """Users and items, of which there are not equally many."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(9, 3), nn.Embedding(2, 3)

    def forward(self, pairs: Tensor) -> Tensor:
        return (self.users(pairs[:, 0]) * self.items(pairs[:, 1])).sum(1)


def test_rows_of_columns_of_different_kinds_are_drawn_whole_where_pytorch_refuses_them_mixed() -> None:
    images, boxes = torch.rand(2, 9), torch.tensor([[0.0, 1.5, 4.5], [1.0, 2.5, 7.5], [1.0, 0.5, 3.5]])
    report = cg.export_gradient(Regions(), (images, boxes), wrt=["images"], dynamic_shapes={"boxes": {0: "boxes"}})
    assert report.verified
    pairs = torch.tensor([[8, 0], [7, 1], [6, 1], [5, 0]])
    assert cg.export_gradient(Pairs(), (pairs,), wrt="parameters").verified
    assert cg.export_training_step(Pairs(), nn.MSELoss(), "sgd", (pairs, torch.rand(4))).verified


def test_infinities_that_both_have_are_equal_and_others_are_not() -> None:
    mask = torch.tensor([True, False, True, False])
    masked = Apply(lambda x: x.masked_fill(mask, -math.inf))
    report = cg.export(masked, (torch.randn(3, 4),))
    assert report.errors["output"].maximum < 1e-6
    program = capture(masked, (torch.randn(3, 4),))

    def wrong(value: float) -> Answers:
        return Answers(program, lambda outputs: outputs["output"].__setitem__((0, 0), value))

    for value in (math.inf, math.nan, -1e30):
        with pytest.raises(cg.VerificationError, match="output"):
            verification.compare(wrong(value), program, {"input": torch.randn(3, 4)})
    assert verification.compare(wrong(-math.inf), program, {"input": torch.randn(3, 4)})["output"].within


def test_an_example_of_one_sample_is_run_at_further_heights_too() -> None:
    """A trace takes no dynamic size to be 1; every run at the example's batch counted as ruled out by that."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    shapes = ({0: "batch", 2: "height", 3: "width"},)
    report = cg.export(GradCAM(network, "1"), (torch.randn(1, 3, 8, 8),), dynamic_shapes=shapes)
    assert report.notes == []
    sizes = [(run["batch"], run["height"], run["width"]) for run in report.verified_sizes]
    assert sizes == [(1, 8, 8), (2, 8, 8), (1, 9, 8), (1, 8, 9)]


def ignoring(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(scores, labels)


@pytest.mark.parametrize("labels", [[2, -100, -100], [-100, -100, -100, -100, 2]])
def test_inputs_whose_mean_is_over_nothing_are_drawn_again(labels: list[int]) -> None:
    args, shapes = (torch.randn(len(labels), 6),), {"input": {0: "batch"}}
    report = cg.export_gradient(
        nn.Linear(6, 5),
        args,
        wrt=["inputs", "parameters"],
        of=ignoring,
        of_args=torch.tensor(labels),
        dynamic_shapes=shapes,
        of_dynamic_shapes={"labels": {0: "batch"}},
    )
    assert set(report.errors) == {"value", "input.grad", "weight.grad", "bias.grad"}
    assert report.errors["value"].relative < 1e-6
    assert {size["batch"] for size in report.verified_sizes} > {len(labels)}


def test_an_example_that_gives_no_number_at_all_is_refused() -> None:
    with pytest.raises(cg.VerificationError, match="output 'value' is NaN everywhere in PyTorch too"):
        cg.export_gradient(nn.Linear(6, 5), (torch.randn(3, 6),), of=ignoring, of_args=torch.tensor([-100] * 3))


def test_nan_that_both_have_is_equal_and_one_side_alone_is_not() -> None:
    """Rows of a softmax that are masked altogether."""
    mask = torch.tensor([[True, False], [True, True]])
    masked = Apply(lambda x: x.masked_fill(mask, -math.inf).softmax(1))
    assert cg.export(masked, (torch.randn(2, 2),)).errors["output"].maximum < 1e-6
    program = capture(masked, (torch.randn(2, 2),))
    for place, value in (((0, 0), math.nan), ((1, 1), 0.5), ((0, 1), 0.9)):
        wrong = Answers(program, lambda outputs, p=place, v=value: outputs["output"].__setitem__(p, v))
        with pytest.raises(cg.VerificationError, match="output"):
            verification.compare(wrong, program, {"input": torch.randn(2, 2)})


def test_an_output_that_is_not_a_number_is_the_one_that_is_named() -> None:
    class Runner:
        input_names = ("x",)

        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"output_0": feeds["x"] * 2, "output_1": feeds["x"] * np.nan}

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * 2, x * 3

    program = capture(Two(), (torch.randn(4),), None)
    with pytest.raises(cg.VerificationError, match=r"output 'output_1' .* is wrong"):
        verification.compare(Runner(), program, {"x": torch.randn(4)})
