"""Max pooling and its gradient in operators that ONNX has.

The gradient goes to the recorded positions by a scatter; where windows lie side by side, by comparing each element with
its window's maximum.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from convgrad_export.integrations.activation_decompositions import masked
from convgrad_export.integrations.pooling_decompositions import along_axis, is_empty, per_axis

aten = torch.ops.aten

_COPIES = (aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default)


def _scatter_to_indices(grad: Tensor, x: Tensor, indices: Tensor, rank: int) -> Tensor:
    """Add `grad` at the positions `indices` (into the flattened spatial axes) of zeros shaped like `x`."""
    zeros = torch.zeros_like(_flat(x, rank))
    return aten.scatter_add(zeros, -1, _flat(indices, rank), _flat(grad, rank)).reshape(x.shape)


def _flat(x: Tensor, rank: int) -> Tensor:
    """The spatial axes as one. Not by -1, which divides by the size of the other axes: an empty batch is 0 long."""
    lead, spatial = x.shape[: x.dim() - rank], x.shape[x.dim() - rank :]
    return x.reshape([*lead, math.prod(spatial)])


def max_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """A scatter; in windows that lie side by side each element is compared with its window's maximum instead.

    In onnxruntime recorded positions cost five times as much: MaxPool with its second output, then a scatter. Where
    several elements are the maximum, PyTorch's gradient goes to the first; `order` falls along the window for that.
    """
    kernel = per_axis(kernel_size, 2)
    strides, pads, dilations = per_axis(stride, 2) if stride else kernel, per_axis(padding, 2), per_axis(dilation, 2)
    side_by_side = kernel == strides and not any(pads) and dilations == [1, 1] and not ceil_mode
    if not side_by_side or x.dim() != 4 or x.dtype != torch.float32 or math.prod(kernel) == 1 or is_empty(x):
        return _scatter_to_indices(grad, x, indices, 2)
    if not _are_of(indices, x):
        return _scatter_to_indices(grad, x, indices, 2)
    covered = [grad.shape[axis] * kernel[axis] for axis in (-2, -1)]
    highest = aten.max_pool2d_with_indices(x, kernel_size, stride, padding, dilation, ceil_mode)[0]
    inside = x.narrow(-2, 0, covered[0]).narrow(-1, 0, covered[1])
    rows, columns = (torch.arange(size, device=x.device) % k for size, k in zip(covered, kernel, strict=True))
    order = (math.prod(kernel) - (rows.unsqueeze(1) * kernel[1] + columns)).to(x.dtype)
    candidates = (inside == aten.upsample_nearest2d(highest, covered)).to(x.dtype) * order
    # No element equals a NaN: the smallest order keeps the maximum of such a window from being that of all.
    first = aten.max_pool2d_with_indices(candidates, kernel)[0].clamp(min=1)
    chosen = candidates == aten.upsample_nearest2d(first, covered)
    result = masked(aten.upsample_nearest2d(grad, covered), chosen)
    missing = [size - reached for size, reached in zip(x.shape[-2:], covered, strict=True)]
    if all(isinstance(size, int) and size == 0 for size in missing):
        return result
    return aten.constant_pad_nd(result, [0, missing[1], 0, missing[0]], 0.0)


def _are_of(indices: Tensor, x: Tensor) -> bool:
    """Whether traced positions are those of the maxima of `x` itself.

    The tangent of a gradient (`torch.func.jvp` of `grad`) stands in the place of `x`, with the positions of another.
    """
    mode = get_proxy_mode()
    if mode is None:
        return False
    slots: list[Any] = [get_proxy_slot(tensor, mode.tracer, None) for tensor in (indices, x)]
    if any(slot is None for slot in slots):
        return False
    positions, pooled = (_origin(slot.proxy.node) for slot in slots)
    pooling = positions.args[0] if positions.target is operator.getitem else None
    if not isinstance(pooling, torch.fx.Node) or pooling.target is not aten.max_pool2d_with_indices.default:
        return False
    return isinstance(pooling.args[0], torch.fx.Node) and _origin(pooling.args[0]) is pooled


def _origin(node: torch.fx.Node) -> torch.fx.Node:
    """What a node is a copy of."""
    while node.target in _COPIES and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    return node


def max_pool3d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    return _scatter_to_indices(grad, x, indices, 3)


def _adaptive_max_pool_backward(rank: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def backward(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        return _scatter_to_indices(grad, x, indices, rank)

    return backward


def _adaptive_windows(size: Any, outputs: int, device: torch.device) -> Tensor:
    """(outputs, longest): the positions of each window, filled up with its last one, which changes no maximum.

    By arithmetic, as AOTAutograd takes no graph in which torch.tensor made a constant. Of a dynamic size, the longest
    that a window can be is taken.
    """
    if isinstance(size, int):
        longest = max(-((-(o + 1) * size) // outputs) - (o * size) // outputs for o in range(outputs))
    else:
        longest = (size + outputs - 1) // outputs + 1
    rows = torch.arange(outputs, device=device).unsqueeze(1)
    start = (rows * size) // outputs
    stop = ((rows + 1) * size + outputs - 1) // outputs
    return torch.minimum(start + torch.arange(longest, device=device), stop - 1)


def adaptive_max_pool(x: Tensor, output_size: list[int]) -> tuple[Tensor, Tensor]:
    """adaptive_max_pool2d and 3d: values and indices into the flattened spatial axes."""
    rank = len(output_size)
    sizes = x.shape[x.dim() - rank :]
    plans = [_adaptive_windows(size, outputs, x.device) for size, outputs in zip(sizes, output_size, strict=True)]
    # Flattened position of every window element: (*outputs, *longest)
    position = torch.zeros([1] * (2 * rank), dtype=torch.int64, device=x.device)
    step = count = 1
    for axis in reversed(range(rank)):
        longest = plans[axis].shape[1]
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = output_size[axis], longest
        position = position + plans[axis].reshape(shape) * step
        step, count = step * sizes[axis], count * longest
    outputs = 1
    for length in output_size:
        outputs *= length
    position = position.reshape([outputs, count])
    lead = x.shape[: x.dim() - rank]
    gathered = _flat(x, rank)[..., position]
    best = gathered.argmax(-1, keepdim=True)
    values = gathered.gather(-1, best).squeeze(-1).reshape([*lead, *output_size])
    where = position.expand(gathered.shape).gather(-1, best).squeeze(-1).reshape([*lead, *output_size])
    return values, where


def max_pool_backward_by_taps(
    grad: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Max pooling backward without a scatter, for opsets whose ScatterElements cannot add (below 16).

    Each kernel tap takes the gradients whose recorded position is the one that the tap reads, and puts them there.
    """
    rank = 3 if len(kernel_size) == 3 or x.dim() == 5 else 2
    kernel, pads, dilations = per_axis(kernel_size, rank), per_axis(padding, rank), per_axis(dilation, rank)
    strides = per_axis(stride, rank) if stride else kernel
    sizes = x.shape[x.dim() - rank :]
    total: Any = None
    for tap in itertools.product(*(range(k) for k in kernel)):
        position: Any = 0
        for axis in range(rank):
            outputs = grad.shape[axis - rank]
            along = torch.arange(outputs, device=grad.device) * strides[axis] + (
                tap[axis] * dilations[axis] - pads[axis]
            )
            position = position * sizes[axis] + along_axis(along, axis, rank)
        part = torch.where(indices == position, grad, 0.0)
        for axis in range(rank):
            reach = dilations[axis] * (kernel[axis] - 1)
            part = _insert_zeros(part, axis - rank, strides[axis], tap[axis] * dilations[axis], reach)
        total = part if total is None else total + part
    for axis in range(rank):
        total = total.narrow(axis - rank, pads[axis], sizes[axis])
    return total


def _insert_zeros(x: Tensor, axis: int, step: int, before: int, reach: int) -> Tensor:
    """`step - 1` zeros after each element, `before` zeros in front, and as many behind as add up to `reach`."""
    axis = axis % x.dim()
    trailing = x.dim() - 1 - axis
    if step > 1:
        shape = [*x.shape[:axis], x.shape[axis] * step, *x.shape[axis + 1 :]]
        x = aten.constant_pad_nd(x.unsqueeze(axis + 1), [0, 0] * trailing + [0, step - 1], 0.0).reshape(shape)
    return aten.constant_pad_nd(x, [0, 0] * trailing + [before, reach - before], 0.0) if reach else x


BELOW_OPSET_16: dict[Any, Callable[..., Any]] = {
    aten.max_pool2d_with_indices_backward.default: max_pool_backward_by_taps,
    aten.max_pool3d_with_indices_backward.default: max_pool_backward_by_taps,
}

TABLE: dict[Any, Callable[..., Any]] = {
    aten.adaptive_max_pool2d.default: adaptive_max_pool,
    aten.adaptive_max_pool3d.default: adaptive_max_pool,
    aten.adaptive_max_pool2d_backward.default: _adaptive_max_pool_backward(2),
    aten.adaptive_max_pool3d_backward.default: _adaptive_max_pool_backward(3),
    aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
    aten.max_pool3d_with_indices_backward.default: max_pool3d_backward,
}
