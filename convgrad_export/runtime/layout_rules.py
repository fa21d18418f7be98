"""Which convolutions a session computes in onnxruntime's blocked layout: those that it can hold, where that gains.

The limits are measured; benchmarks/NOTES.md says how.
"""

from __future__ import annotations

import math

from ..depth_planes import all_taps
from ..geometry import ConvGeometry
from .blocked_volumes import plane_pairs
from .blocked_weights import fills_blocks
from .convolution_entries import FORWARD, INPUT, WEIGHT, ConvolutionEntry, one_to_one, reversed_pads

_BLOCKS_TOGETHER = 4  # of filters, which onnxruntime's kernel takes at once
# Dense layers: output positions of all samples from which on the weight's rearrangement is little beside the Conv, and
# elements of a weight that is little anyway.
_POSITIONS, _SMALL_WEIGHT = 256, 1 << 16
# Of a weight gradient, which every sample adds to.
_WEIGHT_POSITIONS, _SMALL_WEIGHT_POSITIONS = 512, 128
_PIECES, _FEW_FILTERS, _FEW_COLUMNS, _SMALL_IMAGE = 5, 32, 32, 256
_CACHED = 1 << 23  # elements of both operands, which the last cache holds
# On two threads: pairs of an input and an output channel, from where on the file's form divides better.
_MANY_PAIRS = 64 * 96
_LONG = 1 << 14  # positions, from where on the transpositions, which run on one thread, weigh too much for two
_FEW_TAPS, _MANY_ELEMENTS = 8, 1 << 22  # one axis: what few taps compute is little beside operands that leave the cache
# The same over three axes, where the file's own forms are slower; and of an input gradient also per element of weight.
_VOLUME_POSITIONS, _WEIGHT_USES = 128, 1 << 13
_MOST_PAIRS = 1 << 12  # of a plane and a depth tap, which are listed one by one
_TAPS, _FEW_CHANNELS = 3, 64  # kernels of fewer taps on one axis read what they rearrange too seldom, from here on


def applies(entry: ConvolutionEntry, block: int) -> bool:
    """Whether the layout can hold it, with so many channels side by side, and one thread is faster with it."""
    g = entry.geometry
    if 0 in (*g.input_size, *g.output_size) or g.out_channels % block:
        return False
    if g.rank == 3:
        return _volume_applies(entry, block)
    depthwise = one_to_one(g)
    if entry.kind == INPUT and (min(reversed_pads(g)) < 0 or not (depthwise or set(g.stride) == {1})):
        return False
    if depthwise:
        return entry.kind != WEIGHT or _batch(g) > 0
    inputs, outputs = g.in_channels_per_group, g.out_channels_per_group
    if g.rank == 1 and g.taps < _TAPS and inputs * outputs > _FEW_CHANNELS**2:
        return False
    if entry.kind == WEIGHT:
        return fills_blocks(g, block) and _weight_pays(g, block)
    blocks = inputs % block == 0 or (entry.kind == FORWARD and g.groups == 1 and inputs < block)
    return blocks and outputs % block == 0 and _dense_pays(g, inputs * outputs)


def _volume_applies(entry: ConvolutionEntry, block: int) -> bool:
    g = entry.geometry
    axes, pads = g.rank, reversed_pads(g)
    if entry.kind == WEIGHT or g.groups > 1 or g.in_channels % block:
        return False
    if entry.kind == INPUT and (set(g.stride[1:]) != {1} or min(*pads[1:axes], *pads[axes + 1 :]) < 0):
        return False
    if g.input_size[0] * g.kernel_size[0] > _MOST_PAIRS or not all(pairs := plane_pairs(entry)):
        return False
    positions = max(_batch(g), 1) * math.prod(g.output_size)
    # The file's input gradient reads the weight nearly as it lies; its Conv reads all of it for every sample.
    used = len(all_taps(pairs)) * math.prod(g.kernel_size[1:])
    needed = used * g.in_channels * g.out_channels // _WEIGHT_USES if entry.kind == INPUT else 0
    return positions >= max(_VOLUME_POSITIONS, needed)


def divides(entry: ConvolutionEntry, block: int) -> bool:
    """Whether there is work for two threads: a Conv is divided by sample, group, four blocks of filters and row."""
    g = entry.geometry
    if not isinstance(g.batch, int) or one_to_one(g) or g.rank == 3:  # a volume's planes are samples
        return True
    if entry.kind == WEIGHT:
        return _weight_divides(g, block)
    forward = entry.kind == FORWARD
    elements = g.batch * max(g.in_channels, g.out_channels) * math.prod(g.input_size)
    if g.rank == 1 and not forward and g.taps < _FEW_TAPS and elements > _MANY_ELEMENTS:
        return False
    rows = 1 if g.rank == 1 else (g.output_size if forward else g.input_size)[0]
    filters = g.out_channels_per_group if forward else g.in_channels_per_group
    return g.batch * g.groups * -(-filters // (_BLOCKS_TOGETHER * block)) * rows > 1


def _weight_divides(g: ConvGeometry, block: int) -> bool:
    """Whether a dense weight gradient gains on two threads: its rows are the kernel's, and three leave one idle.

    Of few filters the file's own form is slower still, for its matrix product has as many rows.
    """
    if g.rank == 1 and _batch(g) * g.output_size[0] > _LONG:
        return False
    if g.rank == 2 and g.in_channels * g.out_channels > _MANY_PAIRS:
        return False
    pieces = g.kernel_size[0] * -(-g.out_channels // (_BLOCKS_TOGETHER * block))
    if pieces % 2 == 0 or pieces >= _PIECES:
        return True
    small = g.in_channels <= _FEW_CHANNELS or math.prod(g.output_size) <= _SMALL_IMAGE
    return pieces > 1 and g.out_channels <= _FEW_FILTERS and small


def _dense_pays(g: ConvGeometry, channels: int) -> bool:
    """Whether bringing weight, operand and result into the layout and out of it costs less than it saves.

    Args:
        channels: pairs of an input and an output channel of a group.
    """
    return channels * g.taps <= _SMALL_WEIGHT or max(_batch(g), 1) * math.prod(g.output_size) >= _POSITIONS


def _weight_pays(g: ConvGeometry, block: int) -> bool:
    """Whether a dense weight gradient has enough products for what is moved, and the file's form is the slower one."""
    samples, pairs = _batch(g), g.in_channels * g.out_channels
    if all(k <= s for k, s in zip(g.kernel_size, g.stride, strict=True)):  # the file's form copies nothing twice
        return False
    if samples > 1 and g.out_channels > _FEW_FILTERS and g.in_channels * g.taps < _FEW_COLUMNS:
        return False
    if pairs > 2 * _FEW_CHANNELS**2 and g.rank == 2 and set(g.stride) != {1}:
        return False
    elements = samples * (g.in_channels * math.prod(g.input_size) + g.out_channels * math.prod(g.output_size))
    if samples >= block and elements > _CACHED:  # blocks of samples take one more copy of both
        return False
    small = samples > 1 and math.prod(g.weight_shape) <= _SMALL_WEIGHT
    return samples * math.prod(g.output_size) >= (_SMALL_WEIGHT_POSITIONS if small else _WEIGHT_POSITIONS)


def _batch(g: ConvGeometry) -> int:
    """0 where it is not fixed."""
    return g.batch if isinstance(g.batch, int) else 0
