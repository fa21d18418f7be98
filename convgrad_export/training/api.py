"""`CheckpointState`, `Module` and `Optimizer`, as in onnxruntime.training.api, on any onnxruntime build. No torch.

Semantics are those of onnxruntime-training 1.19.2: gradients accumulate over calls until `lazy_reset_grad`, `Optimizer`
updates the module's parameters in the state they share, and buffers move parameters in and out as one vector.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..arguments import as_bool, as_int, as_names, as_path
from ..errors import ArgumentTypeError, ConvGradError, DTypeError, GeometryError, ModelFileError
from ..runtime import tensors
from ..runtime.cuda_options import CudaOptions
from ..runtime.providers import onnxruntime
from ..runtime.session import GradientSession
from ..tensor_names import GRADIENT, LEARNING_RATE, LOSS, RESET, SEED, STEP, UPDATED
from .checkpoint import as_array, check_matches
from .checkpoint_state import CheckpointState, Parameter, Parameters, Path
from .session import check_rate, check_seed

__all__ = ["CheckpointState", "LinearLRScheduler", "Module", "Optimizer", "Parameter", "Parameters"]

OWN = (RESET, SEED, STEP, LEARNING_RATE)
# In the metadata of a model, JSON lists: the inputs that a call takes, and the outputs that it returns.
BATCH = "convgrad.batch"
RETURNED = "convgrad.returned"


class Module:
    """A training and an eval model over a shared state.

    Args:
        train_model_uri, eval_model_uri: files from `generate_artifacts`.
        state: shared with the `Optimizer`.
        device: ``"cpu"`` or ``"cuda"``, with the number of the device if it is not the first: ``"cuda:1"``.
        session_options: an `onnxruntime.SessionOptions`, for all sessions, the optimizer's too.

    Raises:
        ModelFileError: a file that cannot be read or is of another kind, or a state of another model.
    """

    def __init__(
        self,
        train_model_uri: Path,
        state: CheckpointState,
        eval_model_uri: Path | None = None,
        device: str = "cpu",
        session_options: Any = None,
    ) -> None:
        if not isinstance(state, CheckpointState):
            raise ArgumentTypeError(
                f"state is a {type(state).__name__}, expected a CheckpointState: CheckpointState.load_checkpoint(path)"
            )
        self.training = True
        self._state = state
        self._open = functools.partial(GradientSession, providers=_provider(device), session_options=session_options)
        self._train = self._open(as_path(train_model_uri, "train_model_uri"))
        self._eval_path = None if eval_model_uri is None else as_path(eval_model_uri, "eval_model_uri")
        self._eval = None if self._eval_path is None else self._open(self._eval_path)
        self._reset = True
        self.seed = 0
        if RESET not in self._train.input_names:
            raise ModelFileError(f"{train_model_uri} is no training model, expected generate_artifacts' training_model")
        if self._eval is not None and LOSS not in self._eval.output_names:
            raise ModelFileError(f"{eval_model_uri} is no eval model, expected generate_artifacts' eval_model")
        for session in (self._train, *([self._eval] if self._eval else [])):
            _check_fits(session, state, self._user_names(session))

    def _user_names(self, session: GradientSession) -> list[str]:
        """The inputs that a call takes; of a file that does not say so, what is neither state nor our own."""
        gradients = {f"{name}{GRADIENT}" for name in self._state.trained}
        known = {*OWN, *gradients, *self._state.arrays}
        return _listed(session, BATCH, session.input_names) or [n for n in session.input_names if n not in known]

    def __call__(self, *user_inputs: Any) -> Any:
        """Run a step on a batch, arrays or OrtValues: the loss, or (loss, outputs...) as `generate_artifacts` was told.

        In training mode gradients are computed and added up, and buffers (BatchNorm) are updated. The results are
        OrtValues where the whole batch is.

        Raises:
            ArgumentTypeError: another number of inputs, or values that an operator refuses (a label outside the
                classes). DTypeError, GeometryError: an input of another type or shape.
        """
        ort_value = onnxruntime().OrtValue
        session = self._train if self.training else self._eval
        if session is None:
            raise ArgumentTypeError("the module has no eval model: give eval_model_uri")
        names = self._user_names(session)
        if len(user_inputs) != len(names):
            raise ArgumentTypeError(f"the module takes {len(names)} inputs, {names}, got {len(user_inputs)}")
        feeds = {name: _array(value, name) for name, value in zip(names, user_inputs, strict=True)}
        state = self._state
        for name in session.input_names:
            if name in feeds:
                continue
            if name == RESET:
                feeds[name] = np.array(self._reset)
            elif name == SEED:
                feeds[name] = np.array(check_seed(self.seed), np.int64)
            elif name == STEP:
                feeds[name] = np.array(state.calls, np.int64)
            elif name.endswith(GRADIENT) and name not in state.arrays:
                parameter = name.removesuffix(GRADIENT)
                before = state.gradients.get(parameter)
                feeds[name] = np.zeros_like(state.arrays[parameter]) if before is None else before
            else:
                feeds[name] = state.arrays[name]
        results = session.run(feeds)
        if self.training:
            self._take_over(results)
        outputs = [results[name] for name in _returned(session)]
        if user_inputs and all(isinstance(value, ort_value) for value in user_inputs):
            outputs = [_ort_value(value) for value in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _take_over(self, results: Mapping[str, np.ndarray]) -> None:
        for name, value in results.items():
            if not name.endswith(UPDATED):
                continue
            target = name.removesuffix(UPDATED)
            if target.endswith(GRADIENT) and target not in self._state.arrays:
                self._state.gradients[target.removesuffix(GRADIENT)] = value
            else:
                self._state.arrays[target] = value
        self._reset = False
        self._state.calls += 1

    def train(self, mode: bool = True) -> Module:
        """Switch to training, or with False to evaluation."""
        self.training = as_bool(mode, "mode")
        return self

    def eval(self) -> Module:
        return self.train(False)

    def lazy_reset_grad(self) -> None:
        """The next training call starts the gradients anew."""
        self._reset = True

    def input_names(self) -> list[str]:
        session = self._train if self.training or self._eval is None else self._eval
        return self._user_names(session)

    def output_names(self) -> list[str]:
        session = self._train if self.training or self._eval is None else self._eval
        return _returned(session)

    def _names(self, trainable_only: bool) -> list[str]:
        return self._state.trained if as_bool(trainable_only, "trainable_only") else self._state.parameter_names

    def get_parameters_size(self, trainable_only: bool = True) -> int:
        """Number of elements."""
        return sum(self._state.arrays[name].size for name in self._names(trainable_only))

    def get_contiguous_parameters(self, trainable_only: bool = False) -> Any:
        """All parameters as one vector, an `onnxruntime.OrtValue`: what a federated client sends."""
        parts = [self._state.arrays[name].ravel() for name in self._names(trainable_only)]
        dtypes = {part.dtype for part in parts}
        if len(dtypes) > 1:
            raise ArgumentTypeError(
                f"the parameters have several dtypes, {sorted(map(str, dtypes))}: no vector holds them"
            )
        return _ort_value(np.concatenate(parts))

    def copy_buffer_to_parameters(self, buffer: Any, trainable_only: bool = True) -> None:
        """Take all parameters from one vector, an OrtValue or an array: what a federated server sends back.

        Raises:
            GeometryError: another number of elements; nothing is changed. DTypeError: no numbers.
        """
        vector = _array(buffer, "buffer").ravel()
        if vector.dtype.kind not in "fiu":
            raise DTypeError(f"buffer is {vector.dtype}, expected numbers, as get_contiguous_parameters gives them")
        names = self._names(trainable_only)
        expected = self.get_parameters_size(trainable_only)
        if vector.size != expected:
            raise GeometryError(f"buffer has {vector.size} elements, expected {expected}")
        position = 0
        for name in names:
            old = self._state.arrays[name]
            self._state.arrays[name] = vector[position : position + old.size].reshape(old.shape).astype(old.dtype)
            position += old.size

    def export_model_for_inferencing(self, inference_model_uri: Path, graph_output_names: list[str]) -> None:
        """Write the eval model cut at `graph_output_names`, the parameters inside.

        Raises:
            ArgumentTypeError: no eval model, or an output it does not have. OutputPathError: it cannot be written.
        """
        import onnx
        import onnx.numpy_helper
        import onnx_ir as ir
        from onnx_ir.passes import common as passes

        from ..files import write_atomically

        if self._eval_path is None:
            raise ArgumentTypeError("the module has no eval model: give eval_model_uri")
        names = list(dict.fromkeys(as_names(graph_output_names, "graph_output_names", "output")))
        if not names:
            raise ArgumentTypeError("graph_output_names is empty, expected the outputs that inference shall return")
        model = ir.load(self._eval_path)
        available = {value.name: value for value in model.graph.outputs}
        if unknown := [name for name in names if name not in available]:
            raise ArgumentTypeError(
                f"graph_output_names holds {unknown}, the eval model has {sorted(map(str, available))}"
            )
        model.graph.outputs.clear()
        model.graph.outputs.extend(available[name] for name in names)
        for value in list(model.graph.inputs):
            if value.name in self._state.arrays:
                value.const_value = ir.tensor(self._state.arrays[value.name], name=value.name)
                model.graph.inputs.remove(value)
                model.graph.initializers[value.name] = value
        passes.RemoveUnusedNodesPass()(model)
        used = {value for node in model.graph for value in node.inputs} | set(model.graph.outputs)
        for value in [value for value in model.graph.inputs if value not in used]:
            model.graph.inputs.remove(value)  # the targets
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        write_atomically(as_path(inference_model_uri, "inference_model_uri"), proto.SerializeToString(), overwrite=True)


def _array(value: Any, name: str) -> np.ndarray:
    """An OrtValue, an array, a tensor or nested lists as an array."""
    if isinstance(value, onnxruntime().OrtValue):
        return np.asarray(value.numpy())
    try:
        return as_array(value, name)
    except ConvGradError:
        raise
    except (TypeError, ValueError) as error:  # lists of different lengths, say
        raise ArgumentTypeError(f"{name} is a {type(value).__name__} that is no array: {error}") from error


def _returned(session: GradientSession) -> list[str]:
    """The outputs that a call returns; of a file that does not say so, all but the state."""
    outputs = [name for name in session.output_names if not name.endswith(UPDATED)]
    return _listed(session, RETURNED, outputs) or outputs


def _listed(session: GradientSession, key: str, available: Sequence[str]) -> list[str] | None:
    """Names from a model's metadata, None where it has no such entry.

    Raises:
        ModelFileError: the file names others than it has.
    """
    text = session.inference_session.get_modelmeta().custom_metadata_map.get(key)
    if text is None:
        return None
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(name in available for name in names):
        raise ModelFileError(f"the model's {key} is {text!r:.200}, expected a list of names among {list(available)}")
    return names


def _check_fits(session: GradientSession, state: CheckpointState, others: Collection[str]) -> None:
    """Refuse the state of another model.

    Args:
        others: inputs that are no state. Those of our own and the gradients are none either.

    Raises:
        ModelFileError: names, shapes or dtypes differ; all of them are listed.
    """
    expected = {
        value.name: (tensors.onnx_type(value.type)[1], tuple(value.shape))
        for value in session.inference_session.get_inputs()
        if value.name in state.arrays or not (value.name in (*OWN, *others) or value.name.endswith(GRADIENT))
    }
    check_matches("given as state", {name: a for name, a in state.arrays.items() if name in expected}, expected)


def _ort_value(array: np.ndarray) -> Any:
    """An OrtValue with memory of its own: one made from an array reads it after it is gone, in ``f(x).numpy()``."""
    value = onnxruntime().OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, "cpu", 0)
    value.update_inplace(np.ascontiguousarray(array))
    return value


def _provider(device: Any) -> Any:
    if not isinstance(device, str):
        raise ArgumentTypeError(
            f"device is {device!r:.80} ({type(device).__name__}), expected 'cpu', 'cuda' or one with a number, 'cuda:1'"
        )
    kind, _, index = device.partition(":")
    if kind == "cuda" and index.isdecimal():
        return CudaOptions(device_id=int(index))
    return kind if index in ("", "0") else device


class Optimizer:
    """The optimizer model over a module's state.

    Args:
        optimizer_uri: file from `generate_artifacts`. module: whose gradients are applied.

    Raises:
        ModelFileError: a file that cannot be read, or of another model than the module's state.
    """

    def __init__(self, optimizer_uri: Path, module: Module) -> None:
        if not isinstance(module, Module):
            raise ArgumentTypeError(
                f"module is a {type(module).__name__}, expected a convgrad_export.training.api.Module"
            )
        self._state = module._state
        self._session = module._open(as_path(optimizer_uri, "optimizer_uri"))
        types = {value.name: value.type for value in self._session.inference_session.get_inputs()}
        _, self._rate_type = tensors.onnx_type(types.get(LEARNING_RATE, "tensor(float)"))
        _check_fits(self._session, self._state, ())

    def step(self) -> None:
        """Update the parameters from the accumulated gradients.

        Raises:
            ArgumentTypeError: before any training call.
        """
        state = self._state
        feeds = {}
        for name in self._session.input_names:
            if name == LEARNING_RATE:
                feeds[name] = np.array(state.learning_rate, self._rate_type)
            elif name.endswith(GRADIENT) and name not in state.arrays:
                gradient = state.gradients.get(name.removesuffix(GRADIENT))
                if gradient is None:
                    raise ArgumentTypeError("step was called before any training call: there are no gradients")
                feeds[name] = gradient
            else:
                feeds[name] = state.arrays[name]
        for name, value in self._session.run(feeds).items():
            state.arrays[name.removesuffix(UPDATED)] = value

    def set_learning_rate(self, learning_rate: float) -> None:
        self._state.learning_rate = check_rate(learning_rate, dtype=self._rate_type)

    def get_learning_rate(self) -> float:
        return self._state.learning_rate


class LinearLRScheduler:
    """The learning rate rises linearly over the warm-up and falls linearly to zero at the end.

    It follows the number of the optimizer's steps, which a checkpoint holds: made again, it goes on where it was.

    Args:
        optimizer: whose rate is set. warmup_step_count, total_step_count: in steps of it.
        initial_lr: the rate after the warm-up.
    """

    def __init__(self, optimizer: Optimizer, warmup_step_count: int, total_step_count: int, initial_lr: float) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ArgumentTypeError(f"optimizer is a {type(optimizer).__name__}, expected the Optimizer of this module")
        warmup_step_count = as_int(warmup_step_count, "warmup_step_count")
        total_step_count = as_int(total_step_count, "total_step_count")
        if total_step_count < 0:
            raise ArgumentTypeError(f"total_step_count is {total_step_count}, expected 0 or more")
        if not 0 <= warmup_step_count <= total_step_count:
            raise ArgumentTypeError(
                f"warmup_step_count is {warmup_step_count}, expected a number from 0 to {total_step_count}"
            )
        self._optimizer, self._warmup, self._total, self._rate = (
            optimizer,
            warmup_step_count,
            total_step_count,
            check_rate(initial_lr, "initial_lr", optimizer._rate_type),
        )
        self.step()

    def step(self) -> None:
        """Set the rate for the optimizer's next step."""
        done = int(self._optimizer._state.arrays[STEP])
        if done < self._warmup:
            factor = done / max(1, self._warmup)
        else:
            factor = max(0.0, (self._total - done) / max(1, self._total - self._warmup))
        self._optimizer.set_learning_rate(self._rate * factor)
