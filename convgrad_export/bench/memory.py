"""Peak memory of the choices, measured: the growth of the process during one run, beyond what it returns.

onnxruntime's arena is off here, so that buffers come from the system and are given back; the high-water mark of the
process (VmHWM) is reset before each run. It includes what kernels allocate inside, such as Conv's column buffer.
"""

from __future__ import annotations

import gc
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import BenchmarkError
from ..geometry import ConvGeometry
from . import contenders
from .contenders import SESSION, TORCH

# Every block above 64 KiB is mapped on its own and unmapped when freed; glibc reads this when a process starts.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure_memory(
    operation: str, geometry: ConvGeometry, threads: int, names: Collection[str] | None = None
) -> dict[str, int]:
    """Bytes by contender (``torch`` among them) that one run needs beyond operands and result.

    Call it in a process started with `ENVIRONMENT`; figures are right to about 100 KB.

    Args:
        names: lowerings; None for those that `contenders.choices` names, which are what the tables show.

    Raises:
        BenchmarkError: the system does not report a resettable high-water mark (anything but Linux).
    """
    import torch

    torch.set_num_threads(threads)
    feeds = contenders.operands(geometry)
    builders: dict[str, Any] = {TORCH: lambda: contenders.torch_call(operation, geometry, feeds)}
    wanted = contenders.choices(operation, geometry, threads).values() if names is None else names
    for entry in contenders.applicable(operation, geometry):
        if entry.name not in wanted:
            continue
        builders[entry.name] = lambda entry=entry: contenders.lowering_call(
            entry, geometry, feeds, threads, arena=False
        )
    content = contenders.session_model(operation, geometry, threads)
    if content is not None:
        builders[SESSION] = lambda: contenders.onnx_call(content, feeds, threads, arena=False)
    result = {}
    for name, build in builders.items():
        try:
            call = build()
            size = call.result().nbytes
        except Exception:  # reported by the timing pass
            continue
        call.run()
        gc.collect()
        result[name] = max(0, _growth(call.run) - size)
        del call
    return result


def _growth(run: Any) -> int:
    before = _reset()
    kept = run()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _reset() -> int:
    """Set the high-water mark to the present size, and return it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise BenchmarkError(f"peak memory cannot be measured here: {error}") from error
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"peak memory cannot be measured here: /proc/self/status has no {field}")
