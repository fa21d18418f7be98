"""Every recipe on a real photograph: exported to ONNX, run on onnxruntime, compared with eager PyTorch, and drawn.

    python examples/recipes.py [saliency gradcam ...] [--out FOLDER]

The network needs no training: a bank of Gabor filters, whose responses are added up by orientation, so that its 8
classes are "edges at 0, 22.5, ... degrees". Attributions then have a known right answer: the edges of that direction.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import convgrad_export as cg
from convgrad_export.recipes.by_name import RECIPES, Prepared, RecipeOptions, prepare

ORIENTATIONS, KERNEL = 8, 11
SHEET = "recipes.png"  # docs/images/recipes.png in the repository


class OrientationNetwork(nn.Module):
    """Scores of 8 edge orientations: Gabor convolution, squared ReLU, smoothing, mean energy."""

    def __init__(self) -> None:
        super().__init__()
        axis = torch.arange(KERNEL) - KERNEL // 2
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        envelope = torch.exp(-(x**2 + y**2) / 18.0)
        filters = []
        for step in range(ORIENTATIONS):
            angle = math.pi * step / ORIENTATIONS
            wave = envelope * torch.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / 6.0)
            wave = wave / wave.norm()
            filters += [wave.expand(3, -1, -1), -wave.expand(3, -1, -1)]
        self.gabor = nn.Conv2d(3, 2 * ORIENTATIONS, KERNEL, padding=KERNEL // 2, padding_mode="reflect", bias=False)
        self.gabor.weight = nn.Parameter(torch.stack(filters))
        self.features = nn.AvgPool2d(9, stride=4)
        self.classes = nn.Conv2d(2 * ORIENTATIONS, ORIENTATIONS, 1, bias=False)
        grouping = torch.eye(ORIENTATIONS).repeat_interleave(2, 1)
        self.classes.weight = nn.Parameter(grouping[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        energy = self.features(torch.relu(self.gabor(x)).square())
        return 20 * self.classes(energy).mean((2, 3))


def photograph() -> Tensor:
    """The temple of scikit-learn's samples at half size, shape [1, 3, 213, 320], values in [0, 1]."""
    image = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None].float() / 255
    return nn.functional.interpolate(image, size=(213, 320), mode="area")


def show(axes: plt.Axes, image: Tensor | np.ndarray, title: str, **options: object) -> None:
    array = np.asarray(image)
    axes.imshow(array.transpose(1, 2, 0).clip(0, 1) if array.ndim == 3 else array, **options)
    axes.set_title(title, fontsize=10)
    axes.axis("off")


@dataclass(frozen=True)
class Run:
    """A recipe by onnxruntime: what it was given and what it gave."""

    recipe: str
    args: tuple[Tensor, ...]
    results: list[Tensor]
    verified: bool


def draw(run: Run, network: nn.Module, row: Sequence[plt.Axes]) -> None:
    left, middle, right = row
    recipe, photo, result = run.recipe, run.args[0][0], run.results[0]
    show(left, photo, "photograph")
    if recipe in ("saliency", "gradcam"):
        show(middle, result[0], f"{recipe}: vertical edges", cmap="magma", vmax=float(result.quantile(0.995)))
        overlay = photo.mean(0) * 0.5 + 0.5 * result[0] / result.quantile(0.995)
        show(right, overlay, "over the photograph", cmap="magma", vmin=0, vmax=1)
    elif recipe == "integrated-gradients":
        attribution = result[0].sum(0)
        limit = float(attribution.abs().quantile(0.995))
        show(middle, attribution, "attribution to 'vertical edges'", cmap="coolwarm", vmin=-limit, vmax=limit)
        change = network(run.args[0])[0, 0] - network(run.args[1])[0, 0]
        text = f"sum of attributions {attribution.sum():.4f}\nscore - score of the baseline {change.item():.4f}"
        right.text(0.5, 0.5, text, ha="center", va="center", fontsize=12)
        right.axis("off")
    elif recipe == "forces":
        energy, force = run.results
        magnitude = force[0].norm(dim=0)
        show(middle, magnitude, f"force of the energy {energy.sum():.2f}", cmap="magma", vmax=magnitude.quantile(0.995))
        show(right, photo + 200 * force[0] * float(1 / force.abs().max()) / 255, "photograph moved along the force")
    else:
        before, after = (network(image)[0].argmax().item() for image in (run.args[0], result))
        what = "after one guided step" if recipe == "guided-diffusion" else f"attacked by {recipe}"
        show(middle, result[0], f"{what}: class {before} to {after}")
        show(right, 0.5 + (result[0] - photo) * 8, "change, 8 times enlarged")


def picture(runs: Sequence[Run], network: nn.Module, path: Path, dpi: float) -> None:
    """A PNG of 256 colours, one row a recipe."""
    size = (14, 3.5 * len(runs))
    figure, rows = plt.subplots(len(runs), 3, figsize=size, layout="constrained", squeeze=False)
    for run, row in zip(runs, rows, strict=True):
        draw(run, network, row)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    plt.close(figure)
    Image.open(stream).convert("RGB").quantize(256).save(path, optimize=True)


def prepared(recipe: str, network: nn.Module, photo: Tensor) -> Prepared:
    options = RecipeOptions(target=0, layer="features", steps=24, epsilon=16 / 255, step_size=4 / 255, scale=0.2)
    return prepare(recipe, network, photo, options)


def run(recipe: str, network: nn.Module, photo: Tensor, folder: Path) -> Run:
    """Export, run and compare; the difference printed includes signs of gradients that are almost zero."""
    made = prepared(recipe, network, photo)
    path = folder / f"{recipe}.onnx"
    report = cg.export(made.module, made.args, path, overwrite=True, progress=False)
    session = cg.GradientSession(path)
    args = made.args
    repeats = 8 if recipe == "pgd" else 1  # PGD is one step of an iteration
    difference = 0.0
    for _ in range(repeats):
        results = list(session.run(dict(zip(session.input_names, args, strict=True))).values())
        expected = made.module(*args)
        for got, want in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
            difference = max(difference, ((got - want).norm() / want.norm()).item())
        if repeats > 1:
            args = (results[0], *args[1:])
    print(
        f"{recipe:<21} {sum(report.operators.values()):>4} nodes {report.sizes['files']:>7,} bytes  "
        f"verified {report.verified}  relative difference from eager {difference:.1e}"
    )
    return Run(recipe, made.args, results, report.verified)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RECIPES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("recipes"), help="folder for models and pictures")
    options = parser.parse_args()
    if unknown := [name for name in options.recipes if name not in RECIPES]:
        parser.error(f"unknown: {', '.join(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    network, photo = OrientationNetwork().eval(), photograph()
    runs = [run(recipe, network, photo, options.out) for recipe in options.recipes or RECIPES]
    for each in runs:
        picture([each], network, options.out / f"{each.recipe}.png", dpi=75)
    picture(runs, network, options.out / SHEET, dpi=56.25)
    print(f"pictures: {options.out}, all of them in {options.out / SHEET}")
    return int(not all(each.verified for each in runs))


if __name__ == "__main__":
    sys.exit(main())
