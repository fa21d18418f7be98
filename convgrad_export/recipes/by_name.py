"""Recipes by the names of the command line, with the example arguments that each needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentTypeError, CaptureError, in_one_line
from .attack import FGSM, PGD
from .attribution import GradCAM, IntegratedGradients, Saliency
from .diffusion import GuidedDiffusionStep
from .forces import Forces


@dataclass(frozen=True)
class RecipeOptions:
    """Options of the command line; each recipe takes what it knows."""

    target: int | None = None
    layer: str | None = None
    steps: int = 16
    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    scale: float = 1.0


@dataclass(frozen=True)
class Prepared:
    """A module to export, with what a command needs to know of it.

    Attributes:
        module, args: to export with, by example. batched: which of the arguments have the batch as their first axis.
        float64_bytes: what a run in float64 holds at once, at least; 0 where that is no more than the network's own.
    """

    module: nn.Module
    args: tuple[Tensor, ...]
    batched: tuple[bool, ...]
    float64_bytes: int = 0


def _run(network: nn.Module, x: Tensor) -> Any:
    try:
        return network(x)
    except Exception as error:  # the user's own code can raise anything
        raise CaptureError(
            f"{type(network).__name__} cannot run on an input of shape {tuple(x.shape)}: "
            f"{type(error).__name__}: {in_one_line(error)}"
        ) from error


def _labels(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scores = _run(network, x)
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        raise ArgumentTypeError("the recipe needs a classifier: an output of shape (batch, classes)")
    return scores.argmax(1)


def _saliency(network: nn.Module, x: Tensor, o: RecipeOptions) -> Prepared:
    return Prepared(Saliency(network, o.target), (x,), (True,))


def _gradcam(network: nn.Module, x: Tensor, o: RecipeOptions) -> Prepared:
    if o.layer is None:
        raise ArgumentTypeError("gradcam needs a layer: --layer NAME, as in dict(module.named_modules())")
    return Prepared(GradCAM(network, o.layer, o.target), (x,), (True,))


def _integrated(network: nn.Module, x: Tensor, o: RecipeOptions) -> Prepared:
    module = IntegratedGradients(network, o.target, o.steps)
    held = 8 * o.steps * _elements_held(network, x)  # all steps are one batch
    return Prepared(module, (x, torch.zeros_like(x)), (True, True), held)


def _elements_held(network: nn.Module, x: Tensor) -> int:
    """How many numbers a forward keeps for its backward, beside the network's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and place not in own:
            held[place] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _run(network, x.detach().requires_grad_())
    return sum(held.values())


def _fgsm(network: nn.Module, x: Tensor, o: RecipeOptions) -> Prepared:
    return Prepared(FGSM(network, o.epsilon), (x, _labels(network, x)), (True, True))


def _pgd(network: nn.Module, x: Tensor, o: RecipeOptions) -> Prepared:
    return Prepared(PGD(network, o.epsilon, o.step_size), (x, x.clone(), _labels(network, x)), (True, True, True))


def _forces(network: nn.Module, x: Tensor, o: RecipeOptions) -> Prepared:
    return Prepared(Forces(network), (x,), (True,))


class _BlurDenoiser(nn.Module):
    """Noise as what a 5x5 mean takes away: a denoiser for trying guidance out without trained weights."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x - nn.functional.avg_pool2d(nn.functional.pad(x, (2, 2, 2, 2), mode="reflect"), 5, 1)


def _guided(network: nn.Module, x: Tensor, o: RecipeOptions) -> Prepared:
    module = GuidedDiffusionStep(_BlurDenoiser(), network, o.scale)
    timestep = torch.full([x.shape[0]], 500)
    alphas = (torch.tensor(0.5, dtype=x.dtype), torch.tensor(0.6, dtype=x.dtype))
    args = (x, timestep, *alphas, _labels(network, x))
    return Prepared(module, args, (True, True, False, False, True))


@dataclass(frozen=True)
class Recipe:
    """What the command line knows of a recipe.

    Attributes:
        prepare: puts it around a network, and makes arguments to go with an input.
        options: the fields of `RecipeOptions` that it takes.
    """

    prepare: Callable[[nn.Module, Tensor, RecipeOptions], Prepared]
    options: tuple[str, ...] = ()


RECIPES: Mapping[str, Recipe] = {
    "saliency": Recipe(_saliency, ("target",)),
    "gradcam": Recipe(_gradcam, ("target", "layer")),
    "integrated-gradients": Recipe(_integrated, ("target", "steps")),
    "fgsm": Recipe(_fgsm, ("epsilon",)),
    "pgd": Recipe(_pgd, ("epsilon", "step_size")),
    "guided-diffusion": Recipe(_guided, ("scale",)),
    "forces": Recipe(_forces),
}


def used_options(recipe: str) -> set[str]:
    """The fields of `RecipeOptions` that a recipe takes.

    Raises:
        ArgumentTypeError: an unknown recipe.
    """
    return set(_known(recipe).options)


def prepare(recipe: str, network: nn.Module, x: Tensor, options: RecipeOptions) -> Prepared:
    """A recipe around a network, in evaluation mode.

    Raises:
        ArgumentTypeError: an unknown recipe, a missing option, or a network that does not fit. CaptureError: the
            network cannot run on `x`.
    """
    return _known(recipe).prepare(network.eval(), x, options)


def _known(name: str) -> Recipe:
    if name not in RECIPES:
        raise ArgumentTypeError(f"recipe is {name!r}, expected one of: {', '.join(RECIPES)}")
    return RECIPES[name]
