"""`unfold` and `fold` (im2col and col2im), where torch.onnx's translations of them stop.

The translation of im2col leaves the channels to the runtime, which cannot tell them for an empty batch; that of col2im
is Col2Im, which onnxruntime has in float32 only and ONNX from opset 18 on. Neither takes a picture without batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _windows(length: Any, kernel: int, dilation: int, padding: int, stride: int) -> Any:
    return (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def im2col(
    x: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """The windows of a padded picture, one gather per axis: (n, channels * taps, windows)."""
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    samples, channels = batched.shape[:2]
    axes = list(zip(batched.shape[2:], kernel_size, dilation, padding, stride, strict=True))
    windows = [_windows(*axis) for axis in axes]
    found = aten.constant_pad_nd(batched, [padding[1], padding[1], padding[0], padding[0]], 0.0)
    for axis, (_, kernel, step, _, jump) in enumerate(axes):
        taps = torch.arange(kernel, device=x.device) * step
        starts = torch.arange(windows[axis], device=x.device) * jump
        places = (taps.unsqueeze(1) + starts.unsqueeze(0)).reshape([-1])
        position = 2 + 2 * axis  # the axis before has become two
        found = aten.index_select(found, position, places)
        found = found.reshape([*found.shape[:position], kernel, windows[axis], *found.shape[position + 1 :]])
    found = found.permute([0, 1, 2, 4, 3, 5])
    taken = channels * kernel_size[0] * kernel_size[1]
    columns = found.reshape([samples, taken, windows[0] * windows[1]])
    return columns if x.dim() == 4 else columns.squeeze(0)


def _added_up(columns: Tensor, axis: int, size: Any, dilation: int, padding: int, stride: int) -> Tensor:
    """Axes `axis` (taps) and `axis + 1` (windows) as one of `size` positions, each the sum of what lies on it."""
    kernel, windows = columns.shape[axis : axis + 2]
    behind = columns.dim() - axis - 2
    before, after = columns.shape[:axis], columns.shape[axis + 2 :]
    whole = size + 2 * padding
    result: Any = None
    for tap in range(kernel):
        part = columns.select(axis, tap)
        if stride > 1:  # zeros between the windows
            part = aten.constant_pad_nd(part.unsqueeze(axis + 1), [0, 0] * behind + [0, stride - 1], 0.0)
            part = part.reshape([*before, windows * stride, *after]).narrow(axis, 0, (windows - 1) * stride + 1)
        last = whole - tap * dilation - (windows - 1) * stride - 1
        part = aten.constant_pad_nd(part, [0, 0] * behind + [tap * dilation, last], 0.0)
        result = part if result is None else result + part
    return result.narrow(axis, padding, size)


def _col2im(has_operator: bool) -> Callable[..., Tensor]:
    def col2im(
        x: Tensor,
        output_size: Sequence[Any],
        kernel_size: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[int],
        stride: Sequence[int],
    ) -> Tensor:
        """The sum of the windows where they lie, axis by axis."""
        if x.dim() == 2:
            arguments = (output_size, kernel_size, dilation, padding, stride)
            return aten.col2im.default(x.unsqueeze(0), *arguments).squeeze(0)
        if has_operator and x.dtype != torch.float64:
            return NotImplemented
        axes = zip(output_size, kernel_size, dilation, padding, stride, strict=True)
        rows, columns = (_windows(*axis) for axis in axes)
        channels = x.shape[1] // (kernel_size[0] * kernel_size[1])
        found = x.reshape([x.shape[0], channels, *kernel_size, rows, columns]).permute([0, 1, 2, 4, 3, 5])
        found = _added_up(found, 4, output_size[1], dilation[1], padding[1], stride[1])
        return _added_up(found, 2, output_size[0], dilation[0], padding[0], stride[0])

    return col2im


TABLE: dict[Any, Callable[..., Tensor]] = {aten.im2col.default: im2col, aten.col2im.default: _col2im(True)}
# ONNX has Col2Im from opset 18 on.
BELOW_OPSET_18: dict[Any, Callable[..., Tensor]] = {aten.col2im.default: _col2im(False)}
