"""The preferences of the fixed policy: for every kind of convolution, the lowerings to try, the best first.

The order of a list is the rule; the first entry that applies is taken. The rules come from the timings in
benchmarks/NOTES.md. Nothing here knows how a formula works.
"""

from __future__ import annotations

import math

from ..geometry import ConvGeometry
from ..lowering import columns, cuda_kernel
from .depthwise_rule import whole_image_pays

_FEW_CHANNELS = 16  # a GEMM with a side this short leaves most of its register tile empty
# Output positions of a sample.
_TINY_IMAGE, _ONE_THREAD_TINY_IMAGE = 64, 8  # up to here a GEMM a sample does little but read the weight
# Output positions of one sample up to which a pointwise GEMM is short beside the rearrangement of its weight: of any
# weight, and at one thread of one that leaves the cache (`_WIDENING_WEIGHT`).
_FEW_POSITIONS, _MORE_POSITIONS = 64, 256
_VECTOR = 8  # up to here a GEMM a sample fills half of a register at most
_SMALL_IMAGE = 256  # up to here Col2Im's additions cost less than ConvTranspose's
_SMALL_VOLUME = 64  # up to here plane by plane pays for strided 1x1x1 kernels
_ONE_SAMPLE_VOLUME = 128  # of one sample: up to here the planes' weights are rearranged for too little
_ONE_SAMPLE_IMAGE = 300  # of one sample: up to here ConvTranspose's additions take less than the weight's rearrangement
_STRIDED_COLUMN_IMAGE = 49  # strided: up to here one GEMM over the batch pays for copying its result sample by sample
_SMALL_PLANE, _ONE_THREAD_PLANE = 256, 64  # up to here a Gather of runs over the batch is faster than a Slice of rows
_FEW_GROUP_CHANNELS = 4  # up to here taps beside the channels fill a GEMM better than the channels alone
_MANY_TAPS = 81  # few input channels: from here on the columns are best made inside the Conv
_RUN = 8  # samples from which on a run over the batch is worth copying as such
_MANY_SAMPLES = 16  # pointwise, one thread: from here on copied columns leave the cache
_WIDE_ROW = 56  # depthwise, kernels of 5 and more: from here on taps divided between the operands beat whole rows
_SHORT_ROW, _ONE_THREAD_SHORT_ROW = 28, 16  # depthwise: up to here the products of whole rows are worth it
_COLUMN_IMAGE = 1024  # strided: up to here Col2Im's buffer for the whole batch is small enough
_MEDIUM_IMAGE = 196  # the same where that GEMM's result is half as large, or a third at one thread
_LARGE_IMAGE = 784  # pointwise: from here on a sample's GEMM is long enough by itself
_COLUMNS, _ONE_THREAD_COLUMNS = 324, 64  # up to here copying the columns costs less than transposing the result
_STRIDED_COLUMNS = 1024  # the same where a Slice would pick every other element
_LARGE_WEIGHT, _WIDENING_WEIGHT = 1 << 21, 1 << 18  # elements; read once for the batch, not once a sample
_FEW_SAMPLES, _FEW_SAMPLES_COLUMNS = 4, 49  # the columns' Gather copies runs of one element a sample

# What every plain input gradient and every weight gradient can fall back on, float64 included.
_ANY_INPUT = ("input.conv_transpose", "input.conv_transpose_crop", "input.pixel_shuffle", "input.matmul_taps")
_ANY_WEIGHT = ("weight.matmul_taps",)


def input_preferences(g: ConvGeometry, constant_weight: bool, one_thread: bool) -> tuple[str, ...]:
    if g.transposed:
        return ("input.conv", "input.im2col")
    if columns.is_one_window(g):
        return ("input.columns", *_ANY_INPUT)
    if g.unit_stride and g.is_pointwise:
        return _pointwise_input_preferences(g, constant_weight, one_thread)
    volume = g.rank == 3 and g.groups == 1 and g.is_static
    if volume and g.is_one_sample and g.input_size[0] > 1 and math.prod(g.output_size) <= _ONE_SAMPLE_VOLUME:
        return _ANY_INPUT
    if volume and (not g.is_pointwise or math.prod(g.output_size) <= _SMALL_VOLUME):
        return ("input.plane_col2im", *_ANY_INPUT)
    if not constant_weight and whole_image_pays(g, one_thread):
        return ("input.image_matmul", *_ANY_INPUT)
    if g.unit_stride and constant_weight and (g.groups == 1 or g.is_depthwise):
        # onnxruntime blocks the channels of a Conv whose weight is constant, and has no such form of ConvTranspose.
        return ("input.flipped_conv", *_ANY_INPUT)
    if not g.is_static:
        return _ANY_INPUT
    positions = math.prod(g.output_size)
    if g.groups > 1:
        # ConvTranspose adds its columns up on one thread; a Conv divides all of its work.
        several = not (one_thread or g.is_depthwise)
        if g.unit_stride:
            wide = min(g.in_channels_per_group, g.out_channels_per_group) > _FEW_GROUP_CHANNELS
            short = several and g.is_one_sample and wide and positions <= _LARGE_IMAGE
            return _ANY_INPUT if one_thread or short else ("input.flipped_conv", *_ANY_INPUT)
        small = several and positions <= (_COLUMN_IMAGE if g.is_one_sample else _SMALL_IMAGE)
        return ("input.col2im", *_ANY_INPUT) if small else _ANY_INPUT
    strided_image = g.rank == 2 and not (g.unit_stride or g.is_pointwise or constant_weight)
    one_sample_limit = _TINY_IMAGE if strided_image or (one_thread and g.unit_stride) else _ONE_SAMPLE_IMAGE
    if g.is_one_sample and positions <= one_sample_limit and g.rank < 3:
        return _ANY_INPUT  # its GEMM reads the weight as it lies
    if g.is_one_sample and strided_image:
        return ("input.col2im", *_ANY_INPUT)
    tiny = _STRIDED_COLUMN_IMAGE if strided_image else _TINY_IMAGE
    if positions <= (_ONE_THREAD_TINY_IMAGE if one_thread and not g.is_pointwise else tiny):
        return ("input.columns", "input.col2im", *_ANY_INPUT)
    if positions <= _SMALL_IMAGE:
        return ("input.col2im", *_ANY_INPUT)
    if g.in_channels < _FEW_CHANNELS or g.rank == 3:
        return _ANY_INPUT
    if g.unit_stride:
        return ("input.flipped_conv", *_ANY_INPUT)
    return ("input.col2im", *_ANY_INPUT) if positions <= _COLUMN_IMAGE else _ANY_INPUT


def _pointwise_input_preferences(g: ConvGeometry, constant_weight: bool, one_thread: bool) -> tuple[str, ...]:
    """Of a stride of 1: a Conv, unless one GEMM over the batch saves reading a large weight for each sample.

    Or unless a sample has so few positions that its own GEMM would leave most of each register empty.
    """
    size = g.in_channels * g.out_channels
    large = size >= _LARGE_WEIGHT or (size >= _WIDENING_WEIGHT and g.out_channels > g.in_channels)
    positions = math.prod(g.output_size)
    plain = not constant_weight and g.groups == 1 and g.is_static
    few = positions <= (_MORE_POSITIONS if one_thread and size >= _WIDENING_WEIGHT else _FEW_POSITIONS)
    if plain and g.is_one_sample and few:
        # A Conv would need the weight transposed, which takes longer than the GEMM; ConvTranspose copies its result.
        return ("input.matmul_taps", *_ANY_INPUT)
    together = plain and not (isinstance(g.batch, int) and g.batch < 2)
    if together and (positions <= _VECTOR or (large and positions <= _TINY_IMAGE)):
        return ("input.columns", "input.flipped_conv", *_ANY_INPUT)
    return ("input.flipped_conv", *_ANY_INPUT)


def _depthwise_weight_preferences(g: ConvGeometry, one_thread: bool) -> tuple[str, ...]:
    width = g.output_size[-1]
    if max(g.kernel_size) >= 5:
        wide = width >= _WIDE_ROW and g.unit_stride
        return ("weight.shifted_matmul", "weight.depthwise_rows") if wide else ("weight.depthwise_rows",)
    if g.unit_stride:
        short = width <= (_ONE_THREAD_SHORT_ROW if one_thread else _SHORT_ROW)
        return ("weight.depthwise_rows",) if short else _ANY_WEIGHT
    if width > _ONE_THREAD_SHORT_ROW:
        return ("weight.swapped_conv", "weight.depthwise_rows")
    return ("weight.depthwise_rows",) if one_thread else ("weight.columns", "weight.depthwise_rows")


def weight_preferences(g: ConvGeometry, one_thread: bool) -> tuple[str, ...]:
    if whole_image_pays(g, one_thread):
        return ("weight.image_matmul", "weight.depthwise_rows")
    if g.is_depthwise:
        return _depthwise_weight_preferences(g, one_thread)
    if columns.is_one_window(g):
        return ("weight.columns", *_ANY_WEIGHT)  # no copy at all
    if g.is_one_sample and g.is_pointwise and g.groups == 1:
        if math.prod(g.output_size) >= _LARGE_IMAGE:
            return ("weight.sample_matmul", *_ANY_WEIGHT)
        return ("weight.columns", *_ANY_WEIGHT) if g.unit_stride else _ANY_WEIGHT
    preferences = _matmul_weight_preferences(g, one_thread)
    if not _channels_last_pays(g, one_thread):
        return preferences
    # The side with more channels gives the GEMM its rows: the other side's columns are copied once for all of them.
    few = isinstance(g.batch, int) and g.batch * math.prod(g.output_size) <= _TINY_IMAGE
    more = g.in_channels > g.out_channels or (g.in_channels == g.out_channels and g.is_one_sample and not one_thread)
    flipped = more and g.unit_stride and not few
    return ("weight.channels_last_flipped_conv" if flipped else "weight.channels_last_conv", *preferences)


def _channels_last_pays(g: ConvGeometry, one_thread: bool) -> bool:
    """For almost every kernel of more than one tap: a GEMM of full size, and columns that stay in the cache."""
    if not g.is_static or g.is_pointwise:
        return False
    if g.rank == 3:
        dense = g.groups == 1 and min(g.in_channels, g.out_channels) >= _FEW_CHANNELS
        return dense and g.is_one_sample and math.prod(g.output_size) > _volume_columns(g, one_thread)
    if g.groups > 1:
        return min(g.in_channels_per_group, g.out_channels_per_group) > _FEW_GROUP_CHANNELS
    if one_thread:
        return True
    if g.in_channels < _FEW_CHANNELS:
        if all(k <= s for k, s in zip(g.kernel_size, g.stride, strict=True)):
            return False  # no element is read twice
        if g.is_one_sample and g.taps < _FEW_CHANNELS:
            return False  # what one thread rearranges is as long as the product
    # Else the result's Transpose, on one thread, takes too long.
    return math.prod(g.output_size) > (_FEW_SAMPLES_COLUMNS if g.is_one_sample else _TINY_IMAGE)


def _matmul_weight_preferences(g: ConvGeometry, one_thread: bool) -> tuple[str, ...]:
    """Neither depthwise nor by `channels_last_conv`: matrix products of copied columns, in float64 too."""
    if g.groups > 1:
        return _grouped_weight_preferences(g, one_thread)
    few = min(g.in_channels, g.out_channels) < _FEW_CHANNELS
    if not g.is_static:
        return ("weight.im2col",) if few and not g.is_pointwise else _ANY_WEIGHT
    if g.is_pointwise:
        return _pointwise_weight_preferences(g, one_thread)
    if few:
        return _few_channels_weight_preferences(g, one_thread)
    positions = math.prod(g.output_size)
    limit = _ONE_THREAD_COLUMNS if one_thread else _COLUMNS if g.unit_stride else _STRIDED_COLUMNS
    if g.rank == 3:
        limit = _ONE_THREAD_TINY_IMAGE
    if isinstance(g.batch, int) and g.batch < _FEW_SAMPLES:
        limit = _volume_columns(g, one_thread) if g.rank == 3 and g.is_one_sample else _FEW_SAMPLES_COLUMNS
    if positions <= limit:
        return ("weight.columns", *_ANY_WEIGHT)
    if g.rank == 3:
        # A Slice picks what a stride leaves of a row one by one.
        small = math.prod(g.output_size[1:]) <= (_ONE_THREAD_PLANE if one_thread else _SMALL_PLANE)
        if _has_runs(g) and (small or any(s > 1 for s in g.stride[1:])):
            return ("weight.depth_taps_gathered", *_ANY_WEIGHT)
        return ("weight.depth_taps", *_ANY_WEIGHT)
    return _ANY_WEIGHT if one_thread else ("weight.sample_matmul", *_ANY_WEIGHT)


def _volume_columns(g: ConvGeometry, one_thread: bool) -> int:
    """Output positions of one sample of a volume up to which the columns are copied."""
    large = math.prod(g.weight_shape) >= _LARGE_WEIGHT and not one_thread
    return _ONE_SAMPLE_VOLUME if large else _FEW_SAMPLES_COLUMNS


def _has_runs(g: ConvGeometry) -> bool:
    """A Gather whose runs are the batch copies enough at once."""
    return isinstance(g.batch, int) and g.batch >= _RUN


def _few_channels_weight_preferences(g: ConvGeometry, one_thread: bool) -> tuple[str, ...]:
    """Fewer than `_FEW_CHANNELS` on a side, static, not pointwise."""
    if g.rank == 1:
        return _ANY_WEIGHT
    if not g.unit_stride and all(k <= s for k, s in zip(g.kernel_size, g.stride, strict=True)):
        return ("weight.swapped_conv",)
    if g.rank == 2:
        few_inputs = g.in_channels < _FEW_CHANNELS
        if few_inputs and math.prod(g.kernel_size) >= _MANY_TAPS:
            return ("weight.swapped_conv", *_ANY_WEIGHT)
        if g.unit_stride and not few_inputs:
            # Taps beside the few output channels fill the GEMM's short side.
            return ("weight.shifted_matmul", *_ANY_WEIGHT)
    return ("weight.columns",) if one_thread and g.unit_stride else ("weight.sample_matmul", "weight.columns")


def _pointwise_weight_preferences(g: ConvGeometry, one_thread: bool) -> tuple[str, ...]:
    positions = math.prod(g.output_size)
    if g.rank == 3 and any(s > 1 for s in g.stride[1:]) and _has_runs(g) and positions < _LARGE_IMAGE:
        return ("weight.depth_taps_gathered", *_ANY_WEIGHT)
    # One product of weight size a sample is worth it where it is small beside the two operands.
    product, operands = g.in_channels * g.out_channels, (g.in_channels + g.out_channels) * positions
    if positions >= _LARGE_IMAGE and product <= operands:
        return ("weight.sample_matmul", *_ANY_WEIGHT)
    if one_thread:
        many = isinstance(g.batch, int) and g.batch >= _MANY_SAMPLES
        if positions >= _MEDIUM_IMAGE and (many or (3 * product <= operands and _has_runs(g))):
            return ("weight.sample_matmul", *_ANY_WEIGHT)
        copied = g.unit_stride and g.rank == 2 and _TINY_IMAGE < positions <= _COLUMNS and _has_runs(g)
        return ("weight.columns", *_ANY_WEIGHT) if copied else _ANY_WEIGHT
    if positions >= _MEDIUM_IMAGE and 2 * product <= operands:
        return ("weight.sample_matmul", *_ANY_WEIGHT)
    return _ANY_WEIGHT


def _grouped_weight_preferences(g: ConvGeometry, one_thread: bool) -> tuple[str, ...]:
    """On several threads the Slices of matmul_taps, one for every tap, run on one of them."""
    if g.is_pointwise:
        return _ANY_WEIGHT
    few = min(g.in_channels_per_group, g.out_channels_per_group)
    strided = not g.unit_stride
    if one_thread or not g.is_static:
        return ("weight.shifted_matmul", "weight.im2col") if few < _FEW_CHANNELS else _ANY_WEIGHT
    if strided and few < _FEW_CHANNELS:
        return ("weight.swapped_conv", "weight.im2col")
    if not strided and few <= _FEW_CHANNELS:
        return ("weight.shifted_matmul", "weight.im2col")
    small = strided or math.prod(g.output_size) <= _TINY_IMAGE
    return ("weight.columns", *_ANY_WEIGHT) if small and _has_runs(g) else _ANY_WEIGHT


def cuda_preferences(gradient: str, g: ConvGeometry, dtype: str, opset: int) -> tuple[str, ...]:
    """Forms whose every node stays on the CUDA provider; which of them is faster has not been measured.

    ConvTranspose is cuDNN's own backward-data call. It has no bfloat16 kernel, so at stride 1 a Conv goes first where
    that one has (opset 22).
    """
    if gradient == "input":
        if g.transposed:
            return ("input.conv", "input.im2col")
        half_conv = cuda_kernel("Conv", dtype, opset) and not cuda_kernel("ConvTranspose", dtype, opset)
        return ("input.flipped_conv", *_ANY_INPUT) if half_conv else _ANY_INPUT
    if g.is_depthwise:
        return ("weight.depthwise_taps", *_ANY_WEIGHT)
    if not g.is_pointwise and min(g.in_channels_per_group, g.out_channels_per_group) < _FEW_CHANNELS:
        return ("weight.im2col", *_ANY_WEIGHT)  # one GEMM with a longer side than a tap's
    return _ANY_WEIGHT
