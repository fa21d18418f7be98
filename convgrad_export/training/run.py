"""`convgrad train`: export a step, train on onnxruntime, compare with PyTorch, report."""

from __future__ import annotations

import copy
import importlib
import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..arguments import as_number, check_pool
from ..errors import ArgumentTypeError, in_one_line
from ..files import new_folder
from ..integrations.onnx_export import export
from ..runtime.session import GradientSession
from .comparison import LossCurves, train_with_pytorch
from .data import Dataset
from .losses import Loss, resolve_loss
from .session import TrainingSession
from .step import export_training_step

TORCH_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


@dataclass(frozen=True)
class TrainingSettings:
    """What to train with. `compared_steps` of PyTorch's own run are compared step by step; 0 leaves PyTorch out."""

    loss: str = "cross_entropy"
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    epochs: int = 15
    batch_size: int = 32
    seed: int = 0
    threads: int | None = None
    compared_steps: int = 100
    overwrite: bool = False


@dataclass
class TrainingResult:
    """What came out; accuracies are None for losses that have no classes."""

    steps: int
    losses: list[float]
    epoch_accuracy: list[float]
    seconds: float
    accuracy: float | None
    torch_losses: list[float]
    torch_seconds: float
    torch_accuracy: float | None
    curves: LossCurves | None
    files: dict[str, Path]


def load_module(name: str) -> torch.nn.Module:
    """``"package.module:Name"``: a torch.nn.Module, or a class or function that gives one when called.

    Raises:
        ArgumentTypeError: no such module or name, the module or what makes the network raises an error, or it gives
            something else.
    """
    place, separator, attribute = name.partition(":")
    if not separator or not place or not attribute or place.startswith("."):
        raise ArgumentTypeError(f"module is {name!r}, expected package.module:Name, from the top package on")
    try:
        found = importlib.import_module(place)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever a module of the user's raises: a script may end itself
        raise ArgumentTypeError(f"module {name!r} cannot be imported: {_described(error)}") from error
    made: Any = found
    if callable(found) and not isinstance(found, torch.nn.Module):
        try:
            made = found()
        except (Exception, SystemExit) as error:
            raise ArgumentTypeError(
                f"module {name!r} gives no network when it is called without arguments: {_described(error)}"
            ) from error
    if not isinstance(made, torch.nn.Module):
        raise ArgumentTypeError(f"module {name!r} is a {type(made).__name__}, expected a torch.nn.Module")
    return made


def _described(error: BaseException) -> str:
    """The error with its kind, and the line of another file than this that it comes from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    silent = frame.filename == __file__ or isinstance(error, ImportError | SyntaxError)
    return f"{type(error).__name__}: {in_one_line(error)}" + (
        "" if silent else f" ({Path(frame.filename).name}, line {frame.lineno})"
    )


def train(
    module: torch.nn.Module,
    data: Dataset,
    folder: Path,
    settings: TrainingSettings,
    progress: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> TrainingResult:
    """Train `module` on onnxruntime; the arguments' files are written to `folder`.

    ``step.onnx`` and ``step.checkpoint.safetensors`` are the exported step and its initial state,
    ``trained.safetensors`` the last state, and ``trained.onnx`` the network for inference.

    Raises:
        ArgumentTypeError: fewer samples than a batch, an unknown loss or optimizer, a learning rate that is no number
            or that float32 does not hold, or what is no number of threads. Nothing is left of a folder then that was
            made for it, nor where the step is refused.
    """
    per_epoch = len(data.targets) // settings.batch_size
    if per_epoch == 0:
        raise ArgumentTypeError(
            f"the data has {len(data.targets)} samples, fewer than a batch of {settings.batch_size}"
        )
    if settings.optimizer not in TORCH_OPTIMIZERS:
        raise ArgumentTypeError(f"optimizer is {settings.optimizer!r}, expected one of: {', '.join(TORCH_OPTIMIZERS)}")
    # more than float32 holds, which is what a step takes, would be infinity there
    as_number(settings.learning_rate, "learning_rate", minimum=0, maximum=float(np.finfo(np.float32).max))
    check_pool(settings.threads)
    make_optimizer = lambda parameters: TORCH_OPTIMIZERS[settings.optimizer](parameters, lr=settings.learning_rate)  # noqa: E731
    module = module.train()
    loss = resolve_loss(settings.loss)
    example = tuple(torch.from_numpy(a) for a in next(data.batches(settings.batch_size, 0, settings.seed)))
    _check_data(module, loss, data, example)
    with new_folder(folder):
        export_training_step(
            module,
            settings.loss,
            make_optimizer(module.parameters()),
            example,
            folder / "step.onnx",
            dynamic_shapes=({0: "batch"}, {0: "batch"}),
            overwrite=settings.overwrite,
        )
    session = TrainingSession(folder / "step.onnx", threads=settings.threads, seed=settings.seed)
    evaluator = _Evaluator(module, data, settings)
    steps = settings.epochs * per_epoch
    losses: list[float] = []
    accuracies: list[float] = []
    started = time.perf_counter()
    evaluating = 0.0
    for number, batch in enumerate(_order(data, settings), 1):
        losses.append(session.step(*batch)["loss"])
        progress(number, steps, losses[-1])
        if number % per_epoch == 0 and evaluator.has_classes:
            before = time.perf_counter()
            accuracies.append(evaluator.accuracy(session.state_dict()))
            evaluating += time.perf_counter() - before
    seconds = time.perf_counter() - started - evaluating
    files = {"step": folder / "step.onnx", "initial state": folder / "step.checkpoint.safetensors"}
    files["trained state"] = session.save(folder / "trained.safetensors", overwrite=settings.overwrite)
    files["trained network"] = evaluator.export(session.state_dict(), folder / "trained.onnx", settings.overwrite)
    result = TrainingResult(
        steps, losses, accuracies, seconds, accuracies[-1] if accuracies else None, [], 0.0, None, None, files
    )
    if settings.compared_steps:
        _compare(result, module, loss, make_optimizer, data, evaluator, settings)
    return result


def _order(data: Dataset, settings: TrainingSettings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of all epochs, one by one: each epoch's are a copy of the data."""
    for epoch in range(settings.epochs):
        yield from data.batches(settings.batch_size, epoch, settings.seed)


def _check_data(module: torch.nn.Module, loss: Loss, data: Dataset, example: tuple[torch.Tensor, ...]) -> None:
    """PyTorch's own word on a batch, and every label, before the long work starts.

    Raises:
        ArgumentTypeError: the network or the loss does not take the data.
    """
    *inputs, target = example
    form = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in (("x", inputs[0]), ("y", target)))
    try:
        with torch.no_grad():
            output = copy.deepcopy(module)(*inputs)
            loss.call(output, target)
    except Exception as error:  # whatever a network of the user's raises
        raise ArgumentTypeError(
            f"data: {type(module).__name__} and its loss do not take a batch of it ({form}): {in_one_line(error)}"
        ) from error
    if loss.function in (functional.cross_entropy, functional.nll_loss) and data.targets.dtype.kind == "i":
        labels = np.concatenate([data.targets.ravel(), data.test_targets.ravel()])
        labels = labels[labels != -100]  # PyTorch's ignore_index
        if labels.size and not 0 <= labels.min() <= labels.max() < output.shape[1]:
            raise ArgumentTypeError(
                f"data: y holds labels from {labels.min()} to {labels.max()}, {type(module).__name__} has "
                f"{output.shape[1]} classes, so expected 0 to {output.shape[1] - 1}"
            )


def _compare(
    result: TrainingResult,
    module: torch.nn.Module,
    loss: Any,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    data: Dataset,
    evaluator: _Evaluator,
    settings: TrainingSettings,
) -> None:
    """Add PyTorch's own run on the same batches to the result."""
    threads = torch.get_num_threads()
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        started = time.perf_counter()
        result.torch_losses, trained = train_with_pytorch(
            module, loss, make_optimizer, _order(data, settings), seed=settings.seed
        )
        result.torch_seconds = time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
    if evaluator.has_classes:
        result.torch_accuracy = evaluator.torch_accuracy(trained)
    count = min(settings.compared_steps, result.steps)
    first = itertools.islice(_order(data, settings), count)
    exact, _ = train_with_pytorch(module, loss, make_optimizer, first, seed=settings.seed, dtype=torch.float64)
    result.curves = LossCurves(
        np.array(result.losses[:count]), np.array(result.torch_losses[:count]), np.array(exact[:count])
    )


class _Evaluator:
    """Accuracy on the test samples, by onnxruntime, with the parameters of any moment."""

    def __init__(self, module: torch.nn.Module, data: Dataset, settings: TrainingSettings) -> None:
        self._module = copy.deepcopy(module).eval()
        self._data = data
        self._threads = settings.threads
        labelled = settings.loss in ("cross_entropy", "nll") and data.test_targets.dtype.kind == "i"
        self.has_classes = labelled and len(data.test_targets) > 0

    def _loaded(self, state: dict[str, np.ndarray]) -> torch.nn.Module:
        self._module.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
        return self._module

    def _exported(self, state: dict[str, np.ndarray], path: Path | None, verify: bool, overwrite: bool) -> Any:
        example = torch.from_numpy(self._data.inputs[:2])
        shapes = ({0: "batch"},)
        return export(self._loaded(state), (example,), path, dynamic_shapes=shapes, verify=verify, overwrite=overwrite)

    def export(self, state: dict[str, np.ndarray], path: Path, overwrite: bool) -> Path:
        self._exported(state, path, True, overwrite)
        return path

    def accuracy(self, state: dict[str, np.ndarray]) -> float:
        session = GradientSession(self._exported(state, None, False, False).model, threads=self._threads)
        (name,) = session.input_names
        (scores,) = session.run({name: self._data.test_inputs}).values()
        return float((scores.argmax(1) == self._data.test_targets).mean())

    def torch_accuracy(self, trained: torch.nn.Module) -> float:
        with torch.no_grad():
            scores = trained.eval()(torch.from_numpy(self._data.test_inputs)).numpy()
        return float((scores.argmax(1) == self._data.test_targets).mean())
