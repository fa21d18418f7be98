"""The six gradients of torch.nn.grad for TorchScript: legacy, kept thin.

TorchScript records torch.nn.grad's `convolution_backward` with a list of booleans, which neither its tracer nor its
ONNX exporter takes. These functions are the same gradients in forward operators, so a scripted or traced module that
calls them can be saved, reloaded without this package, and exported with `torch.onnx.export(..., dynamo=False)`. Every
size may change at run time; stride, padding, dilation and groups are constants, as always in ONNX.

Signatures are torch.nn.grad's, lists of one for all axes included. TorchScript spreads a default over the axes where
scripted code calls a function, and not where Python calls one that is itself scripted: give such a call its stride,
padding and dilation. Scripted functions, and `int(x.size(2))`, take a size out of a trace: in a module that is traced,
by `torch.onnx.export` too, it is the example's from then on, dynamic axis or not. Pass sizes as they are to the
functions of this module, or script the module as a whole. PyTorch's convolutions over no channels end the process, so
scripted weight gradients refuse a batch of no samples; a traced module has to be given one sample or more. New code
should use `cg.export`, which needs none of this.
"""

# TorchScript compiles these from their source: annotations must be real objects, and nothing may loop over axes.
from typing import Any, List  # noqa: UP035

import torch
from torch import Tensor
from torch._jit_internal import BroadcastingList1, BroadcastingList2, BroadcastingList3
from torch.nn import functional


def _per_axis(value: Any, rank: int) -> Any:
    """What TorchScript's compiler does to an int given for a list."""
    return [value] * rank if isinstance(value, int) else list(value)


def _not_empty(tensor: Tensor) -> Tensor:
    """One sample of zeros for a batch of none: as a convolution over no channels, it would end the process."""
    if torch.jit.is_tracing() or tensor.size(0) > 0:
        return tensor
    return functional.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, 1])


def conv1d_input(
    input_size: List[int],  # noqa: UP006
    weight: Tensor,
    grad_output: Tensor,
    stride: BroadcastingList1[int] = 1,
    padding: BroadcastingList1[int] = 0,
    dilation: BroadcastingList1[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Input gradient (N, C, I0): the whole transposed convolution, then cut or filled up to the input's size."""
    if not torch.jit.is_scripting():
        stride, padding, dilation = _per_axis(stride, 1), _per_axis(padding, 1), _per_axis(dilation, 1)
    whole = functional.conv_transpose1d(grad_output, weight, None, stride, 0, 0, groups, dilation)
    return functional.pad(whole, [-padding[0], input_size[2] + padding[0] - whole.size(2)])


def conv2d_input(
    input_size: List[int],  # noqa: UP006
    weight: Tensor,
    grad_output: Tensor,
    stride: BroadcastingList2[int] = 1,
    padding: BroadcastingList2[int] = 0,
    dilation: BroadcastingList2[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Input gradient (N, C, I0, I1): the whole transposed convolution, cut or filled up to the input's size."""
    if not torch.jit.is_scripting():
        stride, padding, dilation = _per_axis(stride, 2), _per_axis(padding, 2), _per_axis(dilation, 2)
    whole = functional.conv_transpose2d(grad_output, weight, None, stride, 0, 0, groups, dilation)
    last = [-padding[-1], input_size[3] + padding[-1] - whole.size(3)]  # a list of one counts for all axes
    return functional.pad(whole, [last[0], last[1], -padding[0], input_size[2] + padding[0] - whole.size(2)])


def conv3d_input(
    input_size: List[int],  # noqa: UP006
    weight: Tensor,
    grad_output: Tensor,
    stride: BroadcastingList3[int] = 1,
    padding: BroadcastingList3[int] = 0,
    dilation: BroadcastingList3[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Input gradient (N, C, I0, I1, I2): the whole transposed convolution, cut or filled up to the input's size."""
    if not torch.jit.is_scripting():
        stride, padding, dilation = _per_axis(stride, 3), _per_axis(padding, 3), _per_axis(dilation, 3)
    whole = functional.conv_transpose3d(grad_output, weight, None, stride, 0, 0, groups, dilation)
    center = padding[len(padding) // 2]  # a list of one counts for all axes
    last = input_size[4] + padding[-1] - whole.size(4)
    middle = input_size[3] + center - whole.size(3)
    first = input_size[2] + padding[0] - whole.size(2)
    return functional.pad(whole, [-padding[-1], last, -center, middle, -padding[0], first])


def conv1d_weight(
    input: Tensor,
    weight_size: List[int],  # noqa: UP006
    grad_output: Tensor,
    stride: BroadcastingList1[int] = 1,
    padding: BroadcastingList1[int] = 0,
    dilation: BroadcastingList1[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Weight gradient (M, C/G, K0): a convolution with batch and channels exchanged, stride and dilation too."""
    if not torch.jit.is_scripting():
        stride, padding, dilation = _per_axis(stride, 1), _per_axis(padding, 1), _per_axis(dilation, 1)
        input, grad_output = _not_empty(input), _not_empty(grad_output)
    else:
        assert input.size(0) > 0, "input has no samples, expected at least one in TorchScript"  # no node in an export
    per_group = weight_size[1]
    x = input.reshape(input.size(0), groups, per_group, input.size(2)).permute(2, 1, 0, 3)
    x = x.reshape(per_group, groups * input.size(0), input.size(2))
    taps = functional.conv1d(x, grad_output.permute(1, 0, 2), None, dilation, padding, stride, groups)
    return taps[:, :, : weight_size[2]].permute(1, 0, 2)


def conv2d_weight(
    input: Tensor,
    weight_size: List[int],  # noqa: UP006
    grad_output: Tensor,
    stride: BroadcastingList2[int] = 1,
    padding: BroadcastingList2[int] = 0,
    dilation: BroadcastingList2[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Weight gradient (M, C/G, K0, K1): a convolution with batch and channels exchanged, stride and dilation too."""
    if not torch.jit.is_scripting():
        stride, padding, dilation = _per_axis(stride, 2), _per_axis(padding, 2), _per_axis(dilation, 2)
        input, grad_output = _not_empty(input), _not_empty(grad_output)
    else:
        assert input.size(0) > 0, "input has no samples, expected at least one in TorchScript"  # no node in an export
    per_group = weight_size[1]
    x = input.reshape(input.size(0), groups, per_group, input.size(2), input.size(3)).permute(2, 1, 0, 3, 4)
    x = x.reshape(per_group, groups * input.size(0), input.size(2), input.size(3))
    taps = functional.conv2d(x, grad_output.permute(1, 0, 2, 3), None, dilation, padding, stride, groups)
    return taps[:, :, : weight_size[2], : weight_size[3]].permute(1, 0, 2, 3)


def conv3d_weight(
    input: Tensor,
    weight_size: List[int],  # noqa: UP006
    grad_output: Tensor,
    stride: BroadcastingList3[int] = 1,
    padding: BroadcastingList3[int] = 0,
    dilation: BroadcastingList3[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Weight gradient (M, C/G, K0, K1, K2): a convolution with batch and channels exchanged."""
    if not torch.jit.is_scripting():
        stride, padding, dilation = _per_axis(stride, 3), _per_axis(padding, 3), _per_axis(dilation, 3)
        input, grad_output = _not_empty(input), _not_empty(grad_output)
    else:
        assert input.size(0) > 0, "input has no samples, expected at least one in TorchScript"  # no node in an export
    per_group = weight_size[1]
    x = input.reshape(input.size(0), groups, per_group, input.size(2), input.size(3), input.size(4))
    x = x.permute(2, 1, 0, 3, 4, 5)
    x = x.reshape(per_group, groups * input.size(0), input.size(2), input.size(3), input.size(4))
    taps = functional.conv3d(x, grad_output.permute(1, 0, 2, 3, 4), None, dilation, padding, stride, groups)
    return taps[:, :, : weight_size[2], : weight_size[3], : weight_size[4]].permute(1, 0, 2, 3, 4)


__all__ = ["conv1d_input", "conv1d_weight", "conv2d_input", "conv2d_weight", "conv3d_input", "conv3d_weight"]
