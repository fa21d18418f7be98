"""Writing models: under a temporary name first, external data where the weights are large."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from convgrad_export.errors import ArgumentTypeError, OutputPathError
from convgrad_export.files import check_output, hand_on_permissions, replace_together, temporary_folder, written_file
from convgrad_export.integrations.report import weight_bytes

# protobuf refuses messages above 2 GB; well below it, a file of its own already loads faster (it can be mapped).
EXTERNAL_DATA_ABOVE = 2**30


def check_path(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """Refuse what could not be written in the end, before any work is done; a link is followed to the file it names."""
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(f"path is {path!r:.80}, expected the name of a file to write, or None")
    target = check_output(path, overwrite=overwrite)
    file = written_file(target)
    check_output(data_path(file), overwrite=overwrite)
    if not os.access(file.parent, os.W_OK):
        raise OutputPathError(f"output {target}: the folder {file.parent} cannot be written to")
    return target


def save(
    model: ir.Model, path: Path, *, external_data: bool | None = None, external_data_above: int = EXTERNAL_DATA_ABOVE
) -> dict[str, int]:
    """Write the model and rename it into place. Files that are replaced hand their permissions on.

    Args:
        model: What to write.
        path: Checked with `check_path` before.
        external_data: Weights in `<path>.data` beside the model: always, never, or by size (None).
        external_data_above: The size in bytes that decides for None.

    Returns:
        Bytes: "weights", "graph" (the files without the weights), "files" (all of them).
    """
    weights = weight_bytes(model)
    external = weights > external_data_above if external_data is None else external_data
    path = written_file(path)  # its weights lie beside the file itself, not beside a link to it
    data = data_path(path)
    with temporary_folder(path.parent) as folder:
        ir.save(model, folder / path.name, external_data=data.name if external else None)
        moves = {folder / path.name: path}
        hand_on_permissions(folder / path.name, path)
        if (folder / data.name).exists():
            moves[folder / data.name] = data
            hand_on_permissions(folder / data.name, data if data.exists() else path)
        replace_together(moves, outdated=[data])
    files = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    return {"weights": weights, "graph": files - weights, "files": files}


def data_path(path: Path) -> Path:
    """Where the weights of a model file lie that holds them outside."""
    return path.with_name(f"{path.name}.data")
