"""The geometry of a convolution that was saved by PyTorch, read without running code of the file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import GeometryError, ModelFileError
from .program_file import check_closed, program_layers


def layer_geometry(path: Path, name: str | None, input_shape: tuple[int, ...] | None) -> dict[str, Any]:
    """Arguments of `build_model` that the file determines.

    A ``.safetensors`` file or a saved state_dict gives the weight's shape; a ``.pt2`` program of torch.export gives
    everything, but for the sizes of the input that it leaves open.

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
        layers = program_layers(path, input_shape)
        chosen = _pick(layers, name, path)
        return check_closed(chosen, layers[chosen], path)
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
            f"--layer {path} is not a state_dict: {_first_line(error)}. A file that holds more than tensors "
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


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
