"""ATen operators that torch.onnx translates wrongly or not at all, as compositions of operators that it does right.

`onnx_decompositions()` is the table for the second pass of tracing: torch.onnx's own table, PyTorch's decompositions
in place of translations that were found wrong, and the functions in the `*_decompositions.py` files and below where
PyTorch has none. Each entry is held by a gradient test of its own (tests/integrations/test_operator_gradients.py).

Why each is here, measured on torch 2.13 with onnxscript 0.7:

- batch normalization: the translation of `_native_batch_norm_legit_functional` ignores `training=True`.
- mse_loss: the translation's mean of no elements is 0.
- nll_loss_forward: the translation has no total weight, so mean-reduced losses lose a factor in the gradient. Class -1,
  in images too, would be the last one.
- hardtanh_backward (ReLU6): the translation lets the gradient through exactly at the clamps; a zero is common there.
- threshold_backward, leaky_relu_backward, hardswish_backward, hardsigmoid_backward: right, but slow (Where).
- copy: the translation does not broadcast.
- full, scalar_tensor, clamp, hardtanh, arange, addcmul, addcdiv, addmv, addbmm, sinc: the translation rounds
  a float64 value to float32.
- mv, addmv: onnxruntime is wrong for a transposed matrix times a vector.
- log1p, expm1, logaddexp, logaddexp2, logcumsumexp, remainder, pow: right for a part of the arguments
  (`exact_decompositions.py`).
- amax and amin without axes: the translation asks for some. eq to ge of booleans and a number: made a boolean.
- sum, cumsum: ONNX adds up neither booleans nor small integers. max along an axis: ArgMax takes no booleans.
- linalg_matrix_exp, linalg_householder_product: no translation (`linear_algebra.py`).
- determinants, solve, inv, cholesky: their derivatives take the factors, which ONNX has not (`factorizations.py`).
- medians, k-th values, running extremes, searches: none (`order_statistics.py`).
- as_strided_scatter, diagonal_scatter, unfold_backward, hypot, fmax, fmin, copysign, rrelu, the product of
  Bilinear: no translation.
- erfc, erfcx: no digit is right for large arguments (`error_functions.py`).
- scatter_reduce: the translation of "mean" overwrites.
- im2col and col2im: no empty batch, float32 only, no picture without a batch axis (`column_decompositions.py`).
- squeeze of given dimensions: ONNX refuses one of another size than 1, which PyTorch leaves.
- index_put with indices that broadcast over a dynamic size: the translation takes the larger size, 1 of 1 and 0.
- index, index_put by int32: the translation makes an invalid model.
- roll by a dynamic size: the translation has attributes.
- split into parts of a dynamic size: a sequence, on which onnxscript's optimizer and opsets below 18 fail.
- convolution in float64: onnxruntime's CPU provider has no kernel.
- pooling, padding and weight_norm backward: no translation, or none for every size.
- antialiased upsampling: the translation ignores scale factors, and has no gradient.
- softmax along an inner axis, max pooling backward of windows side by side: right, but slow.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from convgrad_export.integrations import (
    activation_decompositions,
    column_decompositions,
    error_functions,
    exact_decompositions,
    factorizations,
    float64_decompositions,
    interpolation,
    linear_algebra,
    max_pooling_decompositions,
    normalization_decompositions,
    order_statistics,
    pooling_decompositions,
    softmax_decompositions,
    torchlib,
)

aten = torch.ops.aten
Table = dict[Any, Callable[..., Any]]


@functools.cache
def _onnx_friendly_table() -> Table:
    from torch.onnx._internal.exporter import _decomp

    implemented = set(_decomp.get_onnx_implemented_overloads(torchlib.translations()))
    return dict(_decomp.create_onnx_friendly_decomposition_table(implemented))


def onnx_decompositions(opset: int = 18) -> Table:
    """The whole table: ATen overload to Python function. Below opset 16 to 18 it avoids operators that came then."""
    table = dict(_onnx_friendly_table())
    for target, at in _OF_CLASSES.items():
        table[target] = _refusing_negative_classes(torch._decomp.decomposition_table[target], at)
    float64_decompositions.add_to(table)
    table.update(OWN)
    if opset < 18:
        table.update(column_decompositions.BELOW_OPSET_18)
    if opset < 17:
        table[aten.native_layer_norm.default] = torch._decomp.decomposition_table[aten.native_layer_norm.default]
    if opset < 16:
        table.update(max_pooling_decompositions.BELOW_OPSET_16)
        table[aten.embedding_dense_backward.default] = embedding_backward_by_matmul
    # Nothing may take the convolution apart: it is what the lowerings are for.
    table.pop(aten.convolution_backward.default, None)
    return table


def copy(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`source` in the type and shape of `destination`, broadcast if it is smaller."""
    return source.to(destination.dtype).expand(destination.shape).clone()


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


def _narrow(x: Tensor) -> torch.dtype | None:
    """The type of `x` if a sum would have another one by itself."""
    return None if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.int64 else x.dtype


def sum_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    converted = _summable(x, dtype)
    return NotImplemented if converted is None else converted.sum(dtype=_narrow(converted))


def sum_dims(x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    converted = _summable(x, dtype)
    return NotImplemented if converted is None else converted.sum(dim, keepdim, dtype=_narrow(converted))


def cumulative_sum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    converted = _summable(x, dtype)
    return NotImplemented if converted is None else converted.cumsum(dim, dtype=_narrow(converted))


def maximum_along(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Of booleans, which ArgMax does not take, as integers."""
    if x.dtype != torch.bool:
        return NotImplemented
    values, positions = x.to(torch.int32).max(dim, keepdim)
    return values.to(torch.bool), positions


def hypotenuse(x: Tensor, y: Tensor) -> Tensor:
    """Scaled by the larger one, so that nothing overflows that need not."""
    larger, smaller = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    ratio = torch.where(larger == smaller, 1.0, smaller / larger)  # of two infinities and of two zeros, too
    return larger * (1 + ratio * ratio).sqrt()


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


def zeros_with_same_layout(x: Tensor, other: Tensor, *, self_num_batch_dims: int = 0) -> Tensor:
    """The tangent of a tensor without one, of which a part is written to."""
    return x.new_zeros([*x.shape[:self_num_batch_dims], *other.shape])


def squeeze_dim(x: Tensor, dim: int) -> Tensor:
    """A dimension of another size than 1 stays, where ONNX's Squeeze refuses it."""
    return NotImplemented if _is_one(x, dim) else aten.alias(x)


def squeeze_dims(x: Tensor, dim: list[int]) -> Tensor:
    """The same of several."""
    result: Tensor = aten.alias(x)
    for axis in sorted({each % x.dim() for each in dim if x.dim()}, reverse=True):
        result = aten.squeeze.dim(result, axis)
    return result


def _is_one(x: Tensor, dim: int) -> bool:
    """Sizes that are open stay, as PyTorch has it in a trace."""
    return x.dim() > 0 and isinstance(size := x.shape[dim], int) and size == 1


def roll(x: Tensor, shifts: list[int], dims: list[int] = []) -> Tensor:  # noqa: B006
    """By positions, where a shift is a dynamic size; the translation takes numbers alone."""
    if all(isinstance(shift, int) for shift in shifts):
        return NotImplemented
    if not dims:
        return roll(x.reshape([-1]), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        positions = torch.arange(x.shape[dim], device=x.device)
        size = torch.ones_like(positions).sum().clamp(min=1)  # no division by 0 where there is nothing
        x = x.index_select(dim, torch.remainder(positions - shift, size))
    return x


def traced_convolution(*arguments: Any) -> Tensor:
    """The convolution of a module from `torch.jit.trace`, which records four options of cuDNN's behind its nine."""
    result: Tensor = aten.convolution(*arguments[:9])
    return result


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


def index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """ONNX gathers by int64 alone."""
    wide = _in_int64(indices)
    found: Tensor = NotImplemented if wide is indices else aten.index.Tensor(x, wide)
    return found


def index_put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """By int64, and the indices in one shape, where dynamic ones differ."""
    wide = _in_int64(indices)
    shapes = [index.shape for index in wide if index is not None]
    if any(index is not None and not _is_integer(index) for index in wide) or _surely_equal(shapes):
        if wide is indices:
            return NotImplemented
    else:
        common = torch.broadcast_shapes(*shapes)
        wide = [None if index is None else index.expand(common) for index in wide]
    result: Tensor = aten.index_put.default(x, wide, values, accumulate)
    return result


def _in_int64(indices: list[Tensor | None]) -> list[Tensor | None]:
    """The list itself where there is no int32 in it."""
    if all(index is None or index.dtype != torch.int32 for index in indices):
        return indices
    return [None if index is None else index.to(torch.int64) if _is_integer(index) else index for index in indices]


def _is_integer(x: Tensor) -> bool:
    return x.dtype != torch.bool and x.dtype != torch.uint8


def _surely_equal(shapes: list[torch.Size]) -> bool:
    """Whether all are one shape, or made of numbers; asking about a dynamic size must not fix it."""
    if all(isinstance(size, int) for shape in shapes for size in shape):
        return True
    first = shapes[0]
    return all(
        len(shape) == len(first) and all(statically_known_true(a == b) for a, b in zip(shape, first, strict=True))
        for shape in shapes[1:]
    )


def split(x: Tensor, split_size: int, dim: int = 0) -> list[Tensor]:
    """Parts of a dynamic size."""
    if isinstance(x.shape[dim], int) and isinstance(split_size, int):
        return NotImplemented
    parts = int((x.shape[dim] + split_size - 1) // split_size)  # the forward has decided on it
    sizes = [split_size] * (parts - 1)
    return split_with_sizes(x, [*sizes, x.shape[dim] - split_size * (parts - 1)], dim)


def split_with_sizes(x: Tensor, split_sizes: list[int], dim: int = 0) -> list[Tensor]:
    """Parts of dynamic sizes as slices; the translation makes a sequence of them."""
    if all(isinstance(size, int) for size in split_sizes):
        return NotImplemented
    ends = list(itertools.accumulate(split_sizes))
    return [aten.slice.Tensor(x, dim, end - size, end) for size, end in zip(split_sizes, ends, strict=True)]


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
    slope = rrelu_slope(x, torch.rand_like(x), lower, upper)
    return x * slope, slope


def uniform(x: Tensor, low: float = 0.0, high: float = 1.0, generator: Any = None) -> Tensor:
    """PyTorch's own decomposition ends in an operator without a translation."""
    return torch.rand_like(x) * (high - low) + low


def rrelu_slope(x: Tensor, drawn: Tensor, lower: float, upper: float) -> Tensor:
    """1 where x is positive, elsewhere between the bounds, by numbers drawn from [0, 1)."""
    return torch.where(x > 0, 1.0, drawn * (upper - lower) + lower)


def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """As a product with a one-column matrix: onnxruntime 1.32 fuses Transpose into MatMul wrongly before a vector."""
    return torch.mm(matrix, vector.unsqueeze(1)).squeeze(1)


def matrix_vector_sum(x: Tensor, matrix: Tensor, vector: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """As `matrix_vector`."""
    if not x.dtype.is_floating_point:
        return NotImplemented  # the factors are integers there
    product = torch.mv(matrix, vector)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (x if beta == 1 else x * beta)


# Where the network's output stands among the arguments: the target is next to it, `ignore_index` the fourth after it.
# The gradients too: of an attack, say, nothing else of the loss is left.
_OF_CLASSES = {
    aten.nll_loss_forward.default: 0,
    aten.nll_loss2d_forward.default: 0,
    aten.nll_loss_backward.default: 1,
    aten.nll_loss2d_backward.default: 1,
}


def _refusing_negative_classes(decomposition: Callable[..., Any], at: int) -> Callable[..., Any]:
    """PyTorch's own decomposition; ONNX counts index -1 from the end, where PyTorch refuses it as a class."""

    def of_classes(*arguments: Any) -> Any:
        x, target, _, _, ignore_index = arguments[at : at + 5]
        if target.dtype != torch.uint8:
            # One more than the last class: GatherElements and ScatterElements refuse it.
            outside = x.shape[min(1, x.dim() - 1)]
            outside = outside if outside != ignore_index else outside + 1
            negative = target < 0
            if ignore_index < 0:
                negative = negative & (target != ignore_index)
            target = torch.where(negative, outside, target)
        return decomposition(*arguments[: at + 1], target, *arguments[at + 2 :])

    return of_classes


def _extreme(operator: Any) -> Callable[..., Tensor]:
    def of_all(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
        """amax or amin without axes, which are all of them."""
        if dim:
            return NotImplemented
        found: Tensor = operator(x, list(range(x.dim())), keepdim) if x.dim() else x.clone()
        return found

    return of_all


OWN: Table = {
    aten.amax.default: _extreme(aten.amax),
    aten.amin.default: _extreme(aten.amin),
    aten.copy.default: copy,
    aten.mv.default: matrix_vector,
    aten.addmv.default: matrix_vector_sum,
    aten.as_strided.default: as_strided,
    aten.as_strided_scatter.default: as_strided_scatter,
    aten.mse_loss.default: torch._decomp.decomposition_table[aten.mse_loss.default],
    aten.sum.default: sum_all,
    aten.sum.dim_IntList: sum_dims,
    aten.cumsum.default: cumulative_sum,
    aten.max.dim: maximum_along,
    aten.hypot.default: hypotenuse,
    aten.diagonal_backward.default: diagonal_backward,
    aten.diagonal_scatter.default: diagonal_scatter,
    aten.unfold_backward.default: unfold_backward,
    aten._convolution.default: traced_convolution,
    aten._trilinear.default: trilinear,
    aten._new_zeros_with_same_feature_meta.default: zeros_with_same_layout,
    aten.squeeze.dim: squeeze_dim,
    aten.squeeze.dims: squeeze_dims,
    aten.index.Tensor: index,
    aten._unsafe_index.Tensor: index,
    aten.index_put.default: index_put,
    aten._unsafe_index_put.default: index_put,
    aten.roll.default: roll,
    aten.split.Tensor: split,
    aten.unsafe_split.Tensor: split,
    aten.split_with_sizes.default: split_with_sizes,
    aten.uniform.default: uniform,
    aten.rrelu_with_noise_functional.default: rrelu_with_noise_functional,
    **activation_decompositions.TABLE,
    **column_decompositions.TABLE,
    **error_functions.TABLE,
    **exact_decompositions.TABLE,
    **factorizations.TABLE,
    **interpolation.TABLE,
    **linear_algebra.TABLE,
    **normalization_decompositions.TABLE,
    **order_statistics.TABLE,
    **pooling_decompositions.TABLE,
    **max_pooling_decompositions.TABLE,
    **softmax_decompositions.TABLE,
}
