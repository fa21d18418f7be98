"""The command as a process among others: pipes, and what it says beside its output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import convgrad_export as cg


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


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell closes the stream")
@pytest.mark.parametrize(("arguments", "status"), [(["check", "missing.onnx", "--json"], 2), (["tune", "MODEL"], 0)])
def test_a_closed_standard_error_is_no_failure(arguments: list[str], status: int, tmp_path: Path) -> None:
    """As in ``convgrad tune models/ 2>&-``: nothing of what belongs there comes to standard output either."""
    model = tmp_path / "gradient.onnx"
    onnx.save(cg.build_model("conv2d_input", input_shape=(1, 1, 4, 4), weight_shape=(1, 1, 3, 3)), model)
    given = [str(model) if word == "MODEL" else word for word in arguments]
    limits = ["--cache", "tuning.json", "--budget", "0.01"] if "MODEL" in arguments else []
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-m", "convgrad_export", *given, *limits],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert (tmp_path / "tuning.json").is_file() if limits else done.stdout == ""
