"""Options that several subcommands share, and how their text becomes arguments."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConvGradError, GeometryError, OutputPathError

InputShape = Annotated[str | None, typer.Option("--input-shape", help="N,C,I0[,I1[,I2]] of the forward call.")]
WeightShape = Annotated[str | None, typer.Option("--weight-shape", help="M,C/groups,K0[,K1[,K2]].")]
Stride = Annotated[str, typer.Option(help="One integer, or one per spatial axis: 2 or 2,1.")]
Padding = Annotated[str, typer.Option(help="An integer, one per axis, begin:end pairs (0:1,2:2), same or valid.")]
Dilation = Annotated[str, typer.Option(help="One integer, or one per spatial axis.")]
Groups = Annotated[int, typer.Option(help="Number of groups.")]
Transposed = Annotated[bool, typer.Option("--transposed", help="The forward operator is a transposed convolution.")]
OutputPadding = Annotated[str, typer.Option(help="Of a transposed convolution.")]
DType = Annotated[str, typer.Option(help="float32, float64, float16 or bfloat16.")]
Opset = Annotated[int, typer.Option(help="Version of the standard ONNX operators.")]
MaxErrorFactor = Annotated[
    float, typer.Option(help="Largest error bound, in those of the direct form: 1 for no Winograd form, 8 for each.")
]
MAX_SEED = 2**63 - 1  # of numpy's, PyTorch's and onnxruntime's generators
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the random data.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _no_dash(path: Path) -> Path:
    if str(path) == "-":  # other programs write to standard output then; here it would be a file of that name
        raise OutputPathError(
            "--output is '-', expected a name: files are replaced as a whole, not written to a stream"
        )
    return path


def output(what: str) -> Any:
    """``--output`` of a command; `what` is written there."""
    return typer.Option("--output", "-o", help=what, callback=_no_dash)


def words(text: str) -> tuple[str, ...]:
    """``"a, b"`` as ("a", "b"); empty ones are left out."""
    return tuple(word for part in text.split(",") if (word := part.strip()))


def integers(text: str, option: str, error: type[ConvGradError] = GeometryError) -> tuple[int, ...]:
    """``"2,1"`` as (2, 1)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise error(f"{option} is {text!r}, expected integers separated by commas") from None


def sizes(text: str, option: str) -> tuple[int, ...]:
    """``"1,3,224,224"``, of a tensor that is about to be made.

    Raises:
        GeometryError: no integers, one below 1, or more elements than there are addresses.
    """
    found = integers(text, option)
    if min(found) < 1 or math.prod(found) > 2**40:
        raise GeometryError(f"{option} is {text!r}, expected sizes of at least 1, of a tensor that fits into memory")
    return found


def padding(text: str) -> Any:
    """``"1"``, ``"1,2"``, ``"0:1,2:2"``, ``"same"`` or ``"valid"``."""
    if text in ("same", "valid"):
        return text
    if ":" not in text:
        return integers(text, "--padding")
    try:
        return tuple(tuple(int(amount) for amount in pair.split(":", 1)) for pair in text.split(","))
    except ValueError:
        raise GeometryError(f"--padding is {text!r}, expected begin:end pairs such as 0:1,2:2") from None


def geometry_arguments(
    input_shape: str | None,
    weight_shape: str | None,
    stride: str,
    padding_text: str,
    dilation: str,
    groups: int,
    transposed: bool,
    output_padding: str,
) -> dict[str, Any]:
    """The options above as keyword arguments of `build_model` and `lowerings`."""
    return {
        "input_shape": None if input_shape is None else integers(input_shape, "--input-shape"),
        "weight_shape": None if weight_shape is None else integers(weight_shape, "--weight-shape"),
        "stride": integers(stride, "--stride"),
        "padding": padding(padding_text),
        "dilation": integers(dilation, "--dilation"),
        "groups": groups,
        "transposed": transposed,
        "output_padding": integers(output_padding, "--output-padding"),
    }


def refuse_given(
    context: typer.Context,
    names: Iterable[str],
    why: str,
    error: type[ConvGradError] = GeometryError,
    advice: str = "leave one of the two out",
) -> None:
    """Refuse options that were typed and have no effect here; a default is no option typed.

    Raises:
        ConvGradError: of the kind `error`, with the options' names, in the order of `--help`.
    """
    unused = set(names)
    typed = [
        f"--{parameter.name.replace('_', '-')}"
        for parameter in context.command.params
        if parameter.name in unused
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    ]
    if typed:
        raise error(f"{', '.join(typed)} is given, but {why}: {advice}")


def print_table(table: Any, width: int = 140) -> None:
    """A rich table, in lines long enough to read where there is no terminal to fit, or one too narrow for its columns.

    What stands in brackets, in a file's name or a layer's, is no markup.
    """
    from rich.console import Console

    console = Console(markup=False)
    if not console.is_terminal:
        console.width = width
    elif console.width < (needed := 6 * len(table.columns)):  # rich would leave cells empty; the terminal breaks lines
        console.width = needed
    console.print(table)


def print_json(value: Any) -> None:
    """Print a JSON object. JSON has no infinity and no not-a-number: null stands for them."""
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_network(name: str) -> Any:
    """The torch.nn.Module that ``package.module:Name`` is or makes, from the current folder too.

    Raises:
        ArgumentTypeError: as `training.run.load_module`.
    """
    from ..training.run import load_module

    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does, so that a file in the current folder is found
    return load_module(name)


@contextlib.contextmanager
def progress(what: str, quiet: bool, *, thread: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error, where that is a terminal, to be called with (done, total, a few words).

    Args:
        what: stands before it. thread: a thread draws it, for calls that come in quick succession. Without one nothing
            of this process runs beside what it measures.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    seen = sys.stderr is not None and sys.stderr.isatty()  # None where the caller has closed it
    console = Console(stderr=True, quiet=quiet or not seen)
    text = TextColumn("{task.description}", markup=False)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
    with Progress(*columns, console=console, auto_refresh=thread) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, words: str) -> None:
            bar.update(task, completed=done, total=total, description=words, refresh=not thread)

        yield show
