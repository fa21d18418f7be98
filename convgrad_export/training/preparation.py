"""What becomes of a training step's model when it is loaded to run on the CPU.

Its convolutions are brought into the machine's blocked layout, it is cut in two phases where its state is to be updated
in place, with the updates that can run within the first, and its nodes are put in the order that keeps the fewest
tensors alive.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelFileError
from ..runtime.blocked import put_blocked_layout
from ..runtime.execution_order import put_execution_order
from ..runtime.model_source import loaded
from ..runtime.tensor_bytes import declared_bytes
from ..tensor_names import STEP, UPDATED
from .chunks import fixed_shapes
from .flat_updates import flatten_updates
from .fused_updates import fuse_updates
from .phases import Phases, split

METADATA = "convgrad.training"
_LARGEST_JOINED = 1 << 19  # elements whose gradients wait for one another, where updates run within the backward


@dataclass(frozen=True)
class Prepared:
    """A step's model as it is loaded.

    Attributes:
        content: the model of the first phase, or of the whole step.
        phases: what the second phase needs; None where the step is not cut.
        sizes: of tensors in bytes, those that are known; 0 where the caller gives their memory.
    """

    content: Path | bytes
    phases: Phases | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


def prepare(
    source: Path | bytes,
    parsed: Any | None,
    in_place: bool | None,
    blocked_layout: bool,
    threads: int | None = None,
    *,
    fuse: bool = True,
) -> Prepared:
    """What `TrainingSession` loads.

    Args:
        source: as it came; it comes back unchanged where onnxruntime shall say what is wrong with it, where onnx is
            missing, and where tensors lie in other files.
        parsed: the onnx.ModelProto that is in it, to be changed; read from it without one.
        in_place, blocked_layout, threads: as in `TrainingSession`.
        fuse: compute updates within the backward, those that can be.
    """
    model = loaded(source) if parsed is None else parsed
    if model is None or any(tensor.external_data for tensor in model.graph.initializer):
        return Prepared(source)
    sizes = declared_bytes(model.graph)
    if blocked_layout:
        put_blocked_layout(model, threads)
    phases = None if in_place is False else _cut(model, fuse and bool(sizes))
    if phases is not None:
        outputs = {value.name for value in phases.gradients.graph.output}
        given = {name for tensor in phases.flat for name in tensor.parts if name in outputs}
        given |= phases.fused.gone if phases.fused else set()  # the update that frees them comes at once
        sizes.update(dict.fromkeys(given, 0))
    first = model if phases is None else phases.gradients
    put_execution_order(first.graph)
    if phases is not None:
        put_execution_order(phases.update.graph)
    return Prepared(first.SerializeToString(), phases, sizes)


def _cut(model: Any, fuse: bool) -> Phases | None:
    """The step cut in two, or None where it cannot be; what is wrong with a model is said when it is loaded."""
    try:
        metadata = training_metadata({entry.key: entry.value for entry in model.metadata_props})
    except ModelFileError:
        return None
    outputs = {value.name for value in model.graph.output}
    updated = {name: name + UPDATED for name in metadata["state"] if name + UPDATED in outputs}
    trained = set(metadata["trained"])
    inner = list(model.graph.value_info)
    for largest in (_LARGEST_JOINED, None) if fuse else (None,):
        phases = split(model, trained, set(metadata["state"]), updated)
        phases = phases and flatten_updates(phases, trained, fixed_shapes(inner), largest=largest)
        if phases is None or largest is None:
            return phases
        phases = fuse_updates(phases, inner)
        if phases.fused:
            return phases
    return None


def training_metadata(entries: Mapping[str, str]) -> dict[str, Any]:
    """A model's own description of its training step, from its text entries.

    Raises:
        ModelFileError: it has none, one of another version, or one that is damaged.
    """
    text = entries.get(METADATA)
    if not text:
        raise ModelFileError(
            f"the model is no training step: it has no {METADATA!r} entry; write one with export_training_step"
        )
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"it is no JSON text: {error}") from None
    if not isinstance(found, dict):
        raise _damaged(f"it is {text:.60}, expected a JSON object")
    if found.get("version") != 1:
        raise ModelFileError(f"the training step has version {found.get('version')!r}, expected 1")
    for name, (fits, expected) in _FIELDS.items():
        if name not in found:
            if name in _OPTIONAL:
                found[name] = _OPTIONAL[name]
                continue
            raise _damaged(f"it has no {name!r}")
        if not fits(found[name]):
            raise _damaged(f"{name!r} is {found[name]!r:.60}, expected {expected}")
    if STEP not in found["state"]:
        raise _damaged(f"its 'state' has no {STEP!r}")
    return found


def _damaged(reason: str) -> ModelFileError:
    return ModelFileError(f"the model's {METADATA!r} entry is damaged, export the step again: {reason}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _aliases(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (_number, "a number"),
    "accumulation": (_number, "a number"),
    "state": (_names, "a list of names"),
    "trained": (_names, "a list of names"),
    "aliases": (_aliases, "an object of names"),
    "not_persistent": (_names, "a list of names"),
}
_OPTIONAL: Mapping[str, Any] = {"aliases": {}, "not_persistent": []}  # steps of earlier versions have neither
