"""When the forward convolution of a training step is better one GEMM over the batch than onnxruntime's Conv.

Conv runs one GEMM a sample and reads the whole weight for each. Measured in benchmarks/NOTES.md, "Forward".
"""

from __future__ import annotations

import math

from ..geometry import ConvGeometry
from ..lowering import CPU

_TINY_IMAGE = 8  # output positions; a sample's GEMM does little but read the weight
_SMALL_IMAGE = 64  # the same where the weight does not stay in a core's cache either
_CACHED_WEIGHT = 1 << 18  # float32 elements: 1 MiB


def forward_by_columns(geometry: ConvGeometry, dtype: str, provider: str) -> bool:
    """Whether `lowering.columns.forward` is to stand for Conv, with the weight an input of the model.

    A weight that is a constant is better left to Conv, for which onnxruntime rearranges it when the model is loaded.
    """
    g = geometry
    if provider != CPU or g.transposed or g.groups > 1 or not g.is_static or dtype != "float32":
        return False
    if isinstance(g.batch, int) and g.batch < 2:
        return False
    positions = math.prod(g.output_size)
    return positions <= _TINY_IMAGE or (positions <= _SMALL_IMAGE and math.prod(g.weight_shape) > _CACHED_WEIGHT)
