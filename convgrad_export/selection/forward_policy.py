"""What stands for the forward convolution of a training step where onnxruntime's Conv or ConvTranspose is slower.

Conv runs one GEMM a sample and reads the whole weight for each. ConvTranspose is the input gradient of a convolution,
and has that one's lowerings. Measured in benchmarks/NOTES.md, "Forward" and "Winograd".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ..geometry import ConvGeometry
from ..lowering import CPU, columns, image_matmul, winograd
from .depthwise_rule import whole_image_pays
from .policy import choose
from .reduced_arithmetic import winograd_tiles

_TINY_IMAGE = 8  # output positions; a sample's GEMM does little but read the weight
_SMALL_IMAGE = 64  # the same where the weight does not stay in a core's cache either
_CACHED_WEIGHT = 1 << 18  # float32 elements: 1 MiB


def forward_body(
    geometry: ConvGeometry, dtype: str, provider: str, max_error_factor: float, threads: int | None, opset: int = 18
) -> Callable[..., Any] | None:
    """The formula ``(op, geometry, input, weight)`` that is to stand for Conv or ConvTranspose; None to leave them.

    For a weight that is an input of the model. One that is a constant is better left to Conv, for which onnxruntime
    rearranges it when the model is loaded.
    """
    g = geometry
    if provider != CPU or not g.is_static or dtype != "float32":
        return None
    if g.transposed:
        return _transposed_body(g, dtype, max_error_factor, threads, opset)
    if whole_image_pays(g, threads == 1):
        return image_matmul.forward
    if g.groups > 1:
        return None
    tiles = winograd_tiles("forward", g, max_error_factor, constant_weight=False, one_thread=threads == 1)
    if tiles and winograd.why_not(tiles[0])(g) is None:
        return partial(_winograd, tile=tiles[0])
    if isinstance(g.batch, int) and g.batch < 2:
        return None
    positions = math.prod(g.output_size)
    if positions <= _TINY_IMAGE or (positions <= _SMALL_IMAGE and math.prod(g.weight_shape) > _CACHED_WEIGHT):
        return columns.forward
    return None


def _transposed_body(
    g: ConvGeometry, dtype: str, max_error_factor: float, threads: int | None, opset: int
) -> Callable[..., Any] | None:
    if g.groups > 1:
        return None
    chosen = choose(
        "input", g.adjoint(), dtype, opset=opset, max_error_factor=max_error_factor, threads=threads, provider=CPU
    )
    if set(chosen.operators) == {"ConvTranspose"}:
        return None
    return lambda op, geometry, input, weight: chosen.body(op, geometry.adjoint(), input, weight)


def _winograd(op: Any, geometry: ConvGeometry, input: Any, weight: Any, *, tile: int) -> Any:
    return winograd.forward(op, geometry, input, weight, tile)
