"""What a measured time depends on besides the convolution: the processor, onnxruntime, and this package's formulas."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from ..files import digest
from ..lowering import CUDA

# Everything that decides what graph a lowering's name stands for.
_FOLDERS, _FILES = ("lowering",), ("emit/onnx.py", "geometry.py", "dtypes.py")


@functools.cache
def sources() -> str:
    """SHA-256 of the sources behind the catalogue's graphs, shortened; the same on every machine."""
    root = Path(__file__).resolve().parent.parent
    paths = [root / name for name in _FILES]
    for folder in _FOLDERS:
        paths += sorted((root / folder).rglob("*.py"))
    return digest(root, paths)[:16]


@functools.cache
def processor(provider: str) -> str:
    """Model name of the CPU, or of the first GPU where the CUDA provider is meant."""
    if provider == CUDA:
        return _gpu_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown GPU"
    names = done.stdout.splitlines()
    return names[0].strip() if done.returncode == 0 and names else "unknown GPU"


@functools.cache
def onnxruntime_version() -> str:
    """Version of the installed onnxruntime, whichever distribution it came with; "none" without one."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def machine(provider: str) -> dict[str, str]:
    """The part of a tuning record's key that this machine and its installation decide."""
    return {"processor": processor(provider), "onnxruntime": onnxruntime_version(), "sources": sources()}


@functools.cache
def default_threads() -> int:
    """Threads that onnxruntime's own default comes to: one for each physical core that this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
            cores.add(tuple((topology / name).read_text() for name in ("physical_package_id", "core_id")))
        except OSError:
            return max(1, len(allowed))
    return max(1, len(cores))
