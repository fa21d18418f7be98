"""Measured times of lowerings against PyTorch's convolution_backward on a GPU: the gate for rewriting there.

On CUDA nothing is rewritten by rule: cuDNN's kernel stays unless this very convolution was measured on this kind of
device and a lowering won by `MARGIN`. The measurements are JSON: those shipped with the package, which ``python -m
benchmarks.cuda.run --write-measurements`` makes, and the user's own, which `integrations.aten_measure.measure_step`
adds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelFileError
from ..files import make_folder, write_atomically
from ..geometry import ConvGeometry

MARGIN = 1.1  # a lowering has to be this much faster alone: in a whole graph it may cost what it saves in copies
SHIPPED = Path(__file__).with_name("aten_cuda.json")
ENVIRONMENT_VARIABLE = "CONVGRAD_ATEN_MEASUREMENTS"
_FORMAT, _VERSION = "convgrad aten measurements", 1


@dataclass(frozen=True)
class AtenMeasurement:
    """One gradient of one convolution.

    Attributes:
        gradient: ``"input"`` or ``"weight"``. geometry: `ConvGeometry.to_dict()`. dtype: of the tensors.
        device: name of the GPU. torch: version that was measured.
        kernel_ms: milliseconds of PyTorch's kernel. lowering_ms: of each lowering that gave the same result.
    """

    gradient: str
    geometry: Mapping[str, Any]
    dtype: str
    device: str
    torch: str
    kernel_ms: float
    lowering_ms: Mapping[str, float]

    @property
    def key(self) -> str:
        return _key(self.gradient, self.geometry, self.dtype, self.device)

    @property
    def winner(self) -> str | None:
        """The fastest lowering where it beats the kernel by `MARGIN`; None leaves the kernel in place."""
        if not self.lowering_ms:
            return None
        name, time = min(self.lowering_ms.items(), key=lambda item: item[1])
        return name if time * MARGIN <= self.kernel_ms else None


def worth_measuring(gradient: str, g: ConvGeometry) -> bool:
    """Whether cuDNN's kernel is weak enough for convolutions of this kind that a lowering may win."""
    if gradient == "bias" or g.transposed:
        return False
    dilated = any(d > 1 for d in g.dilation)
    return g.groups > 1 or (g.rank == 3 and dilated) or max(g.kernel_size) >= 7


def winner(gradient: str, geometry: ConvGeometry, dtype: str, device: str) -> str | None:
    """What was measured to win for this convolution on this device; None without a measurement."""
    found = _all().get(_key(gradient, geometry.to_dict(), dtype, device))
    return None if found is None else found.winner


def digest() -> str:
    """Changes with the measurements, so that graphs compiled with others are not reused."""
    return hashlib.sha256("\n".join(f"{key} {m.winner}" for key, m in sorted(_all().items())).encode()).hexdigest()[:16]


def own_path() -> Path:
    """The user's file: the environment variable's, else ``aten_measurements.json`` in the user's cache folder."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    import platformdirs

    return Path(platformdirs.user_cache_dir("convgrad_export")) / "aten_measurements.json"


def add(measurements: Iterable[AtenMeasurement], path: Path | None = None) -> Path:
    """Put measurements into a file, the user's by default; a later one of the same convolution replaces the earlier.

    Raises:
        ModelFileError: the file is there and holds something else. OutputPathError: it cannot be written.
    """
    target = own_path() if path is None else path
    merged = {item.key: item for item in (*(_read(target) if _modified(target) else ()), *measurements)}
    document = {"format": _FORMAT, "version": _VERSION, "measurements": [asdict(m) for m in merged.values()]}
    make_folder(target.parent)
    write_atomically(target, (json.dumps(document, indent=1) + "\n").encode(), overwrite=True)
    _load.cache_clear()
    return target


def _key(gradient: str, geometry: Mapping[str, Any], dtype: str, device: str) -> str:
    return json.dumps([gradient, geometry, dtype, device], sort_keys=True)


def _all() -> dict[str, AtenMeasurement]:
    return _load(SHIPPED, own_path(), *(_modified(path) for path in (SHIPPED, own_path())))


@functools.lru_cache(maxsize=4)
def _load(shipped: Path, own: Path, *_times: int) -> dict[str, AtenMeasurement]:
    return {item.key: item for path in (shipped, own) if _modified(path) for item in _read(path)}


def _modified(path: Path) -> int:
    """0 for no file, or one in a folder that this process may not look into: the home of another user, say."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read(path: Path) -> list[AtenMeasurement]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT or document["version"] != _VERSION:
            raise ValueError(f"format {document['format']!r} version {document['version']!r}")
        return [_measurement(entry) for entry in document["measurements"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(
            f"{path} holds no measurements of ATen lowerings ({error}): remove it, or set {ENVIRONMENT_VARIABLE}"
        ) from error


def _measurement(entry: Mapping[str, Any]) -> AtenMeasurement:
    times = {str(name): float(time) for name, time in entry["lowering_ms"].items()}
    return AtenMeasurement(**{**entry, "kernel_ms": float(entry["kernel_ms"]), "lowering_ms": times})
