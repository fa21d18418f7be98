"""Model repositories: versioned folders that Triton and MLServer serve, made so that no half of one is ever seen.

    repository/
      NAME/
        config.pbtxt            shapes, batching, instances, backend options, warm-up
        labels.txt              when given
        warmup/                 data of warm-up samples, named by content
        1/  2/  ...             model.onnx and the files with its weights; model.py for the Python backend;
                                model-settings.json for MLServer

A new model is built in a hidden folder of the repository and renamed; a new version likewise, in the model's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ArgumentTypeError, ModelFileError, OutputExistsError, OutputPathError, ServingConfigError
from ..files import as_path, grant, temporary_folder, write_atomically
from ..runtime.providers import onnxruntime
from ..runtime.session import GradientSession
from .config import MODEL_FILE, batch_limit, make_config, read_config, to_text
from .options import ServingOptions, check_name
from .rows import why_rows_depend
from .signature import ModelSignature, TensorSpec, read_signature
from .warmup import WarmupSample, warmup_samples

CONFIG_FILE = "config.pbtxt"
WARMUP_FOLDER = "warmup"  # where Triton looks for input_data_file
MLSERVER_FILE = "model-settings.json"
MLSERVER_RUNTIME = "convgrad_export.serving.mlserver_runtime.OnnxRuntime"


@dataclass(frozen=True)
class RepositoryEntry:
    """What `add_model` wrote. `extended` is True when the model was there already and got a version."""

    name: str
    version: int
    folder: str
    extended: bool
    backend: str
    max_batch_size: int
    dynamic_batching: bool
    inputs: dict[str, str]
    outputs: dict[str, str]
    files: list[str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def add_model(
    model: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    options: ServingOptions | None = None,
    *,
    name: str | None = None,
    update_config: bool = False,
) -> RepositoryEntry:
    """Add a model file to a repository: as version 1 of a new model, or as the next version of one that is there.

    Args:
        model: an ``.onnx`` file; files with its external data are carried along.
        repository: a folder, created when missing (its parent must exist).
        name: of the model; the file's name without ``.onnx`` when None.
        update_config: allow an existing model's config.pbtxt to be replaced where the options differ.

    Raises:
        ModelFileError, DTypeError: the model cannot be served or loaded, or an existing config.pbtxt cannot be read.
        ServingConfigError: options that do not fit the model; a version whose inputs, outputs or options differ from
            the existing configuration. OutputPathError: the repository cannot be written.
    """
    options = ServingOptions() if options is None else options
    if not isinstance(options, ServingOptions):
        raise ArgumentTypeError(f"options is a {type(options).__name__}, expected ServingOptions")
    path = as_path(model, "model")
    signature = read_signature(path)
    name = check_name(path.name.removesuffix(".onnx") if name is None else name)
    if options.labels is not None and (
        options.labels.name.casefold() in (CONFIG_FILE, WARMUP_FOLDER) or options.labels.name.isdecimal()
    ):
        raise ServingConfigError(
            f"labels {options.labels} has a name that a repository gives to something of its own: rename the file"
        )
    root = _check_repository(repository)
    limit = batch_limit(signature, options.max_batch_size)
    dynamic, notes = _dynamic_batching(signature, options, limit)
    samples = warmup_samples(options.warmup, signature, limit, options.sizes)
    config = make_config(name, signature, options, max_batch_size=limit, dynamic_batching=dynamic, samples=samples)
    text = to_text(config)
    folder = root / name
    extended = folder.exists()
    with _made(root):
        if extended:
            changed = _compare(folder, config, options.labels, update_config)
            version = _add_version(
                folder, lambda path, number: notes.extend(_write_version(path, name, number, signature, options, limit))
            )
            # After the version: it is the same model to its clients, so the old configuration serves it too.
            if changed:
                _write_side_files(folder, options, samples)
                write_atomically(folder / CONFIG_FILE, text.encode(), overwrite=True)
                notes.append(f"{CONFIG_FILE} was replaced")
        else:
            version = 1
            with temporary_folder(root) as staged:
                (staged / "1").mkdir()
                notes += _write_version(staged / "1", name, version, signature, options, limit)
                _write_side_files(staged, options, samples)
                (staged / CONFIG_FILE).write_text(text, encoding="utf-8")
                _publish(staged, folder)
    files = sorted(str(path.relative_to(root)) for path in (folder / str(version)).rglob("*") if path.is_file())
    return RepositoryEntry(
        name,
        version,
        str(folder / str(version)),
        extended,
        options.backend,
        limit,
        dynamic,
        {tensor.name: f"{tensor.protocol_type} {tensor.sizes()}" for tensor in signature.inputs},
        {tensor.name: f"{tensor.protocol_type} {tensor.sizes()}" for tensor in signature.outputs},
        files,
        notes,
    )


def _check_repository(repository: str | os.PathLike[str]) -> Path:
    root = as_path(repository, "repository")
    if root.exists() and not root.is_dir():
        raise OutputPathError(f"repository {root} is a file, expected a folder")
    if not root.exists() and not root.parent.is_dir():
        raise OutputPathError(f"repository {root}: the folder {root.parent} does not exist")
    if (root / CONFIG_FILE).is_file():
        raise OutputPathError(f"repository {root} is a model of one: give the folder that it lies in")
    return root


@contextlib.contextmanager
def _made(root: Path) -> Iterator[None]:
    """Make the repository's folder where it is missing; without a model in it, it goes again."""
    missing = not root.exists()
    try:
        root.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputPathError(f"repository {root} cannot be created: {error.strerror}") from error
    try:
        yield
    except BaseException:
        if missing:
            with contextlib.suppress(OSError):  # another process may have put a model into it
                root.rmdir()
        raise


def _dynamic_batching(signature: ModelSignature, options: ServingOptions, limit: int) -> tuple[bool, list[str]]:
    notes: list[str] = []
    if limit == 0:
        missing = signature.why_no_batch()
        if options.dynamic_batching or options.preferred_batch_sizes:
            raise ServingConfigError(
                f"requests of {signature.path} cannot be merged: {missing or 'max_batch_size is 0'}"
            )
        if missing:
            notes.append(f"no batch dimension: {missing}")
        return False, notes
    if too_large := [size for size in options.preferred_batch_sizes if size > limit]:
        raise ServingConfigError(
            f"preferred batch size {too_large[0]} exceeds max_batch_size, {limit} unless it is given: no server would "
            f"load that"
        )
    if options.dynamic_batching is False:
        return False, notes
    independent, reason = why_rows_depend(signature, options.sizes)
    asked = options.dynamic_batching or bool(options.preferred_batch_sizes)
    if independent is False and asked:
        raise ServingConfigError(
            f"requests of {signature.path} cannot be merged: {reason}. Leave dynamic batching off, or export the model "
            f"so that each row depends on itself alone (a loss that is summed, not averaged; layers in eval mode)"
        )
    if not independent:
        notes.append(f"dynamic batching is {'on, unchecked' if asked else 'off'}: {reason}")
    return bool(independent or asked), notes


def _compare(folder: Path, config: Any, labels: Path | None, update: bool) -> bool:
    """Whether config.pbtxt has to be replaced; an error where that is not allowed."""
    existing = read_config(folder / CONFIG_FILE)
    for kind in ("input", "output"):
        old, new = (
            [(t.name, t.data_type, tuple(t.dims), t.HasField("reshape")) for t in getattr(side, kind)]
            for side in (existing, config)
        )
        if sorted(old) != sorted(new):
            raise ServingConfigError(
                f"{folder} has the {kind}s {_shown(existing, kind)}, the new version {_shown(config, kind)}: versions "
                f"of one model take the same requests. Give the model another --name"
            )
    fields = [f.name for f in config.DESCRIPTOR.fields if getattr(existing, f.name) != getattr(config, f.name)]
    if labels is not None and (folder / labels.name).is_file():
        fields += ["labels"] if (folder / labels.name).read_bytes() != labels.read_bytes() else []
    if not fields:
        return False
    if not update:
        raise ServingConfigError(
            f"{folder / CONFIG_FILE} exists with other settings ({', '.join(fields)}); give the same options, or "
            f"--update-config to replace it for all versions"
        )
    return True


def _shown(config: Any, kind: str) -> str:
    return ", ".join(f"{t.name} {list(t.dims)}" for t in getattr(config, kind))


def _write_version(
    folder: Path, name: str, version: int, signature: ModelSignature, options: ServingOptions, limit: int
) -> list[str]:
    """Write a version's files and load the copy; gives notes."""
    if taken := {MODEL_FILE, "model.py", MLSERVER_FILE} & {Path(file).name for file in signature.external_files}:
        raise ModelFileError(
            f"{signature.path} takes weights from {taken.pop()}, a name that a repository gives to a file of its own: "
            "save the model with its weights under another name"
        )
    shutil.copyfile(signature.path, folder / MODEL_FILE)
    for file in signature.external_files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(signature.path.parent / file, folder / file)
    if options.backend == "python":
        template = resources.files("convgrad_export.serving.templates").joinpath("model.py")
        (folder / "model.py").write_bytes(template.read_bytes())
    settings = {
        "name": name,
        "implementation": MLSERVER_RUNTIME,
        "platform": "onnx",
        "inputs": [_mlserver_tensor(tensor) for tensor in signature.inputs],
        "outputs": [_mlserver_tensor(tensor) for tensor in signature.outputs],
        "parameters": {
            "uri": MODEL_FILE,
            "version": str(version),
            "extra": {"max_batch_size": limit, "threads": options.threads},
        },
    }
    (folder / MLSERVER_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return _load(folder / MODEL_FILE, signature.path, options.device)


def _load(copy: Path, source: Path, device: str) -> list[str]:
    """Load the copy on the CPU as a server would, so that nothing is published that no server can open.

    A model for the GPU may have operators or types that the CPU lacks, which is a note then.
    """
    settings = onnxruntime().SessionOptions()
    settings.graph_optimization_level = onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL  # quicker, and enough
    settings.log_severity_level = 4
    try:
        GradientSession(copy, threads=1, session_options=settings, blocked_layout=False)
    except ModelFileError as error:
        if device == "gpu" and type(error.__cause__).__name__ == "NotImplemented":
            return [f"not loaded here, for the GPU alone: {error}"]
        raise ModelFileError(f"{source} cannot be served: {str(error).replace(str(copy), str(source))}") from error
    return []


def _mlserver_tensor(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.protocol_type, "shape": tensor.sizes()}


def _write_side_files(folder: Path, options: ServingOptions, samples: list[WarmupSample]) -> None:
    """Labels and warm-up data; existing ones are replaced whole or, named by content, already right."""
    if options.labels is not None:
        write_atomically(folder / options.labels.name, options.labels.read_bytes(), overwrite=True)
    for value in (value for sample in samples for value in sample.inputs if value.kind == "file"):
        target = folder / WARMUP_FOLDER / value.file
        target.parent.mkdir(exist_ok=True)
        write_atomically(target, value.data, overwrite=True)


def _add_version(folder: Path, write: Callable[[Path, int], None]) -> int:
    """Build the next version in a hidden folder and rename it; another process may take the number meanwhile."""
    while True:
        names = [path.name for path in folder.iterdir()]  # a file takes its number as well
        taken = [int(name) for name in names if name.isascii() and name.isdecimal()]
        version = max(taken, default=0) + 1
        with temporary_folder(folder) as staged:
            write(staged, version)
            try:
                _publish(staged, folder / str(version))
            except OutputExistsError:
                continue
            return version


def _publish(staged: Path, target: Path) -> None:
    grant(staged, 0o777)  # a server may run as another user
    for path in staged.rglob("*"):
        if path.is_file():
            with path.open("r+b") as stream:  # Windows writes back only what is open for writing
                os.fsync(stream.fileno())
    if target.exists():
        raise OutputExistsError(f"{target} exists already")
    try:
        staged.rename(target)  # fails on a folder that is not empty: two processes never mix their files
    except OSError as error:
        if target.exists():
            raise OutputExistsError(f"{target} exists already") from error
        raise OutputPathError(f"cannot create {target}: {error.strerror or error}") from error
