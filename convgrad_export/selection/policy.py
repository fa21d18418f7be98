"""The fixed policy: which lowering for a geometry, dtype and provider, by stated rules and without any measurement.

The order of a preference list is the rule; the first entry that applies is taken. The rules come from the timings in
benchmarks/NOTES.md. Selection is separate from lowering: nothing here knows how a formula works.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import ArgumentTypeError, UnsupportedLoweringError
from ..geometry import ConvGeometry
from ..lowering import CPU, CUDA, LOWERINGS, Lowering, by_name, candidates, cuda_kernel
from .depthwise_rule import whole_image_pays
from .graph_walk import workspace_bytes
from .reduced_arithmetic import DEFAULT_ERROR_FACTOR, DIRECT, winograd_tiles
from .tuned import TUNED, is_tuned, tuned_name

AUTO = "auto"

_FEW_CHANNELS = 16  # a GEMM with a side this short leaves most of its register tile empty
# Output positions of a sample.
_TINY_IMAGE, _ONE_THREAD_TINY_IMAGE = 64, 8  # up to here a GEMM a sample does little but read the weight
_SMALL_IMAGE = 256  # up to here Col2Im's additions cost less than ConvTranspose's
_SMALL_VOLUME = 64  # up to here plane by plane pays for strided 1x1x1 kernels
_SMALL_PLANE, _ONE_THREAD_PLANE = 256, 64  # up to here a Gather of runs over the batch is faster than a Slice of rows
_RUN = 8  # samples from which on a run over the batch is worth copying as such
_COLUMN_IMAGE = 1024  # strided: up to here Col2Im's buffer for the whole batch is small enough
_LARGE_IMAGE = 784  # pointwise: from here on a sample's GEMM is long enough by itself
_COLUMNS, _ONE_THREAD_COLUMNS = 324, 64  # up to here copying the columns costs less than transposing the result
_FEW_SAMPLES, _FEW_SAMPLES_COLUMNS = 4, 49  # the columns' Gather copies runs of one element a sample

# What every plain input gradient and every weight gradient can fall back on, float64 included.
_ANY_INPUT = ("input.conv_transpose", "input.conv_transpose_crop", "input.pixel_shuffle", "input.matmul_taps")
_ANY_WEIGHT = ("weight.matmul_taps",)


def _input_preferences(g: ConvGeometry, constant_weight: bool, one_thread: bool) -> tuple[str, ...]:
    if g.transposed:
        return ("input.conv", "input.im2col")
    unit_stride = all(s == 1 for s in g.stride)
    if unit_stride and g.is_pointwise:
        return ("input.flipped_conv", *_ANY_INPUT)
    volume = g.rank == 3 and g.groups == 1 and g.is_static
    if volume and (not g.is_pointwise or math.prod(g.output_size) <= _SMALL_VOLUME):
        return ("input.plane_col2im", *_ANY_INPUT)
    if not constant_weight and whole_image_pays(g, one_thread):
        return ("input.image_matmul", *_ANY_INPUT)
    if unit_stride and constant_weight and (g.groups == 1 or g.is_depthwise):
        # onnxruntime blocks the channels of a Conv whose weight is constant, and has no such form of ConvTranspose.
        return ("input.flipped_conv", *_ANY_INPUT)
    if not g.is_static:
        return _ANY_INPUT
    positions = math.prod(g.output_size)
    if g.groups > 1:
        # ConvTranspose adds its columns up on one thread; a Conv divides all of its work.
        return ("input.flipped_conv", *_ANY_INPUT) if unit_stride and not one_thread else _ANY_INPUT
    if positions <= (_ONE_THREAD_TINY_IMAGE if one_thread else _TINY_IMAGE):
        return ("input.columns", "input.col2im", *_ANY_INPUT)
    if positions <= _SMALL_IMAGE:
        return ("input.col2im", *_ANY_INPUT)
    if g.in_channels < _FEW_CHANNELS or g.rank == 3:
        return _ANY_INPUT
    if unit_stride:
        return ("input.flipped_conv", *_ANY_INPUT)
    return ("input.col2im", *_ANY_INPUT) if positions <= _COLUMN_IMAGE else _ANY_INPUT


def _weight_preferences(g: ConvGeometry, one_thread: bool) -> tuple[str, ...]:
    unit_stride = all(s == 1 for s in g.stride)
    if whole_image_pays(g, one_thread):
        return ("weight.image_matmul", "weight.depthwise_rows")
    if g.is_depthwise:
        if max(g.kernel_size) >= 5 or (unit_stride and g.output_size[-1] <= 28):
            return ("weight.depthwise_rows",)
        return _ANY_WEIGHT if unit_stride else ("weight.swapped_conv", "weight.depthwise_rows")
    few = min(g.in_channels_per_group, g.out_channels_per_group) < _FEW_CHANNELS
    if g.groups > 1:
        return ("weight.shifted_matmul", "weight.im2col") if few and not g.is_pointwise else _ANY_WEIGHT
    if not g.is_static:
        return ("weight.im2col",) if few and not g.is_pointwise else _ANY_WEIGHT
    positions = math.prod(g.output_size)
    if g.is_pointwise:
        # One product of weight size a sample is worth it where it is small beside the two operands.
        small = g.in_channels * g.out_channels <= (g.in_channels + g.out_channels) * positions
        return ("weight.sample_matmul", *_ANY_WEIGHT) if small and positions >= _LARGE_IMAGE else _ANY_WEIGHT
    if few:
        if g.rank == 1:
            return _ANY_WEIGHT
        if any(s > 1 for s in g.stride) and all(k <= s for k, s in zip(g.kernel_size, g.stride, strict=True)):
            return ("weight.swapped_conv",)
        return ("weight.columns",) if one_thread and unit_stride else ("weight.sample_matmul", "weight.columns")
    limit = _ONE_THREAD_COLUMNS if one_thread else _COLUMNS
    if g.rank == 3:
        limit = _ONE_THREAD_TINY_IMAGE
    if isinstance(g.batch, int) and g.batch < _FEW_SAMPLES:
        limit = _FEW_SAMPLES_COLUMNS
    if positions <= limit:
        return ("weight.columns", *_ANY_WEIGHT)
    if g.rank == 3:
        # A Slice picks what a stride leaves of a row one by one.
        small = math.prod(g.output_size[1:]) <= (_ONE_THREAD_PLANE if one_thread else _SMALL_PLANE)
        if isinstance(g.batch, int) and g.batch >= _RUN and (small or any(s > 1 for s in g.stride[1:])):
            return ("weight.depth_taps_gathered", *_ANY_WEIGHT)
        return ("weight.depth_taps", *_ANY_WEIGHT)
    return _ANY_WEIGHT if one_thread else ("weight.sample_matmul", *_ANY_WEIGHT)


def _cuda_preferences(gradient: str, g: ConvGeometry, dtype: str, opset: int) -> tuple[str, ...]:
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


def check_name(lowering: object) -> str:
    """`lowering` if it is "auto", "tuned", "tuned:PATH" or a catalogue name.

    Raises:
        ArgumentTypeError: not a string. UnsupportedLoweringError: an unknown name.
    """
    if not isinstance(lowering, str):
        raise ArgumentTypeError(f"lowering is {lowering!r} ({type(lowering).__name__}), expected a string")
    if not is_way(lowering) and lowering not in LOWERINGS:
        raise UnsupportedLoweringError(f"lowering {lowering!r} is none of: {AUTO}, {TUNED}, {', '.join(LOWERINGS)}")
    return lowering


def is_way(lowering: str) -> bool:
    """A way to choose, not the name of a lowering."""
    return lowering == AUTO or is_tuned(lowering)


def choose(
    gradient: str,
    geometry: ConvGeometry,
    dtype: str = "float32",
    *,
    lowering: str = AUTO,
    provider: str = CPU,
    opset: int = 18,
    constant_weight: bool = False,
    max_error_factor: float = DEFAULT_ERROR_FACTOR,
    max_workspace: int | None = None,
    threads: int | None = None,
) -> Lowering:
    """The lowering for one gradient.

    Args:
        gradient: ``"input"``, ``"weight"`` or ``"bias"``.
        dtype: element type of the tensors.
        lowering: ``"auto"`` for the policy's choice, ``"tuned"`` for the fastest in the tuning cache (``"tuned:PATH"``
            names the file; what it lacks is the policy's), or a name of the catalogue. A name for another gradient than
            `gradient` leaves the choice to the policy, so that one name can be given for a whole backward call.
        provider: the onnxruntime execution provider that will run the graph.
        opset: version of the standard operators.
        constant_weight: the weight is an initializer of the model that no input overrides. Nothing measures that case,
            so ``"tuned"`` leaves it to the policy.
        max_error_factor: largest allowed error bound, in units of the direct form's: 1 takes direct forms only, 2 (the
            default) admits Winograd tiles of 4, and 8 tiles of 6 (`Lowering.error_factor`).
        max_workspace: most bytes of intermediate tensors, at the geometry's batch; None for no limit.
        threads: that will run the graph; None for onnxruntime's default, which the rules take for more than one.

    Raises:
        UnsupportedLoweringError: the named lowering is unknown, does not apply, or exceeds `max_workspace`, or none
            is left. GeometryError: `max_workspace` with an open batch. TuningCacheError: as `tuned.tuned_name`.
    """
    if not max_error_factor >= DIRECT:  # NaN too
        raise UnsupportedLoweringError(
            f"max_error_factor is {max_error_factor}, expected at least {DIRECT}: no form is better than the direct one"
        )
    named = LOWERINGS.get(lowering)
    if not is_way(lowering) and (named is None or named.gradient == gradient):
        entry = by_name(lowering, gradient, geometry, dtype, provider, opset)
        if reason := _workspace_why_not(entry.name, geometry, dtype, provider, opset, max_workspace):
            raise UnsupportedLoweringError(
                f"lowering {entry.name!r} for {geometry.describe()} in {dtype} {reason}: raise the limit, or leave the "
                f"choice to {AUTO!r}"
            )
        return entry
    if gradient == "bias":
        return LOWERINGS["bias.reduce_sum"]

    def why_not(name: str) -> str | None:
        entry = LOWERINGS[name]
        if entry.error_factor > max_error_factor:
            return f"its error factor is {entry.error_factor}, max_error_factor is {max_error_factor}"
        return entry.why_not(geometry, dtype, provider, opset) or _workspace_why_not(
            name, geometry, dtype, provider, opset, max_workspace
        )

    automatic = _automatic(
        gradient, geometry, dtype, provider, opset, constant_weight, max_error_factor, threads == 1, why_not
    )
    if not is_tuned(lowering) or constant_weight:
        return LOWERINGS[automatic]
    chosen = tuned_name(
        gradient,
        geometry,
        dtype,
        provider,
        threads,
        lowering=lowering,
        automatic=automatic,
        allowed=lambda name: name in LOWERINGS and why_not(name) is None,
    )
    return LOWERINGS[chosen]


def _automatic(
    gradient: str,
    geometry: ConvGeometry,
    dtype: str,
    provider: str,
    opset: int,
    constant_weight: bool,
    max_error_factor: float,
    one_thread: bool,
    why_not: Callable[[str], str | None],
) -> str:
    """The first preference that nothing speaks against, then any other entry of the catalogue."""
    plain = geometry.adjoint() if gradient == "weight" and geometry.transposed else geometry
    if provider == CUDA:
        preferences = _cuda_preferences(gradient, plain, dtype, opset)
    elif gradient == "input":
        preferences = _input_preferences(plain, constant_weight, one_thread)
    else:
        preferences = _weight_preferences(plain, one_thread)
    if provider != CUDA:  # cuDNN chooses its own arithmetic
        tiles = winograd_tiles(
            gradient, plain, max_error_factor, constant_weight=constant_weight, one_thread=one_thread
        )
        preferences = (*(f"{gradient}.winograd{tile}" for tile in tiles), *preferences)
    others = [entry.name for entry in candidates(gradient) if entry.error_factor == DIRECT]
    reasons = []
    for name in dict.fromkeys((*preferences, *others)):
        reason = why_not(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise UnsupportedLoweringError(
        f"no lowering gives the {gradient} gradient of {geometry.describe()} in {dtype} on {provider} at opset "
        f"{opset}: {'; '.join(reasons)}"
    )


def _workspace_why_not(
    name: str, geometry: ConvGeometry, dtype: str, provider: str, opset: int, limit: int | None
) -> str | None:
    if limit is None:
        return None
    need = workspace_bytes(name, geometry, dtype, provider, opset)
    return f"needs {need} bytes of workspace, max_workspace is {limit}" if need > limit else None
