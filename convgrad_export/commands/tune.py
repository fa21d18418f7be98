"""`convgrad tune`: measure the lowerings on this machine, for ``lowering="tuned"``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import GeometryError
from . import options

if TYPE_CHECKING:
    from ..selection.tune import TuningReport


def register(app: typer.Typer) -> None:
    app.command("tune")(tune)


def tune(
    target: Annotated[
        str, typer.Argument(help="A model of convgrad build, a folder of them, or package.module:Name (with --shape).")
    ],
    shape: Annotated[str | None, typer.Option("--shape", help="N,C,H,W: input of the module.")] = None,
    batch: Annotated[int | None, typer.Option(help="Measure at this batch size instead of the target's own.")] = None,
    gradients: Annotated[str, typer.Option(help="input, weight, or both by commas.")] = "input,weight",
    dtype: Annotated[str | None, typer.Option(help="Element type; the target's own by default.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds of measuring; a second run goes on from there.")] = 60.0,
    threads: Annotated[int | None, typer.Option(help="onnxruntime's threads; its own default without it.")] = None,
    provider: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    max_error_factor: options.MaxErrorFactor = 2.0,
    max_workspace: Annotated[int | None, typer.Option(help="Most bytes of intermediate tensors.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Cache file; CONVGRAD_TUNING_CACHE or the user's cache folder without it.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the cache holds already.")] = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Measure every lowering of a network's convolution gradients, and keep the times for lowering="tuned"."""
    from ..selection.tune import tune as measure

    subject: Any = target
    input_shape = None if shape is None else options.sizes(shape, "--shape")
    if _names_a_module(target):
        if input_shape is None:
            raise GeometryError(f"--shape is missing: {target} is a module, and its input decides the geometries")
        subject = options.load_network(target)
    elif input_shape is not None:
        raise GeometryError(f"--shape is for a module (package.module:Name), and {target} is a path: use --batch")
    with options.progress("tune", as_json) as show:
        report = measure(
            subject,
            input_shape=input_shape,
            batch=batch,
            gradients=options.words(gradients),
            dtype=dtype,
            provider=provider,
            threads=threads,
            budget=budget,
            max_error_factor=max_error_factor,
            max_workspace=max_workspace,
            cache=cache,
            again=again,
            seed=seed,
            progress=show,
        )
    if as_json:
        options.print_json(report.to_dict())
    else:
        _print(report)
    if not report.gradients:
        raise typer.Exit(1)


def _names_a_module(target: str) -> bool:
    """``package.module:Name``, unless a file of that name exists (or a Windows drive is meant)."""
    place, separator, name = target.partition(":")
    dotted = all(part.isidentifier() for part in (*place.split("."), *name.split(".")))
    return bool(separator) and dotted and not Path(target).exists()


def _print(report: TuningReport) -> None:
    from rich.table import Table

    from ..selection.cache import WRONG

    table = Table(title=f"{report.threads} thread{'s' * (report.threads != 1)}; milliseconds are minima over rounds")
    for heading in ("layer", "gradient", "auto", "ms", "tuned", "ms", "gain"):
        table.add_column(heading, overflow="fold")
    for entry in report.gradients:
        name = entry.layer if entry.count == 1 else f"{entry.layer} (x{entry.count})"
        gain = entry.auto_ms / entry.tuned_ms
        cells = (name, entry.gradient, _short(entry.auto), f"{entry.auto_ms:.3f}", _short(entry.tuned))
        table.add_row(*cells, f"{entry.tuned_ms:.3f}", "-" if entry.tuned == entry.auto else f"{gain:.2f}x")
    options.print_table(table)
    if report.gradients:
        typer.echo(
            f"all layers: {report.auto_ms:.2f} ms by auto, {report.tuned_ms:.2f} ms tuned "
            f"({report.auto_ms / report.tuned_ms:.2f}x)"
        )
    for entry in report.gradients:
        for name, reason in entry.refused.items():
            if reason.startswith(WRONG):
                typer.echo(f"refused: {entry.layer} {entry.gradient}, {name}: {reason}")
    waiting = [f"{skipped.layer} {skipped.gradient}" for skipped in report.skipped if skipped.reason is None]
    for skipped in report.skipped:
        if skipped.reason is not None:
            typer.echo(f"not measured: {skipped.layer} {skipped.gradient}: {skipped.reason}")
    if waiting:
        typer.echo(f"no time for {len(waiting)} gradients, run again to go on: {', '.join(waiting[:6])}")
    held = sum(entry.cached for entry in report.gradients)
    typer.echo(f"{report.cache}: {len(report.gradients) - held} measured in {report.seconds:.1f} s, {held} held before")


def _short(name: str) -> str:
    return name.partition(".")[2]
