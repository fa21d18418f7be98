"""ATen operators that torch.onnx translates wrongly or not at all, as compositions of operators that it does right.

`onnx_decompositions()` is the table for the second pass of tracing: torch.onnx's own table, PyTorch's decompositions
in place of translations that were found wrong, and the functions in `pooling_decompositions.py` and below where PyTorch
has none. Each entry is held by a gradient test of its own (tests/integrations/test_operator_gradients.py).

Why each is here, measured on torch 2.13 with onnxscript 0.7:

- batch normalization: the translation of `_native_batch_norm_legit_functional` ignores `training=True`.
- nll_loss_forward: the translation has no total weight, so mean-reduced losses lose a factor in the gradient.
- hardtanh_backward (ReLU6): the translation lets the gradient through exactly at the clamps; a zero is common there.
- threshold_backward, leaky_relu_backward: right, but slow (Where); a non-finite gradient times 0 is not-a-number.
- copy: the translation does not broadcast.
- full, full_like, scalar_tensor: the translation rounds a float64 value to float32.
- mv: onnxruntime is wrong for a transposed matrix times a vector.
- convolution in float64: onnxruntime's CPU provider has no kernel.
- pooling, padding and weight_norm backward: no translation, or none for every size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convgrad_export.integrations import pooling_decompositions

aten = torch.ops.aten
Table = dict[Any, Callable[..., Any]]


@functools.cache
def _onnx_friendly_table() -> Table:
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = _registration.ONNXRegistry.from_torchlib()
    return dict(_decomp.create_onnx_friendly_decomposition_table(set(_decomp.get_onnx_implemented_overloads(registry))))


def onnx_decompositions(opset: int = 18) -> Table:
    """The whole table: ATen overload to Python function. Below opset 16 and 17 it avoids operators that came then."""
    table = dict(_onnx_friendly_table())
    for target in _PYTORCH_IS_RIGHT:
        table[target] = torch._decomp.decomposition_table[target]
    for target in _FLOAT64:
        if target in torch._decomp.decomposition_table:
            table.setdefault(target, _only_in_float64(target))
    table.update(OWN)
    if opset < 17:
        table[aten.native_layer_norm.default] = torch._decomp.decomposition_table[aten.native_layer_norm.default]
    if opset < 16:
        table.update(pooling_decompositions.BELOW_OPSET_16)
        table[aten.embedding_dense_backward.default] = embedding_backward_by_matmul
    # Nothing may take the convolution apart: it is what the lowerings are for.
    table.pop(aten.convolution_backward.default, None)
    return table


def _statistics_axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _count_per_channel(x: Tensor) -> Any:
    count: Any = x.shape[0]
    for size in x.shape[2:]:
        count = count * size
    return count


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape([1, -1] + [1] * (like.dim() - 2))


def _computed(x: Tensor) -> Tensor:
    """float16 and bfloat16 are accumulated in float32, as eager does."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def batch_norm_functional(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, saved mean, saved reciprocal deviation, and the running statistics after the call."""
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm: evaluation mode needs running statistics")
        out, mean, rstd = aten._native_batch_norm_legit_no_training(
            x, weight, bias, running_mean, running_var, momentum, eps
        )
        return out, mean, rstd, running_mean, running_var
    axes = _statistics_axes(x)
    wide = _computed(x)
    mean = wide.mean(axes)
    centred = wide - _per_channel(mean, x)
    variance = (centred * centred).mean(axes)
    rstd = torch.rsqrt(variance + eps)
    if weight is not None and bias is not None and x.dtype == torch.float32:
        # one pass over x: BatchNormalization in inference mode, given the batch's own statistics
        out = aten._native_batch_norm_legit_no_training(x, weight, bias, mean, variance, momentum, eps)[0]
    else:
        out = centred * _per_channel(rstd if weight is None else rstd * weight, x)
        if bias is not None:
            out = out + _per_channel(bias, x)
    if running_mean is not None:
        running_mean = (running_mean * (1 - momentum) + mean * momentum).to(running_mean.dtype)
    if running_var is not None:
        count = _count_per_channel(x)
        unbiased = variance * count / (count - 1)
        running_var = (running_var * (1 - momentum) + unbiased * momentum).to(running_var.dtype)
    return out.to(x.dtype), mean, rstd, running_mean, running_var


def batch_norm_no_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64 only, where the operator's epsilon would be a float32."""
    if x.dtype != torch.float64:
        return NotImplemented
    scale = torch.rsqrt(running_var + eps)
    out = (x - _per_channel(running_mean, x)) * _per_channel(scale if weight is None else scale * weight, x)
    empty = x.new_empty([0])
    return out if bias is None else out + _per_channel(bias, x), empty, empty


def _native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, rstd, new_mean, new_var = batch_norm_functional(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )
    if training and running_mean is not None and running_var is not None:
        running_mean.copy_(new_mean)  # type: ignore[arg-type]
        running_var.copy_(new_var)  # type: ignore[arg-type]
    return out, mean, rstd


def _batch_norm_no_stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return batch_norm_functional(x, weight, bias, None, None, training, momentum, eps)[:3]


def batch_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_rstd: Tensor | None,
    train: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias); with batch statistics when `train`, with the running ones otherwise."""
    axes = _statistics_axes(x)
    grad, wide = _computed(grad_out), _computed(x)
    if train:
        mean, rstd = save_mean, save_rstd
    else:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm_backward: evaluation mode needs running statistics")
        mean, rstd = _computed(running_mean), torch.rsqrt(_computed(running_var) + eps)
    if mean is None or rstd is None:
        raise ValueError("batch_norm_backward: training mode needs the saved statistics")
    scale = rstd if weight is None else rstd * weight
    dx = dweight = dbias = None
    grad_sum = grad.sum(axes) if output_mask[2] or (train and output_mask[0]) else None
    dot = centred = None
    if output_mask[1] or (train and output_mask[0]):
        centred = wide - _per_channel(mean, x)
        dot = (grad * centred).sum(axes)
    if output_mask[0]:
        if train and dot is not None and centred is not None and grad_sum is not None:
            count = _count_per_channel(x)
            slope = dot * rstd * rstd / count
            # scale * (grad - mean of grad - slope * centred); the last two terms in one pass, as a BatchNormalization
            # of mean 0 and variance 1
            zero = torch.zeros_like(slope)
            moved = aten._native_batch_norm_legit_no_training(
                centred, -scale * slope, -scale * (grad_sum / count), zero, zero + 1, 0.0, 0.0
            )[0]
            dx = (grad * _per_channel(scale, x) + moved).to(x.dtype)
        else:
            dx = (grad * _per_channel(scale, x)).to(x.dtype)
    if output_mask[1] and dot is not None:
        dweight = (dot * rstd).to(weight.dtype if weight is not None else x.dtype)
    if output_mask[2]:
        dbias = grad_sum if grad_sum is None else grad_sum.to(weight.dtype if weight is not None else x.dtype)
    return dx, dweight, dbias


def threshold_backward(grad: Tensor, x: Tensor, threshold: Any) -> Tensor:
    """The gradient of ReLU as a product: onnxruntime's Where takes eleven times as long."""
    return grad * (x > threshold).to(grad.dtype)


def hardtanh_backward(grad: Tensor, x: Tensor, min_val: float, max_val: float) -> Tensor:
    """The gradient of ReLU6, zero at both clamps."""
    return grad * ((x > min_val).to(grad.dtype) * (x < max_val).to(grad.dtype))


def leaky_relu_backward(grad: Tensor, x: Tensor, negative_slope: float, self_is_result: bool) -> Tensor:
    return grad * ((x > 0).to(grad.dtype) * (1 - negative_slope) + negative_slope)


def copy(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`source` in the type and shape of `destination`, broadcast if it is smaller."""
    return source.to(destination.dtype).expand(destination.shape).clone()


def _norm_except(v: Tensor, dim: int) -> Tensor:
    axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    return (v * v).sum(axes, keepdim=True).sqrt() if axes else v.abs()


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """The normalized weight `v * g / |v|`, and |v| over every axis but `dim`."""
    norm = _norm_except(v, dim)
    return v * (g / norm), norm


def weight_norm_interface_backward(
    grad_w: Tensor, saved_v: Tensor, saved_g: Tensor, saved_norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """(dv, dg) of `w = v * g / |v|`."""
    axes = [axis for axis in range(saved_v.dim()) if axis != dim % saved_v.dim()]
    dot = (grad_w * saved_v).sum(axes, keepdim=True) if axes else grad_w * saved_v
    dg = dot / saved_norms
    dv = (grad_w - saved_v * (dot / (saved_norms * saved_norms))) * (saved_g / saved_norms)
    return dv, dg


def _strided_positions(size: list[int], stride: list[int], offset: int, device: torch.device) -> Tensor:
    positions = torch.full([1] * len(size), offset, dtype=torch.int64, device=device)
    for axis, (length, step) in enumerate(zip(size, stride, strict=True)):
        shape = [1] * len(size)
        shape[axis] = length
        positions = positions + (torch.arange(length, device=device) * step).reshape(shape)
    return positions.reshape([-1])


def as_strided(x: Tensor, size: list[int], stride: list[int], storage_offset: int | None = None) -> Tensor:
    """`x.as_strided` for a contiguous x, as a gather from the flattened tensor."""
    return x.reshape([-1])[_strided_positions(size, stride, storage_offset or 0, x.device)].reshape(size)


def as_strided_scatter(
    x: Tensor, source: Tensor, size: list[int], stride: list[int], storage_offset: int | None = None
) -> Tensor:
    """A copy of the contiguous `x` with the elements that `as_strided` would show replaced by `source`."""
    positions = _strided_positions(size, stride, storage_offset or 0, x.device)
    return aten.scatter.src(x.reshape([-1]), 0, positions, source.reshape([-1])).reshape(x.shape)


def _summable(x: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """`x` in the type its sum has, or None where that is its own: ONNX sums neither booleans nor small integers."""
    target = dtype or (x.dtype if x.dtype.is_floating_point or x.dtype.is_complex else torch.int64)
    return None if target == x.dtype else x.to(target)


def sum_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    converted = _summable(x, dtype)
    return NotImplemented if converted is None else converted.sum()


def sum_dims(x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    converted = _summable(x, dtype)
    return NotImplemented if converted is None else converted.sum(dim, keepdim)


def median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Values and positions of the lower median, from a sort."""
    values, positions = torch.sort(x, dim=dim)
    middle = (x.shape[dim] - 1) // 2
    values, positions = values.narrow(dim, middle, 1), positions.narrow(dim, middle, 1)
    return (values, positions) if keepdim else (values.squeeze(dim), positions.squeeze(dim))


def diagonal_scatter(x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """`x` with one diagonal of two axes replaced by `source`, whose last axis runs along the diagonal."""
    rank = x.dim()
    dim1, dim2 = dim1 % rank, dim2 % rank
    rows = torch.arange(x.shape[dim1], device=x.device).unsqueeze(1)
    columns = torch.arange(x.shape[dim2], device=x.device).unsqueeze(0)
    along = (rows + columns * 0) if offset >= 0 else (columns + rows * 0)
    spread = source[..., torch.clamp(along, max=source.shape[-1] - 1)]
    order = [*(axis for axis in range(rank) if axis not in (dim1, dim2)), dim1, dim2]
    merged = torch.where((columns - rows) == offset, spread, x.permute(order))
    return merged.permute([order.index(axis) for axis in range(rank)])


def diagonal_backward(grad: Tensor, input_sizes: list[int], offset: int, dim1: int, dim2: int) -> Tensor:
    """Zeros of `input_sizes` with `grad` (its last axis) on one diagonal of two axes."""
    return diagonal_scatter(grad.new_zeros(input_sizes), grad, offset, dim1, dim2)


def unfold_backward(grad: Tensor, input_sizes: list[int], dim: int, size: int, step: int) -> Tensor:
    """Overlapping windows added back; PyTorch's own version counts positions in int32, which ScatterND refuses."""
    dim = dim % max(len(input_sizes), 1)
    positions = torch.arange(input_sizes[dim], device=grad.device).unfold(0, size, step).reshape([-1])
    windows = grad.movedim(-1, dim + 1).flatten(dim, dim + 1)
    zeros = grad.new_zeros(input_sizes)
    return aten.index_put(zeros, [None] * dim + [positions], windows, True)


def embedding_backward_by_matmul(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """Embedding backward as one-hot rows times the gradient, for opsets whose ScatterND cannot add (below 16)."""
    if scale_grad_by_freq:
        return NotImplemented
    flat = indices.reshape([-1])
    rows = torch.arange(num_weights, device=grad.device).unsqueeze(1)
    chosen = (rows == flat.unsqueeze(0)) & (flat != padding_idx).unsqueeze(0)
    return torch.matmul(chosen.to(grad.dtype), grad.reshape([-1, grad.shape[-1]]))


def trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
    unroll_dim: int = 1,
) -> Tensor:
    """Product of three tensors, each with axes inserted, summed over `sumdim`."""
    product: Any = None
    for tensor, axes in ((i1, expand1), (i2, expand2), (i3, expand3)):
        for axis in sorted(axes):
            tensor = tensor.unsqueeze(axis)
        product = tensor if product is None else product * tensor
    return product.sum(sumdim) if sumdim else product


def rrelu_with_noise_functional(
    x: Tensor,
    noise: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    generator: Any = None,
) -> tuple[Tensor, Tensor]:
    """Output, and the slope each element was multiplied with."""
    if not training:
        return aten.leaky_relu.default(x, (lower + upper) / 2), noise
    slope = torch.where(x > 0, 1.0, torch.rand_like(x) * (upper - lower) + lower)
    return x * slope, slope


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


def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """As a product with a one-column matrix: onnxruntime 1.32 fuses Transpose into MatMul wrongly before a vector."""
    return torch.mm(matrix, vector.unsqueeze(1)).squeeze(1)


def _only_in_float64(target: Any) -> Callable[..., Any]:
    """PyTorch's decomposition for float64 tensors; other types keep the ONNX operator."""
    decomposition = torch._decomp.decomposition_table[target]

    @functools.wraps(decomposition)
    def decomposed(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return decomposition(x, *args, **kwargs) if x.dtype == torch.float64 else NotImplemented

    return decomposed


def _needs_float64(value: Any, dtype: torch.dtype | None) -> bool:
    return dtype == torch.float64 and isinstance(value, float) and float(np.float32(value)) != value


def full(size: list[int], fill_value: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """The translation writes the value as float32 first: in float64, one times the value instead."""
    if not _needs_float64(fill_value, dtype) and not options.get("exact"):
        return NotImplemented
    return aten.ones.default(size, dtype=torch.float64, device=options.get("device")) * fill_value


def full_like(x: Tensor, fill_value: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """As `full`."""
    if not _needs_float64(fill_value, dtype or x.dtype):
        return NotImplemented
    return aten.ones.default(list(x.shape), dtype=torch.float64, device=x.device) * fill_value


def clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """The translation rounds float64 limits to float32."""
    if not (_needs_float64(min, x.dtype) or _needs_float64(max, x.dtype)):
        return NotImplemented
    if min is not None:
        x = torch.maximum(x, full([], float(min), dtype=x.dtype, device=x.device, exact=True))
    if max is not None:
        x = torch.minimum(x, full([], float(max), dtype=x.dtype, device=x.device, exact=True))
    return x


def scalar_tensor(value: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """As `full`."""
    return full([], value, dtype=dtype, **options)


_PYTORCH_IS_RIGHT = (aten.nll_loss_forward.default,)

# Operators with float32 attributes, or without a float64 kernel in onnxruntime.
_FLOAT64 = (
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
)

OWN: Table = {
    aten._native_batch_norm_legit_functional.default: batch_norm_functional,
    aten._native_batch_norm_legit.default: _native_batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_no_stats,
    aten.native_batch_norm.default: _native_batch_norm,
    aten._native_batch_norm_legit_no_training.default: batch_norm_no_training,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.convolution.default: convolution_in_float64,
    aten.copy.default: copy,
    aten.threshold_backward.default: threshold_backward,
    aten.hardtanh_backward.default: hardtanh_backward,
    aten.leaky_relu_backward.default: leaky_relu_backward,
    aten.mv.default: matrix_vector,
    aten.full.default: full,
    aten.full_like.default: full_like,
    aten.clamp.default: clamp,
    aten.scalar_tensor.default: scalar_tensor,
    aten._weight_norm_interface.default: weight_norm_interface,
    aten._weight_norm_interface_backward.default: weight_norm_interface_backward,
    aten.as_strided.default: as_strided,
    aten.as_strided_scatter.default: as_strided_scatter,
    aten.sum.default: sum_all,
    aten.sum.dim_IntList: sum_dims,
    aten.median.dim: median,
    aten.diagonal_backward.default: diagonal_backward,
    aten.diagonal_scatter.default: diagonal_scatter,
    aten.unfold_backward.default: unfold_backward,
    aten._trilinear.default: trilinear,
    aten.rrelu_with_noise_functional.default: rrelu_with_noise_functional,
    **pooling_decompositions.TABLE,
}
