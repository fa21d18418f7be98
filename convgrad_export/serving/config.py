"""Triton's ModelConfig of a model, as the protobuf that tritonclient ships, and as config.pbtxt.

Sources: model_config.proto of Triton (fields); README of triton-inference-server/onnxruntime_backend (its parameters
and the meaning of optimization.graph.level).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from ..errors import ModelFileError, ServingConfigError, raise_missing
from .options import GRAPH_LEVELS, ServingOptions
from .signature import ModelSignature, TensorSpec
from .warmup import WarmupSample

MODEL_FILE = "model.onnx"
THREADS = "intra_op_thread_count"  # the onnxruntime backend's name; our model.py reads the same
MEMORY_PATTERN = "enable_mem_pattern"  # off for the reason that session_memory.py gives
DEFAULT_BATCH = 8


def model_config_pb2() -> Any:
    """tritonclient's generated module.

    Raises:
        MissingDependencyError: tritonclient or grpcio is not installed.
    """
    try:
        importlib.import_module("grpc")  # tritonclient says what is missing as a RuntimeError
        from tritonclient.grpc import model_config_pb2 as module
    except ImportError as error:
        raise_missing(error)
    return module


def batch_limit(signature: ModelSignature, wanted: int | None) -> int:
    """`max_batch_size` for the configuration.

    Raises:
        ServingConfigError: a batch is asked for and a tensor's first dimension is fixed or missing.
    """
    if wanted is None:
        return 0 if signature.why_no_batch() else DEFAULT_BATCH
    if wanted > 0:
        for tensor in signature.tensors:
            if not tensor.shape or isinstance(tensor.shape[0], int):
                raise ServingConfigError(
                    f"max_batch_size is {wanted}, but {tensor} has no batch dimension: export the model with a dynamic "
                    f"batch, or take max_batch_size 0"
                )
    return wanted


def make_config(
    name: str,
    signature: ModelSignature,
    options: ServingOptions,
    *,
    max_batch_size: int,
    dynamic_batching: bool,
    samples: list[WarmupSample],
) -> Any:
    """The ModelConfig message.

    Args:
        max_batch_size: as `batch_limit` gives it. dynamic_batching: whether the server may merge requests.

    Raises:
        ServingConfigError: `label_output` is no output, or a tensor is declared with a size of 0.
        MissingDependencyError: no tritonclient.
    """
    pb = model_config_pb2()
    config = pb.ModelConfig(name=name, max_batch_size=max_batch_size, default_model_filename=MODEL_FILE)
    if options.backend == "python":
        config.default_model_filename = "model.py"
    config.backend = options.backend
    if options.backend == "onnxruntime":
        config.platform = "onnxruntime_onnx"
    if options.versions == 0:
        config.version_policy.all.SetInParent()
    else:
        config.version_policy.latest.num_versions = options.versions
    for tensor in signature.inputs:
        _describe(pb, config.input.add(), tensor, max_batch_size)
    for tensor in signature.outputs:
        _describe(pb, config.output.add(), tensor, max_batch_size)
    if options.labels is not None:
        _label_output(config, options).label_filename = options.labels.name
    group = config.instance_group.add(count=options.instances)
    group.kind = pb.ModelInstanceGroup.KIND_GPU if options.device == "gpu" else pb.ModelInstanceGroup.KIND_CPU
    if dynamic_batching:
        config.dynamic_batching.max_queue_delay_microseconds = options.queue_delay_us
        config.dynamic_batching.preferred_batch_size.extend(sorted(set(options.preferred_batch_sizes)))
    level = GRAPH_LEVELS[options.graph_optimization]
    if level is not None:
        config.optimization.graph.level = level
    if options.threads is not None:
        config.parameters[THREADS].string_value = str(options.threads)
    if options.device != "gpu":
        config.parameters[MEMORY_PATTERN].string_value = "0"
    for sample in samples:
        _warm_up(pb, config.model_warmup.add(), sample)
    return config


def _describe(pb: Any, field: Any, tensor: TensorSpec, max_batch_size: int) -> None:
    field.name = tensor.name
    field.data_type = pb.DataType.Value(tensor.config_type)
    dims = tensor.sizes()[1 if max_batch_size else 0 :]
    if 0 in dims:  # Triton would not start with it, nor with any other model of the repository
        raise ServingConfigError(f"{tensor} is always empty, and servers take no size of 0: export another size")
    if dims:
        field.dims.extend(dims)
        return
    # A configuration knows no scalars: clients send and get one element. With a batch Triton takes it off; without one
    # it refuses that, and the backend does: model.py, and the onnxruntime backend from 23.10 on.
    field.dims.append(1)
    if max_batch_size:
        field.reshape.SetInParent()


def _label_output(config: Any, options: ServingOptions) -> Any:
    outputs = {output.name: output for output in config.output}
    wanted = options.label_output
    if wanted is None and len(outputs) > 1:
        raise ServingConfigError(f"labels belong to one output: name it, one of {', '.join(outputs)}")
    if wanted is not None and wanted not in outputs:
        raise ServingConfigError(f"label_output is {wanted!r}, expected one of: {', '.join(outputs)}")
    output = outputs[wanted] if wanted is not None else next(iter(outputs.values()))
    labels = read_labels(options.labels)
    classes = output.dims[-1]
    if classes > 0 and len(labels) != classes:
        raise ServingConfigError(f"{options.labels} names {len(labels)} classes, but {output.name} has {classes}")
    return output


def read_labels(path: Path | None) -> list[str]:
    """The class names in a labels file, one a line.

    Raises:
        ServingConfigError: it cannot be read as text.
    """
    try:
        return Path(path or "").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServingConfigError(f"labels {path} cannot be read as text: {error}") from error


def _warm_up(pb: Any, field: Any, sample: WarmupSample) -> None:
    field.name = sample.name
    field.batch_size = sample.batch_size
    for value in sample.inputs:
        entry = field.inputs[value.tensor.name]
        entry.data_type = pb.DataType.Value(value.tensor.config_type)
        entry.dims.extend(value.dims or (1,))
        if value.kind == "file":
            entry.input_data_file = value.file
        elif value.kind == "random":
            entry.random_data = True
        else:
            entry.zero_data = True


def to_text(config: Any) -> str:
    """config.pbtxt, parsed once more so that nothing is written that a server could not read."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config, as_utf8=True)
    if text_format.Parse(text, model_config_pb2().ModelConfig()) != config:
        raise ServingConfigError(f"the configuration of {config.name} does not survive its text form; report this")
    return text


def read_config(path: str | os.PathLike[str]) -> Any:
    """Parse a config.pbtxt.

    Raises:
        ModelFileError: missing, or not the text form of a ModelConfig.
    """
    from google.protobuf import text_format

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from error
    try:
        return text_format.Parse(text, model_config_pb2().ModelConfig())
    except text_format.ParseError as error:
        raise ModelFileError(f"{path} is not a Triton model configuration: {error}") from error
