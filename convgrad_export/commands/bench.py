"""`convgrad bench`: lowerings against PyTorch, onnxruntime-training and the textbook form, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BenchmarkError
from . import options

if TYPE_CHECKING:
    from ..bench.results import Results
    from ..bench.run import Outcome


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    context: typer.Context,
    networks: Annotated[str, typer.Option(help="Names separated by commas; by default all 14.")] = "",
    layers: Annotated[str, typer.Option(help="Parts of NETWORK/LAYER names, separated by commas.")] = "",
    batch: Annotated[str, typer.Option(help="Batch sizes, as 1,8,32.")] = "8",
    threads: Annotated[str, typer.Option(help="Thread counts, as 1,2.")] = "1",
    gradients: Annotated[str, typer.Option(help="Any of input, weight and forward (the latter for context).")] = (
        "input,weight,forward"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Undisturbed rounds to keep for each measurement.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.01, help="After these, three rounds are enough.")] = 2.0,
    max_gmac: Annotated[float | None, typer.Option(help="Leave out layers with more 10^9 multiplications.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which no measurement starts.")] = None,
    ort_training_python: Annotated[
        str | None,
        typer.Option(envvar="CONVGRAD_ORT_TRAINING_PYTHON", help="A Python with onnxruntime-training, as a peer."),
    ] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory instead of time (Linux).")] = False,
    output: Annotated[Path, options.output("Result file.")] = Path("bench.json"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an existing result file.")] = False,
    retry_disturbed: Annotated[
        bool, typer.Option("--retry-disturbed", help="With --resume, measure again what had no quiet round.")
    ] = False,
    foreign_cores: Annotated[
        float, typer.Option(min=0.0, help="Cores that other work may use before a round counts as disturbed.")
    ] = 0.1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    report: Annotated[Path | None, typer.Option(help="Measure nothing: print the tables of this result file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="With --report, write PNG plots into this folder.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --report, print Markdown.")] = False,
    as_json: options.Json = False,
) -> None:
    """Check every applicable lowering of published networks' layers against float64, and time it beside its peers."""
    if report is not None:
        from ..bench.results import load

        shown = ("report", "plots", "markdown", "overwrite", "as_json")
        measuring = [parameter.name for parameter in context.command.params if parameter.name not in shown]
        options.refuse_given(context, measuring, "--report measures nothing", BenchmarkError)

        results = load(report)
        files = _plots(results, plots, report.stem, overwrite)
        _show(results, None, files, as_json=as_json, as_markdown=markdown)
        return
    if plots is not None or markdown:
        raise BenchmarkError("plots and markdown describe a result file: expected them together with --report FILE")
    if retry_disturbed and not resume:
        raise BenchmarkError("--retry-disturbed goes on with a result file: expected it together with --resume")
    if memory:
        timing = ("rounds", "seconds", "foreign_cores", "ort_training_python", "retry_disturbed")
        options.refuse_given(context, timing, "--memory measures no time", BenchmarkError)
    if resume and overwrite:
        raise BenchmarkError("--resume goes on with a result file and --overwrite drops it: leave one of the two out")
    from ..bench import plan, run
    from ..bench.environment import environment
    from ..bench.results import open_results

    items = plan.items(
        options.words(networks),
        options.words(layers),
        batches=options.integers(batch, "--batch", BenchmarkError),
        threads=options.integers(threads, "--threads", BenchmarkError),
        operations=options.words(gradients),
        max_gmac=max_gmac,
    )
    here = environment()
    here.pop("command")
    commit = here.pop("commit")
    results = open_results(output, here, resume=resume, overwrite=overwrite)
    results.settings = {
        "rounds": rounds,
        "seconds": seconds,
        "foreign_cores": foreign_cores,
        "allocator": run.KEEP_MEMORY,
    }
    settings = run.Settings(rounds, seconds, time_limit, ort_training_python, memory, retry_disturbed, foreign_cores)
    with options.progress("bench", as_json) as show:
        outcome = run.run(items, results, output, settings, None if commit is None else str(commit), show)
    _show(results, outcome, [output], as_json=as_json)
    wrong = any(record.get("wrong") for record in results.records.values())
    if outcome.failed or wrong:
        raise typer.Exit(1)


def _plots(results: Results, folder: Path | None, stem: str, overwrite: bool) -> list[Path]:
    if folder is None:
        return []
    from ..bench.report import write_plots
    from ..files import make_folder

    make_folder(folder)
    return write_plots(results, folder, stem, overwrite=overwrite)


def _show(
    results: Results,
    outcome: Outcome | None,
    files: list[Path],
    *,
    as_json: bool,
    as_markdown: bool = False,
) -> None:
    from ..bench import report
    from ..bench.summary import groups, restless, troubles

    counts: dict[str, Any] = {}
    if outcome is not None:
        counts = {"measured": outcome.made, "known": outcome.known, "left": outcome.left, "failed": outcome.failed}
    if as_json:
        summary = [
            {"batch": group.batch, "threads": group.threads, "gradient": operation or "both", **part.figures()}
            for group in groups(results)
            for operation in ("input", "weight", None)
            if (part := group.select(operation)).rows
        ]
        options.print_json(
            {
                **counts,
                "environment": results.environment,
                "summary": summary,
                "left_out_disturbed": sum(restless(results, group.batch, group.threads) for group in groups(results)),
                "not_timed": troubles(results),
                "files": [str(path) for path in files],
            }
        )
        return
    if as_markdown:
        typer.echo(report.markdown(results), nl=False)
        return
    typer.echo(report.machine_line(results))
    from rich.table import Table

    for entry in report.tables(results):
        table = Table(title=entry.title, title_justify="left")
        for index, heading in enumerate(entry.headings):
            table.add_column(heading, overflow="fold", justify="left" if index == 0 else "right")
        for row in entry.rows:
            table.add_row(*row)
        options.print_table(table, width=200)
    for line in troubles(results):
        typer.echo(f"not timed: {line}")
    if outcome is not None:
        typer.echo(f"{outcome.made} measured, {outcome.known} known before, {outcome.left} left for want of time")
        for key, reason in outcome.failed.items():
            typer.echo(f"failed: {key}: {reason}")
    for path in files:
        typer.echo(f"written: {path}")
