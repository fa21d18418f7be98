"""What a caller may choose about how a model is served; checked when it is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..arguments import as_bool
from ..errors import ArgumentTypeError, ServingConfigError
from ..files import as_path

BACKENDS = ("onnxruntime", "python")
DEVICES = ("cpu", "gpu")
# ModelConfig's optimization.graph.level for Triton's onnxruntime backend; None is its default, everything on
GRAPH_LEVELS: dict[str, int | None] = {"all": None, "extended": 1, "basic": -1, "none": 2}
_LARGEST = 2**31 - 1  # of an int32, as config.pbtxt has them
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # a file system's 255, and room for temporary names


@dataclass(frozen=True)
class ServingOptions:
    """Settings of one model in a repository.

    Args:
        backend: "onnxruntime" is the one in NVIDIA's containers; "python" writes a model.py that opens onnxruntime
            itself, for servers that have only Triton's Python backend.
        max_batch_size: largest batch of one execution; 0 serves the model without a batch dimension; None takes 8 for a
            model that has one and 0 otherwise.
        dynamic_batching: merge requests of several clients; None does so where rows of a batch are seen to be
            independent.
        preferred_batch_sizes: batches the server tries to form.
        queue_delay_us: how long a request waits for company, in microseconds.
        instances: copies of the model that run side by side on `device`.
        threads: onnxruntime's intra-op threads of each instance; None leaves the choice to onnxruntime.
        graph_optimization: "all", "extended", "basic" or "none".
        labels: a text file with one class name a line, for `label_output` (the only output when None).
        warmup: "none", "zero", "random", or an .npz file with one array for each input.
        sizes: values of named dimensions, for warm-up samples and for looking at rows of a batch.
        versions: how many of the newest versions are served; 0 is all of them.

    Raises:
        ServingConfigError: a value out of range. ArgumentTypeError: a value of another type.
    """

    backend: str = "onnxruntime"
    max_batch_size: int | None = None
    dynamic_batching: bool | None = None
    preferred_batch_sizes: tuple[int, ...] = ()
    queue_delay_us: int = 500
    instances: int = 1
    device: str = "cpu"
    threads: int | None = None
    graph_optimization: str = "all"
    labels: Path | None = None  # text is taken too
    label_output: str | None = None
    warmup: str | Path = "none"
    sizes: dict[str, int] = field(default_factory=dict)
    versions: int = 1

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        _one_of("device", self.device, DEVICES)
        _one_of("graph_optimization", self.graph_optimization, tuple(GRAPH_LEVELS))
        _at_least("max_batch_size", self.max_batch_size, 0)
        _at_least("queue_delay_us", self.queue_delay_us, 0)
        _at_least("instances", self.instances, 1)
        _at_least("threads", self.threads, 1)
        _at_least("versions", self.versions, 0)
        if self.dynamic_batching is not None:
            object.__setattr__(self, "dynamic_batching", as_bool(self.dynamic_batching, "dynamic_batching"))
        if not isinstance(self.sizes, Mapping):
            raise ArgumentTypeError(f"sizes is {self.sizes!r}, expected a size for each name of a dimension")
        for name, size in self.sizes.items():
            _at_least(f"size of {name}", size, 1)
        if self.labels is not None:
            object.__setattr__(self, "labels", as_path(self.labels, "labels"))
        elif self.label_output is not None:
            raise ServingConfigError(f"label_output is {self.label_output!r}, but no labels file is given")
        if not isinstance(self.warmup, str):
            as_path(self.warmup, "warmup")
        self._check_preferred()

    def _check_preferred(self) -> None:
        if not isinstance(self.preferred_batch_sizes, Sequence):
            raise ArgumentTypeError(f"preferred_batch_sizes is {self.preferred_batch_sizes!r}, expected integers")
        if self.dynamic_batching is False and self.preferred_batch_sizes:
            raise ServingConfigError("preferred_batch_sizes are given, but dynamic_batching is off: leave one out")
        for size in self.preferred_batch_sizes:
            _at_least("preferred_batch_sizes", size, 1)
            if self.max_batch_size is not None and size > self.max_batch_size:
                raise ServingConfigError(f"preferred batch size {size} exceeds max_batch_size {self.max_batch_size}")


def check_name(name: str) -> str:
    """A model's name: a folder name and a part of the server's addresses.

    Raises:
        ServingConfigError: other than letters, digits, ``_``, ``.``, ``-``, with a dot or hyphen first, or too long.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ServingConfigError(
            f"model name is {name!r}, expected up to 200 letters, digits, '_', '.' and '-', the first no '.' or '-'"
        )
    return name


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ServingConfigError(f"{name} is {value!r}, expected one of: {', '.join(known)}")


def _at_least(name: str, value: int | None, minimum: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} is {value!r} ({type(value).__name__}), expected an integer")
    if value < minimum:
        raise ServingConfigError(f"{name} is {value}, expected at least {minimum}")
    if value > _LARGEST:
        raise ServingConfigError(f"{name} is {value}, expected at most {_LARGEST}")
