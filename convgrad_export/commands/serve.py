"""`convgrad serve`: a real inference server on a model repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ServerError, ServingConfigError


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    repository: Annotated[Path, typer.Argument(help="A folder that `convgrad serve-repo` wrote.")],
    server: Annotated[str, typer.Option(help="triton or mlserver.")] = "triton",
    python: Annotated[
        str | None,
        typer.Option(
            help="Python of the environment that has the server; by default CONVGRAD_TRITON_PYTHON or "
            "CONVGRAD_MLSERVER_PYTHON, or this one."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; there is no access control.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=1, max=65535, help="Of REST.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="Of gRPC.")] = 8001,
) -> None:
    """Run Triton or MLServer (Open Inference Protocol, REST and gRPC) on a repository until it is interrupted."""
    import signal
    import subprocess

    from ..serving.launch import Address, command, stop

    if http_port == grpc_port:
        raise ServingConfigError(f"--http-port and --grpc-port are both {http_port}: each needs a port of its own")
    with command(server, repository, Address(host, http_port, grpc_port), python) as (line, environment):
        try:
            process = subprocess.Popen(line, env=environment)
        except OSError as error:  # a damaged installation
            raise ServerError(f"{line[0]} cannot be started: {error.strerror or error}") from error

        def end(_number: int, _frame: object) -> None:
            process.terminate()

        previous = signal.signal(signal.SIGTERM, end)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            status = stop(process)
        finally:
            signal.signal(signal.SIGTERM, previous)
            stop(process)
    if status not in (0, -signal.SIGTERM, -signal.SIGINT):
        raise typer.Exit(1)
