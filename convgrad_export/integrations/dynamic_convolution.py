"""Convolution gradients whose spatial sizes are only known when the model runs.

The catalogue's lowerings are made for one geometry. Where height or width is dynamic these two take over; channels,
kernel, stride, padding, dilation and groups are integers as always. Shapes are read with Shape, never assumed.
Letters as in `geometry.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from convgrad_export.lowering.blocks import Ops, Value, ints, pad, reshape, stack, transpose

NAMES = {
    "input": "input.conv_transpose_dynamic",
    "transposed_input": "input.conv_dynamic",
    "weight": "weight.matmul_taps_dynamic",
}


@dataclass(frozen=True)
class DynamicConvolution:
    """The integers of a convolution without its spatial sizes. `weight_shape` is (M, C/G, *K), or (C, M/G, *K)."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.stride)

    @property
    def pads_whole_strides(self) -> bool:
        """Whether an output padding reaches the stride, which PyTorch takes and onnxruntime refuses."""
        return any(extra >= s for extra, s in zip(self.output_padding, self.stride, strict=True))


def spatial_shape(op: Ops, g: DynamicConvolution, value: Value) -> Value:
    """The sizes behind batch and channels, as an INT64 vector."""
    return op.Slice(op.Shape(value), ints(op, [2]), ints(op, [2 + g.rank]), ints(op, [0]))


def crop_to(op: Ops, g: DynamicConvolution, value: Value, like: Value, starts: Sequence[int]) -> Value:
    """`value` from `starts` on, in the spatial sizes of `like`."""
    stops = spatial_shape(op, g, like)
    if any(starts):
        stops = op.Add(stops, ints(op, starts))
    return op.Slice(value, ints(op, starts), stops, ints(op, range(2, 2 + g.rank)))


def input_gradient(
    op: Ops, g: DynamicConvolution, grad_output: Value, input: Value, weight: Value, *, even_pads: bool = False
) -> Value:
    """(N, C, *I), the spatial size of `input`, of which nothing but the shape is read.

    Plain: a ConvTranspose that is at least as long as the input, cut to it. `output_padding = stride - 1` is the most
    that a forward stride can have skipped; beyond the span there is nothing but zeros, so the cut is exact.
    """
    if g.transposed:
        pads = [*g.padding, *g.padding]
        result = op.Conv(
            grad_output, weight, strides=list(g.stride), dilations=list(g.dilation), pads=pads, group=g.groups
        )
        if g.pads_whole_strides:
            result = crop_to(op, g, result, input, [0] * g.rank)
        return result
    if all(s == 1 for s in g.stride):
        return op.ConvTranspose(
            grad_output, weight, dilations=list(g.dilation), pads=[*g.padding, *g.padding], group=g.groups
        )
    # Pads before but not after the axis would leave onnxruntime's CUDA provider: crop both there.
    before = [0] * g.rank if even_pads else list(g.padding)
    full = op.ConvTranspose(
        grad_output,
        weight,
        strides=list(g.stride),
        dilations=list(g.dilation),
        pads=[*before, *([0] * g.rank)],
        output_padding=[s - 1 for s in g.stride],
        group=g.groups,
    )
    return crop_to(op, g, full, input, [p - b for p, b in zip(g.padding, before, strict=True)])


def transposed_forward(op: Ops, g: DynamicConvolution, data: Value, weight: Value) -> Value:
    """A ConvTranspose of any output padding: onnxruntime refuses one that is not smaller than the stride.

    Less padding at the end stands for it, and zeros where there is no padding left.
    """
    result = op.ConvTranspose(
        data,
        weight,
        strides=list(g.stride),
        dilations=list(g.dilation),
        pads=[*g.padding, *(max(p - extra, 0) for p, extra in zip(g.padding, g.output_padding, strict=True))],
        group=g.groups,
    )
    missing = [max(extra - p, 0) for p, extra in zip(g.padding, g.output_padding, strict=True)]
    return pad(op, result, [0] * g.rank, missing)


def weight_gradient(op: Ops, g: DynamicConvolution, grad_output: Value, input: Value) -> Value:
    """The weight's shape: one GEMM a tap, summing over batch and positions.

    A transposed convolution is the plain one with the roles of input and grad_output exchanged.
    """
    data, rows = (grad_output, input) if g.transposed else (input, grad_output)
    out_channels, in_per_group, *kernel = g.weight_shape
    out_per_group = out_channels // g.groups
    spatial = range(2, 2 + g.rank)
    data = pad(op, data, g.padding, g.padding)
    data = transpose(op, data, [1, 0, *spatial])
    # The last position a tap reads is its first plus (O - 1) * s: O * s - (s - 1) elements.
    reach = spatial_shape(op, g, rows)
    if any(s != 1 for s in g.stride):
        reach = op.Sub(op.Mul(reach, ints(op, g.stride)), ints(op, [s - 1 for s in g.stride]))
    columns = reshape(op, transpose(op, rows, [1, 0, *spatial]), [g.groups, out_per_group, -1])
    products = []
    for tap in itertools.product(*(range(k) for k in kernel)):
        starts = [d * k for d, k in zip(g.dilation, tap, strict=True)]
        stops = op.Add(reach, ints(op, starts)) if any(starts) else reach
        part = op.Slice(data, ints(op, starts), stops, ints(op, spatial), ints(op, g.stride))
        part = reshape(op, part, [g.groups, in_per_group, -1])
        product = op.MatMul(columns, op.Transpose(part, perm=[0, 2, 1]))
        products.append(reshape(op, product, [out_channels, 1, in_per_group]))
    if len(products) == 1:
        return reshape(op, products[0], g.weight_shape)
    taps = op.Transpose(stack(op, products, axis=1), perm=[0, 2, 1])
    return reshape(op, taps, [out_channels, in_per_group, *kernel])
