"""Options of onnxruntime's CUDA provider, checked before onnxruntime sees them.

onnxruntime answers an unknown option or a bad value with a message and a session on the CPU, so nothing unchecked is
passed on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ArgumentTypeError, ProviderError

_ALGORITHM_SEARCHES = ("HEURISTIC", "DEFAULT", "EXHAUSTIVE")
_ARENA_STRATEGIES = ("kNextPowerOfTwo", "kSameAsRequested")

# Options of onnxruntime-gpu 1.31 that this class has no field for; they are passed on as given.
_OTHER_OPTIONS = frozenset(
    {
        "cudnn_conv1d_pad_to_nc1d",
        "do_copy_in_default_stream",
        "enable_cudnn",
        "enable_skip_layer_norm_strict_mode",
        "fuse_conv_bias",
        "gpu_external_alloc",
        "gpu_external_empty_cache",
        "gpu_external_free",
        "has_user_compute_stream",
        "sdpa_kernel",
        "tunable_op_enable",
        "tunable_op_max_tuning_duration_ms",
        "tunable_op_tuning_enable",
        "use_ep_level_unified_stream",
        "user_compute_stream",
    }
)


@dataclass(frozen=True)
class CudaOptions:
    """How sessions use a CUDA device: ``providers=cg.CudaOptions(use_tf32=False)``.

    Attributes:
        device_id: index of the device.
        use_tf32: float32 products on tensor cores with 10-bit mantissas, as cuDNN does in PyTorch by default. False
            keeps full float32. float16 and bfloat16 accumulate in float32 either way.
        cudnn_conv_algo_search: ``"HEURISTIC"`` picks cuDNN's algorithm without timing; ``"EXHAUSTIVE"`` times all of
            them for every new shape, which takes seconds; ``"DEFAULT"`` takes the same one for all shapes.
        cudnn_conv_use_max_workspace: let cuDNN take as much workspace as its fastest algorithm asks for.
        prefer_nhwc: channels-last convolutions. onnxruntime-gpu 1.31 has no such ConvTranspose: those nodes go to the
            CPU, so use it with lowerings that are Conv or MatMul.
        enable_cuda_graph: record the kernels of a model once and replay them. All sizes of the model must be fixed,
            and all its nodes on CUDA. Inputs are copied into fixed memory, results out of it.
        gpu_mem_limit: most bytes of device memory that the session may take; None for no limit.
        arena_extend_strategy: ``"kNextPowerOfTwo"`` or ``"kSameAsRequested"``.
        other: further options of onnxruntime's CUDA provider, by onnxruntime's names.

    Raises:
        ProviderError: a value or a name that the provider does not have. ArgumentTypeError: a value of another type.
    """

    device_id: int = 0
    use_tf32: bool = True
    cudnn_conv_algo_search: str = "HEURISTIC"
    cudnn_conv_use_max_workspace: bool = True
    prefer_nhwc: bool = False
    enable_cuda_graph: bool = False
    gpu_mem_limit: int | None = None
    arena_extend_strategy: str = "kNextPowerOfTwo"
    other: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            object.__setattr__(self, name, _switch(name, getattr(self, name)))
        object.__setattr__(self, "device_id", _count("device_id", self.device_id, 0))
        if self.gpu_mem_limit is not None:
            object.__setattr__(self, "gpu_mem_limit", _count("gpu_mem_limit", self.gpu_mem_limit, 1))
        _one_of("cudnn_conv_algo_search", self.cudnn_conv_algo_search, _ALGORITHM_SEARCHES)
        _one_of("arena_extend_strategy", self.arena_extend_strategy, _ARENA_STRATEGIES)
        if not isinstance(self.other, Mapping):
            raise ArgumentTypeError(f"other is {self.other!r}, expected a mapping from option name to value")
        for name in self.other:
            if name not in _OTHER_OPTIONS:
                raise ProviderError(_unknown(str(name)))

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> CudaOptions:
        """From the options of a ``("cuda", {...})`` pair, this class's fields and onnxruntime's other names alike.

        Raises:
            ProviderError: an unknown name or value. ArgumentTypeError: a value of another type.
        """
        own = {name: value for name, value in options.items() if name in _FIELDS}
        others = {name: value for name, value in options.items() if name not in _FIELDS}
        given = own.pop("other", {})
        return cls(**own, other={**given, **others} if isinstance(given, Mapping) else given)

    def provider_options(self) -> dict[str, str]:
        """The options in onnxruntime's form: text by name."""
        options: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        del options["other"]
        if self.gpu_mem_limit is None:
            del options["gpu_mem_limit"]
        options.update(self.other)
        return {name: str(int(value)) if isinstance(value, bool) else str(value) for name, value in options.items()}


_SWITCHES = ("use_tf32", "cudnn_conv_use_max_workspace", "prefer_nhwc", "enable_cuda_graph")
_FIELDS = tuple(CudaOptions.__dataclass_fields__)


def _switch(name: str, value: Any) -> bool:
    """A bool, or onnxruntime's text for one."""
    texts = {"0": False, "1": True, "false": False, "true": True}
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, str)) and str(value).lower() in texts:
        return texts[str(value).lower()]
    raise ArgumentTypeError(f"{name} is {value!r}, expected True or False")


def _count(name: str, value: Any, least: int) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int):
        raise ArgumentTypeError(f"{name} is {value!r}, expected an integer")
    if number < least:
        raise ProviderError(f"{name} is {number}, expected {least} or more")
    return number


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{name} is {value!r:.80}, expected one of {', '.join(allowed)}")
    if value not in allowed:
        raise ProviderError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


def _unknown(name: str) -> str:
    known = sorted({*_FIELDS, *_OTHER_OPTIONS} - {"other"})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f", expected one of {', '.join(known)}"
    return f"the CUDA provider has no option {name!r}{hint}"
