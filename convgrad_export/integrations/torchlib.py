"""torch.onnx's translations by ATen overload, and the package's own in place of some."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op

from convgrad_export.integrations import random_translations
from convgrad_export.integrations.pooling_decompositions import per_axis

# Logged at every model, about nothing that its author could change.
_HINTS = {
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
    "onnx_ir._convenience": "Attribute type is ambiguous because it is an empty sequence",
}


@functools.cache
def translations() -> Any:
    """torch.onnx's ONNXRegistry; filling one from nothing takes a third of a second. Not to be changed."""
    from torch.onnx._internal.exporter import _registration

    with without_hints():
        return _registration.ONNXRegistry.from_torchlib()


def registry() -> Any:
    """A registry to be changed: torch.onnx's translations, and this file's before them."""
    from torch.onnx._internal.exporter import _registration

    result = _registration.ONNXRegistry()
    result.functions = {target: list(entries) for target, entries in translations().functions.items()}
    aten = torch.ops.aten
    result.register_op(torch.ops.prims.prod.default, _reduce_prod)
    result.register_op(torch.ops.prims.var.default, _variance)
    result.register_op(aten.sym_numel.default, _size)
    result.register_op(aten.scalar_tensor.default, _scalar_tensor)
    result.register_op(aten.max_pool2d_with_indices.default, _max_pool_with_indices(2))
    result.register_op(aten.max_pool3d_with_indices.default, _max_pool_with_indices(3))
    result.register_op(aten.native_group_norm.default, _group_norm)
    result.register_op(aten.diagonal.default, _diagonal)
    result.register_op(aten.mean.default, _mean)
    result.register_op(aten.mean.dim, _mean_along)
    for target, function in random_translations.TABLE.items():
        result.register_op(target, function)
    for wrapper, target in (
        (_rounded_division, aten.div.Tensor_mode),
        (_rounded_division, aten.div.Scalar_mode),
        (_fitting_scatter, aten.slice_scatter.default),
        (_safe_roll, aten.roll.default),
    ):
        # no custom entries: those of float64 calls are still to be wrapped
        result.functions[target.name()] = [
            entry if entry.is_complex else dataclasses.replace(entry, onnx_function=wrapper(entry.onnx_function))
            for entry in result.functions[target.name()]
        ]
    normalization = aten._native_batch_norm_legit_no_training.default
    result.register_op(normalization, _batch_norm_inference(result.get_decomps(normalization)[0].onnx_function))
    return result


@contextlib.contextmanager
def without_hints() -> Iterator[None]:
    """While active, two lines that torch.onnx logs for many models are left out."""

    def passes(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_HINTS[record.name])

    loggers = [logging.getLogger(name) for name in _HINTS]
    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)


def _reduce_prod(x: Any, dims: Sequence[int] | None = None, output_dtype: Any = None) -> Any:
    if not dims:
        return op.ReduceProd(x, keepdims=0)
    axes: Any = op.Constant(value_ints=[int(d) for d in dims])
    return op.ReduceProd(x, axes, keepdims=0)


def _mean(x: Any, dtype: int | None = None) -> Any:
    return _mean_along(x, None, dtype=dtype)


def _mean_along(x: Any, dim: Sequence[int] | None, keepdim: bool = False, dtype: int | None = None) -> Any:
    """In the type asked for, and NaN of no elements.

    torch.onnx's translation converts the result, which is that of a division of integers then. onnxruntime's mean of no
    elements is 0.
    """
    axes, empty = list(dim or range(len(x.shape))), 0 in x.shape
    if dtype is not None and dtype > 0:
        x = op.Cast(x, to=dtype)
    if axes:
        along: Any = op.Constant(value_ints=[int(axis) for axis in axes])
        x = op.ReduceMean(x, along, keepdims=int(keepdim))
    return op.Div(x, x) if empty else x


def _variance(inp: Any, dims: Sequence[int] | None = None, correction: float = 1.0, *, output_dtype: Any = None) -> Any:
    """Over n elements, with the divisor n - correction, or 0 where that is negative, as in PyTorch."""
    axes = list(range(len(inp.shape))) if not dims else [int(d) for d in dims]
    if not axes:  # a number
        return op.Mul(op.Sub(inp, inp), _number(inp, _share(1, correction)))
    along: Any = op.Constant(value_ints=axes)
    centred = op.Sub(inp, op.ReduceMean(inp, along, keepdims=1))
    mean = op.ReduceMean(op.Mul(centred, centred), along, keepdims=0)
    if inp.shape is None:  # a value from within a translation, which takes no correction
        return mean
    sizes = [inp.shape[axis] for axis in axes]
    if all(isinstance(size, int) for size in sizes):
        if correction == 0:
            return op.Div(mean, mean) if 0 in inp.shape else mean
        return op.Mul(mean, _number(inp, _share(math.prod(sizes), correction)))
    count = op.CastLike(op.ReduceProd(op.Gather(op.Shape(inp), along), keepdims=0), inp)
    return op.Mul(mean, op.Div(count, op.Max(op.Sub(count, _number(inp, correction)), _number(inp, 0.0))))


def _share(count: int, correction: float) -> float:
    """What a mean of squares is multiplied by."""
    return count / (count - correction) if count > correction else math.inf if count else math.nan


def _number(like: Any, value: float) -> Any:
    return op.Constant(value=ir.to_proto(ir.tensor(value, dtype=like.dtype)))


def _each(*numbers: int) -> list[Any]:
    """Each as a constant of one axis."""
    return [op.Constant(value_ints=[number]) for number in numbers]


def _rounded_division(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Integers divided as integers; torch.onnx's translation divides them in float32."""

    @functools.wraps(otherwise, updated=())
    def division(self: Any, other: Any, rounding_mode: str | None = None) -> Any:
        whole = isinstance(other, int) or other.dtype.is_integer()
        if rounding_mode is None or not self.dtype.is_integer() or not whole:
            return otherwise(self, other, rounding_mode=rounding_mode)
        # Div rounds towards zero; the remainder has the divisor's sign, without it the quotient is whole.
        return op.Div(self if rounding_mode == "trunc" else op.Sub(self, op.Mod(self, other)), other)

    return division


def _fitting_scatter(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """A slice of one position has it in a trace, whatever an open size is; where that is 0, it has none."""

    @functools.wraps(otherwise, updated=())
    def slice_scatter(self: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
        if isinstance(src.shape[dim], int) and not isinstance(self.shape[dim], int):
            axis = dim % len(self.shape)
            zero, along = _each(0, axis)
            fitting = op.Slice(src, zero, op.Shape(self, start=axis, end=axis + 1), along)
            # the translation asks for the rank
            fitting.dtype = src.dtype
            fitting.shape = ir.Shape([None if each == axis else size for each, size in enumerate(src.shape)])
            src = fitting
        return otherwise(self, src, dim, start, end, step)

    return slice_scatter


def _safe_roll(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """What goes around in front, then the rest; torch.onnx's translation divides by a size, which may be open and 0."""

    @functools.wraps(otherwise, updated=())
    def roll(self: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
        rank = len(self.shape)
        if all(isinstance(size, int) for size in self.shape):
            return otherwise(self, shifts, dims)
        if not dims:
            (flat,) = _each(-1)
            return op.Reshape(_rolled(op.Reshape(self, flat), shifts[0], 0), op.Shape(self), allowzero=1)
        for shift, dim in zip(shifts, dims, strict=True):
            self = _rolled(self, shift, dim % rank)
        return self

    return roll


def _rolled(x: Any, shift: int, axis: int) -> Any:
    zero, one, along, by = _each(0, 1, axis, shift)
    size = op.Shape(x, start=axis, end=axis + 1)
    cut = op.Sub(size, op.Mod(by, op.Max(size, one)))
    return op.Concat(op.Slice(x, cut, size, along), op.Slice(x, zero, cut, along), axis=axis)


def _size(x: Any) -> Any:
    return op.Size(x)


def _batch_norm_inference(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The translation with empty statistics, which eager returns too.

    torch.onnx's translation returns the running ones under the empty shape of eager's, and a pass that merges shapes
    would then write 0 as the size of the mean itself, where its size is symbolic.
    """

    def batch_norm_inference(
        input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float, eps: float
    ) -> tuple[Any, Any, Any]:
        result = otherwise(input, weight, bias, running_mean, running_var, momentum=momentum, eps=eps)[0]
        empty = op.Constant(value=ir.to_proto(ir.tensor(np.zeros(0, np.float32))))
        return result, empty, empty

    return batch_norm_inference


def _group_norm(
    x: Any,
    weight: Any,
    bias: Any,
    samples: Any,
    channels: Any,
    positions: Any,
    group: int,
    eps: float,
) -> tuple[Any, Any, Any]:
    """Output, and each group's mean and reciprocal deviation, as torch.onnx's translation computes them.

    That one leaves the size of a group open in its shapes, and no runtime finds it out for an empty batch.
    """
    axes: Any = op.Constant(value_ints=[2])
    batch = op.Shape(x, start=0, end=1)
    groups: Any = op.Constant(value_ints=[group])
    size = op.Div(op.ReduceProd(op.Shape(x, start=1), keepdims=1), groups)
    grouped = op.Reshape(x, op.Concat(batch, groups, size, axis=0), allowzero=1)
    ones, zeros = (op.Expand(_number(x, value), groups) for value in (1.0, 0.0))
    normal = op.InstanceNormalization(grouped, ones, zeros, epsilon=eps)
    out = op.Reshape(normal, op.Shape(x), allowzero=1)
    inner: Any = op.Constant(value_ints=list(range(1, len(x.shape) - 1)))
    if weight is not None:
        out = op.Mul(out, op.CastLike(op.Unsqueeze(weight, inner), out))  # float32 beside half pictures
    if bias is not None:
        out = op.Add(out, op.CastLike(op.Unsqueeze(bias, inner), out))
    mean = op.ReduceMean(grouped, axes, keepdims=1)  # as the variance takes it
    rstd = op.Reciprocal(op.Sqrt(op.Add(_variance(grouped, [2], 0), _number(x, eps))))
    return out, op.Squeeze(mean, axes), rstd


def _diagonal(x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """The elements of a diagonal, read off the plane's rows laid end to end.

    torch.onnx's translation adds up rows of the plane times zeros and ones: an infinity beside the diagonal (a mask's,
    say) makes NaN of it.
    """
    rank = len(x.shape)
    plane = [dim1 % rank, dim2 % rank]
    planes = op.Transpose(x, perm=[axis for axis in range(rank) if axis not in plane] + plane)
    rows, columns = op.Shape(planes, start=-2, end=-1), op.Shape(planes, start=-1)
    flat = op.Reshape(planes, op.Concat(op.Shape(planes, end=-2), op.Mul(rows, columns), axis=0), allowzero=1)
    last, zero, one, down, right = _each(-1, 0, 1, max(-offset, 0), max(offset, 0))
    length = op.Max(op.Min(op.Sub(rows, down), op.Sub(columns, right)), zero)
    start, step = op.Add(op.Mul(down, columns), right), op.Add(columns, one)
    return op.Slice(flat, start, op.Add(start, op.Mul(length, step)), last, step)


def _scalar_tensor(s: Any, dtype: int = 1, **_: Any) -> Any:
    """A 0-d constant in its own type; torch.onnx's translation goes through float32."""
    wanted = ir.DataType(dtype if dtype > 0 else 1)
    if isinstance(s, (int, float, bool)):
        return op.Constant(value=ir.to_proto(ir.tensor(s, dtype=wanted)))
    return op.Cast(s, to=int(wanted))


def _padding_behind(size: Any, kernel: int, stride: int, padding: int, dilation: int) -> int | None:
    """The padding behind an axis with which rounding down gives PyTorch's windows of rounding up; None: unknown.

    PyTorch leaves out a window that lies behind the input as a whole, which onnx's shape inference counts.
    """
    if not isinstance(size, int):
        return None
    reach = dilation * (kernel - 1) + 1
    windows: int = (size + 2 * padding - reach + stride - 1) // stride + 1
    if (windows - 1) * stride >= size + padding:
        windows -= 1
    return max((windows - 1) * stride + reach - size - padding, 0)


def _max_pool_with_indices(rank: int) -> Callable[..., Any]:
    """MaxPool once: ONNX counts positions over the whole tensor, PyTorch within a plane, so the remainder is taken.

    torch.onnx's translation runs a second MaxPool over the input for that.
    """

    def max_pool_with_indices(
        x: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> Any:
        batched = len(x.shape) == rank + 2
        axis: Any = op.Constant(value_ints=[0])
        kernel, dilations, before = (per_axis(values, rank) for values in (kernel_size, dilation, padding))
        strides = per_axis(stride, rank) if stride else kernel
        windows = list(zip(x.shape[-rank:], kernel, strides, before, dilations, strict=True))
        after = [_padding_behind(*window) for window in windows] if ceil_mode else before
        explicit = [pad for pad, k in zip(after, kernel, strict=True) if pad is not None and pad < k]
        if len(explicit) == rank:
            ceil_mode = False
        else:
            explicit = before
        pooled, positions = op.MaxPool(
            x if batched else op.Unsqueeze(x, axis),
            kernel_shape=kernel,
            strides=strides,
            pads=before + explicit,
            dilations=dilations,
            ceil_mode=int(ceil_mode),
        )
        plane = op.ReduceProd(op.Shape(x, start=-rank), keepdims=0)
        positions = op.Mod(positions, plane)
        return (pooled, positions) if batched else (op.Squeeze(pooled, axis), op.Squeeze(positions, axis))

    return max_pool_with_indices
