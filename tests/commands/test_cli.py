"""The command as a process among others: pipes, and what it says beside its output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["lowerings", "conv2d_input"]])
def test_a_reader_that_is_gone_is_no_failed_check(arguments: list[str]) -> None:
    """``convgrad check models/ | head -1`` in a script that looks at the status of every part."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "convgrad_export", *arguments], stdout=write, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")  # as of a program that SIGPIPE ends


def test_a_warning_is_a_line_for_users(tmp_path: Path) -> None:
    shapes = ["--input-shape", "2,4,9,9", "--weight-shape", "6,4,3,3"]
    path = str(tmp_path / "gradient.onnx")
    environment = {**os.environ, "CONVGRAD_TUNING_CACHE": str(tmp_path / "tuning.json")}
    done = subprocess.run(
        [sys.executable, "-m", "convgrad_export", "build", "conv2d_input", *shapes, "--lowering", "tuned", "-o", path],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"convgrad: warning: the tuning cache {tmp_path / 'tuning.json'} is empty: ")
