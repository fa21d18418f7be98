"""`convgrad export`: a network's gradients, or a recipe around it, as an ONNX file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ArgumentTypeError, GeometryError, in_one_line
from . import options


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    context: typer.Context,
    module: Annotated[str, typer.Argument(help="package.module:Name, a torch.nn.Module or what makes one.")],
    output: Annotated[Path, options.output("File to write.")],
    input_shape: Annotated[str, typer.Option(help="Of the first argument: N,C,H,W.")] = "1,3,224,224",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="saliency, gradcam, integrated-gradients, fgsm, pgd, guided-diffusion or forces; without one the "
            "gradients named by --wrt are exported."
        ),
    ] = None,
    wrt: Annotated[str, typer.Option(help="inputs, parameters, or names of them or of layers, by commas.")] = "inputs",
    of: Annotated[str, typer.Option(help="sum, vjp, or a class index: what is differentiated.")] = "sum",
    target: Annotated[int | None, typer.Option(help="Class of a recipe; the best one by default.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer of gradcam.")] = None,
    steps: Annotated[int, typer.Option(help="Points of integrated-gradients.")] = 16,
    epsilon: Annotated[float, typer.Option(help="Of fgsm and pgd.")] = 8 / 255,
    step_size: Annotated[float, typer.Option(help="Of pgd.")] = 2 / 255,
    scale: Annotated[float, typer.Option(help="Of guided-diffusion.")] = 1.0,
    weights: Annotated[Path | None, typer.Option(help="A .safetensors file with the state_dict.")] = None,
    dynamic: Annotated[str, typer.Option(help="Of batch, height, width; by commas; empty for none.")] = "batch",
    train_mode: Annotated[bool, typer.Option("--train-mode", help="Export in training mode.")] = False,
    opset: options.Opset = 18,
    lowering: Annotated[str, typer.Option(help="auto, or a name that `convgrad lowerings` lists.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads the lowerings are for; several by default.")] = None,
    max_error_factor: options.MaxErrorFactor = 2.0,
    verify: Annotated[bool, typer.Option(help="Compare with float64 eager before writing.")] = True,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, help="Of random weights and the example input.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    runs_on: Annotated[
        str | None, typer.Option("--runs-on", help="web or webgpu: refuse what onnxruntime-web cannot load.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Export gradients of a network by its dotted name, verified, with a report."""
    import torch

    from ..integrations import onnx_export
    from ..integrations.saving import check_path
    from ..recipes.by_name import RecipeOptions, prepare, used_options

    check_path(output, overwrite)
    own = {field.name for field in fields(RecipeOptions)}
    if recipe is None:
        options.refuse_given(context, own, "it is for a --recipe (a class is --of, a layer --wrt)", ArgumentTypeError)
    else:
        unused = (own - used_options(recipe)) | {"wrt", "of", "train_mode"}
        options.refuse_given(context, unused, f"the recipe {recipe} does not take it", ArgumentTypeError)
    torch.manual_seed(seed)
    network = options.load_network(module).train(train_mode)
    if weights is not None:
        _load_weights(network, weights)
    x = _random(input_shape, network)
    common: dict[str, Any] = {
        "opset_version": opset,
        "lowering": lowering,
        "threads": threads,
        "max_error_factor": max_error_factor,
        "verify": verify,
        "overwrite": overwrite,
        "target": runs_on,
        "progress": False if as_json else None,
    }
    sizes = _dynamic_axes(dynamic, x.dim())
    if recipe is not None:
        choice = RecipeOptions(target, layer, steps, epsilon, step_size, scale)
        prepared = prepare(recipe, network, x, choice)
        if verify:
            _check_memory(prepared.float64_bytes, steps)
        shapes = tuple(
            (sizes if value.dim() == x.dim() else {k: v for k, v in sizes.items() if k == 0}) or None
            if batched
            else None
            for value, batched in zip(prepared.args, prepared.batched, strict=True)
        )
        report = onnx_export.export(prepared.module, prepared.args, output, dynamic_shapes=shapes, **common)
    else:
        names = list(options.words(wrt))
        scalar: Any = int(of) if of.removeprefix("-").isdecimal() else of
        report = onnx_export.export_gradient(
            network, (x,), output, wrt=names, of=scalar, dynamic_shapes=(sizes or None,), **common
        )
    if as_json:
        options.print_json(report.to_dict())
    else:
        _print(report)


# Times what one forward holds for its backward: gradients, copies, runs at larger batches. 4 was measured for a network
# of 25 layers, 10 for one of three.
_COMPARISON = 4


def _check_memory(held: int, steps: int) -> None:
    """Refuse a comparison for whose memory the system would end the process."""
    from ..selection.runner import available_bytes

    available, wanted = available_bytes(), _COMPARISON * held
    if available is not None and wanted > available:
        raise GeometryError(
            f"--steps is {steps}, all of which are one batch: comparing it with float64 takes {wanted / 2**30:.3g} GiB "
            f"or more, and {available / 2**30:.3g} are free. Take fewer steps, a smaller --input-shape, or --no-verify"
        )


def _random(input_shape: str, network: Any) -> Any:
    """An example in the element type of the network's parameters."""
    import torch

    dtypes = (tensor.dtype for tensor in network.parameters() if tensor.is_floating_point())
    try:
        return torch.rand(options.sizes(input_shape, "--input-shape")).to(next(dtypes, torch.float32))
    except RuntimeError as error:  # of a size that this machine's memory does not hold
        raise GeometryError(
            f"--input-shape is {input_shape!r}, of which no tensor can be made: {in_one_line(error)}"
        ) from error


def _dynamic_axes(text: str, rank: int) -> dict[int, str]:
    axes = {"batch": 0} | ({"width": rank - 1} if rank > 2 else {}) | ({"height": rank - 2} if rank > 3 else {})
    names = options.words(text)
    if unknown := [name for name in names if name not in axes]:
        raise ArgumentTypeError(
            f"--dynamic names {', '.join(unknown)}, expected some of {', '.join(axes)}: the input has {rank} dimensions"
        )
    return {axes[name]: name for name in names}


def _load_weights(network: Any, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..errors import ModelFileError

    if path.is_dir():
        raise ModelFileError(f"--weights {path} cannot be read as safetensors: it is a folder")
    try:
        state = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelFileError(f"--weights {path} cannot be read as safetensors: {error}") from error
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelFileError(f"--weights {path} does not fit the network: {in_one_line(error)}") from error


def _print(report: Any) -> None:
    from rich.table import Table

    summary = report.to_dict()
    table = Table(title=f"{report.path}: opset {report.opset}, {sum(report.operators.values())} nodes")
    table.add_column("")
    table.add_column("", overflow="fold")
    for title, values in (("inputs", report.inputs), ("outputs", report.outputs)):
        shown = [f"{name} ({', '.join(map(str, shape))})" for name, shape in values.items()]
        more = f"\nand {len(shown) - 6} more" if len(shown) > 6 else ""
        table.add_row(title, "\n".join(shown[:6]) + more)
    table.add_row("operators", ", ".join(f"{name} {count}" for name, count in report.operators.items()))
    chosen: dict[str, int] = {}
    for entry in summary["lowerings"]:
        chosen[entry["lowering"]] = chosen.get(entry["lowering"], 0) + entry["count"]
    table.add_row("lowerings", ", ".join(f"{name} {count}" for name, count in chosen.items()) or "-")
    table.add_row("bytes", ", ".join(f"{name} {size:,}" for name, size in report.sizes.items()))
    table.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items()))
    if report.errors:
        name = max(report.errors, key=lambda key: report.errors[key].relative / report.errors[key].bound)
        table.add_row("verified", report.errors[name].described(name))
    for note in report.notes:
        table.add_row("note", note)
    options.print_table(table)
