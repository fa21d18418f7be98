"""Loading a training step into onnxruntime: one session, or two where its state is updated in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.model_source import model_source
from ..runtime.providers import is_cpu_alone
from .chunks import chunk_updates, fixed_shapes
from .flat_memory import FlatTensor
from .phase_session import PhaseSession
from .preparation import Prepared, prepare


@dataclass(frozen=True)
class OpenedStep:
    """A step's sessions, and what goes between them.

    Attributes:
        phases: in the order in which they run.
        carried, hidden, in_place, flat: as in `Phases`.
        shapes: of the second phase's inputs before some were declared as chunks.
    """

    phases: tuple[PhaseSession, ...]
    carried: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()
    in_place: frozenset[str] = frozenset()
    flat: tuple[FlatTensor, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


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
    on_cpu = is_cpu_alone(providers)
    ready = prepare(source, parsed, in_place, blocked_layout, threads) if on_cpu else Prepared(source)
    del parsed  # its weights: the session has its own
    cut = ready.phases
    first = PhaseSession(ready.content, providers, threads, shared=cut is not None, sizes=ready.sizes)
    if cut is None:
        return OpenedStep((first,))
    update = cut.typed_update(first.outputs.values())
    shapes = fixed_shapes(update.graph.input)
    views = chunk_updates(update)
    second = PhaseSession(update.SerializeToString(), providers, threads, shared=True, views=views)
    return OpenedStep((first, second), frozenset(cut.carried), frozenset(cut.hidden), cut.in_place, cut.flat, shapes)
