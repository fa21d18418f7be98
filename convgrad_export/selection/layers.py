"""The convolutions of a model file, a folder of them, a saved program or a module: what there is to tune."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import dtypes
from ..arguments import as_int
from ..errors import CaptureError, GeometryError, ModelFileError, in_one_line
from ..files import model_files
from ..geometry import ConvGeometry, aten_attributes
from ..operators import operator

BOTH = ("input", "weight")


@dataclass(frozen=True)
class LayerToTune:
    """One distinct convolution.

    Attributes:
        name: of the first place it was found at: a module path or a file name.
        geometry: its batch an integer. gradients: which of ``"input"`` and ``"weight"`` to measure.
        dtype: of its tensors; None where the target does not say. count: how often it was found.
    """

    name: str
    geometry: ConvGeometry
    gradients: tuple[str, ...] = BOTH
    dtype: str | None = None
    count: int = 1


def model_layers(path: Path) -> list[LayerToTune]:
    """The convolutions of models that `build_model` wrote, from their metadata.

    Args:
        path: an ``.onnx`` file, or a folder that is searched for them.

    Raises:
        ModelFileError: nothing there, not an ONNX model, or no metadata of ours.
    """
    if path.is_dir():
        files = model_files(path)
        if not files:
            raise ModelFileError(f"{path} holds no .onnx file, or those of a server's model repository alone")
    elif path.is_file():
        files = [path]
    else:
        raise ModelFileError(f"{path} does not exist")
    found = []
    for file in files:
        layer = _model_layer(file)
        if layer is not None:
            found.append(layer)
        elif file == path:
            raise ModelFileError(f"{path} is dynamic in every dimension and names no sizes: there is no layer to tune")
    if not found:
        raise ModelFileError(f"the models in {path} name no sizes: there is no layer to tune")
    return merged(found)


def _model_layer(file: Path) -> LayerToTune | None:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(file), format="protobuf", load_external_data=False)  # whatever its suffix is
    except (DecodeError, ValueError, OSError) as error:
        raise ModelFileError(f"{file} is not an ONNX model, or is truncated: {error}") from error
    metadata = {item.key: item.value for item in model.metadata_props}
    if missing := [key for key in ("convgrad.op", "convgrad.geometry", "convgrad.dtype") if key not in metadata]:
        raise ModelFileError(
            f"{file} was not made by convgrad build: its metadata lacks {', '.join(missing)}. To tune a whole network, "
            f"give its module (package.module:Name) and input shape"
        )
    try:
        arguments = json.loads(metadata["convgrad.geometry"])
        if "input_shape" not in arguments:
            return None
        geometry = ConvGeometry.from_dict(arguments)
        op, dtype = operator(metadata["convgrad.op"]), dtypes.name_of(metadata["convgrad.dtype"], "convgrad.dtype")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{file}: its metadata is damaged: {error}") from error
    return LayerToTune(file.stem, geometry, tuple(name for name in op.gradients if name in BOTH), dtype)


def module_layers(module: Any, args: Sequence[Any]) -> list[LayerToTune]:
    """The convolutions that one forward call of a torch module runs, wherever in its code they are called.

    Args:
        module: a `torch.nn.Module`, run once without gradients; its buffers (running statistics, say) and PyTorch's
            random numbers are afterwards what they were. args: its positional arguments.

    Raises:
        CaptureError: the forward call fails. GeometryError: it runs no convolution.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[LayerToTune] = []
    path: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default:
                found.append(_call_layer(path[-1] if path else "", args, dtypes.name_of(args[0].dtype)))
            return func(*args, **(kwargs or {}))

    hooks = []
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            continue  # takes no hooks: its convolutions go by the module that holds it
        hooks.append(child.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
        hooks.append(child.register_forward_hook(lambda *_: path.pop() and None))
    try:
        # In inference mode a mode sees functions (conv2d), not the operator behind them.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(range(torch.cuda.device_count())),
            _kept_buffers(module),
            Record(),
        ):
            module(*args)
    except Exception as error:  # the user's own code can raise anything
        shapes = ", ".join(str(tuple(value.shape)) for value in args if hasattr(value, "shape"))
        raise CaptureError(
            f"{type(module).__name__} cannot run on inputs of shape {shapes}: "
            f"{type(error).__name__}: {in_one_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise GeometryError(f"{type(module).__name__} runs no convolution: there is nothing to tune")
    return merged(found)


@contextlib.contextmanager
def _kept_buffers(module: Any) -> Iterator[None]:
    """Buffers that a forward pass in training mode moves have their values again afterwards."""
    from torch.nn.parameter import is_lazy

    before = [
        (owner, name, buffer, buffer.detach().clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        for owner, name, buffer, value in before:
            buffer.copy_(value)
            if getattr(owner, name) is not buffer:  # replaced, not changed in place
                setattr(owner, name, buffer)


def _call_layer(name: str, args: Sequence[Any], dtype: str) -> LayerToTune:
    value, weight, _, *attributes = args
    geometry = ConvGeometry.from_forward(
        tuple(value.shape),
        tuple(weight.shape),
        **aten_attributes(*attributes),
    )
    return LayerToTune(name or "convolution", geometry, dtype=dtype)


def at_batch(layer: LayerToTune, batch: int) -> LayerToTune:
    return replace(layer, geometry=layer.geometry.with_batch(as_int(batch, "batch", minimum=1)))


def merged(layers: Iterable[LayerToTune]) -> list[LayerToTune]:
    """Layers of equal geometry and dtype once, with their counts and gradients added."""
    result: dict[Any, LayerToTune] = {}
    for layer in layers:
        key = (layer.geometry, layer.dtype)
        known = result.get(key)
        if known is None:
            result[key] = layer
            continue
        gradients = tuple(name for name in BOTH if name in known.gradients or name in layer.gradients)
        result[key] = replace(known, gradients=gradients, count=known.count + layer.count)
    return list(result.values())
