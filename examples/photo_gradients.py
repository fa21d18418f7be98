"""The two gradients of a convolution layer over real photographs, as ONNX models on onnxruntime, beside torch.nn.grad.

    python examples/photo_gradients.py [--out FOLDER] [--rounds 20]

The layer is a bank of 32 colour Gabor filters (11x11, stride 2): edges and bars at 8 orientations and 2 scales, in
brightness and in colour. The scalar that is differentiated is half the energy of the rectified responses, so
grad_output is the rectified response itself, and the input gradient is large where the photographs have edges. The
script writes `input_gradient.onnx`, `weight_gradient.onnx` and `photo_gradients.png`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import onnx
import torch
from sklearn.datasets import load_sample_image

import convgrad_export as cg
from convgrad_export.accuracy import compare, reference_and_bounds
from convgrad_export.geometry import ConvGeometry
from convgrad_export.timing import alternate, timed

STRIDE, PADDING, KERNEL = 2, 5, 11


def gabor_filters() -> torch.Tensor:
    """32 filters of unit norm, [32, 3, 11, 11]: 8 orientations x 2 wavelengths x (brightness, red against blue)."""
    axis = torch.arange(KERNEL) - KERNEL // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0]])
    filters = []
    for wavelength in (4.0, 8.0):
        for step in range(8):
            angle = math.pi * step / 8
            across = x * math.cos(angle) + y * math.sin(angle)
            wave = torch.exp(-(x**2 + y**2) / (2 * (wavelength / 2) ** 2)) * torch.sin(
                2 * math.pi * across / wavelength
            )
            filters += [colour[:, None, None] * wave for colour in colours]
    bank = torch.stack(filters)
    return bank / bank.flatten(1).norm(dim=1)[:, None, None, None]


def photographs() -> torch.Tensor:
    """scikit-learn's two sample photographs, shape [2, 3, 427, 640], values in [0, 1]."""
    images = [torch.tensor(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return torch.stack(images).permute(0, 3, 1, 2).float().div(255).contiguous()


def draw(images: torch.Tensor, gradient: torch.Tensor, path: Path) -> None:
    magnitude = gradient.norm(dim=1)
    figure, axes = plt.subplots(2, 2, figsize=(12.8, 8.6), layout="constrained")
    for row, image, values in zip(axes, images, magnitude, strict=True):
        row[0].imshow(image.permute(1, 2, 0))
        row[0].set_title("photograph")
        shown = row[1].imshow(values, cmap="magma", vmax=values.quantile(0.995).item())
        row[1].set_title("magnitude of the input gradient (onnxruntime)")
        figure.colorbar(shown, ax=row[1], shrink=0.8)
        for ax in row:
            ax.axis("off")
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("photo_gradients"), help="folder for models and picture")
    parser.add_argument("--rounds", type=int, default=20, help="timing rounds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    images, weight = photographs(), gabor_filters()
    output = torch.nn.functional.conv2d(images, weight, stride=STRIDE, padding=PADDING)
    grad_output = output.relu()
    operands = {"input": images, "weight": weight, "grad_output": grad_output}
    print(
        f"layer: Conv2d(3, 32, kernel_size={KERNEL}, stride={STRIDE}, padding={PADDING}) over {tuple(images.shape)}\n"
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"medians of {options.rounds} alternating rounds\n"
    )
    geometry = ConvGeometry.from_forward(images.shape, weight.shape, STRIDE, PADDING)
    exact = reference_and_bounds(geometry, {k: v.double().numpy() for k, v in operands.items()}, "float32", "float32")

    failed = False
    results = {}
    shape_of = {"input": images.shape, "weight": weight.shape}
    torch_gradients = {
        "input": lambda: torch.nn.grad.conv2d_input(images.shape, weight, grad_output, STRIDE, PADDING),
        "weight": lambda: torch.nn.grad.conv2d_weight(images, weight.shape, grad_output, STRIDE, PADDING),
    }
    print("gradient lowering                           onnxruntime  torch.nn.grad  ratio  error / bound (torch's)")
    for gradient, in_torch in torch_gradients.items():
        model = cg.build_model(
            f"conv2d_{gradient}",
            input_shape=shape_of["input"],
            weight_shape=shape_of["weight"],
            stride=STRIDE,
            padding=PADDING,
        )
        path = options.out / f"{gradient}_gradient.onnx"
        onnx.save(model, path)
        session = cg.GradientSession(path, threads=torch.get_num_threads())
        feeds = {name: operands[name] for name in session.input_names}
        (results[gradient],) = session.run(feeds).values()
        ours = compare(results[gradient].numpy(), *exact[gradient])
        theirs = compare(in_torch().numpy(), *exact[gradient])
        failed = failed or not ours.within
        turns = {"ours": timed(lambda s=session, f=feeds: s.run(f)), "torch": timed(in_torch)}
        timings = alternate(turns, options.rounds, math.inf, always=tuple(turns)).timings
        mine, eager = (statistics.median(timings[name].values) for name in turns)
        lowering = next(item.value for item in model.metadata_props if item.key == "convgrad.lowering")
        print(
            f"{gradient:<8} {lowering:<33} {mine:>9.1f} ms {eager:>11.1f} ms {eager / mine:>5.2f}x  "
            f"{ours.worst:.3f} ({theirs.worst:.3f})"
        )
    draw(images, results["input"], options.out / "photo_gradients.png")
    print("\nwritten:", *sorted(str(path) for path in options.out.iterdir()), sep="\n  ")
    print(
        "FAILED: an error exceeds its bound"
        if failed
        else "Both gradients agree with float64 autograd within the bound."
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
