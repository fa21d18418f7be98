"""One rule per ONNX operator: the ATen calls that do the same. Rules are named as ONNX names the operator.

A rule receives tensors, tuples of integers (INT64 shape tensors) and `Constant` arrays, positionally as in ONNX, and
the node's attributes by keyword.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from .. import dtypes
from ..torch_convolution import last_axis_first

aten = torch.ops.aten
Ints: TypeAlias = tuple[Any, ...]  # int or torch.SymInt


@dataclass(frozen=True)
class Constant:
    """A constant array of floats; it takes the dtype of the tensor it meets."""

    array: np.ndarray

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.array.tolist(), dtype=tensor.dtype, device=tensor.device)


AtenValue: TypeAlias = "torch.Tensor | Ints | Constant"


# --- convolutions ----------------------------------------------------------------------------------------------------


def Conv(
    data: Any,
    weight: Any,
    *,
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
) -> Any:
    rank = weight.dim() - 2
    begin, end = _sides(pads, rank)
    # ATen pads both sides alike: what one side has more is padded before.
    common = [min(pair) for pair in zip(begin, end, strict=True)]
    extra = [(lo - c, hi - c) for lo, hi, c in zip(begin, end, common, strict=True)]
    if any(lo or hi for lo, hi in extra):
        data = aten.constant_pad_nd.default(data, last_axis_first(extra), 0.0)
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    if isinstance(weight.shape[1], int) and weight.shape[1] == 0:
        return _empty_sum(data, weight, stride, common, dilation)
    return aten.convolution.default(data, weight, None, stride, common, dilation, False, [0] * rank, group)


def _empty_sum(data: Any, weight: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Any:
    """A convolution over no channels is zero; ATen gives it a wrong shape."""
    sizes = [
        (i + 2 * p - d * (k - 1) - 1) // s + 1
        for i, k, s, p, d in zip(data.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return aten.new_zeros.default(data, [data.shape[0], weight.shape[0], *sizes])


def ConvTranspose(
    data: Any,
    weight: Any,
    *,
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    group: int = 1,
) -> Any:
    rank = weight.dim() - 2
    begin, end = _sides(pads, rank)
    common = [min(pair) for pair in zip(begin, end, strict=True)]
    added = list(output_padding or [0] * rank)
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    result = aten.convolution.default(data, weight, None, stride, common, dilation, True, added, group)
    extra = [(c - lo, c - hi) for lo, hi, c in zip(begin, end, common, strict=True)]
    if any(lo or hi for lo, hi in extra):  # pads of a transposed convolution crop its result
        result = aten.constant_pad_nd.default(result, last_axis_first(extra), 0.0)
    return result


def Col2Im(
    columns: Any,
    image_shape: Ints,
    block_shape: Ints,
    *,
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> Any:
    begin, end = _sides(pads, 2)
    # ATen has one padding per axis; with that of the beginning, an image longer by the difference has the same windows.
    longer = [size + hi - lo for size, lo, hi in zip(image_shape, begin, end, strict=True)]
    image = aten.col2im.default(columns, longer, list(block_shape), list(dilations), begin, list(strides))
    if longer == list(image_shape):
        return image
    cut = [0, image_shape[1] - longer[1], 0, image_shape[0] - longer[0]]
    return aten.constant_pad_nd.default(image, cut, 0.0)


def _sides(pads: Sequence[int] | None, rank: int) -> tuple[list[int], list[int]]:
    values = list(pads or [0] * (2 * rank))
    return values[:rank], values[rank:]


# --- products and sums -----------------------------------------------------------------------------------------------


def MatMul(left: Any, right: Any) -> Any:
    if isinstance(left, Constant):
        left = left.like(right)
    if isinstance(right, Constant):
        right = right.like(left)
    if left.dim() == right.dim() == 3 and isinstance(left.shape[0], int) and left.shape[0] == right.shape[0]:
        return aten.bmm.default(left, right)  # what matmul comes to, without its views
    return torch.matmul(left, right)


def ReduceSum(data: Any, axes: Ints | None = None, *, keepdims: int = 1) -> Any:
    dims = list(range(data.dim())) if axes is None else list(axes)
    return aten.sum.dim_IntList(data, dims, bool(keepdims))


def Sum(*terms: Any) -> Any:
    total = terms[0]
    for term in terms[1:]:
        total = aten.add.Tensor(total, term)
    return total


def _elementwise(on_ints: Callable[[Any, Any], Any], on_tensors: Any) -> Callable[[Any, Any], Any]:
    def rule(left: Any, right: Any) -> Any:
        if not isinstance(left, tuple):
            return on_tensors(left, right)
        length = max(len(left), len(right))
        left, right = (value * length if len(value) == 1 else value for value in (left, right))
        return tuple(on_ints(a, b) for a, b in zip(left, right, strict=True))

    return rule


def Neg(value: Any) -> Any:
    return tuple(-item for item in value) if isinstance(value, tuple) else aten.neg.default(value)


# --- data movement ---------------------------------------------------------------------------------------------------


def ConstantNode(
    *, value: Any = None, value_ints: Sequence[int] | None = None, value_int: int | None = None
) -> AtenValue:
    if value_ints is not None:
        return tuple(value_ints)
    if value_int is not None:
        return (value_int,)
    return constant(value.numpy())


def constant(array: np.ndarray) -> AtenValue:
    """Integers are shape values; floats wait for the tensor they meet."""
    return tuple(int(item) for item in array.ravel()) if array.dtype.kind == "i" else Constant(array)


def Shape(value: Any, *, start: int = 0, end: int | None = None) -> Ints:
    return tuple(value.shape[start:end])


def Reshape(value: Any, shape: Ints, *, allowzero: int = 0) -> Any:
    if isinstance(value, tuple):
        return value  # a scalar made a vector, or the reverse
    if isinstance(value, Constant):
        return Constant(value.array.reshape(shape))
    sizes = [
        value.shape[axis] if not allowzero and isinstance(size, int) and size == 0 else size
        for axis, size in enumerate(shape)
    ]
    return aten.reshape.default(value, sizes)


def Transpose(value: Any, *, perm: Sequence[int]) -> Any:
    return aten.permute.default(value, list(perm))


def Unsqueeze(value: Any, axes: Ints) -> Any:
    for axis in sorted(axes):
        value = aten.unsqueeze.default(value, axis)
    return value


def Concat(*values: Any, axis: int) -> Any:
    if isinstance(values[0], tuple):
        return tuple(item for value in values for item in value)
    return aten.cat.default(list(values), axis)


def Expand(value: Any, shape: Ints) -> Any:
    return aten.expand.default(value, list(shape))


def Gather(value: Any, indices: Ints, *, axis: int = 0) -> Any:
    positions = torch.tensor(list(indices), dtype=torch.int64, device=value.device)
    return aten.index_select.default(value, axis, positions)


def Cast(value: Any, *, to: int) -> Any:
    name = dtypes.from_onnx_code(to)
    if name is None:
        raise KeyError(f"Cast to element type {to}")
    return value.to(getattr(torch, name))


def CastLike(value: Any, like: Any) -> Any:
    """onnxscript puts one behind each literal; the literals here are integers beside integers."""
    return value if isinstance(value, tuple) else value.to(like.dtype)


def Pad(value: Any, amounts: Ints) -> Any:
    """Zeros; negative amounts crop."""
    rank = value.dim()
    pairs = [side for axis in reversed(range(rank)) for side in (amounts[axis], amounts[rank + axis])]
    while len(pairs) > 2 and all(isinstance(side, int) and side == 0 for side in pairs[-2:]):
        pairs = pairs[:-2]  # leading axes that stay as they are
    if all(isinstance(side, int) and side == 0 for side in pairs):
        return value
    return aten.constant_pad_nd.default(value, pairs, 0.0)


def Slice(value: Any, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Any:
    if isinstance(value, tuple):
        return value[starts[0] : ends[0]]
    axes = axes or tuple(range(len(starts)))
    reversed_axes = []
    for axis, start, end, step in zip(axes, starts, ends, steps or (1,) * len(axes), strict=True):
        if step < 0:
            start, end, step = _ascending(start, end, step, value.shape[axis])
            reversed_axes.append(axis)
        if not _is_whole(start, end, step, value.shape[axis]):
            value = aten.slice.Tensor(value, axis, start, end, step)
    reversed_axes = [axis for axis in reversed_axes if value.shape[axis] > 1]
    return aten.flip.default(value, reversed_axes) if reversed_axes else value


def _ascending(start: int, end: int, step: int, size: int) -> tuple[int, int, int]:
    """The same elements of an axis of known size in rising order."""
    positions = range(*slice(start, None if end < -size else end, step).indices(size))
    return (positions[-1], positions[0] + 1, -step) if positions else (0, 0, 1)


def _is_whole(start: Any, end: Any, step: int, size: Any) -> bool:
    if not isinstance(start, int) or start != 0 or step != 1:
        return False
    return isinstance(end, int) and isinstance(size, int) and end >= size


RULES: dict[str, Callable[..., Any]] = {
    "Add": _elementwise(operator.add, aten.add.Tensor),
    "Cast": Cast,
    "CastLike": CastLike,
    "Col2Im": Col2Im,
    "Concat": Concat,
    "Constant": ConstantNode,
    "Conv": Conv,
    "ConvTranspose": ConvTranspose,
    "Div": _elementwise(operator.floordiv, aten.div.Tensor),
    "Expand": Expand,
    "Gather": Gather,
    "MatMul": MatMul,
    "Mul": _elementwise(operator.mul, aten.mul.Tensor),
    "Neg": Neg,
    "Pad": Pad,
    "ReduceSum": ReduceSum,
    "Reshape": Reshape,
    "Shape": Shape,
    "Slice": Slice,
    "Sub": _elementwise(operator.sub, aten.sub.Tensor),
    "Sum": Sum,
    "Transpose": Transpose,
    "Unsqueeze": Unsqueeze,
}
