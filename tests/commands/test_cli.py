"""The command as a process among others: pipes."""

from __future__ import annotations

import os
import subprocess
import sys

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
