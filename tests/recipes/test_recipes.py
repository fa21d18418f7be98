"""Each recipe: its defining property in eager float64, and its export against eager."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.recipes import FGSM, PGD, Forces, GradCAM, GuidedDiffusionStep, IntegratedGradients, Saliency
from convgrad_export.recipes.by_name import RECIPES, RecipeOptions, prepare


def classifier(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
        .to(dtype)
        .eval()
    )


def pictures(dtype: torch.dtype = torch.float32, count: int = 3) -> Tensor:
    return torch.rand(count, 3, 12, 14, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_saliency_is_the_largest_partial_derivative() -> None:
    network, x = classifier(torch.float64), pictures(torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: network(one[None])[0, 2]))(x)
    torch.testing.assert_close(Saliency(network, 2)(x), jacobian.abs().amax(1))


def test_gradcam_is_the_weighted_activation() -> None:
    network, x = classifier(torch.float64), pictures(torch.float64)
    activation = network[:4](x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network[4:](activation)[:, 1].sum(), activation)
    expected = torch.relu((gradient.mean((2, 3), keepdim=True) * activation).sum(1))
    torch.testing.assert_close(GradCAM(network, "3", 1, resize=False)(x), expected.detach())
    assert GradCAM(network, "3", 1)(x).shape == (3, 12, 14)


def test_gradcam_before_an_in_place_relu_sees_the_activation_itself() -> None:
    network, x = classifier(torch.float64), pictures(torch.float64)
    activation = network[:2](x).detach().requires_grad_()
    rest = nn.Sequential(nn.ReLU(), *network[3:])
    (gradient,) = torch.autograd.grad(rest(activation)[:, 1].sum(), activation)
    expected = torch.relu((gradient.mean((2, 3), keepdim=True) * activation).sum(1))
    torch.testing.assert_close(GradCAM(network, "1", 1, resize=False)(x), expected.detach())


def test_integrated_gradients_add_up_to_the_change_of_the_score() -> None:
    network, x = classifier(torch.float64), pictures(torch.float64)
    baseline = torch.zeros_like(x)
    attribution = IntegratedGradients(network, 0, steps=256)(x, baseline)
    change = (network(x) - network(baseline))[:, 0]
    torch.testing.assert_close(attribution.sum((1, 2, 3)), change, rtol=1e-3, atol=1e-5)


def test_the_memory_of_integrated_gradients_is_known_before_a_run() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    prepared = prepare("integrated-gradients", network, torch.rand(1, 1, 8, 8), RecipeOptions(steps=100))
    assert prepared.float64_bytes == 8 * 100 * (64 + 72)  # what the convolution reads, and what both others read


def test_attacks_raise_the_loss_and_stay_in_their_bounds() -> None:
    network, x = classifier(), pictures()
    label = network(x).argmax(1)
    loss = functional.cross_entropy(network(x), label)
    attacked = FGSM(network, 0.05)(x, label)
    assert functional.cross_entropy(network(attacked), label) > loss
    assert (attacked - x).abs().max() <= 0.05 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    step, moved = PGD(network, 0.05, 0.02), x
    for _ in range(5):
        moved = step(moved, x, label)
        assert (moved - x).abs().max() <= 0.05 + 1e-6
    assert functional.cross_entropy(network(moved), label) > loss
    torch.testing.assert_close(FGSM(network, 0.05)(x[:1], label[:1]), attacked[:1])  # whatever the batch


class Denoiser(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return 0.1 * x * (timestep / 1000)[:, None, None, None]


def test_guidance_raises_the_probability_of_the_class() -> None:
    network, x = classifier(), pictures()
    label = torch.tensor([1, 2, 3])
    arguments = (x, torch.full([3], 500), torch.tensor(0.5), torch.tensor(0.7), label)

    def probability(scale: float) -> Tensor:
        return torch.log_softmax(network(GuidedDiffusionStep(Denoiser(), network, scale)(*arguments)), 1).gather(
            1, label[:, None]
        )

    assert (probability(5.0) > probability(0.0)).all()
    # without guidance it is the DDIM step itself (Song et al., arXiv:2010.02502, equation 12 with sigma 0)
    noise = 0.1 * x * 0.5
    clean = (x - 0.5**0.5 * noise) / 0.5**0.5
    torch.testing.assert_close(
        GuidedDiffusionStep(Denoiser(), network, 0.0)(*arguments), 0.7**0.5 * clean + 0.3**0.5 * noise
    )


def test_forces_are_the_negative_gradient() -> None:
    network, x = classifier(torch.float64), pictures(torch.float64, 1)
    energy, force = Forces(network)(x)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    h = 1e-6
    slope = (network(x + h * direction).sum() - network(x - h * direction).sum()) / (2 * h)
    assert energy.shape == (1, 4)
    torch.testing.assert_close(-(force * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_exports_and_agrees_with_eager_at_other_sizes(recipe: str) -> None:
    prepared = prepare(recipe, classifier(), pictures(), RecipeOptions(target=None, layer="3", steps=4))
    shapes = tuple(
        ({0: "batch", 2: "height", 3: "width"} if value.dim() == 4 else {0: "batch"}) if batched else None
        for value, batched in zip(prepared.args, prepared.batched, strict=True)
    )
    report = cg.export(prepared.module, prepared.args, dynamic_shapes=shapes)
    assert report.verified
    assert {name for sizes in report.verified_sizes for name in sizes} == {"batch", "height", "width"}
    session = cg.GradientSession(report.model)
    results = session.run({n: v.numpy() for n, v in zip(session.input_names, prepared.args, strict=True)})
    expected = prepared.module(*prepared.args)
    for got, want in zip(results.values(), expected if isinstance(expected, tuple) else (expected,), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradCAM(classifier(), "nothing"), "does not have"),
        (lambda: IntegratedGradients(classifier(), steps=0), "at least 1"),
        (lambda: IntegratedGradients(classifier(), steps=10**11), "steps is 100000000000, expected at most 8388608"),
        (lambda: FGSM(classifier(), 0.0), "epsilon is 0.0, expected a finite number above 0"),
        (lambda: FGSM(classifier(), float("inf")), "epsilon is inf"),
        (lambda: FGSM(classifier(), low=1.0, high=0.0), "expected low below high"),
        (lambda: PGD(classifier(), step="2"), "step is '2'"),
        (lambda: PGD(classifier(), high=float("nan")), "high is nan"),
        (
            lambda: GuidedDiffusionStep(classifier(), classifier(), float("nan")),
            "scale is nan, expected a finite number",
        ),
        (lambda: Saliency(classifier(), "3"), "target is '3'"),
        (lambda: GradCAM(classifier(), "3", 1.5), "target is 1.5"),
        (lambda: IntegratedGradients(classifier(), True), "target is True"),
        (lambda: Saliency(classifier(), 9)(pictures()), "has 4"),
        (lambda: Saliency(nn.Flatten(0), 0)(pictures()), "expected"),
        (lambda: GradCAM("resnet18", "3"), "network is a str"),
        (lambda: GradCAM(classifier(), "3", resize="no"), "resize is 'no'"),
        (lambda: Saliency(None), "network is a NoneType, expected a torch.nn.Module"),
        (lambda: IntegratedGradients(torch.ones(1)), "network is a Tensor"),
        (lambda: FGSM("resnet18"), "network is a str"),
        (lambda: PGD(nn.Conv2d), "network is the class Conv2d"),
        (lambda: GuidedDiffusionStep(Denoiser(), 3), "classifier is a int"),
        (lambda: GuidedDiffusionStep(None, classifier()), "denoiser is a NoneType"),
        (lambda: Forces({}), "energy is a dict"),
        (lambda: prepare("dream", classifier(), pictures(), RecipeOptions()), "expected one of"),
        (lambda: prepare("gradcam", classifier(), pictures(), RecipeOptions()), "--layer"),
        (lambda: prepare("fgsm", nn.Conv2d(3, 4, 1), pictures(), RecipeOptions()), "classifier"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(cg.ConvGradError, match=message):
        make()


class Aside(nn.Module):
    """A classifier with a layer that gives a tuple, one without influence and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.without, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.twice, self.flat = Twice(), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        self.without(x)
        first, _ = self.twice(self.conv(x))
        return self.flat(first.mean((2, 3)))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("twice", "'twice' gives tuple, expected one tensor"),
        ("flat", r"'flat' gives \(\d, 4\), expected one tensor"),
        ("without", "'without', which the score does not depend on"),
        ("unused", "'unused', which the forward never calls"),
    ],
)
def test_a_layer_without_a_map_is_refused(layer: str, message: str) -> None:
    recipe = GradCAM(Aside(), layer, target=0)
    with pytest.raises(cg.ArgumentTypeError, match=message):
        recipe(pictures())
    with pytest.raises(cg.ArgumentTypeError, match=message):
        cg.export(recipe, (pictures(),))


class Made(nn.Module):
    """A classifier whose output something else is made of."""

    def __init__(self, change) -> None:
        super().__init__()
        self.network, self.change = classifier(), change

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> object:
        return self.change(self.network(x))


@pytest.mark.parametrize("recipe", ["saliency", "integrated-gradients", "fgsm", "pgd", "guided-diffusion", "forces"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: {"logits": logits}, "output is dict, expected"),
        (lambda logits: (logits, logits), "output is tuple, expected"),
        (lambda logits: logits.detach(), "output does not depend on its input"),
        (lambda logits: torch.ones(3, 4, requires_grad=True), "output does not depend on its input"),
    ],
)
def test_a_network_without_a_score_or_a_gradient_is_refused(recipe: str, change, message: str) -> None:
    prepared = prepare(recipe, classifier(), pictures(), RecipeOptions(steps=1))
    module, made = prepared.module, Made(change).eval()
    for name in ("network", "classifier", "energy"):
        if hasattr(module, name):
            setattr(module, name, made)
    with pytest.raises(cg.ArgumentTypeError, match=message):
        module(*prepared.args)
    with pytest.raises(cg.ArgumentTypeError, match=message):
        cg.export(module, prepared.args)


@pytest.mark.parametrize("recipe", ["saliency", "fgsm", "forces"])
def test_pictures_without_a_gradient_are_refused(recipe: str) -> None:
    prepared = prepare(recipe, nn.Sequential(nn.Flatten(), nn.Linear(504, 4)), pictures(), RecipeOptions())
    x, *others = prepared.args
    with pytest.raises(cg.ArgumentTypeError, match=r"x is of torch.uint8, expected a tensor of floating-point numbers"):
        prepared.module((x * 255).byte(), *others)
    with torch.inference_mode(), pytest.raises(cg.ArgumentTypeError, match="inference_mode"):
        prepared.module(*prepared.args)


@pytest.mark.parametrize("recipe", ["fgsm", "pgd", "guided-diffusion"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda label: label[:1], r"label has shape \(1,\), expected \(3,\): a class for each sample"),
        (lambda label: label[:, None], r"label has shape \(3, 1\)"),
        (lambda label: label.float(), "label is of torch.float32, expected an int64 tensor of classes"),
        (lambda label: label.tolist(), "label is a list"),
        (lambda label: label + 4, "label holds a class that the network does not have, it has 4"),
        (lambda label: label - 5, "label holds a class that the network does not have"),
    ],
)
def test_labels_are_one_class_for_each_picture(recipe: str, wrong, message: str) -> None:
    step = prepare(recipe, classifier(), pictures(), RecipeOptions())
    *others, label = step.args
    with pytest.raises(cg.ArgumentTypeError, match=message):
        step.module(*others, wrong(label))


@pytest.mark.parametrize(("recipe", "name"), [("pgd", "original"), ("integrated-gradients", "baseline")])
def test_what_lies_beside_the_pictures_has_their_shape(recipe: str, name: str) -> None:
    """Two originals for one picture gave two pictures."""
    module, (x, _, *labels), *_ = vars(prepare(recipe, classifier(), pictures(), RecipeOptions(steps=2))).values()
    whole = module(x, torch.zeros_like(x), *labels)
    torch.testing.assert_close(module(x, torch.zeros(3, 1, 1), *labels), whole)
    for wrong in (torch.zeros(2, 3, 12, 14), torch.zeros(1, 3, 3, 12, 14), torch.zeros(3, 12, 1, 14, 1)):
        with pytest.raises(cg.ArgumentTypeError, match=rf"{name} has shape .*, expected \(3, 3, 12, 14\)"):
            module(x, wrong, *labels)
    with pytest.raises(cg.ArgumentTypeError, match=rf"{name} is a float, expected a tensor"):
        module(x, 0.0, *labels)


def test_a_layer_that_is_no_name_is_refused() -> None:
    for layer in (["twice"], torch.ones(2)):
        with pytest.raises(cg.ArgumentTypeError, match="layer is "):
            GradCAM(Aside(), layer)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_the_options_that_it_names(recipe: str) -> None:
    read = set()

    class Recorded(RecipeOptions):
        def __getattribute__(self, name: str) -> object:
            read.add(name)
            return super().__getattribute__(name)

    options = Recorded(layer="3")
    read.clear()
    RECIPES[recipe].prepare(classifier(), pictures(), options)
    assert read == set(RECIPES[recipe].options)


@pytest.mark.parametrize("label", [[-1, 0], [0, 4]])
def test_exported_recipes_refuse_labels_that_are_no_class(label: list[int]) -> None:
    """ONNX counts a negative index from the end; of a gradient alone the loss, and its check, would be left out."""
    network = classifier()
    x, labels, scalars = torch.rand(2, 3, 8, 8), torch.tensor([1, 3]), (torch.tensor(0.5), torch.tensor(0.6))
    attacked = cg.export(FGSM(network), (x, labels))
    session = cg.GradientSession(attacked.model)
    session.run(dict(zip(session.input_names, (x, labels), strict=True)))
    with pytest.raises(Exception, match=r"GatherElements|ScatterElements"):
        session.run(dict(zip(session.input_names, (x, torch.tensor(label)), strict=True)))
    guided = cg.export(GuidedDiffusionStep(Denoiser(), network), (x, torch.rand(2), *scalars, labels))
    session = cg.GradientSession(guided.model)
    with pytest.raises(Exception, match=r"GatherElements|ScatterElements"):
        session.run(dict(zip(session.input_names, (x, torch.rand(2), *scalars, torch.tensor(label)), strict=True)))
