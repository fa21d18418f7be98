"""Random operators as torch.onnx translates them wrongly: from uniform and normal numbers instead.

The pass that merges equal nodes, and onnxruntime's own, know RandomUniform, RandomNormal and Multinomial as random, but
take two nodes Dropout or Bernoulli of one tensor for the same value: each sample of a Monte Carlo dropout would have
one mask. A model with random numbers is not compared with PyTorch, so nothing else would notice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18

op: Any = opset18  # its type variables tell each kind of tensor apart, which is not known here
aten = torch.ops.aten
_FLOAT = ir.DataType.FLOAT


def _number(value: float, like: Any) -> Any:
    return op.Constant(value=ir.to_proto(ir.tensor(value, dtype=like.dtype)))


def native_dropout(input: Any, p: float, train: bool | None = True) -> tuple[Any, Any]:
    """The product with mask and factor, and the mask; the numbers are float32 in every type."""
    if train is not None and not train:
        kept = op.Expand(op.Constant(value=ir.to_proto(ir.tensor(True))), op.Shape(input))
        return op.Identity(input), kept
    kept = op.GreaterOrEqual(op.RandomUniformLike(input, dtype=int(_FLOAT)), op.Constant(value_float=float(p)))
    factor = 0.0 if p == 1 else 1.0 / (1.0 - p)
    return op.Mul(op.Mul(input, op.CastLike(kept, input)), _number(factor, input)), kept


def bernoulli(self: Any) -> Any:
    """One where a uniform number is below the probability."""
    drawn = op.RandomUniformLike(self, dtype=int(_FLOAT))
    return op.CastLike(op.Less(drawn, op.Cast(self, to=int(_FLOAT))), self)


def multinomial(self: Any, num_samples: int, replacement: bool = False) -> Any:
    """With replacement Multinomial; without, the first to happen of exponential waiting times with these rates.

    ONNX has the first only, which torch.onnx takes for both.
    """
    axis: Any = op.Constant(value_ints=[0])
    rates = op.Cast(self, to=int(_FLOAT))
    batched = len(self.shape) == 2
    rates = rates if batched else op.Unsqueeze(rates, axis)
    if replacement or num_samples == 1:
        drawn = op.Multinomial(op.Log(rates), dtype=int(ir.DataType.INT64), sample_size=num_samples)
    else:
        # 1 - u is never 0, and no rate of 0 is among the first while there are others: its time is infinite
        u = op.RandomUniformLike(rates, dtype=int(_FLOAT))
        times = op.Div(op.Neg(op.Log(op.Sub(op.Constant(value_float=1.0), u))), rates)
        _, drawn = op.TopK(times, op.Constant(value_ints=[num_samples]), axis=-1, largest=0)
    return drawn if batched else op.Squeeze(drawn, axis)


def normal(mean: Any, std: Any) -> Any:
    """One number for each element of the result, also where one of the two is broadcast."""
    scaled = op.RandomNormalLike(op.Add(mean, std))
    return op.Add(op.Mul(std, scaled), mean)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.native_dropout.default: native_dropout,
    aten.bernoulli.default: bernoulli,
    aten.multinomial.default: multinomial,
    aten.normal.Tensor_Tensor: normal,
}
