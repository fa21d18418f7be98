"""The picture of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import raise_missing
from .run import TrainingResult


def pyplot() -> Any:
    """matplotlib's pyplot, for writing files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError as error:
        raise_missing(error)
    return matplotlib.pyplot


def plot(result: TrainingResult, path: Path) -> Path:
    """Losses by onnxruntime and PyTorch, their distance in units of the bound, and the accuracy, as a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    steps = np.arange(1, len(result.losses) + 1)
    left.semilogy(steps, result.losses, label="onnxruntime", linewidth=1.6)
    if result.torch_losses:
        left.semilogy(steps, result.torch_losses, "--", label="PyTorch", linewidth=1.0)
    left.set(xlabel="step", ylabel="training loss", title="loss")
    left.legend()
    if result.curves is not None:
        ratios = result.curves.ratios
        middle.plot(np.arange(1, len(ratios) + 1), ratios)
        middle.axhline(1.0, color="red", linewidth=0.8)
        middle.set(xlabel="step", ylabel="error / bound", title="distance from float64, in units of the bound", ylim=0)
    else:
        middle.axis("off")
    if result.epoch_accuracy:
        epochs = np.arange(1, len(result.epoch_accuracy) + 1)
        right.plot(epochs, result.epoch_accuracy, "o-", label="onnxruntime")
        if result.torch_accuracy is not None:
            right.axhline(result.torch_accuracy, linestyle="--", color="tab:orange", label="PyTorch at the end")
        right.set(xlabel="epoch", ylabel="test accuracy", title="accuracy")
        right.legend()
    else:
        right.axis("off")
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path
