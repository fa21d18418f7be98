"""Which parts of a picture a prediction rests on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..arguments import as_bool, as_int
from ..errors import ArgumentTypeError, GeometryError
from .scores import check_beside, check_network, check_target, class_score, input_gradient

_MOST_STEPS = 2**23  # the halves between them are the last that float32 counts


class Saliency(nn.Module):
    """Largest gradient magnitude over the colours (Simonyan et al., arXiv:1312.6034, section 3).

    Args:
        network: (N, C, *I) to (N, classes). target: class index; None takes the best class of each picture.

    forward(x) gives shape (N, *I).
    """

    def __init__(self, network: nn.Module, target: int | None = None) -> None:
        super().__init__()
        self.network, self.target = check_network(network), check_target(target)

    def forward(self, x: Tensor) -> Tensor:
        return input_gradient(self.network, x, self.target).abs().amax(1)


class GradCAM(nn.Module):
    """Class activation map of one layer (Selvaraju et al., arXiv:1610.02391, equations 1 and 2).

    Args:
        network: (N, C, H, W) to (N, classes). layer: name of a submodule whose output is (N, K, h, w).
        target: as for `Saliency`. resize: enlarge the map to the picture, bilinearly.

    forward(x) gives shape (N, H, W), or (N, h, w) without `resize`.

    Raises:
        ArgumentTypeError: no module, or no such layer; when called, a layer whose output is no (N, K, h, w) tensor, or
            that the class's score does not depend on.
    """

    def __init__(self, network: nn.Module, layer: str, target: int | None = None, resize: bool = True) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ArgumentTypeError(f"network is a {type(network).__name__}, expected a torch.nn.Module")
        names: Mapping[str, nn.Module] = dict(network.named_modules())
        if not isinstance(layer, str) or layer not in names or not layer:
            known = ", ".join(name for name in list(names)[1:13])
            raise ArgumentTypeError(f"layer is {layer!r:.80}, which the network does not have; its first ones: {known}")
        self.network, self.layer, self.target = network, layer, check_target(target)
        self.resize = as_bool(resize, "resize")

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: object) -> Tensor:
            if not isinstance(output, Tensor) or output.dim() != 4:
                got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ArgumentTypeError(
                    f"layer {self.layer!r} gives {got}, expected one tensor (batch, channels, h, w)"
                )
            kept.append(output if output.requires_grad else output.detach().requires_grad_())
            return kept[-1].clone()  # an in-place ReLU after it would change the kept one

        handle = self.network.get_submodule(self.layer).register_forward_hook(keep)
        try:
            with torch.enable_grad():
                score = class_score(self.network(x), self.target)
                (gradient,) = torch.autograd.grad(score, kept[-1], allow_unused=True) if kept else (None,)
        finally:
            handle.remove()
        if gradient is None:
            what = "the score does not depend on" if kept else "the forward never calls"
            raise ArgumentTypeError(f"layer is {self.layer!r}, which {what}: choose one on the way to the output")
        weights = gradient.mean((2, 3), keepdim=True)
        cam = torch.relu((weights * kept[-1].detach()).sum(1, keepdim=True))
        if self.resize:
            cam = nn.functional.interpolate(cam, size=x.shape[2:], mode="bilinear", align_corners=False)
        return cam[:, 0]


class IntegratedGradients(nn.Module):
    """Gradients summed along the line from a baseline (Sundararajan et al., arXiv:1703.01365, equation 3).

    Args:
        network, target: as for `Saliency`; a fixed target makes the attributions add up to the score's change.
        steps: points on the line, midpoint rule. All are one batch, so memory grows with them.

    forward(x, baseline) gives the attribution of each input element, shape of x; the baseline broadcasts to it.

    Raises:
        GeometryError: fewer steps than 1, or more than float32 has different points for.
    """

    def __init__(self, network: nn.Module, target: int | None = None, steps: int = 16) -> None:
        super().__init__()
        self.network, self.target = check_network(network), check_target(target)
        self.steps: int = as_int(steps, "steps", minimum=1)
        if self.steps > _MOST_STEPS:
            raise GeometryError(
                f"steps is {self.steps}, expected at most {_MOST_STEPS}: float32 tells no more points of a line apart. "
                "They are one batch: tens to a few hundred are usual"
            )

    def forward(self, x: Tensor, baseline: Tensor) -> Tensor:
        check_beside(baseline, x, "baseline")
        along = (torch.arange(self.steps, dtype=x.dtype, device=x.device) + 0.5) / self.steps
        along = along.reshape([self.steps, *[1] * x.dim()])
        points = baseline + along * (x - baseline)  # (steps, N, C, ...)
        gradients = input_gradient(self.network, points.flatten(0, 1), self.target)
        return (x - baseline) * gradients.unflatten(0, (self.steps, x.shape[0])).mean(0)
