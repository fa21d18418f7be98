"""Gradients of activations whose slope is 0 somewhere, as products: onnxruntime's Where takes eleven times as long.

A product of 0 and a gradient that is infinite, or not-a-number, is not-a-number, and PyTorch's kernels give 0. Such
gradients come out of a division mostly, as that of the square root behind a ReLU; there Where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

aten = torch.ops.aten

# A result is infinite where a full-size operand is; smaller ones are statistics, such as those of a normalization.
_ELEMENTWISE = {
    *(aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.neg.default),
    *(aten.div.Tensor, aten.div.Scalar, aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten.pow.Tensor_Scalar, aten.sqrt.default, aten.abs.default),
}
_MOVING = {
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten.permute.default),
    *(aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dims, aten.squeeze.dim),
    *(aten.clone.default, aten._to_copy.default, aten.detach.default, aten.alias.default, aten.slice.Tensor),
    *(aten.select.int, aten.cat.default, aten.constant_pad_nd.default, aten.upsample_nearest2d.default),
    *(aten.sum.dim_IntList, aten.avg_pool2d.default, aten.scatter_add.default, aten.scatter.src),
    *(aten.index_put.default, aten.gather.default, aten.flip.default, aten.squeeze.default, aten.copy.default),
}
_INFINITE_AT_ZERO = {
    *(aten.reciprocal.default, aten.rsqrt.default, aten.log.default, aten.log2.default, aten.log10.default),
    *(aten.pow.Tensor_Tensor, aten.pow.Scalar),
}
_MOST_NODES = 200


def masked(grad: Tensor, mask: Tensor) -> Tensor:
    """`grad` where the boolean `mask` is true, else 0."""
    return torch.where(mask, grad, 0.0) if may_be_infinite(grad) else grad * mask.to(grad.dtype)


def may_be_infinite(grad: Tensor) -> bool:
    """Whether a traced tensor comes, by elementwise operators and copies, from one that is infinite at 0.

    Convolutions and matrix products end the search: what is infinite in one place is so in many behind them. Of what
    comes from outside a compiled graph (AOTAutograd calls it a tangent), nothing is known.
    """
    mode = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(grad, mode.tracer, None)
    if slot is None:
        return mode is None  # nothing is known of a tensor that is not traced
    waiting: list[torch.fx.Node] = [slot.proxy.node]
    seen: set[torch.fx.Node] = set()
    while waiting and len(seen) < _MOST_NODES:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_infinite_at_zero(node):
            return True
        if node.target in _ELEMENTWISE:
            waiting += [a for a in node.all_input_nodes if _shape(a) == _shape(node)]
        elif node.target in _MOVING:
            waiting += node.all_input_nodes
    return False


def _is_infinite_at_zero(node: torch.fx.Node) -> bool:
    if node.op == "placeholder":
        return node.name.startswith("tangents")
    if node.target is aten.div.Tensor:
        return isinstance(node.args[1], torch.fx.Node) and isinstance(node.args[1].meta.get("val"), Tensor)
    if node.target is aten.pow.Tensor_Scalar:
        return not isinstance(node.args[1], (int, float)) or node.args[1] < 0
    return node.target in _INFINITE_AT_ZERO


def _shape(node: torch.fx.Node) -> list[str]:
    """As text: to compare symbolic sizes would fix them."""
    return [str(size) for size in getattr(node.meta.get("val"), "shape", ())]


def threshold_backward(grad: Tensor, x: Tensor, threshold: Any) -> Tensor:
    """The gradient of ReLU."""
    return masked(grad, x > threshold)


def hardtanh_backward(grad: Tensor, x: Tensor, min_val: float, max_val: float) -> Tensor:
    """The gradient of ReLU6, zero at both clamps."""
    if may_be_infinite(grad):
        return torch.where((x > min_val) & (x < max_val), grad, 0.0)
    return grad * ((x > min_val).to(grad.dtype) * (x < max_val).to(grad.dtype))


def hardswish_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Slope x/3 + 1/2 between -3 and 3, 0 below and 1 above; clamped first, so that no infinite x meets a zero."""
    outside = (x <= -3).to(grad.dtype) - (x >= 3).to(grad.dtype)
    product = grad * (x.clamp(-3, 3) / 3 + (outside * 0.5 + 0.5))
    return torch.where(x <= -3, 0.0, product) if may_be_infinite(grad) else product


# PyTorch's own kernel: on the CPU its float64 slope is the float32 next to 1/6.
_SIXTH = float(aten.hardsigmoid_backward(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))


def hardsigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient inside (-3, 3) alone, times 1/6."""
    if may_be_infinite(grad):
        return torch.where((x > -3) & (x < 3), grad * _SIXTH, 0.0)
    return grad * ((x > -3).to(grad.dtype) * (x < 3).to(grad.dtype) * _SIXTH)


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Slope s + y (1 - s) with s = sigmoid(x) and y = x s.

    The forward has both, and layers behind read y again, so that x is held no longer for the gradient's sake.
    """
    s = torch.sigmoid(x)
    return grad * (s + aten.silu.default(x) * (1 - s))


def leaky_relu_backward(grad: Tensor, x: Tensor, negative_slope: float, self_is_result: bool) -> Tensor:
    return grad * ((x > 0).to(grad.dtype) * (1 - negative_slope) + negative_slope)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.threshold_backward.default: threshold_backward,
    aten.hardtanh_backward.default: hardtanh_backward,
    aten.hardswish_backward.default: hardswish_backward,
    aten.hardsigmoid_backward.default: hardsigmoid_backward,
    aten.leaky_relu_backward.default: leaky_relu_backward,
    aten.silu_backward.default: silu_backward,
}
