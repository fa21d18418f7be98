"""Loading a training step into onnxruntime: one session, or two where its state is updated in place."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.model_source import model_source
from ..runtime.ordered_session import CannotAddNodesError
from ..runtime.providers import is_cpu_alone
from .chunks import chunk_updates, fixed_shapes
from .flat_memory import FlatTensor
from .fused_writer import write_updates
from .phase_session import PhaseSession
from .preparation import Prepared, prepare


@dataclass(frozen=True)
class OpenedStep:
    """A step's sessions, and what goes between them.

    Attributes:
        phases: in the order in which they run.
        carried, hidden, in_place, flat: as in `Phases`.
        shapes: of the state tensors that are declared as chunks, their own.
        memory: by the name of a further input, the state tensor that it shows.
    """

    phases: tuple[PhaseSession, ...]
    carried: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()
    in_place: frozenset[str] = frozenset()
    flat: tuple[FlatTensor, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)


def open_step(
    model: str | os.PathLike[str] | bytes | Any,
    providers: Sequence[tuple[str, Mapping[str, Any]]],
    threads: int | None,
    in_place: bool | None,
    blocked_layout: bool,
) -> OpenedStep:
    """The sessions of a step.

    Args:
        providers: names and options, as `runtime.providers.resolve` gives them.
        model, threads, in_place, blocked_layout: as in `TrainingSession`.

    Raises:
        ModelFileError: the model cannot be loaded. ProviderError: the first provider cannot start.
    """
    source, parsed = model_source(model)
    if not is_cpu_alone(providers):
        return OpenedStep((PhaseSession(source, providers, threads),))
    ready = prepare(source, parsed, in_place, blocked_layout, threads)
    try:
        return _opened(ready, providers, threads)
    except CannotAddNodesError:
        source, parsed = model_source(model)
        return _opened(prepare(source, parsed, in_place, blocked_layout, threads, fuse=False), providers, threads)


def _opened(ready: Prepared, providers: Sequence[tuple[str, Mapping[str, Any]]], threads: int | None) -> OpenedStep:
    cut = ready.phases
    if cut is None:
        return OpenedStep((PhaseSession(ready.content, providers, threads, sizes=ready.sizes),))
    fused = cut.fused
    first = PhaseSession(
        ready.content,
        providers,
        threads,
        shared=True,
        views=fused.views if fused else None,
        sizes=ready.sizes,
        add=functools.partial(write_updates, fused=fused) if fused else None,
    )
    update = cut.typed_update(first.outputs.values())
    shapes = {**fixed_shapes(update.graph.input), **cut.shapes}
    views = {**cut.views, **chunk_updates(update)}
    rest = []
    if update.graph.node:
        rest = [PhaseSession(update.SerializeToString(), providers, threads, shared=True, views=views)]
    return OpenedStep(
        (first, *rest),
        frozenset(cut.carried),
        frozenset(cut.hidden),
        cut.in_place,
        cut.flat,
        shapes,
        fused.memory if fused else {},
    )
