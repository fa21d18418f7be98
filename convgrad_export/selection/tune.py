"""`convgrad_export.tune`: measure a network's convolution gradients on this machine and keep the result."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import dtypes
from ..arguments import as_bool, as_int, as_number, as_shape, check_error_factor, check_pool, check_workspace
from ..errors import ArgumentTypeError, GeometryError, ProviderError, in_one_line
from ..geometry import ConvGeometry
from ..lowering import CPU, CUDA, as_provider
from . import cache as store
from .autotune import TuningSettings, candidate_names, tune_gradient
from .cache import MEMORY, NO_TIME, TuningRecord
from .layers import BOTH, LayerToTune, at_batch, merged, model_layers, module_layers
from .policy import AUTO, choose
from .reduced_arithmetic import DEFAULT_ERROR_FACTOR
from .runner import onnxruntime_with
from .tuned import TUNED

_LONGEST, _SHORTEST = 5.0, 0.25  # seconds for one gradient of one layer
_WORTH_AGAIN = 1.5  # times the seconds of a measurement that was cut short: with as many it is taken again

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TunedGradient:
    """What tuning found for one gradient of one layer.

    Attributes:
        layer: name. count: layers of that geometry. gradient: ``"input"`` or ``"weight"``. geometry: in words.
        dtype: element type. auto, auto_ms: the fixed policy's choice and its milliseconds.
        tuned, tuned_ms: what ``lowering="tuned"`` takes from now on.
        timings: milliseconds (minimum) of every lowering measured. refused: why others were not.
        cached: the record was in the cache already.
    """

    layer: str
    count: int
    gradient: str
    geometry: str
    dtype: str
    auto: str
    auto_ms: float
    tuned: str
    tuned_ms: float
    timings: dict[str, float]
    refused: dict[str, str]
    cached: bool


@dataclass(frozen=True)
class SkippedGradient:
    """A gradient of one layer that was not measured.

    Attributes:
        layer: name. gradient: ``"input"`` or ``"weight"``.
        reason: why it cannot be; None where the budget had no time left for it, so that another run goes on with it.
    """

    layer: str
    gradient: str
    reason: str | None = None


@dataclass(frozen=True)
class TuningReport:
    """What `tune` did.

    Attributes:
        cache: the file that holds the measurements. threads: of the measurement.
        gradients: one entry for each gradient of each distinct layer that was measured, now or before.
        skipped: one for each of the others.
        seconds: it took.
    """

    cache: Path
    threads: int
    gradients: tuple[TunedGradient, ...]
    skipped: tuple[SkippedGradient, ...]
    seconds: float

    @property
    def auto_ms(self) -> float:
        """Milliseconds of all layers' gradients, each as often as the network has it, by the fixed policy."""
        return sum(entry.auto_ms * entry.count for entry in self.gradients)

    @property
    def tuned_ms(self) -> float:
        """The same with the tuned choices."""
        return sum(entry.tuned_ms * entry.count for entry in self.gradients)

    def to_dict(self) -> dict[str, Any]:
        totals = {"auto_ms": self.auto_ms, "tuned_ms": self.tuned_ms}
        return {**asdict(self), "cache": str(self.cache), **totals}


def tune(
    target: Any,
    *,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] | None = None,
    batch: int | None = None,
    gradients: Sequence[str] = BOTH,
    dtype: Any = None,
    provider: str = CPU,
    threads: int | None = None,
    budget: float = 60.0,
    max_error_factor: float = DEFAULT_ERROR_FACTOR,
    max_workspace: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    again: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> TuningReport:
    """Measure the lowerings of every convolution gradient of `target` and keep the times for ``lowering="tuned"``.

    Args:
        target: a `torch.nn.Module`, a path of an ``.onnx`` file that `build_model` made or of a folder of them, a
            `ConvGeometry`, or a sequence of `ConvGeometry`.
        input_shape: of a module's single argument (random data). args: a module's arguments, in place of it.
        batch: to measure at, in place of the target's own.
        gradients: which of ``"input"`` and ``"weight"``.
        dtype: of the tensors; None takes what the target says, float32 where it says nothing.
        provider: the onnxruntime execution provider, ``"cpu"`` and ``"cuda"`` for short. threads: of onnxruntime's
            intra-op pool; None for its default.
        budget: seconds of measuring, shared among the layers; reading or tracing the target comes before. What there
            is no time for is listed as skipped; calling again goes on from there.
        max_error_factor, max_workspace: limits on what is measured, as in `build_model`. They apply again when the
            cache is used.
        cache: the file; None for CONVGRAD_TUNING_CACHE, or the user's cache folder.
        again: measure also what the cache holds already.
        seed: of the data.
        progress: called with (done, total, name) before each gradient.

    Raises:
        ArgumentTypeError, GeometryError, DTypeError: an argument that is none of the above. ModelFileError: a model
            that is not ours. CaptureError: the module cannot run. TuningCacheError: the file there is not an intact
            tuning cache; nothing is measured then. UnsupportedLoweringError: no lowering stays within the limits.
        ProviderError: another provider, or onnxruntime lacks it, or it cannot start. OutputPathError: the cache cannot
            be written; where something has to be measured for it, before that.
    """
    started = time.monotonic()
    wanted, again = _gradients(gradients), as_bool(again, "again")
    if not (progress is None or callable(progress)):
        raise ArgumentTypeError(f"progress is {progress!r:.80}, expected a function, or None")
    settings = TuningSettings(
        provider=_provider(provider),
        threads=check_pool(threads),
        max_error_factor=check_error_factor(max_error_factor),
        max_workspace=check_workspace(max_workspace),
        seed=as_int(seed, "seed", minimum=0),
    )
    budget = as_number(budget, "budget", above=0)
    given = None if dtype is None else dtypes.name_of(dtype)
    path = store.cache_path(cache)
    layers = _layers(target, input_shape, args, batch)
    work = [(layer, gradient) for layer in layers for gradient in layer.gradients if gradient in wanted]
    if not work:
        raise GeometryError(f"gradients is {wanted}, and the target has none of them")
    known = {record.key: record for record in store.load(path)}
    results: list[TunedGradient] = []
    skipped: list[SkippedGradient] = []
    first: float | None = None  # when the first measurement began: each call makes one, so that calling again goes on
    for index, (layer, gradient) in enumerate(work):
        left = budget if first is None else budget - (time.monotonic() - first)
        share = max(_SHORTEST, min(_LONGEST, left / (len(work) - index)))
        mine = replace(settings, dtype=given or layer.dtype or "float32", seconds=share)
        record = None if again else _held(known, gradient, layer.geometry, mine)
        cached = record is not None
        if record is None and left <= 0:
            skipped.append(SkippedGradient(layer.name, gradient))
            continue
        if record is None:
            if first is None:
                store.check_writable(path)
            if progress is not None:
                progress(index, len(work), f"{layer.name} {gradient}")
            first = time.monotonic() if first is None else first
            try:
                record = tune_gradient(gradient, layer.geometry, mine)
            except MemoryError as error:
                skipped.append(SkippedGradient(layer.name, gradient, f"its operands cannot be made: {error}"))
                continue
            store.save(path, [record])
            known[record.key] = record
        if record.timings:
            results.append(_summary(layer, gradient, record, mine, path, cached))
        else:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in record.refused.items())
            skipped.append(SkippedGradient(layer.name, gradient, reasons))
    if progress is not None:
        progress(len(work), len(work), "")
    return TuningReport(path, settings.thread_count, tuple(results), tuple(skipped), time.monotonic() - started)


def _provider(provider: Any) -> str:
    name = as_provider(provider)
    if name not in (CPU, CUDA):
        raise ProviderError(f"provider is {provider!r}, expected cpu or cuda: lowerings are chosen for these two")
    onnxruntime_with(name)
    return name


def _layers(
    target: Any, input_shape: Sequence[int] | None, args: Sequence[Any] | None, batch: int | None
) -> list[LayerToTune]:
    """What there is to tune, at the batch that is wanted; every size is an integer."""
    layers = _own_layers(target, input_shape, args)
    if batch is not None:
        layers = merged(at_batch(layer, batch) for layer in layers)
    for geometry in (layer.geometry for layer in layers):
        if not geometry.is_static or not isinstance(geometry.batch, int):
            raise GeometryError(
                f"{geometry.describe()} has open sizes, expected integers: give the batch to measure at"
            )
        if geometry.batch < 1:
            raise GeometryError(
                f"{geometry.describe()} has an empty batch, expected at least 1: nothing could be measured"
            )
    return layers


def _own_layers(target: Any, input_shape: Sequence[int] | None, args: Sequence[Any] | None) -> list[LayerToTune]:
    if callable(getattr(target, "named_modules", None)):
        if (input_shape is None) == (args is None):
            raise GeometryError("a module needs its input_shape, or its args: expected exactly one of them")
        if args is None:
            args = (_example(target, input_shape),)
        elif not isinstance(args, tuple | list):
            raise ArgumentTypeError(f"args is a {type(args).__name__}, expected a sequence of the module's arguments")
        return module_layers(target, args)
    path = isinstance(target, str | os.PathLike)
    geometries = [target] if isinstance(target, ConvGeometry) or not _is_iterable(target) else list(target)
    if not path and not (geometries and all(isinstance(entry, ConvGeometry) for entry in geometries)):
        raise ArgumentTypeError(
            f"target is a {type(target).__name__}, expected a torch.nn.Module, a path of a model or folder, a "
            "ConvGeometry or a sequence of ConvGeometry"
        )
    if input_shape is not None or args is not None:
        raise GeometryError("input_shape and args are for a module: a model or a ConvGeometry has sizes of its own")
    if path:
        return model_layers(Path(target))
    return merged(LayerToTune(entry.describe(), entry) for entry in geometries)


def _example(module: Any, input_shape: Sequence[int] | None) -> Any:
    import torch

    parameter = next(iter(module.parameters()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    shape = as_shape(input_shape, "input_shape")
    try:
        return torch.rand(shape, generator=generator).to(parameter.device, parameter.dtype)
    except RuntimeError as error:  # of a size that no memory holds
        raise GeometryError(f"input_shape is {shape}, of which no tensor can be made: {in_one_line(error)}") from error


def _is_iterable(value: Any) -> bool:
    """Not so an array of no dimension and a class, which have the method."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _gradients(gradients: Any) -> tuple[str, ...]:
    if not _is_iterable(gradients):
        raise ArgumentTypeError(f"gradients is {gradients!r}, expected 'input', 'weight' or both")
    given = (gradients,) if isinstance(gradients, str) else tuple(gradients)
    if not given or any(not isinstance(name, str) or name not in BOTH for name in given):
        raise GeometryError(f"gradients is {given}, expected 'input', 'weight' or both")
    return given


def _held(
    known: dict[str, TuningRecord], gradient: str, geometry: ConvGeometry, settings: TuningSettings
) -> TuningRecord | None:
    """The record of exactly this batch and thread count, when it covers what may be asked of it."""
    found = store.matching(known.values(), gradient, geometry, settings.dtype, settings.provider, settings.thread_count)
    for record in found:
        if (record.threads, record.geometry) != (settings.thread_count, geometry) or not record.timings:
            continue
        covered = {timing.lowering for timing in record.timings}
        covered |= {name for name, reason in record.refused.items() if _stands(reason, record, settings)}
        if covered.issuperset(candidate_names(gradient, geometry, settings)):
            return record
    return None


def _stands(reason: str, record: TuningRecord, settings: TuningSettings) -> bool:
    """Whether a candidate that was refused would be refused again."""
    if reason.startswith(NO_TIME):
        return settings.seconds < _WORTH_AGAIN * record.seconds
    return not reason.startswith(MEMORY)


def _summary(
    layer: LayerToTune, gradient: str, record: TuningRecord, settings: TuningSettings, path: Path, cached: bool
) -> TunedGradient:
    def chosen(lowering: str) -> str:
        return choose(
            gradient,
            layer.geometry,
            settings.dtype,
            lowering=lowering,
            provider=settings.provider,
            max_error_factor=settings.max_error_factor,
            max_workspace=settings.max_workspace,
            threads=settings.thread_count,
        ).name

    times = {timing.lowering: timing.min_ms for timing in record.timings}
    auto, tuned = chosen(AUTO), chosen(f"{TUNED}:{path}")
    tuned_ms = times.get(tuned, math.nan)
    return TunedGradient(
        layer.name,
        layer.count,
        gradient,
        layer.geometry.describe(),
        settings.dtype,
        auto,
        times.get(auto, tuned_ms),  # the policy's choice was refused
        tuned,
        tuned_ms,
        times,
        record.refused,
        cached,
    )
