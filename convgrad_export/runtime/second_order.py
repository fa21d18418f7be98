"""Derivatives of the gradients themselves, so that the eager functions can stand where torch.nn.grad stood.

A convolution's gradients are bilinear: grad_input in (weight, grad_output), grad_weight in (input, grad_output), and
grad_bias is linear in grad_output. With cotangents V of grad_input, U of grad_weight and b of grad_bias:

    d/d grad_output = conv(V, weight) + conv(input, U) + b
    d/d weight      = grad_weight(V, grad_output)
    d/d input       = grad_input(U, grad_output)

The same identities hold for a transposed convolution with conv_transpose as the forward operator. Source: bilinearity;
compare `convolution_double_backward` in PyTorch's FunctionsManual.
"""

from __future__ import annotations

from typing import Any

import torch

from ..geometry import ConvGeometry
from .providers import Providers


def compute_recorded(
    geometry: ConvGeometry, gradients: tuple[str, ...], operands: dict[str, Any], lowering: str, providers: Providers
) -> dict[str, Any]:
    """`eager.compute` as one autograd node."""
    arguments = [operands.get(name) for name in ("input", "weight", "grad_output")]
    results = _ConvolutionBackward.apply(geometry, gradients, lowering, providers, *arguments)
    return dict(zip(gradients, results, strict=True))


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        geometry: ConvGeometry,
        gradients: tuple[str, ...],
        lowering: str,
        providers: Providers,
        input: torch.Tensor | None,
        weight: torch.Tensor | None,
        grad_output: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        from .eager import compute

        ctx.geometry, ctx.gradients, ctx.lowering, ctx.providers = geometry, gradients, lowering, providers
        ctx.save_for_backward(input, weight, grad_output)
        named = {"input": input, "weight": weight, "grad_output": grad_output}
        operands = {name: value for name, value in named.items() if value is not None}
        results = compute(geometry, gradients, operands, lowering, providers)
        return tuple(results[gradient] for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        from .eager import differentiable

        geometry: ConvGeometry = ctx.geometry
        input, weight, grad_output = ctx.saved_tensors
        seeds = dict(zip(ctx.gradients, cotangents, strict=True))
        need_input, need_weight, need_grad_output = ctx.needs_input_grad[4:]
        d_input = d_weight = d_grad_output = None

        def gradient(name: str, operands: dict[str, Any]) -> torch.Tensor:
            result: torch.Tensor = differentiable(geometry, (name,), operands, ctx.lowering, ctx.providers)[name]
            return result

        if need_input and "weight" in seeds:
            d_input = gradient("input", {"weight": seeds["weight"], "grad_output": grad_output})
        if need_weight and "input" in seeds:
            d_weight = gradient("weight", {"input": seeds["input"], "grad_output": grad_output})
        if need_grad_output:
            terms = []
            if "input" in seeds:
                terms.append(_forward(geometry, seeds["input"], weight))
            if "weight" in seeds:
                terms.append(_forward(geometry, input, seeds["weight"]))
            if "bias" in seeds:
                terms.append(seeds["bias"].reshape(1, -1, *(1,) * geometry.rank).expand_as(grad_output))
            d_grad_output = sum(terms[1:], terms[0])
        return (None, None, None, None, d_input, d_weight, d_grad_output)


def _forward(geometry: ConvGeometry, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The forward operator that the geometry describes, by torch."""
    begin, symmetric = list(geometry.begin), all(lo == hi for lo, hi in geometry.pads)
    if not symmetric:
        amounts = [amount for pair in reversed(geometry.pads) for amount in pair]
        input, begin = torch.nn.functional.pad(input, amounts), [0] * geometry.rank
    return torch.convolution(
        input,
        weight,
        None,
        geometry.stride,
        begin,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding,
        geometry.groups,
    )
