"""Where Winograd's minimal filtering pays: fewer multiplications, against transforms of both operands and the result.

The rules come from the timings in benchmarks/NOTES.md, "Winograd".
"""

from __future__ import annotations

import math

from ..geometry import ConvGeometry
from ..lowering import LOWERINGS

DIRECT = 1.0  # error factor of every form that adds up the products themselves
# What "auto" may take unless it is told otherwise: Winograd tiles of 4, whose transforms hold halves and whole numbers
# only. Their error bound is twice the direct form's, and small integers come out exactly.
DEFAULT_ERROR_FACTOR = 2.0

# Channels, the harmonic mean of both sides, below which the transforms cost more than the multiplications they save:
# they are in proportion to the sum of the two, the multiplications to their product.
_CHANNELS, _ONE_THREAD_CHANNELS = 42, 32
_WEIGHT_CHANNELS = 60  # against a direct form whose copies stay in the cache
_ONE_SAMPLE_WEIGHT_CHANNELS = 384  # of one sample, on several threads: the transforms run on one of them
_LARGE_IMAGE, _LARGE_IMAGE_CHANNELS = 1024, 60  # positions; the untransformed tensors leave the cache as well
_HUGE_IMAGE, _HUGE_IMAGE_CHANNELS = 8192, 96
# Elements of the larger tensor of all samples, from where on the transforms of few channels pass through memory.
_MANY_ELEMENTS, _MANY_ELEMENTS_CHANNELS, _MANY_ELEMENTS_ONE_AXIS = 3 << 20, 97, 1 << 20
# Three taps on one axis save a third of the multiplications, on two axes more than half.
_ONE_AXIS_CHANNELS = 192
_ONE_AXIS_ONE_THREAD_CHANNELS = {"input": 192, "forward": 96, "weight": 160}
# Three axes: the transforms hold eight times the tensor, so that it must not be too large.
_VOLUME_CHANNELS, _VOLUME_ELEMENTS = 96, 1 << 22
_CONSTANT_WEIGHT_CHANNELS = 128  # onnxruntime runs a Conv in its blocked layout then
_TILES = 32  # of all samples: fewer do not pay for transforming the weight
_ASSUMED_BATCH = 8  # where the batch is open
_TAPS = {4: 3, 6: 5}  # the largest kernel worth it: n - K + 1 positions a tile, at least two of them


def winograd_tiles(
    gradient: str, g: ConvGeometry, max_error_factor: float, *, constant_weight: bool, one_thread: bool
) -> list[int]:
    """Tile sizes that the allowed error admits and whose transforms pay, the largest first.

    Args:
        gradient: ``"input"``, ``"weight"`` or ``"forward"``.
        g: of the plain convolution; a transposed one goes by its adjoint.
    """
    if not g.is_static or g.transposed or g.groups > 1 or not g.unit_stride:
        return []
    filtered = [axis for axis, k in enumerate(g.kernel_size) if k > 1]
    size = g.input_size if gradient == "input" else g.output_size
    needed = _ONE_THREAD_CHANNELS if one_thread else _CHANNELS
    if gradient == "weight":
        needed = _WEIGHT_CHANNELS
    if math.prod(size) > _LARGE_IMAGE:
        needed = _LARGE_IMAGE_CHANNELS
    if gradient == "weight" and g.is_one_sample and not one_thread:
        needed = _ONE_SAMPLE_WEIGHT_CHANNELS
    elif len(filtered) < 2:
        needed = _ONE_AXIS_ONE_THREAD_CHANNELS[gradient] if one_thread else _ONE_AXIS_CHANNELS
    if constant_weight:
        needed = max(needed, _CONSTANT_WEIGHT_CHANNELS)
    batch = g.batch if isinstance(g.batch, int) else _ASSUMED_BATCH
    elements = batch * math.prod(size) * max(g.in_channels, g.out_channels)
    if elements > _MANY_ELEMENTS:
        needed = max(needed, _MANY_ELEMENTS_CHANNELS)
    if g.rank == 1 and elements > _MANY_ELEMENTS_ONE_AXIS:
        return []
    if g.rank == 3:
        if elements > _VOLUME_ELEMENTS or any(size[axis] < 2 for axis in filtered):
            return []
        needed = max(needed, _VOLUME_CHANNELS)
    channels = 2 * g.in_channels * g.out_channels / (g.in_channels + g.out_channels)
    if not filtered or channels < needed:
        return []

    def pays(tile: int) -> bool:
        if not 3 <= max(g.kernel_size) <= _TAPS[tile]:
            return False
        if tile == 4 and math.prod(size) > _HUGE_IMAGE and channels < _HUGE_IMAGE_CHANNELS:
            return False
        counts = (math.ceil(size[axis] / (tile - g.kernel_size[axis] + 1)) for axis in filtered)
        return batch * math.prod(counts) >= _TILES

    entry = "input" if gradient == "input" else "weight"  # the forward pass has the tiles of the weight gradient
    factors = {tile: LOWERINGS[f"{entry}.winograd{tile}"].error_factor for tile in sorted(_TAPS, reverse=True)}
    return [tile for tile, factor in factors.items() if factor <= max_error_factor and pays(tile)]
