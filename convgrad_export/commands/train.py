"""`convgrad train`: train on onnxruntime, beside PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    output: Annotated[Path, options.output("Folder for models, states and the plot.")] = Path("training"),
    module: Annotated[
        str | None, typer.Option(help="package.module:Name of your network; by default a CNN for 8x8 digits.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="An .npz with x and y (and x_test, y_test); by default scikit-learn's digits.")
    ] = None,
    loss: Annotated[
        str, typer.Option(help="cross_entropy, bce_with_logits, mse, l1, huber, smooth_l1 or nll.")
    ] = "cross_entropy",
    optimizer: Annotated[str, typer.Option(help="sgd, adam, adamw or rmsprop.")] = "adamw",
    learning_rate: Annotated[float, typer.Option(help="A runtime input of the exported step.")] = 2e-3,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 15,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 32,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, help="Of the initial weights, the batches' order and dropout.")
    ] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of onnxruntime and PyTorch.")] = None,
    compare: Annotated[int, typer.Option(min=0, help="Steps compared with PyTorch; 0 leaves PyTorch out.")] = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: options.Json = False,
) -> None:
    """Train a network on onnxruntime alone, and compare with PyTorch from the same state on the same batches."""
    import torch

    from ..files import check_folder, check_output
    from ..training.data import read_dataset
    from ..training.plot import plot, pyplot
    from ..training.run import TrainingSettings
    from ..training.run import train as run

    check_folder(output)
    names = ("step.onnx", "step.checkpoint.safetensors", "trained.safetensors", "trained.onnx", "training.png")
    for name in names if output.exists() else ():
        check_output(output / name, overwrite=overwrite)
    pyplot()  # what is missing shows before the training, not after it
    torch.manual_seed(seed)
    if module is None:
        from ..training.digits import DigitsNetwork

        network: Any = DigitsNetwork()
    else:
        network = options.load_network(module)
    if data is None:
        from ..training.digits import load_digits

        dataset = load_digits()
    else:
        dataset = read_dataset(data)
    settings = TrainingSettings(
        loss, optimizer, learning_rate, epochs, batch_size, seed, threads, compare, overwrite=overwrite
    )
    with options.progress("training", as_json, thread=True) as show:
        result = run(network, dataset, output, settings, lambda step, of, loss: show(step, of, f"loss {loss:.4f}"))
    result.files["plot"] = plot(result, output / "training.png")
    _print(result, as_json)
    if result.curves is not None and not result.curves.within:
        raise typer.Exit(1)


def _print(result: Any, as_json: bool) -> None:
    curves = result.curves
    report = {
        "steps": result.steps,
        "loss": result.losses[-1],
        "accuracy": result.accuracy,
        "seconds": round(result.seconds, 3),
        "steps_per_second": round(result.steps / result.seconds, 1),
        "torch": None
        if curves is None
        else {
            "loss": result.torch_losses[-1],
            "accuracy": result.torch_accuracy,
            "seconds": round(result.torch_seconds, 3),
            "steps_per_second": round(result.steps / result.torch_seconds, 1),
        },
        "compared_steps": 0 if curves is None else len(curves.exported),
        "worst_error": None if curves is None else float(curves.ratios.max()),
        "within_bound": None if curves is None else curves.within,
        "files": {name: str(path) for name, path in result.files.items()},
    }
    if as_json:
        options.print_json(report)
        return
    from rich.table import Table

    table = Table(title=f"{result.steps} steps")
    for heading in ("", "last loss", "test accuracy", "steps per second"):
        table.add_column(heading)
    rows: list[tuple[str, dict[str, Any]]] = [("onnxruntime", report)]
    if report["torch"] is not None:
        rows.append(("PyTorch eager", report["torch"]))
    for name, row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.2%}"
        table.add_row(name, f"{row['loss']:.5f}", accuracy, f"{row['steps_per_second']:.0f}")
    options.print_table(table)
    if curves is not None:
        verdict = "within" if curves.within else "OUTSIDE"
        typer.echo(
            f"first {len(curves.exported)} losses {verdict} the bound of PyTorch's own rounding: worst "
            f"{curves.ratios.max():.2f} of it"
        )
    for name, path in result.files.items():
        typer.echo(f"{name}: {path}")
