"""Derivatives of the gradients themselves, so that the eager functions can stand where torch.nn.grad stood.

In reverse mode, in forward mode and under torch.func's transforms; `torch.vmap` runs sample by sample.

A convolution's gradients are bilinear: grad_input in (weight, grad_output), grad_weight in (input, grad_output), and
grad_bias is linear in grad_output. With cotangents V of grad_input, U of grad_weight and b of grad_bias:

    d/d grad_output = conv(V, weight) + conv(input, U) + b
    d/d weight      = grad_weight(V, grad_output)
    d/d input       = grad_input(U, grad_output)

A tangent goes through each operand in turn, with the other as it is.

The same identities hold for a transposed convolution with conv_transpose as the forward operator. Source: bilinearity;
compare `convolution_double_backward` in PyTorch's FunctionsManual.
"""

from __future__ import annotations

from typing import Any

import torch

from ..geometry import ConvGeometry
from ..torch_convolution import forward
from .providers import Providers


def compute_recorded(
    geometry: ConvGeometry, gradients: tuple[str, ...], operands: dict[str, Any], lowering: str, providers: Providers
) -> dict[str, Any]:
    """`eager.compute` as one node of autograd, in reverse and in forward mode."""
    arguments = [operands.get(name) for name in ("input", "weight", "grad_output")]
    results = _ConvolutionBackward.apply(geometry, gradients, lowering, providers, *arguments)
    return dict(zip(gradients, results, strict=True))


def _shape(geometry: ConvGeometry, gradient: str) -> tuple[Any, ...]:
    shapes = {"input": geometry.input_shape, "weight": geometry.weight_shape, "bias": (geometry.out_channels,)}
    return shapes[gradient]


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        geometry: ConvGeometry,
        gradients: tuple[str, ...],
        lowering: str,
        providers: Providers,
        input: torch.Tensor | None,
        weight: torch.Tensor | None,
        grad_output: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        from .eager import compute

        named = {"input": input, "weight": weight, "grad_output": grad_output}
        operands = {name: value for name, value in named.items() if value is not None}
        results = compute(geometry, gradients, operands, lowering, providers)
        return tuple(results[gradient] for gradient in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.geometry, ctx.gradients, ctx.lowering, ctx.providers, *operands = inputs
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)
        # A result that nothing depends on has no cotangent: zeros would cost convolutions, and times infinity be NaN.
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[torch.Tensor, ...]:
        from .eager import differentiable

        geometry: ConvGeometry = ctx.geometry
        operands = dict(zip(("input", "weight", "grad_output"), ctx.saved_tensors, strict=True))
        moving = dict(zip(operands, tangents[4:], strict=True))
        results = []
        for gradient in ctx.gradients:
            names = [*{"input": ["weight"], "weight": ["input"], "bias": []}[gradient], "grad_output"]
            terms = [
                differentiable(
                    geometry,
                    (gradient,),
                    {name: moving[name] if name == moved else operands[name] for name in names},
                    ctx.lowering,
                    ctx.providers,
                )[gradient]
                for moved in names
                if moving[moved] is not None
            ]
            still = operands["grad_output"].new_zeros(_shape(geometry, gradient))
            results.append(sum(terms[1:], terms[0]) if terms else still)
        return tuple(results)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        """One run for each sample: a session has no axis for them, and each axis it has is taken."""
        runs = [
            _ConvolutionBackward.apply(
                *(
                    a.select(dim, index) if isinstance(a, torch.Tensor) and dim is not None else a
                    for a, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        if runs:
            stacked = tuple(torch.stack(values) for values in zip(*runs, strict=True))
        else:
            geometry, gradients, *_, grad_output = arguments
            stacked = tuple(grad_output.new_zeros((0, *_shape(geometry, gradient))) for gradient in gradients)
        return stacked, (0,) * len(stacked)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        from .eager import differentiable

        geometry: ConvGeometry = ctx.geometry
        input, weight, grad_output = ctx.saved_tensors
        seeds = {name: seed for name, seed in zip(ctx.gradients, cotangents, strict=True) if seed is not None}
        need_input, need_weight, need_grad_output = ctx.needs_input_grad[4:]
        d_input = d_weight = d_grad_output = None

        def gradient(name: str, operands: dict[str, Any]) -> torch.Tensor:
            result: torch.Tensor = differentiable(geometry, (name,), operands, ctx.lowering, ctx.providers)[name]
            return result

        if need_input and "weight" in seeds:
            d_input = gradient("input", {"weight": seeds["weight"], "grad_output": grad_output})
        if need_weight and "input" in seeds:
            d_weight = gradient("weight", {"input": seeds["input"], "grad_output": grad_output})
        if need_grad_output and seeds:
            terms = []
            if "input" in seeds:
                terms.append(forward(geometry, seeds["input"], weight))
            if "weight" in seeds:
                terms.append(forward(geometry, input, seeds["weight"]))
            if "bias" in seeds:
                terms.append(seeds["bias"].reshape(1, -1, *(1,) * geometry.rank).expand_as(grad_output))
            d_grad_output = sum(terms[1:], terms[0])
        return (None, None, None, None, d_input, d_weight, d_grad_output)
