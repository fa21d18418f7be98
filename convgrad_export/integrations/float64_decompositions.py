"""What float64 models need: operators without a float64 kernel in onnxruntime, and constants kept in float64.

torch.onnx writes many Python numbers as float32 constants first, and float attributes of ONNX operators are float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convgrad_export.integrations import float64_functions

aten = torch.ops.aten


def convolution_in_float64(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """The forward pass as the input gradient of the convolution the other way round, in float64 only.

    onnxruntime's CPU provider has no float64 Conv; the gradient's lowerings have MatMul forms.
    """
    rank = weight.dim() - 2
    sizes, kernel = list(x.shape[2:]), list(weight.shape[2:])
    if x.dtype != torch.float64 or x.dim() != weight.dim() or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    stride, padding, dilation, output_padding = (
        list(values) * rank if len(values) == 1 else list(values)
        for values in (stride, padding, dilation, output_padding)
    )
    axes = list(zip(sizes, kernel, stride, padding, dilation, output_padding, strict=True))
    if transposed:
        result = [(i - 1) * s - 2 * p + d * (k - 1) + 1 + extra for i, k, s, p, d, extra in axes]
        if any(extra >= s for _, _, s, _, _, extra in axes):
            return NotImplemented  # no ordinary convolution has such a remainder
        channels, rest = weight.shape[1] * groups, [0] * rank
    else:
        result = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d, _ in axes]
        channels = weight.shape[0]
        rest = [i + 2 * p - d * (k - 1) - 1 - (o - 1) * s for o, (i, k, s, p, d, _) in zip(result, axes, strict=True)]
    like = x.new_empty([x.shape[0], channels, *result])  # for its shape
    arguments = (stride, padding, dilation, not transposed, rest, groups, [True, False, False])
    output = aten.convolution_backward.default(x, like, weight, None, *arguments)[0]
    return output if bias is None else output + bias.reshape([1, -1] + [1] * rank)


def _only_in_float64(target: Any) -> Callable[..., Any]:
    """PyTorch's decomposition for float64 tensors; other types keep the ONNX operator."""
    decomposition = torch._decomp.decomposition_table[target]

    @functools.wraps(decomposition)
    def decomposed(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return decomposition(x, *args, **kwargs) if x.dtype == torch.float64 else NotImplemented

    return decomposed


def is_rounded(value: Any) -> bool:
    """Whether float32 does not hold a Python number; those too large for it are among them."""
    with np.errstate(over="ignore"):
        return isinstance(value, float) and float(np.float32(value)) != value


def _needs_float64(dtype: torch.dtype | None, *values: Any) -> bool:
    """Whether float32 might not hold one of the numbers; those that the model computes are among them."""
    return dtype == torch.float64 and any(is_rounded(value) or isinstance(value, torch.SymFloat) for value in values)


def full(size: list[int], fill_value: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """The translation writes the value as float32 first: in float64, one times the value instead."""
    if not _needs_float64(dtype, fill_value) and not options.get("exact"):
        return NotImplemented
    return aten.ones.default(size, dtype=torch.float64, device=options.get("device")) * fill_value


def full_like(x: Tensor, fill_value: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """As `full`, for a number that the model computes; other ones are kept by `float64_constants.py`."""
    return new_full(x, list(x.shape), fill_value, dtype=dtype)


def new_full(
    x: Tensor, size: list[int], fill_value: Any, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    computed = isinstance(fill_value, torch.SymFloat)
    return full(size, fill_value, dtype=dtype or x.dtype, device=x.device) if computed else NotImplemented


def clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """The translation rounds float64 limits to float32."""
    if not _needs_float64(x.dtype, min, max):
        return NotImplemented
    if min is not None:
        x = torch.maximum(x, full([], min, dtype=x.dtype, device=x.device, exact=True))
    if max is not None:
        x = torch.minimum(x, full([], max, dtype=x.dtype, device=x.device, exact=True))
    return x


def scalar_tensor(value: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """As `full`."""
    return full([], value, dtype=dtype, **options)


def arange(start: Any, end: Any, step: Any = 1, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """The translation counts in float32 where the limits are integers and the step is not."""
    symbolic = any(isinstance(value, (torch.SymInt, torch.SymFloat)) for value in (start, end, step))
    if symbolic or not _needs_float64(dtype, start, step):
        return NotImplemented
    count = max(math.ceil((end - start) / step), 0)
    return torch.arange(count, device=options.get("device")).to(torch.float64) * float(step) + float(start)


def hardtanh(x: Tensor, min_val: Any = -1, max_val: Any = 1) -> Tensor:
    """The translation has float32 attributes for its numbers; so have those of the functions below."""
    if not _needs_float64(x.dtype, min_val, max_val):
        return NotImplemented
    return x.clamp(min_val, max_val)


def addcmul(x: Tensor, left: Tensor, right: Tensor, *, value: Any = 1) -> Tensor:
    return x + left * value * right if _needs_float64(x.dtype, value) else NotImplemented


def addcdiv(x: Tensor, numerator: Tensor, denominator: Tensor, *, value: Any = 1) -> Tensor:
    return x + numerator / denominator * value if _needs_float64(x.dtype, value) else NotImplemented


def addbmm(x: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    if not _needs_float64(x.dtype, beta, alpha):
        return NotImplemented
    return x * beta + torch.bmm(left, right).sum(0) * alpha


def sinc(x: Tensor) -> Tensor:
    """The translation holds pi in float32."""
    if x.dtype != torch.float64:
        return NotImplemented
    scaled = x * math.pi
    return torch.where(x == 0, torch.ones_like(x), scaled.sin() / scaled)


# Operators with float32 attributes, or without a float64 kernel in onnxruntime.
_BY_PYTORCH = (
    aten.elu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.log_sigmoid_forward.default,
    aten.leaky_relu.default,
    aten.celu.default,
    aten.native_group_norm.default,
    aten.native_layer_norm.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.vec,
    aten.upsample_bicubic2d.default,
    aten.softplus.default,
    aten.gelu.default,
    aten.gelu_backward.default,
)

TABLE: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: convolution_in_float64,
    aten.full.default: full,
    aten.full_like.default: full_like,
    aten.new_full.default: new_full,
    aten.scalar_tensor.default: scalar_tensor,
    aten.clamp.default: clamp,
    aten.arange.start_step: arange,
    aten.hardtanh.default: hardtanh,
    aten.addcmul.default: addcmul,
    aten.addcdiv.default: addcdiv,
    aten.addbmm.default: addbmm,
    aten.sinc.default: sinc,
    aten.special_sinc.default: sinc,
    **float64_functions.TABLE,
}


def add_to(table: dict[Any, Callable[..., Any]]) -> None:
    """Add the entries; decompositions that apply to every type stay as they are."""
    for target in _BY_PYTORCH:
        if target in torch._decomp.decomposition_table:
            table.setdefault(target, _only_in_float64(target))
    table.update(TABLE)
