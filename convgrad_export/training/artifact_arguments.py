"""What `generate_artifacts` is given: a model of either kind, a loss, an optimizer, and which parameters train."""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from ..arguments import as_names, as_path
from ..errors import ArgumentTypeError
from ..files import check_output
from ..integrations.outputs import flat_output_names
from .losses import Loss, resolve_loss
from .onnx_module import OnnxModule
from .optimizers import SGD, AdamW


class LossType(enum.Enum):
    """onnxruntime-training's losses."""

    MSELoss = "mse"
    CrossEntropyLoss = "cross_entropy"
    BCEWithLogitsLoss = "bce_with_logits"
    L1Loss = "l1"


class OptimType(enum.Enum):
    """onnxruntime-training's optimizers; SGD is plain, AdamW has torch's defaults."""

    AdamW = "adamw"
    SGD = "sgd"


def file_paths(artifact_directory: Any, prefix: Any, overwrite: bool) -> dict[str, Path]:
    """Where each file goes; the prefix may lead into a folder, as in onnxruntime-training.

    Raises:
        ArgumentTypeError: no path, or no text. OutputExistsError, OutputPathError: as `check_output`.
    """
    folder = Path.cwd() if artifact_directory is None else as_path(artifact_directory, "artifact_directory")
    if not isinstance(prefix, str):
        raise ArgumentTypeError(f"prefix is {prefix!r:.80} ({type(prefix).__name__}), expected a text")
    return {
        key: check_output(folder / f"{prefix}{key}{suffix}", overwrite=overwrite)
        for key, suffix in (
            ("training_model", ".onnx"),
            ("eval_model", ".onnx"),
            ("optimizer_model", ".onnx"),
            ("checkpoint", ""),
        )
    }


def module_and_batch(
    model: Any, loss: Any, args: Any, loss_input_names: Sequence[str] | None, trainable: Sequence[str]
) -> tuple[torch.nn.Module, tuple[Any, ...], Loss]:
    resolved = Loss(_first_output, ()) if loss is None else resolve_loss(_loss(loss))
    if loss_input_names is not None:
        loss_input_names = as_names(loss_input_names, "loss_input_names", "logits")
        if len(loss_input_names) != len(resolved.target_names) + 1:
            raise ArgumentTypeError(
                f"loss_input_names has {len(loss_input_names)} names, expected the output and "
                f"{len(resolved.target_names)} target(s)"
            )
        resolved = Loss(resolved.function, tuple(loss_input_names[1:]), loss_input_names[0])
    if args is not None and not isinstance(args, (Tensor, list, tuple)):
        raise ArgumentTypeError(
            f"args is a {type(args).__name__}, expected a tuple: the forward's arguments, then the loss's targets"
        )
    if isinstance(model, torch.nn.Module):
        if args is None:
            raise ArgumentTypeError("args is missing: a torch module needs an example batch, the targets last")
        return model, (args,) if isinstance(args, Tensor) else tuple(args), resolved
    if not isinstance(model, (onnx.ModelProto, str, os.PathLike)):
        raise ArgumentTypeError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module or an ONNX model or file"
        )
    if loss is LossType.CrossEntropyLoss and loss_input_names is None:
        resolved = Loss(resolved.function, ("labels",))  # the name that onnxruntime-training gives this target
    module = OnnxModule(model, trainable)
    if args is None:
        inputs = module.example_inputs()
        with torch.no_grad():
            output = module.eval()(*inputs)  # in training mode it would move BatchNorm's statistics
        module.train()
        args = (*inputs, *(_target_like(loss_input(output, resolved, True), resolved) for _ in resolved.target_names))
    return module, (args,) if isinstance(args, Tensor) else tuple(args), resolved


def _target_like(output: Tensor, loss: Loss) -> Tensor:
    """An example target: class indices for cross entropy, values like the output's otherwise."""
    if loss.function is resolve_loss("cross_entropy").function:
        return torch.zeros([output.shape[0], *output.shape[2:]], dtype=torch.int64)
    return torch.zeros_like(output)


def _first_output(result: Any) -> Any:
    return torch.utils._pytree.tree_leaves(result)[0]


def loss_input(result: Any, loss: Loss, from_onnx: bool) -> Any:
    """What of a forward's result the loss takes: the output of its name, or the result as it is.

    Raises:
        ArgumentTypeError: none of several outputs has the name, or the loss of an ONNX model's has none.
    """
    flat = torch.utils._pytree.tree_leaves(result)
    if len(flat) == 1 and (from_onnx or loss.output is not None):
        return flat[0]
    if loss.output is None and not (from_onnx and loss.target_names):
        return result
    names = flat_output_names(result, flat)
    if loss.output not in names:
        raise ArgumentTypeError(
            f"the model has the outputs {', '.join(names)}, of which loss_input_names has to name the one that the "
            f"loss takes, before the targets; got {loss.output!r}"
        )
    return flat[names.index(loss.output)]


def _loss(loss: Any) -> Any:
    return loss.value if isinstance(loss, LossType) else loss


def resolve_optimizer_type(optimizer: Any) -> Any:
    if isinstance(optimizer, OptimType):
        return AdamW() if optimizer is OptimType.AdamW else SGD()
    return optimizer


def frozen_names(
    module: torch.nn.Module, requires_grad: Sequence[str] | None, frozen_params: Sequence[str] | None
) -> list[str]:
    names = [name for name, _ in module.named_parameters()]
    others = module.initializers if isinstance(module, OnnxModule) else ()  # they stay as they are in any case
    known = {"requires_grad": names, "frozen_params": [*names, *others]}
    for option, given in (("requires_grad", requires_grad), ("frozen_params", frozen_params)):
        if unknown := [name for name in given or () if name not in known[option]]:
            raise ArgumentTypeError(f"{option} names no parameter of the model: {', '.join(unknown)}")
    if both := set(requires_grad or ()) & set(frozen_params or ()):
        raise ArgumentTypeError(f"requires_grad and frozen_params both name {', '.join(sorted(both))}")
    frozen = [name for name in frozen_params or () if name in names]
    if requires_grad is not None:
        if fixed := [name for name in requires_grad if not module.get_parameter(name).requires_grad]:
            raise ArgumentTypeError(
                f"requires_grad names {', '.join(fixed)}, which the module itself freezes: call requires_grad_() on it"
            )
        frozen += [name for name in names if name not in requires_grad]
    return frozen


def default_shapes(module: torch.nn.Module, batch: Sequence[Any], loss: Loss) -> tuple[Any, ...]:
    """The first axis of every input, or all axes that an ONNX model leaves open."""
    if isinstance(module, OnnxModule) and all(isinstance(value, Tensor) for value in batch):
        return module.dynamic_shapes(batch, loss.output)
    return tuple({0: "batch"} if isinstance(value, Tensor) and value.dim() else None for value in batch)
