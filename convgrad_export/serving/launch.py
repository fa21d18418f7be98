"""Starting real servers on a model repository, each from the Python environment that it is installed in.

The environments are separate because Triton's wheel wants numpy below 2. How to make them is in the README and in the
error messages.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputPathError, ServerError

INSTALL = {
    "triton": "python3 -m venv .triton && .triton/bin/pip install nvidia-pytriton==0.7.0 onnxruntime",
    "mlserver": "python3 -m venv .mlserver && .mlserver/bin/pip install mlserver==1.7.1 '.[onnxruntime]'",
}
PYTHON_VARIABLE = {"triton": "CONVGRAD_TRITON_PYTHON", "mlserver": "CONVGRAD_MLSERVER_PYTHON"}

# Run by the server's own Python: where its packages and its libpython are.
_PROBE = {
    "triton": """
import importlib.util, json, sys, sysconfig
found = importlib.util.find_spec("pytriton"), importlib.util.find_spec("onnxruntime")
print(json.dumps({"found": all(found), "package": found[0] and found[0].submodule_search_locations[0],
    "libpython": sysconfig.get_config_var("LIBDIR"), "version": "%d.%d" % sys.version_info[:2], "prefix": sys.prefix}))
""",
    "mlserver": """
import importlib.util, json
print(json.dumps({"found": all(importlib.util.find_spec(n) for n in ("mlserver", "convgrad_export", "onnxruntime"))}))
""",
}


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    http_port: int
    grpc_port: int

    @property
    def http(self) -> str:
        return f"{self.host}:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"{self.host}:{self.grpc_port}"


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _free_port(host: str) -> int:
    try:
        return free_ports(1, host)[0]
    except OSError as error:
        raise ServerError(f"host is {host!r}, on which nothing can listen: {error.strerror or error}") from error


def server_python(server: str, python: str | None = None) -> str:
    """The Python that has the server: `python`, the environment variable, or this one.

    Raises:
        ServerError: unknown server, or that Python lacks it; the message says how to make the environment.
    """
    probe(server, chosen := _chosen(server, python))
    return chosen


def _chosen(server: str, python: str | None) -> str:
    return python or os.environ.get(PYTHON_VARIABLE.get(server, "")) or sys.executable


def probe(server: str, python: str) -> dict[str, str]:
    """What the server's Python says about itself.

    Raises:
        ServerError: as `server_python`.
    """
    if server not in _PROBE:
        raise ServerError(f"server is {server!r}, expected one of: {', '.join(_PROBE)}")
    variable = PYTHON_VARIABLE[server]
    hint = f"make an environment for it with `{INSTALL[server]}` and name its Python by --python or {variable}"
    try:
        done = subprocess.run([python, "-c", _PROBE[server]], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"{python} cannot be run ({error}); {hint}") from error
    try:
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        if done.returncode == 0 and found["found"]:
            return found
    except (ValueError, TypeError, KeyError, IndexError):  # another program than a Python, or one that ended early
        reason = done.stderr.strip() or f"it printed {done.stdout.strip()[-200:]!r}"
        raise ServerError(f"{python} cannot say whether it has {server}: {reason}; {hint}") from None
    raise ServerError(f"{python} does not have {server} with onnxruntime; {hint}")


@contextmanager
def command(
    server: str, repository: str | os.PathLike[str], address: Address, python: str | None = None
) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The command line and environment variables of a server; files it needs live as long as the context.

    Raises:
        ServerError: as `server_python`, or there is no such host. OutputPathError: the repository is no folder.
    """
    root = Path(repository).resolve()
    if not root.is_dir():
        raise OutputPathError(f"repository {repository} is not a folder; make one with convgrad serve-repo")
    found = probe(server, chosen := _chosen(server, python))
    environment = dict(os.environ)
    if server == "mlserver":
        environment |= {
            "MLSERVER_HOST": address.host,
            "MLSERVER_HTTP_PORT": str(address.http_port),
            "MLSERVER_GRPC_PORT": str(address.grpc_port),
            "MLSERVER_METRICS_PORT": str(_free_port(address.host)),
            "MLSERVER_PARALLEL_WORKERS": "0",  # threads suffice: onnxruntime releases the interpreter
            "MLSERVER_DEBUG": "false",
        }
        yield [chosen, "-c", "from mlserver.cli import main; main()", "start", str(root)], environment
        return
    package = Path(found["package"]) / "tritonserver"
    backends = Path(tempfile.mkdtemp(prefix="convgrad-triton-"))
    try:
        _python_backend(package, backends / "python", found["version"])
        libraries = [found["libpython"], str(Path(found["package"]).parent / "nvidia_pytriton.libs")]
        libraries += filter(None, [environment.get("LD_LIBRARY_PATH")])
        environment["LD_LIBRARY_PATH"] = ":".join(libraries)
        environment["PATH"] = f"{found['prefix']}/bin:{environment.get('PATH', '')}"  # the stub finds its Python there
        yield (
            [
                *(str(package / "bin" / "tritonserver"), "--model-repository", str(root)),
                *("--backend-directory", str(backends), "--allow-metrics", "false"),
                *("--exit-timeout-secs", "5"),  # idle connections of clients would hold it up for 30
                *("--http-address", address.host, "--http-port", str(address.http_port)),
                *("--grpc-address", address.host, "--grpc-port", str(address.grpc_port)),
            ],
            environment,
        )
    finally:
        shutil.rmtree(backends, ignore_errors=True)


def _python_backend(package: Path, folder: Path, version: str) -> None:
    """The wheel keeps one stub for each Python version apart; the backend wants its own beside it."""
    stub = package / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted(path.name for path in (package / "python_backend_stubs").iterdir()))
        raise ServerError(f"this Triton has no stub for Python {version}, only for {known}: take one of those")
    folder.mkdir()
    for path in (*(package / "backends" / "python").glob("*.*"), stub):
        (folder / path.name).symlink_to(path)


@contextmanager
def running(
    server: str,
    repository: str | os.PathLike[str],
    *,
    python: str | None = None,
    address: Address | None = None,
    log: str | os.PathLike[str],
    timeout: float = 120.0,
) -> Iterator[tuple[Address, subprocess.Popen[bytes]]]:
    """A server that is ready, on free loopback ports by default; stopped at the end.

    Args:
        log: file for what the server prints. timeout: seconds until every model has to be ready.

    Raises:
        ServerError: it ended or was not ready in time; the message holds the last lines of the log.
    """
    address = address or Address("127.0.0.1", *free_ports(2))
    with command(server, repository, address, python) as (line, environment), Path(log).open("wb") as stream:
        process = subprocess.Popen(line, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, address, Path(log), timeout)
            yield address, process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes], timeout: float = 45.0) -> int:
    """Ask a server to end, insist after `timeout` seconds; its exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def is_ready(address: Address) -> bool:
    """Whether the server says that it and all its models are ready."""
    try:
        with urllib.request.urlopen(f"http://{address.http}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (http.client.HTTPException, OSError):  # urllib's own errors are of the latter kind
        return False


def _wait_until_ready(process: subprocess.Popen[bytes], address: Address, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not is_ready(address):
        if process.poll() is not None or time.monotonic() > deadline:
            state = "is not ready" if process.poll() is None else f"ended with status {process.returncode}"
            lines = log.read_text(errors="replace").splitlines()
            relevant = [line for line in lines if line.startswith("E") or "error" in line.lower()] or lines
            raise ServerError(f"the server {state}; its log, {log}, says:", *relevant[-8:])
        time.sleep(0.1)
