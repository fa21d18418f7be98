"""Running an exported training step on onnxruntime, state and all, without torch.

Parameters, buffers and optimizer state stay in onnxruntime's own memory. There are two sets of it: a step reads one and
writes the other, then they change places, so nothing is copied and nothing is allocated from one step to the next.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentTypeError, DTypeError, GeometryError, ModelFileError, NonFiniteLossError
from ..runtime import tensors
from ..runtime.model_source import model_source
from ..runtime.providers import Providers, check_active, onnxruntime, resolve
from .checkpoint import check_matches, checkpoint_path, load_checkpoint, save_checkpoint

METADATA = "convgrad.training"
_SUFFIX = ".updated"
_SETTINGS = ("learning_rate", "seed")


class TrainingSession:
    """A training step loaded into onnxruntime, with its state.

    Args:
        model: path of the step that `export_training_step` wrote, its bytes, or a model object.
        checkpoint: the state's file; by default the one beside the model. A mapping of arrays is taken as it is.
        providers: as in `GradientSession`. threads: size of the intra-op thread pool, None for onnxruntime's choice.
        learning_rate: used by `step` when it is given none; by default the exported optimizer's.
        seed: for dropout; with the step counter it decides every random number.
        stop_on_non_finite: raise `NonFiniteLossError` before the update is taken over.

    Raises:
        ModelFileError: no training step, or a checkpoint that is damaged or of another model.
        ProviderError: the first provider asked for cannot start.
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
    ) -> None:
        self._ort = onnxruntime()
        source = model_source(model)
        wanted = resolve(providers)
        options = self._ort.SessionOptions()
        # One block planned for a whole run is larger than what the arena hands out as it goes (365 against 417 MiB for
        # ResNet-18 at batch 8), at the same speed.
        options.enable_mem_pattern = False
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = self._ort.InferenceSession(
                source if isinstance(source, bytes) else str(source),
                options,
                providers=[name for name, _ in wanted],
                provider_options=[settings for _, settings in wanted],
            )
        except Exception as error:  # onnxruntime raises a private class for each status code
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise ModelFileError(f"onnxruntime cannot load the training step: {error}") from error
        check_active(wanted[0][0], self._session.get_providers())
        self._device = "cuda" if wanted[0][0].startswith("CUDA") else "cpu"
        metadata = _metadata(self._session)
        self.learning_rate = float(metadata["learning_rate"] if learning_rate is None else learning_rate)
        self.seed = seed
        self.stop_on_non_finite = stop_on_non_finite
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        state = [name for name in metadata["state"] if name in self._inputs]
        self.batch_names = tuple(n for n in self._inputs if n not in state and n not in _SETTINGS)
        outputs = [value.name for value in self._session.get_outputs()]
        self._updated = [n.removesuffix(_SUFFIX) for n in outputs if n.removesuffix(_SUFFIX) in state and n != "loss"]
        self._returned = [n for n in outputs if n.removesuffix(_SUFFIX) not in state]
        self._expected = {n: (self._dtype(n), tuple(self._inputs[n].shape)) for n in state}
        self._current: dict[str, Any] = {}
        self._next: dict[str, Any] = {}
        if checkpoint is None:
            if not isinstance(source, Path):
                raise ArgumentTypeError("checkpoint is missing: a model that is no file has none beside it")
            checkpoint = checkpoint_path(source)
        self.load(checkpoint)

    def _dtype(self, name: str) -> str:
        return tensors.onnx_type(self._inputs[name].type)[1]

    def load(self, checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> None:
        """Take over a state: a checkpoint file, or arrays by name (a PyTorch state_dict's are completed from here).

        Raises:
            ModelFileError: a file that is damaged or of another model; names and shapes are listed. The state stays.
        """
        if isinstance(checkpoint, Mapping):
            arrays = {name: tensors.view(value, name) for name, value in checkpoint.items()}
            values = {name: np.array(_as_numpy(view)) for name, view in arrays.items()}
            if self._current:
                values = {**self.state(), **values}
            origin: Any = "given as a mapping"
        else:
            values, origin = load_checkpoint(checkpoint), checkpoint
        # Tensors that no path of the step reads (an unused parameter) are no inputs of the graph.
        values = {name: value for name, value in values.items() if name in self._expected or not self._is_unread(name)}
        check_matches(origin, values, self._expected)
        # One array at a time: the state may fill most of the memory, and is held twice while a step runs.
        self._current, self._next = {}, {}
        for name in self._expected:
            self._current[name] = self._ort_value(values.pop(name))
        for name in self._updated:
            dtype, _ = self._expected[name]
            self._next[name] = self._ort.OrtValue.ortvalue_from_shape_and_type(
                self._current[name].shape(), np.dtype(dtype), self._device, 0
            )

    def _is_unread(self, name: str) -> bool:
        return name in _metadata(self._session)["state"]

    def _ort_value(self, array: np.ndarray) -> Any:
        own = np.array(array, order="C")  # onnxruntime shares a numpy array's memory: the caller's stays untouched
        if own.dtype.name == "bfloat16":
            raise DTypeError(
                "training on bfloat16 state is not supported: onnxruntime's CPU provider cannot compute in it"
            )
        return self._ort.OrtValue.ortvalue_from_numpy(own, self._device, 0)

    def state(self) -> dict[str, np.ndarray]:
        """Copies of all state tensors, by name: parameters and buffers under PyTorch's names, and the optimizer's."""
        return {name: np.array(value.numpy()) for name, value in self._current.items()}

    def state_dict(self, names: Any = None) -> dict[str, np.ndarray]:
        """Parameters and buffers alone, for ``module.load_state_dict`` after ``torch.from_numpy``.

        Args:
            names: which, for example ``module.state_dict()``; by default all that are no optimizer state.
        """
        state = self.state()
        if names is None:
            trained = set(_metadata(self._session)["trained"])
            names = [n for n in state if n not in ("step", "micro_step") and n.rpartition(".")[0] not in trained]
        return {name: state[name] for name in names if name in state}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
        """Write the state; the previous file stays until the new one is complete."""
        return save_checkpoint(path, self.state(), overwrite=overwrite)

    @property
    def steps(self) -> int:
        """Number of updates so far."""
        return int(self._current["step"].numpy())

    def step(self, *batch: Any, learning_rate: float | None = None, **named: Any) -> dict[str, Any]:
        """One step on a batch.

        Args:
            batch: arrays or tensors in the order of `batch_names`, or by name.
            learning_rate: for this step.

        Returns:
            ``{"loss": float, ...}``: the loss, and what else the step returns (``gradient_norm``, ``output``).

        Raises:
            ArgumentTypeError, DTypeError, GeometryError: a batch of another form, dtype or shape, or with values that
                an operator refuses (a label outside the classes); the state stays.
            NonFiniteLossError: with the step's number; the state stays.
        """
        if len(batch) > len(self.batch_names):
            raise ArgumentTypeError(
                f"step got {len(batch)} arrays, expected {len(self.batch_names)}: {self.batch_names}"
            )
        given = {**dict(zip(self.batch_names, batch, strict=False)), **named}
        if set(given) != set(self.batch_names):
            missing, unknown = set(self.batch_names) - set(given), set(given) - set(self.batch_names)
            raise ArgumentTypeError(
                f"step takes {list(self.batch_names)}; missing: {sorted(missing)}, unknown: {sorted(unknown)}"
            )
        rate = self.learning_rate if learning_rate is None else learning_rate
        binding = self._session.io_binding()
        views = {name: tensors.view(value, name) for name, value in given.items()}
        sizes: dict[str, tuple[int, str]] = {}
        for name, view in views.items():
            code = self._check(name, view, sizes)
            binding.bind_input(name, view.device_type, view.device_index, code, view.shape, view.pointer)
        if "learning_rate" in self._inputs:
            binding.bind_cpu_input("learning_rate", np.array(rate, self._dtype("learning_rate")))
        if "seed" in self._inputs:
            binding.bind_cpu_input("seed", np.array(self.seed, np.int64))
        for name, value in self._current.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._returned:
            binding.bind_output(name, "cpu")
        for name in self._updated:
            binding.bind_ortvalue_output(name + _SUFFIX, self._next[name])
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # with a binding mostly RuntimeError, else a private class for each status code
            if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime"):
                raise
            raise ArgumentTypeError(
                f"onnxruntime stopped within step {self.steps + 1}, whose update was not taken over; a label outside "
                f"the classes is the usual cause: {error}"
            ) from error
        values = {v: binding.get_outputs()[i] for i, v in enumerate(self._returned)}
        result: dict[str, Any] = {name: np.array(value.numpy()) for name, value in values.items()}
        result = {name: value.item() if value.ndim == 0 else value for name, value in result.items()}
        if self.stop_on_non_finite and not math.isfinite(result["loss"]):
            raise NonFiniteLossError(
                f"the loss is {result['loss']} at step {self.steps + 1}: the update was not taken over. Lower the "
                "learning rate, look at the batch, or pass stop_on_non_finite=False"
            )
        for name in self._updated:
            self._current[name], self._next[name] = self._next[name], self._current[name]
        return result

    def _check(self, name: str, value: tensors.TensorView, sizes: dict[str, tuple[int, str]]) -> int:
        expected = self._inputs[name]
        code, dtype = tensors.onnx_type(expected.type)
        if value.dtype != dtype:
            raise DTypeError(f"{name} is {value.dtype}, expected {dtype}")
        shape = "(" + ", ".join(str(size) for size in expected.shape) + ")"
        if len(value.shape) != len(expected.shape):
            raise GeometryError(f"{name} has shape {value.shape}, expected {shape}")
        for want, got in zip(expected.shape, value.shape, strict=True):
            size, other = (want, name) if isinstance(want, int) else sizes.setdefault(want, (got, name))
            if size != got:
                raise GeometryError(
                    f"{name} has shape {value.shape}, expected {shape} with {want} = {size} as in {other}"
                )
        return code


def _as_numpy(view: tensors.TensorView) -> Any:
    return view.owner.numpy() if tensors.is_torch(view.owner) else view.owner


def _metadata(session: Any) -> dict[str, Any]:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    try:
        found: dict[str, Any] = json.loads(text or "")
    except ValueError:
        raise ModelFileError(
            f"the model is no training step: it has no {METADATA!r} entry; write one with export_training_step"
        ) from None
    if found.get("version") != 1:
        raise ModelFileError(f"the training step has version {found.get('version')!r}, expected 1")
    return found
