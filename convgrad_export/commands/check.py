"""`convgrad check`: models of ours against float64 autograd."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ModelFileError
from . import options


def register(app: typer.Typer) -> None:
    app.command("check")(check)


def check(
    paths: Annotated[list[Path], typer.Argument(help="Model files, or folders of them.")],
    seed: Annotated[int, typer.Option(help="Of the random data.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Compare models with float64 autograd, on integer-valued data (exactly) and on random data (within the bound)."""
    from ..model_check import check_model

    files = [file for path in paths for file in _model_files(path)]
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


def _model_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # NAME/VERSION/model.onnx under a config.pbtxt is a server's copy of any model, not only of one of ours.
    files = sorted(file for file in path.rglob("*.onnx") if not (file.parent.parent / "config.pbtxt").is_file())
    if not files:
        raise ModelFileError(f"{path} holds no .onnx file (files of a server's model repository are named one by one)")
    return files
