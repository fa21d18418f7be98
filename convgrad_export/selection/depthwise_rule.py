"""Where a depthwise layer's image is small enough to be one matrix a channel; benchmarks/NOTES.md, "Depthwise"."""

from __future__ import annotations

import math

from ..geometry import ConvGeometry
from ..lowering import image_matmul

# Nanoseconds for one sample of one channel, on one thread.
_CALL = 200.0  # of Conv: its columns and its GEMM are made for each
_PRODUCT, _LARGE_KERNEL_PRODUCT = 0.3, 0.8  # of Conv, for one tap at one output position
_LARGE_KERNEL = 9  # taps
_ENTRY, _ENTRY_TAP = 0.75, 0.02  # of an entry of the matrix, which the whole batch shares, and of making it from a tap
_SEVERAL_THREADS = 1.3  # how much less several threads help Conv than they help two large products
_ASSUMED_BATCH = 8  # where the batch is open


def whole_image_pays(g: ConvGeometry, one_thread: bool) -> bool:
    """Whether the three passes of a plain depthwise convolution, whose weight is no constant, go by `image_matmul`."""
    if not g.is_depthwise or g.transposed or image_matmul.why_not(g) is not None:
        return False
    positions = math.prod(g.output_size)
    batch = g.batch if isinstance(g.batch, int) else _ASSUMED_BATCH
    entries = math.prod(g.input_size) * positions
    product = _PRODUCT if g.taps <= _LARGE_KERNEL else _LARGE_KERNEL_PRODUCT
    calls = (_CALL + product * g.taps * positions) * (1.0 if one_thread else _SEVERAL_THREADS)
    return entries * (_ENTRY + _ENTRY_TAP * g.taps) <= calls * batch
