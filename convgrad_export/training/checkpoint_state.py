"""`CheckpointState` and its parameters, as in onnxruntime.training.api. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..arguments import as_bool, as_path
from ..errors import ArgumentTypeError, GeometryError, ModelFileError
from ..tensor_names import STEP
from .checkpoint import as_array, read_checkpoint, save_checkpoint

Path = str | os.PathLike[str]


class Parameter:
    """One parameter of a state.

    Attributes:
        name: PyTorch's. requires_grad: whether training changes it.
    """

    def __init__(self, state: CheckpointState, name: str) -> None:
        self._state, self.name = state, name
        self.requires_grad = name in state.trained

    @property
    def data(self) -> np.ndarray:
        """The values; assign an array of the same shape and dtype to change them."""
        return self._state.arrays[self.name]

    @data.setter
    def data(self, value: np.ndarray) -> None:
        old, value = self._state.arrays[self.name], as_array(value, self.name)
        if value.shape != old.shape or value.dtype != old.dtype:
            raise GeometryError(f"{self.name} is {old.dtype} {old.shape}, but {value.dtype} {value.shape} was assigned")
        self._state.arrays[self.name] = np.array(value)

    @property
    def grad(self) -> np.ndarray | None:
        """The accumulated gradient, None before the first training call and for frozen parameters."""
        return self._state.gradients.get(self.name)

    def __repr__(self) -> str:
        return f"Parameter({self.name}, {self.data.dtype} {self.data.shape}, requires_grad={self.requires_grad})"


class Parameters:
    """A state's parameters by name; iterating gives (name, parameter) as in onnxruntime-training."""

    def __init__(self, state: CheckpointState) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Parameter:
        if name not in self._state.parameter_names:
            raise KeyError(name)
        return Parameter(self._state, name)

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        self[name].data = value

    def __iter__(self) -> Iterator[tuple[str, Parameter]]:
        return ((name, Parameter(self._state, name)) for name in self._state.parameter_names)

    def __contains__(self, name: object) -> bool:
        return name in self._state.parameter_names

    def __len__(self) -> int:
        return len(self._state.parameter_names)

    def __repr__(self) -> str:
        return f"Parameters({', '.join(self._state.parameter_names)})"


class Properties(dict[str, "int | float | str"]):
    """Numbers and texts by name; iterating gives (name, value) as in onnxruntime-training."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items())


class CheckpointState:
    """Parameters, buffers, optimizer state and user properties, shared by a `Module` and an `Optimizer`.

    Attributes:
        arrays: every tensor by name. gradients: accumulated gradients by parameter name.
        trained, parameter_names: in the module's order. properties: your own numbers and texts, saved with the state.
        calls: of the module in training mode so far; with the seed they decide what dropout draws.
    """

    def __init__(self, arrays: dict[str, np.ndarray], header: Mapping[str, str]) -> None:
        if "trained" not in header or "parameters" not in header:
            raise ModelFileError("the checkpoint holds no parameter names; write one with generate_artifacts")
        self.arrays = arrays
        self.gradients: dict[str, np.ndarray] = {}
        self.trained = [name for name in header["trained"].split("\n") if name]
        self.parameter_names = [name for name in header["parameters"].split("\n") if name]
        self._header = {k: v for k, v in header.items() if not k.startswith("property.")}
        if lost := [name for name in (*self.trained, *self.parameter_names) if name not in arrays]:
            raise ModelFileError(f"the checkpoint is damaged: it lacks {', '.join(lost[:10])}, which its header names")
        self.learning_rate: float = _number(float, "learning_rate", header.get("learning_rate", "0.001"))
        self.calls: int = _number(int, "calls", header.get("calls", "0"))
        self.properties = Properties(
            {key.removeprefix("property."): _parsed(key, t) for key, t in header.items() if key.startswith("property.")}
        )

    @property
    def parameters(self) -> Parameters:
        return Parameters(self)

    @classmethod
    def load_checkpoint(cls, checkpoint_uri: Path) -> CheckpointState:
        """Read a checkpoint.

        Raises:
            ModelFileError: missing, damaged, or not written by `generate_artifacts` or `save_checkpoint`.
        """
        return cls(*read_checkpoint(as_path(checkpoint_uri, "checkpoint_uri")))

    @classmethod
    def save_checkpoint(
        cls, state: CheckpointState, checkpoint_uri: Path, include_optimizer_state: bool = False
    ) -> None:
        """Write a checkpoint; an existing one is replaced when the new one is complete.

        Without the optimizer's state, its tensors and the number of calls are written as zeros, as they start.
        """
        if not isinstance(state, CheckpointState):
            raise ArgumentTypeError(f"state is a {type(state).__name__}, expected a CheckpointState")
        path = as_path(checkpoint_uri, "checkpoint_uri")
        include_optimizer_state = as_bool(include_optimizer_state, "include_optimizer_state")
        arrays = dict(state.arrays)
        if not include_optimizer_state:
            for name in state.optimizer_names:
                arrays[name] = np.zeros_like(arrays[name])
        calls = state.calls if include_optimizer_state else 0
        header = {**state._header, "learning_rate": repr(state.learning_rate), "calls": str(calls)}
        for key, value in state.properties.items():
            plain = value.item() if isinstance(value, np.generic) else value  # a mean of losses is a numpy.float64
            kind = next((kind for kind in (int, float, str) if isinstance(plain, kind)), None)
            if not isinstance(key, str):
                raise ArgumentTypeError(f"property {key!r} has a {type(key).__name__} for a name, expected a str")
            if isinstance(plain, bool) or kind is None:
                raise ArgumentTypeError(f"property {key!r} is {value!r}, expected an int, a float or a str")
            header[f"property.{key}"] = f"{kind.__name__}:{kind(plain)}"
        save_checkpoint(path, arrays, metadata=header, overwrite=True)

    @property
    def optimizer_names(self) -> list[str]:
        prefixes = tuple(f"{name}." for name in self.trained)
        known = set(self.parameter_names)
        return [n for n in self.arrays if n == STEP or (n.startswith(prefixes) and n not in known)]


def _parsed(key: str, text: str) -> int | float | str:
    kind, _, value = text.partition(":")
    return _number(int if kind == "int" else float, key, value) if kind in ("int", "float") else value


def _number(kind: Any, key: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ModelFileError(f"the checkpoint is damaged: its {key!r} is {text!r}, expected a number") from None
