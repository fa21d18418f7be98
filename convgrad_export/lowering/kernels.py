"""Which operators an execution provider can run, by element type: the facts behind a lowering's `why_not`.

The CPU's are read from onnxruntime 1.32's kernel registrations, CUDA's from the registry of onnxruntime-gpu 1.31.1
(tests/lowering/cuda_kernels.json, written by ``python -m benchmarks.cuda.placement --registry``).

Half types. On the CPU float16 and bfloat16 are computed in float32: Casts at the border of the lowering, so sums
accumulate in float32. On CUDA a lowering whose every result is one sum inside one Conv, ConvTranspose, MatMul or
ReduceSum works in the half type itself: cuDNN and cuBLAS accumulate such a sum in float32 and round it once. A
lowering that adds up several rounded results works in float32 there too. An operator without a kernel in the half
type runs in float32 between two Casts.
"""

from __future__ import annotations

from typing import Any

from .. import dtypes
from ..errors import ProviderError
from ..provider_names import CPU, CUDA, SHORT_NAMES

_SUFFIX = "ExecutionProvider"  # of every name in onnxruntime's list, those that need other builds included

_FLOAT32_ONLY_ON_CPU = frozenset({"Conv", "ConvTranspose", "Col2Im"})

_ALL_TYPES = ("float32", "float64", "float16", "bfloat16")
_NO_BFLOAT16 = ("float32", "float64", "float16")

# Operators that lowerings record: element type to the first opset with a CUDA kernel, up to the newest one.
CUDA_KERNELS: dict[str, dict[str, int]] = {
    "Cast": dict.fromkeys(_ALL_TYPES, 13),
    "Col2Im": {},
    "Concat": dict.fromkeys(_ALL_TYPES, 13),
    "Conv": {**dict.fromkeys(_NO_BFLOAT16, 13), "bfloat16": 22},
    "ConvTranspose": dict.fromkeys(_NO_BFLOAT16, 13),
    "Expand": dict.fromkeys(_ALL_TYPES, 13),
    "Gather": dict.fromkeys(_ALL_TYPES, 13),
    "MatMul": dict.fromkeys(_ALL_TYPES, 13),
    "Mul": dict.fromkeys(_ALL_TYPES, 13),
    "Pad": dict.fromkeys(_NO_BFLOAT16, 13),
    "ReduceSum": dict.fromkeys(_ALL_TYPES, 13),
    "Reshape": dict.fromkeys(_ALL_TYPES, 13),
    "Shape": dict.fromkeys(_ALL_TYPES, 13),
    "Slice": dict.fromkeys(_ALL_TYPES, 13),
    "Sum": dict.fromkeys(_ALL_TYPES, 13),
    "Transpose": dict.fromkeys(_ALL_TYPES, 13),
    "Unsqueeze": dict.fromkeys(_ALL_TYPES, 13),
}


def as_provider(provider: Any) -> str:
    """onnxruntime's full name of the provider that a graph is meant for, whether or not it is installed.

    Raises:
        ProviderError: no name of an execution provider.
    """
    name = SHORT_NAMES.get(provider, provider) if isinstance(provider, str) else provider
    if not isinstance(name, str) or not name.endswith(_SUFFIX) or name == _SUFFIX:
        raise ProviderError(f"provider is {provider!r}, expected 'cpu', 'cuda' or an onnxruntime name such as {CPU!r}")
    return name


def check_provider(provider: Any) -> None:
    """Refuse what is no full name of a provider: lowerings are chosen for the CPU or for CUDA by it.

    Raises:
        ProviderError: no such name.
    """
    if not isinstance(provider, str) or not provider.endswith(_SUFFIX):
        raise ProviderError(f"provider is {provider!r:.80}, expected an onnxruntime name like {CPU!r} or {CUDA!r}")


def cuda_kernel(operator: str, dtype: str, opset: int) -> bool:
    """Whether onnxruntime-gpu has a CUDA kernel of a standard operator for tensors of `dtype`."""
    first = CUDA_KERNELS.get(operator, {}).get(dtype)
    return first is not None and opset >= first


def preferred_opset(dtype: str, provider: str = CPU) -> int:
    """The opset of a model that is free to choose: 18, and 22 for bfloat16 on CUDA, whose Conv starts there."""
    return 22 if provider == CUDA and dtype == "bfloat16" else 18


def compute_dtype(dtype: str, provider: str = CPU, sums_once: bool = True) -> str:
    """Element type in which a lowering for tensors of `dtype` does its arithmetic on `provider`.

    Args:
        sums_once: every result is one sum inside one operator (`Lowering.sums_once`).
    """
    if not dtypes.is_half(dtype) or (provider == CUDA and sums_once):
        return dtype
    return "float32"


def widened(computed: str, provider: str, opset: int) -> frozenset[str]:
    """Operators that run in float32 between Casts: `provider` has no kernel of theirs for the half type `computed`."""
    if provider != CUDA or not dtypes.is_half(computed):
        return frozenset()
    return frozenset(
        operator
        for operator in CUDA_KERNELS
        if not cuda_kernel(operator, computed, opset) and cuda_kernel(operator, "float32", opset)
    )


def missing_kernel(operators: frozenset[str], computed: str, provider: str, opset: int) -> str | None:
    """Why `provider` cannot run one of `operators` in the type `computed`, or None."""
    if provider == CUDA:
        known = operators - widened(computed, provider, opset)
        absent = frozenset(operator for operator in known if not cuda_kernel(operator, computed, opset))
        return f"{_list(absent)} has no CUDA kernel in onnxruntime and would run on the CPU" if absent else None
    absent = operators & _FLOAT32_ONLY_ON_CPU if computed != "float32" else frozenset()
    return f"{_list(absent)} has no {computed} kernel on onnxruntime's {provider}" if absent else None


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
