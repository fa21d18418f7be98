"""Convolutions whose second derivative leaves dynamic sizes open, for a second trace where PyTorch's fixed one.

PyTorch's own, `_convolution_double_backward`, reads sizes as Python numbers where a weight is differentiated twice or
the convolution has groups. Elsewhere it takes a cotangent for a weight, which has the batch for channels: the slowest
form of a weight's gradient, and for a dynamic batch one that float64, for which onnxruntime has no kernel, lacks.

The gradients are bilinear: with cotangents V of grad_input, U of grad_weight and b of grad_bias,

    d/d grad_output = conv(V, weight) + conv(input, U) + b
    d/d weight      = grad_weight(V, grad_output)
    d/d input       = grad_input(U, grad_output)

which are convolutions and `convolution_backward` again, for a transposed convolution too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import as_padding, as_sizes

aten = torch.ops.aten


class _Options(NamedTuple):
    """In the order in which ATen takes them."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
        result: Tensor = aten.convolution.default(x, weight, bias, *options)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, ctx.options = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        needed = list(ctx.needs_input_grad[:3])
        found = iter(_Gradients.apply(cotangents[0], *ctx.saved_tensors, ctx.options, needed))
        return (*(next(found) if wanted else None for wanted in needed), None)


class _Gradients(torch.autograd.Function):
    """Those of input, weight and bias that are wanted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor, x: Tensor, weight: Tensor, options: _Options, wanted: list[bool]
    ) -> tuple[Tensor, ...]:
        channels = weight.shape[1] * options.groups if options.transposed else weight.shape[0]
        bias_sizes = [channels] if wanted[2] else None
        found = aten.convolution_backward.default(grad_output, x, weight, bias_sizes, *options, wanted)
        return tuple(gradient for gradient, is_wanted in zip(found, wanted, strict=True) if is_wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *operands, ctx.options, ctx.wanted = inputs
        ctx.save_for_backward(*operands)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        grad_output, x, weight = ctx.saved_tensors
        given = iter(cotangents)
        of_input, of_weight, of_bias = (next(given) if wanted else None for wanted in ctx.wanted)
        to_output, to_input, to_weight = ctx.needs_input_grad[:3]
        d_output = d_input = d_weight = None
        if to_output:
            terms = []
            if of_input is not None:
                terms.append(_Convolution.apply(of_input, weight, None, ctx.options))
            if of_weight is not None:
                terms.append(_Convolution.apply(x, of_weight, None, ctx.options))
            if of_bias is not None:
                terms.append(of_bias.reshape([1, -1, *[1] * (weight.dim() - 2)]).expand_as(grad_output))
            d_output = sum(terms[1:], terms[0]) if terms else None
        if to_input and of_weight is not None:
            (d_input,) = _Gradients.apply(grad_output, x, of_weight, ctx.options, [True, False, False])
        if to_weight and of_input is not None:
            (d_weight,) = _Gradients.apply(grad_output, of_input, weight, ctx.options, [False, True, False])
        return d_output, d_input, d_weight, None, None


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
    if x.dim() == weight.dim():
        return _Convolution.apply(x, weight, bias, options)
    return _Convolution.apply(x.unsqueeze(0), weight, bias, options).squeeze(0)


def _convolution(rank: int) -> Callable[..., Tensor]:
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        strides = as_sizes(stride, rank, "stride", minimum=1)
        dilations = as_sizes(dilation, rank, "dilation", minimum=1)
        pads = as_padding(padding, weight.shape[2:], strides, dilations)
        behind = [end - begin for begin, end in reversed(pads)]  # of an even kernel, with padding="same"
        input = functional.pad(input, [pad for more in behind for pad in (0, more)]) if any(behind) else input
        options = _Options(list(strides), [begin for begin, _ in pads], list(dilations), False, [0] * rank, groups)
        return _convolved(input, weight, bias, options)

    return convolution


def _transposed(rank: int) -> Callable[..., Tensor]:
    def transposed(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        options = _Options(
            list(as_sizes(stride, rank, "stride", minimum=1)),
            list(as_sizes(padding, rank, "padding", minimum=0)),
            list(as_sizes(dilation, rank, "dilation", minimum=1)),
            True,
            list(as_sizes(output_padding, rank, "output_padding", minimum=0)),
            groups,
        )
        return _convolved(input, weight, bias, options)

    return transposed


def has_open_weights(graph_module: torch.fx.GraphModule) -> bool:
    """Whether a convolution's weight has a dynamic size, or one of its gradients' weights."""
    for node in graph_module.graph.nodes:
        if (place := _WEIGHT.get(node.target)) is not None:
            weight = node.args[place].meta["val"]
            if any(isinstance(size, torch.SymInt) for size in weight.shape):
                return True
    return False


# Where the weight stands among the arguments.
_WEIGHT = {aten.convolution.default: 1, aten.convolution_backward.default: 2}

CONVOLUTIONS: Mapping[Any, Callable[..., Tensor]] = {
    functional.conv1d: _convolution(1),
    functional.conv2d: _convolution(2),
    functional.conv3d: _convolution(3),
    functional.conv_transpose1d: _transposed(1),
    functional.conv_transpose2d: _transposed(2),
    functional.conv_transpose3d: _transposed(3),
}
