"""The tuning cache: measured times of lowerings, in one JSON file that several processes may write.

A record belongs to one gradient of one convolution, an element type, a provider, a thread count and a machine
(processor, onnxruntime, this package's formulas). It keeps every time that was measured, so that what it decides
follows from the file alone: the fastest entry that the caller's opset, error and memory limits admit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConvGradError, OutputPathError, TuningCacheError
from ..files import as_path, check_folder, check_output, temporary_folder, write_atomically, written_file
from ..geometry import ConvGeometry
from ..lowering import LOWERINGS
from .machine import machine

ENVIRONMENT_VARIABLE = "CONVGRAD_TUNING_CACHE"
_FORMAT, _VERSION = "convgrad tuning cache", 1

# How the reasons of `TuningRecord.refused` begin that something follows from.
MEMORY = "needs more memory"  # another limit or another day may lift it
NO_TIME = "no time was left to measure it"
WRONG = "its result is wrong"


@dataclass(frozen=True)
class Timing:
    """Measured times of one lowering.

    Attributes:
        lowering: catalogue name. rounds: how many were kept.
        min_ms, median_ms: milliseconds of one call, over the rounds.
        workspace_bytes: most bytes of intermediate tensors alive at once.
    """

    lowering: str
    min_ms: float
    median_ms: float
    rounds: int
    workspace_bytes: int


@dataclass(frozen=True)
class TuningRecord:
    """What was measured for one gradient of one convolution.

    Attributes:
        gradient: ``"input"`` or ``"weight"``. geometry: with the batch size that was measured.
        dtype, provider, threads: of the measurement. machine: `machine.machine(provider)` at the time.
        timings: one for each lowering measured, the fastest first.
        refused: lowering to the reason it was not timed (a wrong result, too much memory, no time left).
        seconds: that the measurement was allowed to take; 0 where a file does not say.
    """

    gradient: str
    geometry: ConvGeometry
    dtype: str
    provider: str
    threads: int
    machine: dict[str, str]
    timings: tuple[Timing, ...]
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """Text that two records share exactly when the later one replaces the earlier."""
        parts = (self.gradient, self.geometry.to_dict(), self.dtype, self.provider, self.threads, self.machine)
        return _canonical(parts)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "geometry": self.geometry.to_dict(), "timings": [asdict(t) for t in self.timings]}


def cache_path(path: str | os.PathLike[str] | None = None) -> Path:
    """`path`, else the environment variable CONVGRAD_TUNING_CACHE, else ``tuning.json`` in the user's cache folder."""
    if path is not None:
        return as_path(path, "cache")
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("convgrad_export") / "tuning.json"


def load(path: Path) -> tuple[TuningRecord, ...]:
    """The records of a cache file; none when there is no such file.

    Raises:
        TuningCacheError: not a tuning cache, damaged, edited since it was written, or of another format version.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:  # the latter for a name with a null character
        reason = getattr(error, "strerror", None) or error
        raise TuningCacheError(f"tuning cache {path} cannot be read: {reason}") from error
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _damaged(path, f"it is some other file: its format is not {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise _damaged(path, f"its version is {content.get('version')!r}, expected {_VERSION}")
    if content.get("sha256") != _digest(content.get("records")):
        raise _damaged(path, "its records do not match its checksum, so it was truncated or edited")
    try:
        return tuple(_record(entry) for entry in content["records"])
    except (ConvGradError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"a record cannot be understood ({type(error).__name__}: {error})") from error


def check_writable(path: Path) -> None:
    """Refuse a cache file that `save` could not write, before something is measured for it; nothing is left behind.

    Raises:
        OutputPathError: its folder cannot be made or written to, or what is there is no file.
    """
    check_folder(path.parent)
    if path.parent.is_dir():
        check_output(path, overwrite=True)
    for folder in {path.parent, written_file(path).parent}:  # of the lock, and of the file, where the path is a link
        with temporary_folder(next(place for place in (folder, *folder.parents) if place.is_dir())):
            pass


def save(path: Path, records: Iterable[TuningRecord]) -> None:
    """Add records to a cache file, replacing those with the same key; other processes may do so at the same time.

    Raises:
        TuningCacheError: the file there is no intact tuning cache; it stays as it is. OutputPathError: not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputPathError(f"tuning cache {path}: cannot make its folder: {error.strerror or error}") from error
    with _locked(path):
        merged = {record.key: record for record in load(path)}
        merged |= {record.key: record for record in records}
        entries = [merged[key].to_json() for key in sorted(merged)]
        content = {"format": _FORMAT, "version": _VERSION, "sha256": _digest(entries), "records": entries}
        write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode(), overwrite=True)


def matching(
    records: Iterable[TuningRecord], gradient: str, geometry: ConvGeometry, dtype: str, provider: str, threads: int
) -> list[TuningRecord]:
    """This machine's records for a convolution: those of the nearest thread count, and there of the nearest batch.

    A named batch stands for all sizes, so the records of every batch that was measured are returned.
    """
    here = machine(provider)
    found = [
        record
        for record in records
        if (record.gradient, record.dtype, record.provider, record.machine) == (gradient, dtype, provider, here)
        and record.geometry.with_batch(geometry.batch) == geometry
    ]
    if not found:
        return []
    count = min((record.threads for record in found), key=lambda n: (abs(math.log(n / threads)), n))
    found = [record for record in found if record.threads == count]
    if not isinstance(geometry.batch, int):
        return sorted(found, key=lambda record: record.geometry.batch)
    batch = max(geometry.batch, 1)
    return [min(found, key=lambda r: (abs(math.log(max(r.geometry.batch, 1) / batch)), r.geometry.batch))]


def totals(records: Sequence[TuningRecord]) -> dict[str, float]:
    """Lowerings timed in all records, each with its geometric mean time relative to the fastest of its record."""
    shared = set.intersection(*({t.lowering for t in record.timings} for record in records)) if records else set()
    result = {}
    for name in sorted(shared):
        logs = []
        for record in records:
            times = {t.lowering: t.min_ms for t in record.timings}
            logs.append(math.log(times[name] / min(times.values())))
        result[name] = math.exp(sum(logs) / len(logs))
    return result


def _record(entry: dict[str, Any]) -> TuningRecord:
    geometry = ConvGeometry.from_dict(entry["geometry"])
    timings = tuple(
        Timing(
            str(t["lowering"]), float(t["min_ms"]), float(t["median_ms"]), int(t["rounds"]), int(t["workspace_bytes"])
        )
        for t in entry["timings"]
    )
    for timing in timings:
        known = LOWERINGS.get(timing.lowering)
        if known is not None and known.gradient != entry["gradient"]:
            raise ValueError(f"{timing.lowering} does not give the {entry['gradient']} gradient")
        if not (0 < timing.min_ms < math.inf and 0 < timing.median_ms < math.inf):
            raise ValueError(f"{timing.lowering} took {timing.min_ms} ms")
    if int(entry["threads"]) < 1:
        raise ValueError(f"threads is {entry['threads']}")
    return TuningRecord(
        str(entry["gradient"]),
        geometry,
        str(entry["dtype"]),
        str(entry["provider"]),
        int(entry["threads"]),
        {str(name): str(value) for name, value in entry["machine"].items()},
        timings,
        {str(name): str(reason) for name, reason in entry["refused"].items()},
        float(entry.get("seconds", 0.0)),
    )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(records: Any) -> str:
    return hashlib.sha256(_canonical(records).encode()).hexdigest()


def _damaged(path: Path, reason: str) -> TuningCacheError:
    return TuningCacheError(
        f"tuning cache {path} is unusable: {reason}. Delete it and tune again, or name another file "
        f"(--cache, {ENVIRONMENT_VARIABLE}, or lowering='tuned:PATH')"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file beside `path`; the operating system releases it when the process ends, however it ends."""
    try:
        stream = open(path.with_name(f".{path.name}.lock"), "a+b")  # noqa: SIM115
    except OSError as error:
        raise OutputPathError(f"tuning cache {path}: cannot lock it: {error.strerror or error}") from error
    with stream:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            stream.seek(0)
            msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
        else:
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
