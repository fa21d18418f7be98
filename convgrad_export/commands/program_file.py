"""The convolutions of a program that torch.export.save wrote, read from its JSON alone.

`torch.export.load` unpickles the example inputs and the constants beside that JSON, and loads compiled libraries: a
file from elsewhere would run its code. Nothing of that is touched here, and torch is not needed.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

from ..errors import GeometryError, ModelFileError, in_one_line

# PyTorch 2.8 and newer keep programs in a folder of the archive; 2.7 and older one at its top.
_PROGRAM = re.compile(r"[^/]+/models/[^/]+\.json|serialized_exported_program\.json")
_CONVOLUTION = re.compile(r"torch\.ops\.aten\.(_?convolution|conv(?:_transpose)?[123]d)\.\w+")
_LARGEST = 2**30  # bytes of JSON; a ResNet-50's takes two million
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError)


def program_layers(path: Path, input_shape: tuple[int, ...] | None) -> dict[str, dict[str, Any]]:
    """Arguments of `build_model` for each convolution, by the name of its weight.

    Where convolutions of several geometries share a weight, each has the name of its output behind a colon.

    Args:
        input_shape: what the caller gave; it stands for sizes that the program leaves open. An open batch needs none.

    Raises:
        ModelFileError: not such a program, or damaged.
    """
    graph, names = _graph(path)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        for node in graph["nodes"]:
            if kind := _CONVOLUTION.fullmatch(node["target"]):
                weight, arguments = _convolution(kind[1], node, graph["tensor_values"], input_shape)
                output = node["outputs"][0]["as_tensor"]["name"]
                found.setdefault(names.get(weight, weight), {})[output] = arguments
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    layers = {}
    for weight, calls in found.items():
        alike = all(arguments == next(iter(calls.values())) for arguments in calls.values())
        for output, arguments in calls.items():
            layers[weight if alike else f"{weight}:{output}"] = arguments
    return layers


def _graph(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The program's graph, and the names that its placeholders have in the module."""
    try:
        with zipfile.ZipFile(path) as archive:
            programs = [entry for entry in archive.infolist() if _PROGRAM.fullmatch(entry.filename)]
            if len(programs) != 1:
                raise ModelFileError(
                    f"--layer {path} is not a torch.export program: it holds {len(programs)} of them, expected one"
                )
            if programs[0].file_size > _LARGEST:
                raise ModelFileError(f"--layer {path}: its program takes {programs[0].file_size:,} bytes, too large")
            module = json.loads(archive.read(programs[0]))["graph_module"]
        names = {}
        for spec in module["signature"]["input_specs"]:
            for kind in ("parameter", "buffer"):
                if kind in spec:
                    names[spec[kind]["arg"]["name"]] = spec[kind][f"{kind}_name"]
        graph: dict[str, Any] = module["graph"]
        return graph, names
    except ModelFileError:
        raise
    except zipfile.BadZipFile as error:
        raise ModelFileError(f"--layer {path} is not a torch.export program, or is truncated: {error}") from error
    except (OSError, EOFError, zlib.error, RuntimeError, MemoryError, *_DAMAGED) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> ModelFileError:
    return ModelFileError(
        f"--layer {path} is not a torch.export program, or is damaged: {type(error).__name__}: {in_one_line(error)}"
    )


def _convolution(
    operator: str, node: dict[str, Any], tensors: dict[str, Any], input_shape: tuple[int, ...] | None
) -> tuple[str, dict[str, Any]]:
    """(weight's name in the graph, arguments); what a call leaves out has torch's default."""
    given = {entry["name"]: _value(entry["arg"]) for entry in node["inputs"]}
    image, weight = given["input"]["name"], given["weight"]["name"]
    transposed = bool(given.get("transposed", "transpose" in operator))
    arguments = {
        "input_shape": _shape(tensors[image]["sizes"]),
        "weight_shape": _shape(tensors[weight]["sizes"]),
        "stride": given.get("stride", 1),
        "padding": given.get("padding", 0),
        "dilation": given.get("dilation", 1),
        "groups": given.get("groups", 1),
        "transposed": transposed,
        "output_padding": given.get("output_padding", 0) if transposed else 0,
    }
    if input_shape is not None and not all(isinstance(size, int) for size in arguments["input_shape"][1:]):
        del arguments["input_shape"]  # the caller's
    return weight, arguments


def _value(argument: dict[str, Any]) -> Any:
    """An argument is one entry: its kind and its value."""
    ((kind, value),) = argument.items()
    return [entry["as_int"] for entry in value] if kind == "as_sym_ints" else value


def _shape(sizes: list[dict[str, Any]]) -> tuple[int | str, ...]:
    """Sizes; an open one is its expression, and an open batch its example's."""
    found: list[int | str] = []
    for axis, size in enumerate(sizes):
        if "as_int" in size:
            found.append(int(size["as_int"]))
            continue
        hint = size["as_expr"].get("hint") or {}
        found.append(str(size["as_expr"]["expr_str"]) if axis else int(hint.get("as_int", 1)))
    return tuple(found)


def check_closed(name: str, arguments: dict[str, Any], path: Path) -> dict[str, Any]:
    """The arguments, when no size of the input is open.

    Raises:
        GeometryError: one is, and the caller gave no shape in its place.
    """
    shape = arguments.get("input_shape", ())
    if any(isinstance(size, str) for size in shape):
        raise GeometryError(
            f"--input-shape is missing: {path} leaves sizes of {name}'s input open, ({', '.join(map(str, shape))})"
        )
    return arguments
