"""Running an exported training step on onnxruntime, state and all, without torch.

Parameters, buffers and optimizer state stay in onnxruntime's own memory. On the CPU a step runs in two phases
(`phases.py`): the second writes parameters and optimizer state over the old ones. Large ones are written within the
first, as soon as their gradients are there (`fused_updates.py`). What cannot be written in place is held twice: a step
reads one set and writes the other, then they change places. Nothing is copied from one step to the next.
"""

from __future__ import annotations

import functools
import math
import numbers
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from ..arguments import as_bool, as_names, check_pool
from ..errors import ArgumentTypeError, DTypeError, NonFiniteLossError, ProviderError
from ..runtime import tensors
from ..runtime.declared import Declared, NamedSizes
from ..runtime.providers import (
    Providers,
    in_one_line,
    is_cpu_alone,
    is_onnxruntime_error,
    onnxruntime,
    raise_refused,
    resolve,
)
from ..session_memory import give_back_freed
from ..tensor_names import GRADIENT_NORM, LEARNING_RATE, LOSS, MICRO_STEP, SEED, STEP, UPDATED
from .checkpoint import as_array, check_matches, checkpoint_path, save_checkpoint
from .checkpoint_file import open_checkpoint
from .flat_memory import FlatMemory
from .fused_updates import BEGAN, STOP
from .interrupts import interrupts_after
from .opening import open_step
from .preparation import training_metadata
from .update_gate import UpdateGate

_SETTINGS = (LEARNING_RATE, SEED)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _alone(
    method: Callable[Concatenate[TrainingSession, _Arguments], _Result],
) -> Callable[Concatenate[TrainingSession, _Arguments], _Result]:
    """Of several threads one at a time: what is read while a step writes would be of two steps."""

    @functools.wraps(method)
    def alone(self: TrainingSession, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with self._lock:
            return method(self, *args, **kwargs)

    return alone


class TrainingSession:
    """A training step loaded into onnxruntime, with its state.

    Several threads may use one session, to save it while it trains, say: one waits until the other's step is complete.

    Args:
        model: path of the step that `export_training_step` wrote, its bytes, or a model object.
        checkpoint: the state's file; by default the one beside the model. A mapping of arrays is taken as it is.
        providers: as in `GradientSession`. threads: size of the intra-op thread pool, None for onnxruntime's choice.
        learning_rate: used by `step` when it is given none; by default the exported optimizer's.
        seed: for dropout; with the number of the call, which the state holds, it decides every random number.
        stop_on_non_finite: raise `NonFiniteLossError` before the update is taken over, if the loss is not finite, or
            the norm of the gradients where the step returns it.
        in_place: write parameters and optimizer state over the old ones, within the backward once nothing reads them
            any more or in a second phase after it, so that the state is held once, and gradients shortly; on the CPU
            alone, and there the default. State whose old value may still be read when the new one is written (where
            gradients are accumulated, or a teacher follows the parameters) is held twice all the same.
        blocked_layout: as in `GradientSession`.

    Raises:
        ModelFileError: no training step, or a checkpoint that is damaged or of another model.
        ProviderError: the first provider asked for cannot start, or has no such option.
        ArgumentTypeError: an argument of another kind, no thread, or far more of them than the machine has processors.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes | Any,
        checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        providers: Providers = None,
        *,
        threads: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
        stop_on_non_finite: bool = True,
        in_place: bool | None = None,
        blocked_layout: bool = True,
    ) -> None:
        self._ort = onnxruntime()
        self._lock = threading.RLock()
        check_pool(threads)
        as_bool(stop_on_non_finite, "stop_on_non_finite")
        as_bool(blocked_layout, "blocked_layout")
        in_place = None if in_place is None else as_bool(in_place, "in_place")
        wanted = resolve(providers)
        if in_place and not is_cpu_alone(wanted):
            raise ArgumentTypeError(f"in_place is {in_place}, expected None or False: it is for the CPU provider alone")
        opened = open_step(model, wanted, threads, in_place, blocked_layout)
        give_back_freed()
        self._phases = opened.phases
        self._carried, self._in_place = opened.carried, opened.in_place
        self._flat = FlatMemory(opened.flat)
        self._metadata = training_metadata(self._phases[0].metadata)
        self.seed = check_seed(seed)
        self.stop_on_non_finite = stop_on_non_finite
        self._memory_of = opened.memory
        inputs = {name: value for phase in self._phases for name, value in phase.inputs.items()}
        inputs.update({name: inputs[shown] for shown, name in opened.memory.items() if name not in inputs})
        between = self._carried.union(self._flat.whole, opened.memory, [STOP])
        parts = {name: (flat.dtype, shape) for flat in opened.flat for name, (_, shape) in flat.parts.items()}
        self._inputs = {name: value for name, value in inputs.items() if name not in between}
        self._rate_type = self._dtype(LEARNING_RATE) if LEARNING_RATE in self._inputs else "float64"
        rate = self._metadata["learning_rate"] if learning_rate is None else learning_rate
        self.learning_rate = check_rate(rate, dtype=self._rate_type)
        outputs = [name for phase in self._phases for name in phase.outputs]
        state = [name for name in self._metadata["state"] if name in self._inputs or name in parts]
        self.batch_names = tuple(n for n in self._inputs if n not in state and n not in _SETTINGS)
        self._batch = {name: Declared.of(self._inputs[name], name) for name in self.batch_names}
        self._updated = [name for name in state if name + UPDATED in outputs or name in parts]
        self._expected = {
            n: parts[n] if n in parts else (self._dtype(n), opened.shapes.get(n, tuple(self._inputs[n].shape)))
            for n in state
        }
        hidden = {name + UPDATED for name in self._updated} | opened.hidden
        self._returned = frozenset(outputs) - hidden
        self._gate = UpdateGate(self._phases[0].outputs) if BEGAN in outputs else None
        self._lost: str | None = None
        self._unread: dict[str, np.ndarray] = {}  # state that no path of the step reads
        self._current: dict[str, Any] = {}
        self._next: dict[str, Any] = {}
        self._read: dict[str, Any] = {}  # by an input's name, what it is bound to
        self._written: dict[str, Any] = {}  # by an output's
        if checkpoint is None:
            if not isinstance(model, str | os.PathLike):
                raise ArgumentTypeError("checkpoint is missing: a model that is no file has none beside it")
            checkpoint = checkpoint_path(model)
        self.load(checkpoint)

    def _dtype(self, name: str) -> str:
        return tensors.onnx_type(self._inputs[name].type)[1]

    @_alone
    def load(self, checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> None:
        """Take over a state: a checkpoint file, or arrays by name (a PyTorch state_dict's are completed from here).

        Two steps that share parameters (a GAN's) hand them on by it: ``one.load(other.state_dict(one.state_dict()))``,
        with the optimizers' state left to each.

        Raises:
            ModelFileError: a file that is damaged or of another model; names and shapes are listed. The state stays.
            ArgumentTypeError: a mapping whose names are no texts, or whose values are no arrays.
        """
        if isinstance(checkpoint, Mapping):
            if strange := [name for name in checkpoint if not isinstance(name, str)]:
                raise ArgumentTypeError(f"checkpoint holds the name {strange[0]!r:.80}, expected texts: 'fc.weight'")
            aliases = self._metadata["aliases"]
            ordered = sorted(checkpoint.items(), key=lambda item: item[0] not in aliases)
            arrays = {aliases.get(name, name): tensors.view(value, name) for name, value in ordered}
            values = {name: as_array(view.owner, name) for name, view in arrays.items()}
            if self._current and self._lost is None:
                values = {**self.state(), **values}
            self._take_over("given as a mapping", values, values.__getitem__)
            return
        with open_checkpoint(checkpoint) as file:
            self._take_over(checkpoint, file.tensors, file.read)

    def _take_over(self, origin: Any, stored: Mapping[str, Any], read: Callable[[str], np.ndarray]) -> None:
        """Fill the state's memory, one array at a time: the state may fill most of the computer's."""
        # Tensors that no path of the step reads (an unused parameter) are no inputs of the graph.
        known = {name: t for name, t in stored.items() if name in self._expected or name not in self._metadata["state"]}
        check_matches(origin, known, self._expected)
        if any(dtype == "bfloat16" for dtype, _ in self._expected.values()):
            raise DTypeError(
                "training on bfloat16 state is not supported: onnxruntime's CPU provider cannot compute in it"
            )
        self._lost = f"the checkpoint {origin} was not read to its end"
        for name in self._metadata["state"]:
            if name in stored and name not in self._expected:
                self._unread[name] = np.array(read(name))
        for name, (_, shape) in self._expected.items():
            if name not in self._current:
                self._current[name] = self._memory(name)
            self._current[name].update_inplace(np.ascontiguousarray(read(name)).reshape(shape))
        for name in self._updated:
            if name not in self._next:
                self._next[name] = self._current[name] if name in self._in_place else self._memory(name)
        self._read.update(self._current | self._flat.whole)
        self._written.update({name + UPDATED: value for name, value in (self._next | self._flat.whole).items()})
        self._written.update(self._flat.parts)
        self._read.update({shown: self._read[name] for shown, name in self._memory_of.items()})
        self._written.update(self._gate.written if self._gate else {})
        self._lost = None

    def _memory(self, name: str) -> Any:
        if name in self._flat.parts:
            return self._flat.parts[name]
        dtype, shape = self._expected[name]
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype), self._phases[0].device, 0)

    @_alone
    def state(self) -> dict[str, np.ndarray]:
        """Copies of all state tensors, by name: parameters and buffers under PyTorch's names, and the optimizer's.

        Raises:
            ProviderError: an update broke off halfway; `load` a checkpoint first.
        """
        self._check_whole()
        current = {name: np.array(value.numpy()) for name, value in self._current.items()}
        return current | {name: value.copy() for name, value in self._unread.items()}

    def state_dict(self, names: Any = None) -> dict[str, np.ndarray]:
        """Parameters and buffers alone, for ``module.load_state_dict`` after ``torch.from_numpy``.

        Args:
            names: which; of a mapping, such as ``module.state_dict()``, those that the session has. By default those of
                ``module.state_dict()``: tied tensors under all their names, and no buffers that are not persistent.

        Raises:
            ArgumentTypeError: no names, or in a sequence one that the state does not have.
        """
        state, aliases = self.state(), self._metadata["aliases"]
        if names is not None and not isinstance(names, Mapping):
            names = as_names(names, "names", "fc.weight")
            if unknown := [name for name in names if aliases.get(name, name) not in state]:
                raise ArgumentTypeError(f"names holds {unknown}, which the state does not have: {', '.join(state)}")
        if names is None:
            trained = set(self._metadata["trained"])
            counters = (STEP, MICRO_STEP) if self._metadata["accumulation"] > 1 else (STEP,)
            own = [n for n in state if n not in counters and n.rpartition(".")[0] not in trained]
            kept = set(own).difference(self._metadata["not_persistent"])
            names = [n for n in own if n in kept] + [alias for alias, name in aliases.items() if name in own]
        return {name: state[aliases.get(name, name)] for name in names if aliases.get(name, name) in state}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
        """Write the state; the previous file stays until the new one is complete."""
        return save_checkpoint(path, self.state(), overwrite=as_bool(overwrite, "overwrite"))

    @property
    def steps(self) -> int:
        """Number of updates so far."""
        return int(self._current[STEP].numpy())

    @_alone
    def step(self, *batch: Any, learning_rate: float | None = None, **named: Any) -> dict[str, Any]:
        """One step on a batch.

        Args:
            batch: arrays or tensors in the order of `batch_names`, or by name.
            learning_rate: for this step.

        Returns:
            ``{"loss": float, ...}``: the loss, and what else the step returns (``gradient_norm``, ``output``).

        Raises:
            ArgumentTypeError, DTypeError, GeometryError: a batch of another form, dtype or shape, or with values that
                an operator refuses (a label outside the classes); a learning rate that is no number. The state stays.
            NonFiniteLossError: with the step's number; the state stays.
            ProviderError: the step broke off when part of the state was new; `load` a checkpoint. Ctrl-C does not break
                it off: `KeyboardInterrupt` is raised after it.
        """
        rate = check_rate(self.learning_rate if learning_rate is None else learning_rate, dtype=self._rate_type)
        seed = check_seed(self.seed)
        if len(batch) > len(self.batch_names):
            raise ArgumentTypeError(
                f"step got {len(batch)} arrays, expected {len(self.batch_names)}: {self.batch_names}"
            )
        given = dict(zip(self.batch_names, batch, strict=False))
        if twice := [name for name in given if name in named]:
            raise ArgumentTypeError(f"step got {', '.join(twice)} twice, by position and by name")
        given.update(named)
        if set(given) != set(self.batch_names):
            missing, unknown = set(self.batch_names) - set(given), set(given) - set(self.batch_names)
            raise ArgumentTypeError(
                f"step takes {list(self.batch_names)}; missing: {sorted(missing)}, unknown: {sorted(unknown)}"
            )
        self._check_whole()
        views = {name: tensors.view(value, name) for name, value in given.items()}
        sizes: NamedSizes = {}
        for name, view in views.items():
            self._batch[name].check(view, sizes)
        settings = {LEARNING_RATE: rate, SEED: seed, STOP: int(bool(self.stop_on_non_finite))}
        with interrupts_after():
            return self._run(views, settings)

    def _run(self, views: Mapping[str, tensors.TensorView], settings: Mapping[str, float]) -> dict[str, Any]:
        """All phases; what `step` returns."""
        made = self._run_first(views, settings)
        result = self._results(made)
        self._check_finite(result)
        self._lost = f"the update of step {self.steps + 1} broke off"
        for phase in self._phases[1:]:
            try:
                made = phase.run(views, settings, self._read, made, self._written, self._returned)
            except Exception as error:
                if not is_onnxruntime_error(error):
                    raise
                self._lost += f": {in_one_line(error)}"
                self._check_whole()
            result.update(self._results(made))
        for name in self._updated:
            if name not in self._in_place:
                old, new = self._current[name], self._next[name]
                self._current[name], self._next[name] = new, old
                self._read[name], self._written[name + UPDATED] = new, old
        self._lost = None
        return result

    def _check_finite(self, result: Mapping[str, Any]) -> None:
        # The norm too, where the gradients' phase gives it: a finite loss may have a gradient that is not.
        for name in (LOSS, GRADIENT_NORM) if self.stop_on_non_finite else ():
            if name in result and not math.isfinite(result[name]):
                raise NonFiniteLossError(
                    f"the {name.replace('_', ' ')} is {result[name]} at step {self.steps + 1}: the update was not "
                    "taken over. Lower the learning rate, look at the batch, or pass stop_on_non_finite=False"
                )

    def _run_first(self, views: Mapping[str, tensors.TensorView], settings: Mapping[str, float]) -> dict[str, Any]:
        """The first phase's run; where it writes state, part of that may be new from its start on."""
        number, wanted = self.steps + 1, self._returned | self._carried
        if self._gate:
            self._gate.close()
            self._lost = f"step {number} broke off"
        try:
            return self._phases[0].run(views, settings, self._read, {}, self._written, wanted)
        except Exception as error:
            if self._gate and self._gate.began:
                self._lost = f"step {number} broke off: {in_one_line(error)}"
                self._check_whole()
            self._lost = None
            if self._gate and is_onnxruntime_error(error):
                self._check_finite({LOSS: self._gate.loss})
            raise_refused(error, f"step {number}, whose update was not taken over")

    def _results(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """What the caller gets of a phase's outputs: numbers, and arrays of his own."""
        arrays = {name: np.array(tensors.to_numpy(value)) for name, value in made.items() if name in self._returned}
        return {name: array.item() if array.ndim == 0 else array for name, array in arrays.items()}

    def _check_whole(self) -> None:
        if self._lost is not None:
            raise ProviderError(f"{self._lost}. Part of the state is new and part of it old: load a checkpoint")


def check_rate(value: Any, name: str = "learning_rate", dtype: str = "float64") -> float:
    """A learning rate; with not-a-number the state would be lost in a step whose loss is still finite.

    Args:
        dtype: the type in which the model takes it. What this does not hold would be infinity there.
    """
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = math.nan
    if not math.isfinite(rate) or isinstance(value, str | bytes | bool):
        raise ArgumentTypeError(f"{name} is {value!r:.80}, expected a finite number")
    largest = float(np.finfo(dtype).max)
    if abs(rate) > largest:
        raise ArgumentTypeError(f"{name} is {value!r:.80}, expected a number that {dtype} holds, {largest:.4g} at most")
    return rate


def check_seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not -(2**63) <= int(value) < 2**63:
        raise ArgumentTypeError(f"seed is {value!r}, expected a 64-bit integer")
    return int(value)
