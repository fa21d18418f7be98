"""Depthwise convolution of small images as products with one whole matrix a channel.

onnxruntime's Conv makes columns and calls its GEMM once for every sample and channel, which takes 200 ns where the
arithmetic takes 20. Here every output channel's kernel is written out as the matrix (input positions, output positions)
that it stands for: zeros where no tap connects two positions. The forward pass and the input gradient are then one GEMM
a channel over the whole batch, with the same matrix; the weight gradient is the sum of that matrix's gradient over the
entries each tap stands in. The matrices are the weight times a constant of zeros and ones.

Zeros are multiplied too: a NaN or infinity reaches every position of its image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..geometry import ConvGeometry
from .blocks import Ops, Value, dense_why_not, floats, ints, reshape

_LARGEST = 1 << 18  # elements of the constant, 1 MiB


def forward(op: Ops, g: ConvGeometry, input: Value, weight: Value) -> Value:
    """The convolution itself, (N, M, *O)."""
    product = op.MatMul(_channels_first(op, g, input, g.in_channels, g.input_size), _matrices(op, g, weight))
    return _batch_first(op, product, g.out_channels, g.output_size)


def input_gradient(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value) -> Value:
    """One GEMM a channel with the matrix that its kernel stands for."""
    rank = 3 if _multiplier(g) == 1 else 4
    transposed = op.Transpose(_matrices(op, g, weight), perm=[*range(rank - 2), rank - 1, rank - 2])
    product = op.MatMul(_channels_first(op, g, grad_output, g.out_channels, g.output_size), transposed)
    if rank == 4:
        product = op.ReduceSum(product, ints(op, [1]), keepdims=0)
    return _batch_first(op, product, g.in_channels, g.input_size)


def weight_gradient(op: Ops, g: ConvGeometry, grad_output: Value, input: Value) -> Value:
    """One GEMM a channel over the batch for all pairs of positions, then each tap's pairs added up by another."""
    image = _channels_first(op, g, input, g.in_channels, g.input_size)
    rank = 3 if _multiplier(g) == 1 else 4
    image = op.Transpose(image, perm=[*range(rank - 2), rank - 1, rank - 2])
    pairs = op.MatMul(image, _channels_first(op, g, grad_output, g.out_channels, g.output_size))
    taps = _taps(g)
    product = op.MatMul(reshape(op, pairs, [g.out_channels, taps.shape[1]]), floats(op, taps.T))
    return reshape(op, product, g.weight_shape)


def _multiplier(g: ConvGeometry) -> int:
    """Output channels of an input channel."""
    return g.out_channels // g.in_channels


def _matrices(op: Ops, g: ConvGeometry, weight: Value) -> Value:
    """(C, positions of the input, of the output), with an axis for the channel multiplier after C unless it is 1."""
    taps = _taps(g)
    flat = op.MatMul(reshape(op, weight, [g.out_channels, g.taps]), floats(op, taps))
    sides = [math.prod(g.input_size), math.prod(g.output_size)]
    channels = [g.in_channels] if _multiplier(g) == 1 else [g.in_channels, _multiplier(g)]
    return reshape(op, flat, [*channels, *sides])


def _taps(g: ConvGeometry) -> np.ndarray:
    """(taps, input positions * output positions): 1 where the tap multiplies that input for that output."""
    taps = np.ones((1, 1, 1), np.float32)
    for size, out, kernel, stride, dilation, begin in zip(
        g.input_size, g.output_size, g.kernel_size, g.stride, g.dilation, g.begin, strict=True
    ):
        reads = np.arange(kernel)[:, None] * dilation - begin + np.arange(out)[None, :] * stride
        axis = (reads[:, None, :] == np.arange(size)[None, :, None]).astype(np.float32)
        # the axes' taps, inputs and outputs side by side, each flattened
        taps = np.einsum("tio,ujp->tuijop", taps, axis).reshape(
            taps.shape[0] * kernel, taps.shape[1] * size, taps.shape[2] * out
        )
    return taps.reshape(g.taps, -1)


def _channels_first(op: Ops, g: ConvGeometry, value: Value, channels: int, sizes: Sequence[int]) -> Value:
    """(N, channels, *sizes) as (C, N, positions), with an axis for the channel multiplier after C unless it is 1."""
    rows = op.Transpose(reshape(op, value, [-1, channels, math.prod(sizes)]), perm=[1, 0, 2])
    multiplier = _multiplier(g)
    if multiplier == 1:
        return rows
    return reshape(op, rows, [g.in_channels, multiplier if channels == g.out_channels else 1, -1, math.prod(sizes)])


def _batch_first(op: Ops, value: Value, channels: int, sizes: Sequence[int]) -> Value:
    rows = op.Transpose(reshape(op, value, [channels, -1, math.prod(sizes)]), perm=[1, 0, 2])
    return reshape(op, rows, [-1, channels, *sizes])


def why_not(g: ConvGeometry) -> str | None:
    if not g.is_static:
        return "its matrices are for fixed sizes"
    if reason := dense_why_not(g):
        return reason
    size = g.taps * math.prod(g.input_size) * math.prod(g.output_size)
    return f"its constant would have {size} elements, more than {_LARGEST}" if size > _LARGEST else None
