"""`convgrad serve-repo`: a model repository for inference servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ServingConfigError
from . import options


def register(app: typer.Typer) -> None:
    app.command("serve-repo")(serve_repo)


def serve_repo(
    models: Annotated[list[Path], typer.Argument(help="Exported .onnx files.", metavar="MODEL...")],
    output: Annotated[Path, options.output("The repository: a folder, new or existing.")],
    name: Annotated[str | None, typer.Option(help="Of the model, for one file; by default the file's name.")] = None,
    backend: Annotated[
        str,
        typer.Option(help="onnxruntime (NVIDIA's containers), or python: a model.py that opens onnxruntime."),
    ] = "onnxruntime",
    max_batch_size: Annotated[
        int | None, typer.Option(help="0: no batch dimension. By default 8 where the model has one.")
    ] = None,
    dynamic_batching: Annotated[
        bool | None,
        typer.Option(
            "--dynamic-batching/--no-dynamic-batching",
            help="Merge requests. By default where a run shows that rows of a batch do not influence one another.",
        ),
    ] = None,
    preferred_batch_sizes: Annotated[str, typer.Option(help="Batches to form: 4,8.")] = "",
    queue_delay_us: Annotated[int, typer.Option(help="Microseconds that a request waits for company.")] = 500,
    instances: Annotated[int, typer.Option(help="Copies of the model that run side by side.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or gpu.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="onnxruntime's intra-op threads of each instance.")] = None,
    graph_optimization: Annotated[str, typer.Option(help="all, extended, basic or none.")] = "all",
    labels: Annotated[Path | None, typer.Option(help="A text file with one class name a line.")] = None,
    label_output: Annotated[str | None, typer.Option(help="The output that --labels names the classes of.")] = None,
    warmup: Annotated[str, typer.Option(help="none, zero, random, or an .npz with one array for each input.")] = "none",
    size: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of a dynamic dimension; repeatable.")] = None,
    versions: Annotated[int, typer.Option(help="Newest versions to serve; 0 for all.")] = 1,
    update_config: Annotated[
        bool, typer.Option("--update-config", help="Replace an existing model's config.pbtxt where options differ.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write or extend a Triton-style model repository, which MLServer serves as well."""
    from ..serving.options import ServingOptions
    from ..serving.repository import add_model
    from ..serving.signature import read_signature

    if name is not None and len(models) > 1:
        raise ServingConfigError(f"--name is {name!r}, but {len(models)} models are given: name one at a time")
    if len({path.name for path in models}) < len(models):
        raise ServingConfigError("two models have one file name, which would make them versions of one model")
    preferred = options.integers(preferred_batch_sizes, "--preferred-batch-sizes") if preferred_batch_sizes else ()
    settings = ServingOptions(
        backend=backend,
        max_batch_size=max_batch_size,
        dynamic_batching=dynamic_batching,
        preferred_batch_sizes=preferred,
        queue_delay_us=queue_delay_us,
        instances=instances,
        device=device,
        threads=threads,
        graph_optimization=graph_optimization,
        labels=labels,
        label_output=label_output,
        warmup=warmup,
        sizes=_sizes(size or []),
        versions=versions,
    )
    signatures = [read_signature(path) for path in models]  # all of them readable before the first is written
    known = {size for model in signatures for tensor in model.inputs for size in tensor.shape if isinstance(size, str)}
    if unknown := [name for name in settings.sizes if name not in known]:
        raise ServingConfigError(
            f"--size names {', '.join(unknown)}, which no input has, expected some of: "
            f"{', '.join(sorted(known)) or 'none, all sizes are fixed'}"
        )
    entries = [add_model(path, output, settings, name=name, update_config=update_config) for path in models]
    if as_json:
        options.print_json({"repository": str(output), "models": [entry.to_dict() for entry in entries]})
        return
    from rich.table import Table

    table = Table(title=f"{output}: {len(entries)} models")
    for heading in ("model", "version", "inputs", "outputs", "largest batch", "merged", "notes"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        tensors = ("\n".join(f"{key} {value}" for key, value in side.items()) for side in (entry.inputs, entry.outputs))
        merged = "yes" if entry.dynamic_batching else "no"
        table.add_row(
            entry.name, str(entry.version), *tensors, str(entry.max_batch_size or "-"), merged, "\n".join(entry.notes)
        )
    options.print_table(table)


def _sizes(texts: list[str]) -> dict[str, int]:
    result = {}
    for text in texts:
        name, separator, value = text.rpartition("=")
        if not separator or not name or not (value.isascii() and value.isdecimal()):
            raise ServingConfigError(f"--size is {text!r}, expected NAME=VALUE such as height=224")
        result[name] = options.integers(value, "--size", ServingConfigError)[0]
    return result
