"""``lowering="tuned"``: the tuning cache decides; where it holds nothing usable, the fixed policy does, and says so."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import TuningCacheError, TuningWarning
from ..geometry import ConvGeometry
from . import cache
from .machine import default_threads, machine

TUNED = "tuned"
_KEEP = 1.03  # another lowering has to be this much faster than the policy's choice, or the choice stays

_lock = threading.Lock()
_said: set[tuple[str, str]] = set()
_indexed: tuple[Any, dict[Any, Any]] = ((), {})  # the latest file's records, and where each layer's are


def is_tuned(lowering: str) -> bool:
    """``"tuned"`` for the default cache file, ``"tuned:PATH"`` for another."""
    return lowering == TUNED or lowering.startswith(f"{TUNED}:")


def tuned_name(
    gradient: str,
    geometry: ConvGeometry,
    dtype: str,
    provider: str,
    threads: int | None,
    *,
    lowering: str,
    automatic: str,
    allowed: Callable[[str], bool],
) -> str:
    """The fastest measured lowering, or `automatic` with one `TuningWarning` for each cache file.

    Args:
        threads: that will run the graph; None for onnxruntime's default. The nearest count that was measured is taken.
        lowering: ``"tuned"`` or ``"tuned:PATH"``.
        automatic: the fixed policy's choice; kept unless another is faster by 3%.
        allowed: whether a lowering applies and stays within the caller's limits.

    Raises:
        TuningCacheError: a cache file named by the caller, here or in the environment, is unusable. The default file is
            only warned about.
    """
    explicit = lowering.partition(":")[2] or None
    path = cache.cache_path(explicit)
    try:
        records = _records(path)
    except TuningCacheError as error:
        if explicit is not None or os.environ.get(cache.ENVIRONMENT_VARIABLE):
            raise
        _say_once(path, "damaged", f"{error}. Until then lowering='auto' decides.")
        return automatic
    count = threads or default_threads()
    candidates = _of_layer(records, gradient, geometry, dtype, provider)
    found = cache.matching(candidates, gradient, geometry, dtype, provider, count)
    times = {name: value for name, value in cache.totals(found).items() if allowed(name)}
    if not times:
        _say_once(path, "missing", _missing(path, records, gradient, geometry, dtype, provider))
        return automatic
    fastest = min(times, key=lambda name: (times[name], name))
    return automatic if times.get(automatic, float("inf")) <= _KEEP * times[fastest] else fastest


def is_measured(gradient: str, geometry: ConvGeometry, dtype: str, provider: str, threads: int | None = None) -> bool:
    """Whether the default cache file can decide this gradient here."""
    try:
        records = _records(cache.cache_path())
    except TuningCacheError:
        return False
    return bool(cache.matching(records, gradient, geometry, dtype, provider, threads or default_threads()))


Records = tuple[cache.TuningRecord, ...]


def _records(path: Path) -> Records:
    try:
        status = path.stat()
    except OSError:
        return ()
    return _load(path, status.st_mtime_ns, status.st_size, status.st_ino)


@functools.lru_cache(maxsize=8)
def _load(path: Path, modified: int, size: int, inode: int) -> Records:
    return cache.load(path)


def _of_layer(records: Records, gradient: str, geometry: ConvGeometry, dtype: str, provider: str) -> Records:
    """The records of one layer at any batch, thread count and machine, found without going through all of them."""
    key = (gradient, dtype, provider, geometry.with_batch("batch"))
    return _index(records).get(key, ())


def _index(records: Records) -> dict[Any, Records]:
    global _indexed
    with _lock:
        known, table = _indexed
        if known is records:
            return table
    table = {}
    for record in records:
        key = (record.gradient, record.dtype, record.provider, record.geometry.with_batch("batch"))
        table[key] = (*table.get(key, ()), record)
    with _lock:
        _indexed = (records, table)
    return table


def _missing(
    path: Path,
    records: Records,
    gradient: str,
    geometry: ConvGeometry,
    dtype: str,
    provider: str,
) -> str:
    what = f"the {gradient} gradient of {geometry.describe()} in {dtype} on {provider}"
    advice = "lowering='auto' decides for it. Measure with `convgrad tune` or convgrad_export.tune"
    if not records:
        return f"the tuning cache {path} is empty: {advice}"
    here = machine(provider)
    foreign = [r for r in records if r.provider == provider and r.machine != here]
    note = ""
    if foreign and len(foreign) == len([r for r in records if r.provider == provider]):
        other = foreign[0].machine
        differs = [
            f"{key} {other.get(key)!r}, here {value!r}" for key, value in here.items() if other.get(key) != value
        ]
        note = f" ({len(foreign)} records were measured elsewhere and are not used: {'; '.join(differs)})"
    return (
        f"the tuning cache {path} has no usable measurement of {what}{note}: {advice}. Further convolutions that it "
        f"lacks are not reported"
    )


def _say_once(path: Path, kind: str, message: str) -> None:
    with _lock:
        if (str(path), kind) in _said:
            return
        _said.add((str(path), kind))
    warnings.warn(message, TuningWarning, stacklevel=5)
