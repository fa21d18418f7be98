"""Gradients with respect to the convolution's input, dynamic in every dimension."""

# onnxscript compiles the bodies from their source: annotations must be real objects, so evaluation is not postponed.
from collections.abc import Sequence

from onnxscript import INT64, script
from onnxscript import opset18 as op

from ._domain import TFloat, convgrad_opset


@script(convgrad_opset, default_opset=op)
def conv1d_input(
    input_size: INT64[3],
    weight: TFloat,
    grad_output: TFloat,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> TFloat:
    """Gradient of a 1-D convolution with respect to its input: one ConvTranspose, then crop and extend to input_size.

    Args:
        input_size: [N, C, I0], INT64.
        weight: [M, C / groups, K0].
        grad_output: [N, M, O0].
        stride, padding, dilation: One integer per spatial axis, in elements.
        groups: Number of groups.

    Returns:
        [N, C, I0]. Positions that the forward pass never read are zero.

    Source: Dumoulin and Visin, arXiv:1603.07285, section 4; ONNX ConvTranspose, opset 11, and Pad, opset 18.
    """
    full = op.ConvTranspose(grad_output, weight, strides=stride, dilations=dilation, group=groups)
    unchanged = op.Constant(value_ints=[0, 0])
    begin = op.Constant(value_ints=padding)
    spatial_axes = op.Shape(full, start=2)
    end = op.Sub(op.Add(op.Slice(input_size, [2], [3]), begin), spatial_axes)
    amounts = op.Concat(unchanged, op.Neg(begin), unchanged, end, axis=0)
    return op.Pad(full, amounts)


@script(convgrad_opset, default_opset=op)
def conv2d_input(
    input_size: INT64[4],
    weight: TFloat,
    grad_output: TFloat,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> TFloat:
    """Gradient of a 2-D convolution with respect to its input: one ConvTranspose, then crop and extend to input_size.

    Args:
        input_size: [N, C, I0, I1], INT64.
        weight: [M, C / groups, K0, K1].
        grad_output: [N, M, O0, O1].
        stride, padding, dilation: One integer per spatial axis, in elements.
        groups: Number of groups.

    Returns:
        [N, C, I0, I1]. Positions that the forward pass never read are zero.

    Source: Dumoulin and Visin, arXiv:1603.07285, section 4; ONNX ConvTranspose, opset 11, and Pad, opset 18.
    """
    full = op.ConvTranspose(grad_output, weight, strides=stride, dilations=dilation, group=groups)
    unchanged = op.Constant(value_ints=[0, 0])
    begin = op.Constant(value_ints=padding)
    spatial_axes = op.Shape(full, start=2)
    end = op.Sub(op.Add(op.Slice(input_size, [2], [4]), begin), spatial_axes)
    amounts = op.Concat(unchanged, op.Neg(begin), unchanged, end, axis=0)
    return op.Pad(full, amounts)


@script(convgrad_opset, default_opset=op)
def conv3d_input(
    input_size: INT64[5],
    weight: TFloat,
    grad_output: TFloat,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> TFloat:
    """Gradient of a 3-D convolution with respect to its input: one ConvTranspose, then crop and extend to input_size.

    Args:
        input_size: [N, C, I0, I1, I2], INT64.
        weight: [M, C / groups, K0, K1, K2].
        grad_output: [N, M, O0, O1, O2].
        stride, padding, dilation: One integer per spatial axis, in elements.
        groups: Number of groups.

    Returns:
        [N, C, I0, I1, I2]. Positions that the forward pass never read are zero.

    Source: Dumoulin and Visin, arXiv:1603.07285, section 4; ONNX ConvTranspose, opset 11, and Pad, opset 18.
    """
    full = op.ConvTranspose(grad_output, weight, strides=stride, dilations=dilation, group=groups)
    unchanged = op.Constant(value_ints=[0, 0])
    begin = op.Constant(value_ints=padding)
    spatial_axes = op.Shape(full, start=2)
    end = op.Sub(op.Add(op.Slice(input_size, [2], [5]), begin), spatial_axes)
    amounts = op.Concat(unchanged, op.Neg(begin), unchanged, end, axis=0)
    return op.Pad(full, amounts)
