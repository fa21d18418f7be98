"""Weight gradient as one Conv over the input with its channels last: no column buffer, and a GEMM of full size.

A weight gradient adds up over the samples and the output positions. Here the samples are the channels of a Conv and
grad_output is its kernel, so both are summed inside it, while taps and input channels lie on its output's axes: the
GEMM within has M/G rows and as many columns as a filter has elements. onnxruntime makes that GEMM's columns piece by
piece in a buffer that stays in the cache, in parallel, and copies runs of all input channels.

With the last axis undilated, its taps and the channels are neighbours in memory: those two axes are one, on which a
position is as many elements as there are channels.

Operands: grad_output (N, M, *O), input (N, C, *I). Result: (M, C/G, *K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..geometry import ConvGeometry
from .blocks import Ops, Value, conv_operand, operand_sizes, reshape, reversed_taps, strided_why_not, transpose

_CONV_AXES = 3  # spatial axes of the largest Conv that onnxruntime has fast kernels for


def channels_last_conv(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """Conv over the samples, input channels on its last axis: the stride dilates grad_output, the dilation strides."""
    windows = g.read_windows()
    data, pads = conv_operand(op, input, windows, g.input_size)
    sizes = operand_sizes(pads, windows, g.input_size)
    data = _channels_last(op, data, g.groups, g.in_channels_per_group, sizes)
    channels = (g.out_channels, g.in_channels_per_group)
    result = _convolve(op, g, data, sizes, grad_output, g.output_size, pads, channels)  # (M, *K, C/G)
    if g.taps == 1:
        return reshape(op, result, g.weight_shape)
    return op.Transpose(result, perm=[0, 1 + g.rank, *range(1, 1 + g.rank)])


def channels_last_flipped_conv(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """Stride 1, operands the other way round: input channels are the GEMM's rows, the result is reversed."""
    windows = g.flipped_windows()
    data, pads = conv_operand(op, grad_output, windows, g.output_size)
    sizes = operand_sizes(pads, windows, g.output_size)
    data = _channels_last(op, data, g.groups, g.out_channels_per_group, sizes)
    channels = (g.in_channels, g.out_channels_per_group)
    result = _convolve(op, g, data, sizes, input, g.input_size, pads, channels)  # (C, *K, M/G), the kernel reversed
    forwards = reversed_taps(op, result, [g.in_channels, g.taps, g.out_channels_per_group])
    rows = reshape(op, forwards, [g.groups, g.in_channels_per_group * g.taps, g.out_channels_per_group])
    return reshape(op, op.Transpose(rows, perm=[0, 2, 1]), g.weight_shape)


def _convolve(
    op: Ops,
    g: ConvGeometry,
    data: Value,
    sizes: Sequence[int],
    kernel: Value,
    kernel_size: Sequence[int],
    pads: Sequence[int],
    channels: tuple[int, int],
) -> Value:
    """The Conv: `data` (G, N, *sizes, c), `kernel` (N, r, *kernel_size), result (r, *K, c), with `channels` (r, c)."""
    begin, end = list(pads[: g.rank]), list(pads[g.rank :])
    rows, last = channels
    kernel = op.Transpose(kernel, perm=[1, 0, *range(2, 2 + g.rank)])
    if _merges(g):
        axes = [*sizes[:-1], sizes[-1] * last]
        begin[-1], end[-1] = begin[-1] * last, end[-1] * last
        strides, dilations = [*g.dilation[:-1], 1], [*g.stride[:-1], g.stride[-1] * last]
    else:
        axes = [*sizes, last]
        begin, end = [*begin, 0], [*end, 0]
        strides, dilations = [*g.dilation, 1], [*g.stride, 1]
        kernel = reshape(op, kernel, [rows, -1, *kernel_size, 1])
    data = reshape(op, data, [1, -1, *axes])
    result = op.Conv(data, kernel, strides=strides, dilations=dilations, pads=[*begin, *end], group=g.groups)
    return reshape(op, result, [rows, *g.kernel_size, last])


def why_not(g: ConvGeometry) -> str | None:
    if not g.is_static:
        return "the sizes of its axes are attributes, which need fixed sizes"
    if g.rank == _CONV_AXES and not _merges(g):
        return f"the last of three axes has dilation {g.dilation[-1]}, it needs 1"
    return None


def flipped_why_not(g: ConvGeometry) -> str | None:
    return why_not(g) or strided_why_not(g)


def _merges(g: ConvGeometry) -> bool:
    """Whether the taps of the last axis lie one position apart."""
    return g.dilation[-1] == 1 or g.kernel_size[-1] == 1


def _channels_last(op: Ops, value: Value, groups: int, per_group: int, sizes: Sequence[int]) -> Value:
    """(N, G*c, *sizes) as (G, N, *sizes, c); one axis a Transpose, for which onnxruntime has fast kernels."""
    spatial = range(2, 2 + len(sizes))
    if groups > 1:
        rows = op.Transpose(reshape(op, value, [-1, groups, per_group * math.prod(sizes)]), perm=[1, 0, 2])
        value = reshape(op, rows, [-1, per_group, *sizes])
    return transpose(op, value, [0, *spatial, 1])
