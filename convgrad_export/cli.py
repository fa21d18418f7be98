"""The command `convgrad`: exit status 0 done, 1 a check failed, 2 wrong usage or input, as shells have it 130 and 141
when it was interrupted or nobody reads its output.

Each subcommand lives in `commands`; heavy libraries are imported inside them, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator, Sequence

import typer

from .commands import bench, build, check, export, lowerings, serve, serve_repo, train, tune
from .errors import ConvGradError, TuningWarning, raise_missing


def _application() -> typer.Typer:
    app = typer.Typer(
        name="convgrad",
        help="Gradients of convolutional networks as standard ONNX graphs.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in (build, check, export, lowerings, bench, serve, serve_repo, train, tune):
        command.register(app)
    app.callback()(_common_options)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


def _common_options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options before the subcommand."""


@contextlib.contextmanager
def _warnings_for_users() -> Iterator[None]:
    """Print the package's own warnings as its errors: the line of Python that they are about is none of the user's."""
    usual = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, TuningWarning):
            return f"convgrad: warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a name that its encoding lacks is no reason to fail
    try:
        given = None if arguments is None else list(arguments)
        try:
            with _warnings_for_users():
                result = _application()(args=given, prog_name="convgrad", standalone_mode=False)
        except ImportError as error:
            raise_missing(error)
    except (ConvGradError, ImportError, OSError, MemoryError) as error:  # the last from what no check could foresee
        typer.echo(f"convgrad: {str(error) or type(error).__name__}", err=True)  # not to stdout where stderr is closed
        return 2
    except (typer.Abort, KeyboardInterrupt):  # where typer does not give status 130 itself
        return 130
    except SystemExit:  # typer's, with status 1, where nobody reads its output any more (`| head`)
        return 141
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors know how to print themselves
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    return int(result or 0)


if __name__ == "__main__":
    raise SystemExit(main())
