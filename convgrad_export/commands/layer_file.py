"""The geometry of a convolution that was saved by PyTorch, read without unpickling anything."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any

from ..errors import GeometryError, ModelFileError


def layer_geometry(path: Path, name: str | None, input_shape: tuple[int, ...] | None) -> dict[str, Any]:
    """Arguments of `build_model` that the file determines.

    A ``.safetensors`` file or a saved state_dict gives the weight's shape; a ``.pt2`` program of torch.export gives
    everything.

    Args:
        name: of the weight (``layer1.0.conv1.weight`` or without ``.weight``); may be None when there is only one.
        input_shape: what the caller gave; a file of weights does not know it.

    Raises:
        ModelFileError: missing, of another kind, or unreadable. GeometryError: no such convolution, or several.
    """
    try:
        if not path.is_file():
            raise ModelFileError(f"--layer {path} does not exist, or is no file")
        path.open("rb").close()
    except OSError as error:
        raise ModelFileError(f"--layer {path} cannot be read: {error.strerror or error}") from error
    if path.suffix == ".safetensors":
        return _from_safetensors(path, name, input_shape)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _from_state_dict(path, name, input_shape)
    if path.suffix == ".pt2":
        return _from_program(path, name)
    raise ModelFileError(
        f"--layer {path}: expected a .safetensors file, a state_dict saved by torch.save (.pt, .pth, .bin), or a "
        f"torch.export program (.pt2)"
    )


def _from_safetensors(path: Path, name: str | None, input_shape: tuple[int, ...] | None) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"--layer {path} is not a safetensors file, or is truncated: {error}") from error
    return _weight_shape(shapes, name, path, input_shape)


def _from_state_dict(path: Path, name: str | None, input_shape: tuple[int, ...] | None) -> dict[str, Any]:
    """Tensors only: torch's restricted unpickler runs no code from the file."""
    import torch

    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch raises many kinds for a foreign or truncated archive
        raise ModelFileError(
            f"--layer {path} is not a state_dict: {str(error).splitlines()[0]}. A file that holds more than tensors "
            f"can run code when it is opened: save module.state_dict(), or torch.export.save(torch.export.export(...))"
        ) from error
    if not isinstance(state, dict):
        raise ModelFileError(f"--layer {path} holds a {type(state).__name__}, expected a state_dict")
    shapes = {str(key): tuple(value.shape) for key, value in state.items() if isinstance(value, torch.Tensor)}
    return _weight_shape(shapes, name, path, input_shape)


def _weight_shape(
    shapes: dict[str, tuple[int, ...]], name: str | None, path: Path, input_shape: tuple[int, ...] | None
) -> dict[str, Any]:
    weights = {key: shape for key, shape in shapes.items() if 3 <= len(shape) <= 5}
    chosen = _pick(weights, name, path)
    if input_shape is None:
        raise GeometryError(f"--input-shape is missing: {path} holds the weight of {chosen}, not the layer's input")
    return {"weight_shape": weights[chosen]}


def _from_program(path: Path, name: str | None) -> dict[str, Any]:
    import torch

    if not zipfile.is_zipfile(path):  # torch would log a traceback first
        raise ModelFileError(f"--layer {path} is not a torch.export program, or is truncated: it is no zip archive")
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True  # it would log tracebacks
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # torch raises many kinds for a foreign or truncated archive
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(" Please check the warnings")[0]
        raise ModelFileError(f"--layer {path} is not a torch.export program, or is damaged: {reason}") from error
    finally:
        logger.disabled = before
    placeholders = {
        **program.graph_signature.inputs_to_parameters,
        **program.graph_signature.inputs_to_buffers,
    }
    found = {}
    for node in program.graph.nodes:
        layer = _convolution(node, placeholders)
        if layer is not None:
            found[layer[0]] = layer[1]
    return found[_pick(found, name, path)]


def _convolution(node: Any, placeholders: dict[str, str]) -> tuple[str, dict[str, Any]] | None:
    """(weight name, arguments) for a call of a convolution operator, in whichever form torch.export wrote it."""
    import torch

    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.name.startswith("aten::conv"):
        return None
    operands = {argument.name: argument.default_value for argument in schema.arguments}
    operands.update(zip(operands, node.args, strict=False))
    operands.update(node.kwargs)
    weight = operands.get("weight")
    if not isinstance(weight, torch.fx.Node) or "input" not in operands:
        return None
    transposed = bool(operands.get("transposed", "transpose" in schema.name))
    return placeholders.get(weight.name, weight.name), {
        "input_shape": tuple(int(size) for size in operands["input"].meta["val"].shape),
        "weight_shape": tuple(int(size) for size in weight.meta["val"].shape),
        "stride": tuple(operands["stride"]),
        "padding": operands["padding"] if isinstance(operands["padding"], str) else tuple(operands["padding"]),
        "dilation": tuple(operands["dilation"]),
        "groups": int(operands["groups"]),
        "transposed": transposed,
        "output_padding": tuple(operands["output_padding"]) if transposed else 0,
    }


def _pick(found: dict[str, Any], name: str | None, path: Path) -> str:
    if not found:
        raise GeometryError(f"--layer {path} holds no convolution")
    if name is None:
        if len(found) == 1:
            return next(iter(found))
        raise GeometryError(f"--layer-name is missing: {path} holds {', '.join(found)}")
    for key in (name, f"{name}.weight"):
        if key in found:
            return key
    raise GeometryError(f"--layer-name is {name!r}, expected one of {', '.join(found)}")
