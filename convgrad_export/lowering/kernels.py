"""Which operators an execution provider can run, by element type: the facts behind a lowering's `why_not`.

Read from onnxruntime 1.32's kernel registrations. float16 and bfloat16 are computed in float32 on the CPU (Casts at the
border of the lowering, so sums accumulate in float32); CUDA has float16 kernels of its own.
"""

from __future__ import annotations

from .. import dtypes

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_FLOAT32_ONLY_ON_CPU = frozenset({"Conv", "ConvTranspose", "Col2Im"})
_FALLS_BACK_TO_CPU_ON_CUDA = frozenset({"Col2Im"})


def compute_dtype(dtype: str, provider: str = CPU) -> str:
    """Element type in which a lowering for tensors of `dtype` does its arithmetic on `provider`."""
    if provider == CUDA and dtype == "float16":
        return "float16"
    return "float32" if dtypes.is_half(dtype) else dtype


def missing_kernel(operators: frozenset[str], dtype: str, provider: str) -> str | None:
    """Why `provider` cannot run one of `operators` on tensors of `dtype`, or None."""
    computed = compute_dtype(dtype, provider)
    if provider == CUDA:
        absent = operators & _FALLS_BACK_TO_CPU_ON_CUDA
        return f"{_list(absent)} has no CUDA kernel in onnxruntime and would run on the CPU" if absent else None
    absent = operators & _FLOAT32_ONLY_ON_CPU if computed != "float32" else frozenset()
    return f"{_list(absent)} has no {dtype} kernel on onnxruntime's {provider}" if absent else None


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
