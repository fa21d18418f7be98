"""Average pooling and padding backward in operators that ONNX has, for every size and dtype, dynamic ones included.

Average pooling backward is separable: along one axis, each element of the gradient is spread over `kernel` positions,
`stride` apart. Adaptive pooling is a product with one small matrix per axis, and so is its gradient. Replication
padding adds what was copied back onto the border. Max pooling is in `max_pooling_decompositions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def per_axis(values: Any, rank: int) -> list[Any]:
    """A number, or a sequence of one or of `rank`, as one for each axis."""
    given = list(values) if isinstance(values, Sequence) else [values]
    return given * rank if len(given) == 1 else given


def is_empty(x: Tensor) -> bool:
    """Known to have no elements: PyTorch 2.13's shape function of upsample_nearest2d ends in a TypeError there."""
    return any(isinstance(size, int) and size == 0 for size in x.shape)


def along_axis(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector shaped to broadcast along spatial axis `axis` of (..., *spatial)."""
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def _window_counts(
    size: Any, outputs: Any, k: int, s: int, p: int, include_pad: bool, ceil_mode: bool, like: Tensor
) -> Tensor | int:
    """How many elements each window of one axis averages over."""
    # Without ceil_mode every window lies inside the padded axis.
    if not ceil_mode and (include_pad or p == 0):
        return k
    start = torch.arange(outputs, device=like.device) * s - p
    stop = torch.clamp(start + k, max=size + p)
    if not include_pad:
        stop, start = torch.clamp(stop, max=size), torch.clamp(start, min=0)
    return (stop - start).to(like.dtype)


def _spread(grad: Tensor, axis: int, size: Any, k: int, s: int, p: int) -> Tensor:
    """Add each element of `grad` along `axis` to the `size` positions that its window covers."""
    axis = axis % grad.dim()
    outputs = grad.shape[axis]
    trailing = grad.dim() - 1 - axis
    if s > 1 and k == s and p == 0:
        shape = [*grad.shape[: axis + 1], k, *grad.shape[axis + 1 :]]
        full = grad.unsqueeze(axis + 1).expand(shape)
        full = full.reshape([*grad.shape[:axis], outputs * k, *grad.shape[axis + 1 :]])
    else:
        if s > 1:  # zeros between the elements
            grad = _padded(grad.unsqueeze(axis + 1), 0, s - 1, trailing)
            grad = grad.reshape([*grad.shape[:axis], outputs * s, *grad.shape[axis + 2 :]])
        full = _padded(grad, 0, k - 1, trailing)
        for tap in range(1, k):
            full = full + _padded(grad, tap, k - 1 - tap, trailing)
    return _cut(full, axis, size, s, p)


def _padded(x: Tensor, before: Any, after: Any, behind: int) -> Tensor:
    return aten.constant_pad_nd(x, [0, 0] * behind + [before, after], 0.0) if before or after else x


def _cut(full: Tensor, axis: int, size: Any, s: int, p: int) -> Tensor:
    """The `size` positions of `axis` from `full`, which starts `p` before it.

    With s > k the forward may have left a remainder that `full` does not reach.
    """
    trailing = full.dim() - 1 - axis % full.dim()
    missing = size + p - full.shape[axis]
    if isinstance(missing, int):
        if missing == 0 and p == 0:
            return full
        full = _padded(full, 0, missing, trailing) if missing > 0 else full
    elif s > 1:
        full = _padded(full, 0, s, trailing)
    return full.narrow(axis, p, size)


def avg_pool(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int] | None = None,
    padding: list[int] | None = None,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """avg_pool2d and avg_pool3d with a divisor of its own, which the translation ignores: a mean, then a factor.

    One small matrix product per axis instead in float64, for which onnxruntime has no AveragePool, and where rounding
    up may give a window that lies behind the input: PyTorch leaves it out, ONNX counts it.
    """
    rank = 3 if len(kernel_size) == 3 or x.dim() == 5 else 2
    kernel = per_axis(kernel_size, rank)
    strides, pads = per_axis(stride, rank) if stride else kernel, per_axis(padding or [0], rank)
    if not x.dtype.is_floating_point:
        windows = list(zip(kernel, strides, pads, strict=True))
        return _avg_pool_of_integers(x, windows, ceil_mode, count_include_pad, divisor_override)
    behind = ceil_mode and any(p or s > k for k, s, p in zip(kernel, strides, pads, strict=True))
    if divisor_override is None and x.dtype != torch.float64 and not behind:
        return NotImplemented
    if x.dtype == torch.float64 or behind:
        for axis in range(rank):
            spatial = axis - rank
            options = (kernel[axis], strides[axis], pads[axis], ceil_mode)
            matrix, outputs = _window_matrix(x.shape[spatial], *options, x)
            if divisor_override is None:
                counts = _window_counts(x.shape[spatial], outputs, *options[:3], count_include_pad, ceil_mode, x)
                matrix = matrix / (counts.unsqueeze(1) if isinstance(counts, Tensor) else counts)
            x = apply_along(x, matrix, spatial)
        return x if divisor_override is None else x / divisor_override
    forward = aten.avg_pool3d.default if rank == 3 else aten.avg_pool2d.default
    mean = forward(x, kernel, strides, pads, ceil_mode, True)
    factor: Any = 1
    for axis in range(rank):
        sizes = x.shape[axis - rank], mean.shape[axis - rank]
        count = _window_counts(*sizes, kernel[axis], strides[axis], pads[axis], True, ceil_mode, x)
        if isinstance(count, Tensor):
            mean = mean * along_axis(count, axis, rank)
        else:
            factor *= count
    return mean * (factor / divisor_override)


def _avg_pool_of_integers(
    x: Tensor, windows: list[tuple[int, int, int]], ceil_mode: bool, include_pad: bool, divisor: int | None
) -> Tensor:
    """Sums, and their quotients rounded towards zero; ONNX averages no integers.

    Args:
        windows: Kernel size, stride and padding of each axis.
    """
    counts: Any = 1
    for spatial, window in enumerate(windows, -len(windows)):
        size = x.shape[spatial]
        matrix, outputs = _window_matrix(size, *window, ceil_mode, x)
        count = _window_counts(size, outputs, *window, include_pad, ceil_mode, x)
        counts = counts * (along_axis(count, spatial, len(windows)) if isinstance(count, Tensor) else count)
        x = apply_along(x, matrix, spatial)
    return torch.div(x, counts if divisor is None else divisor, rounding_mode="trunc")


def _window_matrix(size: Any, k: int, s: int, p: int, ceil_mode: bool, like: Tensor) -> tuple[Tensor, Any]:
    """(outputs, size): row o holds a one at each element of window o; and the number of windows."""
    outputs: Any = (size + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
    if ceil_mode and (outputs - 1) * s >= size + p:
        outputs = outputs - 1  # the last window starts inside the axis or its left padding
    start = (torch.arange(outputs, device=like.device) * s - p).unsqueeze(1)
    columns = torch.arange(size, device=like.device).unsqueeze(0)
    return ((columns >= start) & (columns < start + k)).to(like.dtype), outputs


def avg_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Gradient of avg_pool2d and avg_pool3d, of shape `x.shape`."""
    rank = 3 if len(kernel_size) == 3 or x.dim() == 5 else 2
    kernel = per_axis(kernel_size, rank)
    strides = per_axis(stride, rank) if stride else kernel
    pads = per_axis(padding, rank)
    divisor: Any = divisor_override
    if divisor is None:
        divisor = 1
        for axis in range(rank):
            spatial = axis - rank
            count = _window_counts(
                x.shape[spatial],
                grad.shape[spatial],
                kernel[axis],
                strides[axis],
                pads[axis],
                count_include_pad,
                ceil_mode,
                grad,
            )
            if isinstance(count, Tensor):
                grad = grad / along_axis(count, axis, rank)
            else:
                divisor *= count
    reach = [k - 1 - p for k, p in zip(kernel, pads, strict=True)]
    plane = grad.dim() == 4 and rank == 2 and grad.dtype == torch.float32 and not is_empty(grad)
    if plane and set(strides) == {1} and all(2 * r <= k for r, k in zip(reach, kernel, strict=True)):
        # Windows one apart: each element is in k of them, which are a window of grad's.
        mean = aten.avg_pool2d(grad, kernel, [1, 1], reach, False, True)
        factor = math.prod(kernel) / divisor
        return mean if factor == 1 else mean * factor
    if divisor != 1:
        grad = grad / divisor
    if plane and kernel == strides and not any(pads):
        # Resize: 30 times as fast in onnxruntime as an Expand onto several axes; its kernel is for float32.
        full = aten.upsample_nearest2d(grad, [grad.shape[-2] * kernel[0], grad.shape[-1] * kernel[1]])
        return _cut(_cut(full, -2, x.shape[-2], kernel[0], 0), -1, x.shape[-1], kernel[1], 0)
    for axis in range(rank):
        spatial = axis - rank
        grad = _spread(grad, spatial, x.shape[spatial], kernel[axis], strides[axis], pads[axis])
    return grad


def _averaging_matrix(size: Any, outputs: Any, like: Tensor) -> Tensor:
    """(outputs, size): row o averages elements floor(o*size/outputs) up to ceil((o+1)*size/outputs)."""
    rows = torch.arange(outputs, device=like.device)
    start = (rows * size) // outputs
    stop = ((rows + 1) * size + outputs - 1) // outputs
    columns = torch.arange(size, device=like.device)
    inside = (columns.unsqueeze(0) >= start.unsqueeze(1)) & (columns.unsqueeze(0) < stop.unsqueeze(1))
    return inside.to(like.dtype) / (stop - start).to(like.dtype).unsqueeze(1)


def apply_along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """`matrix (a, b)` times axis `axis` (negative, of size b) of x."""
    if axis == -1:
        return torch.matmul(x, matrix.t())
    if axis == -2:
        return torch.matmul(matrix, x)
    return torch.matmul(x.transpose(axis, -1), matrix.t()).transpose(axis, -1)


def adaptive_avg_pool(x: Tensor, output_size: list[int]) -> Tensor:
    """adaptive_avg_pool2d and 3d as one small matrix product per axis."""
    rank = len(output_size)
    for axis, outputs in enumerate(output_size):
        spatial = axis - rank
        x = apply_along(x, _averaging_matrix(x.shape[spatial], outputs, x), spatial)
    return x


def _adaptive_avg_pool_backward(rank: int) -> Callable[[Tensor, Tensor], Tensor]:
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        for axis in range(rank):
            spatial = axis - rank
            matrix = _averaging_matrix(x.shape[spatial], grad.shape[spatial], grad)
            grad = apply_along(grad, matrix.t(), spatial)
        return grad

    return backward


def _border_pad(operator: Any) -> Callable[[Tensor, list[int]], Tensor]:
    def padded(x: Tensor, padding: list[int]) -> Tensor:
        """Cropped behind the padding, which may be of what is cropped; ONNX crops first."""
        if all(isinstance(amount, int) and amount >= 0 for amount in padding):
            return NotImplemented
        x = operator(x, [max(amount, 0) for amount in padding])
        for index, (lo, hi) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
            axis = x.dim() - 1 - index
            x = x.narrow(axis, max(-lo, 0), x.shape[axis] + min(lo, 0) + min(hi, 0))
        return x

    return padded


def _replication_pad_backward(rank: int) -> Callable[[Tensor, Tensor, list[int]], Tensor]:
    def backward(grad: Tensor, x: Tensor, padding: list[int]) -> Tensor:
        for axis in range(rank):
            spatial = axis - rank
            lo, hi = padding[2 * (rank - 1 - axis)], padding[2 * (rank - 1 - axis) + 1]
            grad = _fold_border(grad, spatial % grad.dim(), x.shape[spatial], lo, hi)
        return grad

    return backward


def _fold_border(grad: Tensor, axis: int, size: Any, lo: int, hi: int) -> Tensor:
    """Add the `lo` first elements to the next one and the `hi` last ones to the one before."""
    if lo < 0 or hi < 0:  # negative padding crops: what was cropped has no gradient
        trailing = grad.dim() - 1 - axis
        grad = aten.constant_pad_nd(grad, [0, 0] * trailing + [max(-lo, 0), max(-hi, 0)], 0.0)
        lo, hi = max(lo, 0), max(hi, 0)
    inner = grad.narrow(axis, lo, size)
    trailing = inner.dim() - 1 - axis
    if lo:
        first = grad.narrow(axis, 0, lo).sum(axis, keepdim=True)
        inner = inner + aten.constant_pad_nd(first, [0, 0] * trailing + [0, size - 1], 0.0)
    if hi:
        last = grad.narrow(axis, lo + size, hi).sum(axis, keepdim=True)
        inner = inner + aten.constant_pad_nd(last, [0, 0] * trailing + [size - 1, 0], 0.0)
    return inner


TABLE: dict[Any, Callable[..., Any]] = {
    aten.avg_pool2d.default: avg_pool,
    aten.avg_pool3d.default: avg_pool,
    aten.avg_pool2d_backward.default: avg_pool_backward,
    aten.avg_pool3d_backward.default: avg_pool_backward,
    aten._adaptive_avg_pool2d.default: adaptive_avg_pool,
    aten._adaptive_avg_pool3d.default: adaptive_avg_pool,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool_backward(2),
    aten._adaptive_avg_pool3d_backward.default: _adaptive_avg_pool_backward(3),
    aten.reflection_pad1d.default: _border_pad(aten.reflection_pad1d),
    aten.reflection_pad2d.default: _border_pad(aten.reflection_pad2d),
    aten.reflection_pad3d.default: _border_pad(aten.reflection_pad3d),
    aten.replication_pad1d.default: _border_pad(aten.replication_pad1d),
    aten.replication_pad2d.default: _border_pad(aten.replication_pad2d),
    aten.replication_pad3d.default: _border_pad(aten.replication_pad3d),
    aten.replication_pad1d_backward.default: _replication_pad_backward(1),
    aten.replication_pad2d_backward.default: _replication_pad_backward(2),
    aten.replication_pad3d_backward.default: _replication_pad_backward(3),
}
