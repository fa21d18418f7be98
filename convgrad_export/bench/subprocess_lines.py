"""A child process that answers every line of JSON with one."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BenchmarkError


class Child:
    """A running child; its first line, sent unasked, is `greeting`.

    Raises:
        BenchmarkError: it cannot be started or ends; the message holds the end of what it wrote to standard error.
    """

    def __init__(self, command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> None:
        self.what = what
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the child
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=None if environment is None else dict(environment),
            )
        except OSError as error:
            self._errors.close()
            raise BenchmarkError(f"{what}: cannot run {command[0]}: {error.strerror or error}") from error
        try:
            self.greeting: dict[str, Any] = self._answer()
        except BenchmarkError:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: the answer says how
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the child; more than once does no harm."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        if not self._errors.closed:
            self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.strip():
            try:
                answer = json.loads(line)
            except ValueError:
                answer = None
            if isinstance(answer, dict):
                return answer
            raise BenchmarkError(f"{self.what} wrote {line[:200]!r}, expected one line of JSON")
        status = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read()[-600:].strip()
        raise BenchmarkError(f"{self.what} ended with status {status}: {tail or 'it wrote no message'}")
