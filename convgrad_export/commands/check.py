"""`convgrad check`: models of ours against float64 autograd, or any model against a target that shall load it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ArgumentTypeError, ModelFileError
from ..files import model_files
from . import options


def register(app: typer.Typer) -> None:
    app.command("check")(check)


def check(
    context: typer.Context,
    paths: Annotated[list[Path], typer.Argument(help="Model files, or folders of them.")],
    seed: options.Seed = 0,
    target: Annotated[
        str | None,
        typer.Option(
            help="web or webgpu: instead name what keeps any ONNX model from loading in onnxruntime-web's WebAssembly "
            "build, or in its WebGPU build."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Compare models with float64 autograd, on integer-valued data (exactly) and on random data (within the bound)."""
    files = [file for path in paths for file in _model_files(path)]
    if target is not None:
        options.refuse_given(context, ["seed"], "--target runs nothing", ArgumentTypeError)
        _check_target(files, target, as_json)
        return
    from ..model_check import check_model

    checks = [result for file in files for result in check_model(file, seed=seed)]
    failed = [result for result in checks if not result.passed]
    if as_json:
        options.print_json({"passed": not failed, "checks": [asdict(result) for result in checks]})
    else:
        from rich.table import Table

        table = Table(title="Gradients against float64 autograd; error in units of the bound")
        for heading in ("model", "output", "lowering", "dtype", "data", "worst error", "exact", "result"):
            table.add_column(heading, overflow="fold")
        for result in checks:
            verdict = "ok" if result.passed else "FAILED"
            cells = (result.model, result.output, result.lowering, result.dtype, result.data)
            table.add_row(*cells, f"{result.worst:.3f}", "yes" if result.exact else "no", verdict)
        options.print_table(table)
        typer.echo(f"{len(files)} models, {len(checks)} checks, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)


def _check_target(files: list[Path], target: str, as_json: bool) -> None:
    from ..web_target import check_target, check_web, measured

    check_target(target)
    reports = {str(file): check_web(file) for file in files}
    failed = [name for name, report in reports.items() if report.against(target)]
    if as_json:
        entries = [
            {
                "model": name,
                "passed": name not in failed,
                "problems": [asdict(problem) for problem in report.problems],
                "notes": report.notes,
            }
            for name, report in reports.items()
        ]
        options.print_json({"target": target, "passed": not failed, "models": entries})
    else:
        for name, report in reports.items():
            against = report.against(target)
            others = [problem for problem in report.problems if problem not in against]
            typer.echo(f"{name}: {f'{len(against)} problems' if against else 'ok'}")
            for problem in against:
                typer.echo(f"  {problem}")
            for problem in others:
                typer.echo(f"  only with WebGPU: {problem}")
            for note in report.notes:
                typer.echo(f"  note: {note}")
        typer.echo(f"{len(files)} models, {len(failed)} failed; measured with onnxruntime-web {measured()['version']}")
    if failed:
        raise typer.Exit(1)


def _model_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = model_files(path)
    if not files:
        raise ModelFileError(f"{path} holds no .onnx file (files of a server's model repository are named one by one)")
    return files
