"""Gradients with respect to the convolution's weight, dynamic in every dimension."""

# onnxscript compiles the bodies from their source: annotations must be real objects, so evaluation is not postponed.
from collections.abc import Sequence

from onnxscript import INT64, script
from onnxscript import opset18 as op

from ._domain import TFloat, convgrad_opset


@script(convgrad_opset, default_opset=op)
def conv1d_weight(
    input: TFloat,
    weight_size: INT64[3],
    grad_output: TFloat,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> TFloat:
    """Gradient of a 1-D convolution with respect to its weight: one Conv, with batch and channels exchanged.

    The forward's dilation is the stride of that Conv, and the forward's stride its dilation. Each group's channels
    are laid out beside the batch, so that the same Conv serves any number of groups.

    Args:
        input: [N, C, I0].
        weight_size: [M, C / groups, K0], INT64.
        grad_output: [N, M, O0].
        stride, padding, dilation: One integer per spatial axis, in elements.
        groups: Number of groups.

    Returns:
        [M, C / groups, K0].

    Source: Dumoulin and Visin, arXiv:1603.07285, section 4; ONNX Conv, opset 11, and Pad, opset 18.
    """
    unpadded = op.Constant(value_ints=[0, 0])
    amounts = op.Constant(value_ints=padding)
    padded = op.Pad(input, op.Concat(unpadded, amounts, unpadded, amounts, axis=0))
    batch = op.Shape(padded, start=0, end=1)
    group_count = op.Reshape(op.Constant(value_int=groups), op.Constant(value_ints=[1]))
    channels_per_group = op.Div(op.Shape(padded, start=1, end=2), group_count)
    spatial_sizes = op.Shape(padded, start=2)
    # allowzero: an empty batch is a size of zero here, not "copy this dimension".
    grouped = op.Reshape(padded, op.Concat(batch, group_count, channels_per_group, spatial_sizes, axis=0), allowzero=1)
    exchanged = op.Transpose(grouped, perm=[2, 1, 0, 3])
    data = op.Reshape(
        exchanged, op.Concat(channels_per_group, op.Mul(group_count, batch), spatial_sizes, axis=0), allowzero=1
    )
    kernel = op.Transpose(grad_output, perm=[1, 0, 2])
    correlation = op.Conv(data, kernel, strides=dilation, dilations=stride, group=groups)
    # A stride that leaves a remainder leaves room for more taps than the kernel has.
    taps = op.Slice(correlation, op.Constant(value_ints=[0]), op.Slice(weight_size, [2], [3]), [2])
    return op.Transpose(taps, perm=[1, 0, 2])


@script(convgrad_opset, default_opset=op)
def conv2d_weight(
    input: TFloat,
    weight_size: INT64[4],
    grad_output: TFloat,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> TFloat:
    """Gradient of a 2-D convolution with respect to its weight: one Conv, with batch and channels exchanged.

    The forward's dilation is the stride of that Conv, and the forward's stride its dilation. Each group's channels
    are laid out beside the batch, so that the same Conv serves any number of groups.

    Args:
        input: [N, C, I0, I1].
        weight_size: [M, C / groups, K0, K1], INT64.
        grad_output: [N, M, O0, O1].
        stride, padding, dilation: One integer per spatial axis, in elements.
        groups: Number of groups.

    Returns:
        [M, C / groups, K0, K1].

    Source: Dumoulin and Visin, arXiv:1603.07285, section 4; ONNX Conv, opset 11, and Pad, opset 18.
    """
    unpadded = op.Constant(value_ints=[0, 0])
    amounts = op.Constant(value_ints=padding)
    padded = op.Pad(input, op.Concat(unpadded, amounts, unpadded, amounts, axis=0))
    batch = op.Shape(padded, start=0, end=1)
    group_count = op.Reshape(op.Constant(value_int=groups), op.Constant(value_ints=[1]))
    channels_per_group = op.Div(op.Shape(padded, start=1, end=2), group_count)
    spatial_sizes = op.Shape(padded, start=2)
    # allowzero: an empty batch is a size of zero here, not "copy this dimension".
    grouped = op.Reshape(padded, op.Concat(batch, group_count, channels_per_group, spatial_sizes, axis=0), allowzero=1)
    exchanged = op.Transpose(grouped, perm=[2, 1, 0, 3, 4])
    data = op.Reshape(
        exchanged, op.Concat(channels_per_group, op.Mul(group_count, batch), spatial_sizes, axis=0), allowzero=1
    )
    kernel = op.Transpose(grad_output, perm=[1, 0, 2, 3])
    correlation = op.Conv(data, kernel, strides=dilation, dilations=stride, group=groups)
    # A stride that leaves a remainder leaves room for more taps than the kernel has.
    taps = op.Slice(correlation, op.Constant(value_ints=[0, 0]), op.Slice(weight_size, [2], [4]), [2, 3])
    return op.Transpose(taps, perm=[1, 0, 2, 3])


@script(convgrad_opset, default_opset=op)
def conv3d_weight(
    input: TFloat,
    weight_size: INT64[5],
    grad_output: TFloat,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> TFloat:
    """Gradient of a 3-D convolution with respect to its weight: one Conv, with batch and channels exchanged.

    The forward's dilation is the stride of that Conv, and the forward's stride its dilation. Each group's channels
    are laid out beside the batch, so that the same Conv serves any number of groups.

    Args:
        input: [N, C, I0, I1, I2].
        weight_size: [M, C / groups, K0, K1, K2], INT64.
        grad_output: [N, M, O0, O1, O2].
        stride, padding, dilation: One integer per spatial axis, in elements.
        groups: Number of groups.

    Returns:
        [M, C / groups, K0, K1, K2].

    Source: Dumoulin and Visin, arXiv:1603.07285, section 4; ONNX Conv, opset 11, and Pad, opset 18.
    """
    unpadded = op.Constant(value_ints=[0, 0])
    amounts = op.Constant(value_ints=padding)
    padded = op.Pad(input, op.Concat(unpadded, amounts, unpadded, amounts, axis=0))
    batch = op.Shape(padded, start=0, end=1)
    group_count = op.Reshape(op.Constant(value_int=groups), op.Constant(value_ints=[1]))
    channels_per_group = op.Div(op.Shape(padded, start=1, end=2), group_count)
    spatial_sizes = op.Shape(padded, start=2)
    # allowzero: an empty batch is a size of zero here, not "copy this dimension".
    grouped = op.Reshape(padded, op.Concat(batch, group_count, channels_per_group, spatial_sizes, axis=0), allowzero=1)
    exchanged = op.Transpose(grouped, perm=[2, 1, 0, 3, 4, 5])
    data = op.Reshape(
        exchanged, op.Concat(channels_per_group, op.Mul(group_count, batch), spatial_sizes, axis=0), allowzero=1
    )
    kernel = op.Transpose(grad_output, perm=[1, 0, 2, 3, 4])
    correlation = op.Conv(data, kernel, strides=dilation, dilations=stride, group=groups)
    # A stride that leaves a remainder leaves room for more taps than the kernel has.
    taps = op.Slice(correlation, op.Constant(value_ints=[0, 0, 0]), op.Slice(weight_size, [2], [5]), [2, 3, 4])
    return op.Transpose(taps, perm=[1, 0, 2, 3, 4])
