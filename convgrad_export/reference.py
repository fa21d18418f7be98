"""Convolutions and their gradients in float64 by numpy alone: what a result is held to before it is timed.

Written from the definition of the forward pass, one matrix product for each kernel tap, independent of the catalogue
and of torch. What `convgrad tune` and `convgrad bench` check against; the tests hold it to float64 autograd.

Of a large layer some elements are computed, so that checking it costs less than timing it. A convolution restricted to
some channels (and, where the sum does not run over the batch, to some samples) is a smaller convolution of the same
kind, with the full length of its sums. The rest of the tensor can be held to a second, looser test against another
implementation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dtypes
from .accuracy import ErrorReport, compare, error_bound
from .geometry import ConvGeometry
from .lowering import compute_dtype

FORWARD, INPUT, WEIGHT = "forward", "input", "weight"
OPERATIONS = (FORWARD, INPUT, WEIGHT)
# The tensors that each is computed from.
OPERANDS = {FORWARD: ("input", "weight"), INPUT: ("grad_output", "weight"), WEIGHT: ("grad_output", "input")}

_MOST_ELEMENTS = 1 << 40  # 8 TiB of float64
_SAMPLES = 2  # tells batch and channels apart
_WHOLE_TENSOR = 8.0  # two roundings, and elements outside the sample with somewhat larger sums


@dataclass(frozen=True)
class Expected:
    """Some elements of a result with their bounds.

    Attributes:
        first, second: which indices of the result's first and second axis are sampled.
        reference, bound: float64, of shape (len(first), len(second), ...).
    """

    first: np.ndarray
    second: np.ndarray
    reference: np.ndarray
    bound: np.ndarray

    def report(self, result: np.ndarray, error_factor: float = 1.0) -> ErrorReport:
        """Error of the sampled elements, in units of ``error_factor * bound``."""
        return compare(result[self.first][:, self.second], self.reference, self.bound, error_factor)

    def agrees(self, result: np.ndarray, other: np.ndarray, error_factor: float = 1.0) -> bool:
        """Whether the whole result is within a few bounds of another implementation's."""
        if result.shape != other.shape:
            return False
        limit = np.float32(_WHOLE_TENSOR * error_factor * float(self.bound.max(initial=0.0)))
        return bool(np.max(np.abs(result - other), initial=np.float32(0)) <= limit)


def expected(
    operation: str,
    geometry: ConvGeometry,
    operands: Mapping[str, np.ndarray],
    dtype: str = "float32",
    *,
    channels: int = 4,
) -> Expected:
    """A sample of what the operation must give on these operands, and within what bound.

    Args:
        operation: one of `OPERATIONS`. geometry: every size an integer.
        operands: those of `OPERANDS`, with values that `dtype` holds exactly. dtype: of the result.
        channels: most channels of the result, or of each side of a weight gradient; of whole groups twice as many.
    """
    g = geometry
    groups = _spread(g.groups, max(2, 2 * channels // g.in_channels_per_group)) if g.groups > 1 else None
    inputs = _members(groups, g.in_channels, g.groups)
    filters = _members(groups, g.out_channels, g.groups)
    if groups is None and operation != FORWARD:
        inputs = _spread(g.in_channels, channels)
    if groups is None and operation != INPUT:
        filters = _spread(g.out_channels, channels)
    samples = np.arange(g.batch) if operation == WEIGHT else _spread(g.batch, _SAMPLES)
    rows, columns = (inputs, filters) if g.transposed else (filters, inputs)
    if groups is not None:
        columns = np.arange(g.weight_shape[1])
    chosen = {"input": (samples, inputs), "weight": (rows, columns), "grad_output": (samples, filters)}
    parts = {}
    for name in OPERANDS[operation]:
        first, second = chosen[name]
        parts[name] = operands[name][first][:, second].astype(np.float64)
    part = ConvGeometry.from_forward(
        (len(samples), len(inputs), *g.input_size),
        (len(rows), len(columns), *g.kernel_size),
        g.stride,
        g.pads,
        g.dilation,
        1 if groups is None else len(groups),
        transposed=g.transposed,
        output_padding=g.output_padding,
    )
    reference = compute(operation, part, parts)
    magnitude = compute(operation, part, {name: np.abs(value) for name, value in parts.items()})
    length = int(part.sum_length(operation))
    bound = error_bound(reference, magnitude, length, dtype, compute_dtype(dtype))  # half types are summed in float32
    result = {FORWARD: (samples, filters), INPUT: (samples, inputs), WEIGHT: (rows, columns)}
    return Expected(*result[operation], reference, bound)


def compute(operation: str, g: ConvGeometry, operands: Mapping[str, np.ndarray]) -> np.ndarray:
    """The convolution's result or one gradient, float64.

    Args:
        operation: one of `OPERATIONS`. operands: those of `OPERANDS`, float64.
    """
    first, second = (operands[name] for name in OPERANDS[operation])
    if not g.transposed:
        return {FORWARD: _forward, INPUT: _input_gradient, WEIGHT: _weight_gradient}[operation](g, first, second)
    # A transposed convolution is the input gradient of its adjoint, whose output it takes as input.
    plain = g.adjoint()
    if operation == FORWARD:
        return _input_gradient(plain, first, second)
    if operation == INPUT:
        return _forward(plain, first, second)
    return _weight_gradient(plain, second, first)


def _forward(g: ConvGeometry, input: np.ndarray, weight: np.ndarray) -> np.ndarray:
    data = _between_zeros(g, input)
    result = np.zeros((len(input), g.groups, g.out_channels_per_group, math.prod(g.output_size)))
    for tap, read in _taps(g):
        result += _filters(g, weight, tap) @ _grouped(g, data[read])
    return result.reshape(len(input), g.out_channels, *g.output_size)


def _input_gradient(g: ConvGeometry, grad_output: np.ndarray, weight: np.ndarray) -> np.ndarray:
    grad = _grouped(g, grad_output)
    span = np.zeros((len(grad_output), g.in_channels, *g.span))
    for tap, read in _taps(g):
        part = _filters(g, weight, tap).swapaxes(1, 2) @ grad
        span[read] += part.reshape(len(grad_output), g.in_channels, *g.output_size)
    result = np.zeros((len(grad_output), g.in_channels, *g.input_size))
    inside, image = _inside(g)
    result[image] = span[inside]
    return result


def _weight_gradient(g: ConvGeometry, grad_output: np.ndarray, input: np.ndarray) -> np.ndarray:
    data, grad = _between_zeros(g, input), _grouped(g, grad_output)
    result = np.zeros(g.weight_shape)
    for tap, read in _taps(g):
        product = (grad @ _grouped(g, data[read]).swapaxes(2, 3)).sum(0)
        place: tuple[Any, ...] = (slice(None), slice(None), *tap)
        result[place] = product.reshape(g.weight_shape[:2])
    return result


def _taps(g: ConvGeometry) -> Iterable[tuple[tuple[int, ...], tuple[Any, ...]]]:
    """Every kernel tap, and the index of what it reads of the span."""
    for tap in itertools.product(*(range(k) for k in g.kernel_size)):
        axes = zip(g.dilation, tap, g.output_size, g.stride, strict=True)
        yield tap, (..., *(slice(d * k, d * k + (o - 1) * s + 1, s) for d, k, o, s in axes))


def _filters(g: ConvGeometry, weight: np.ndarray, tap: tuple[int, ...]) -> np.ndarray:
    """One tap of the weight (M, C/G, *K) as (G, M/G, C/G)."""
    place: tuple[Any, ...] = (..., *tap)
    return weight[place].reshape(g.groups, g.out_channels_per_group, g.in_channels_per_group)


def _grouped(g: ConvGeometry, value: np.ndarray) -> np.ndarray:
    """(N, channels, *O) as (N, G, channels/G, positions)."""
    return value.reshape(len(value), g.groups, value.shape[1] // g.groups, math.prod(g.output_size))


def _between_zeros(g: ConvGeometry, input: np.ndarray) -> np.ndarray:
    """The input with its padding as far as the forward pass reads it: (N, C, *span)."""
    result = np.zeros((*input.shape[:2], *g.span))
    inside, image = _inside(g)
    result[inside] = input[image]
    return result


def _inside(g: ConvGeometry) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Where the input lies in the span, and how much of it: the last rows may be read by no tap."""
    axes = list(zip(g.begin, g.input_size, g.span, strict=True))
    read = [max(0, min(size, span - lo)) for lo, size, span in axes]
    inside = (..., *(slice(lo, lo + count) for (lo, _, _), count in zip(axes, read, strict=True)))
    return inside, (..., *(slice(0, count) for count in read))


def make_operands(
    geometry: ConvGeometry,
    dtype: str,
    *,
    integers: bool,
    seed: int = 0,
    names: Iterable[str] = ("input", "weight", "grad_output"),
) -> dict[str, np.ndarray]:
    """float64 arrays with values that `dtype` holds exactly: normal deviates rounded, or small integers.

    Integers are so small that every sum of a gradient is exact in the type it is computed in, as far as its length
    allows, and at most 8.

    Raises:
        MemoryError: more elements than can be.
    """
    check_elements(geometry, names)
    rng = np.random.default_rng(seed)
    shapes = {name: _shapes(geometry)[name] for name in names}
    if not integers:
        rounded = dtypes.numpy_dtype(dtype)
        return {name: rng.standard_normal(shape).astype(rounded).astype(np.float64) for name, shape in shapes.items()}
    longest = max(int(geometry.sum_length(gradient)) for gradient in (INPUT, WEIGHT))
    room = math.isqrt(int(0.5 / dtypes.unit_roundoff(compute_dtype(dtype))) // max(1, longest))
    limit = max(1, min(8, room))
    return {name: rng.integers(-limit, limit + 1, shape, np.int8).astype(np.float64) for name, shape in shapes.items()}


def check_elements(geometry: ConvGeometry, names: Iterable[str]) -> None:
    """Refuse operands that no machine has room for.

    Raises:
        MemoryError: the tensor and its size.
    """
    for name in names:
        shape = _shapes(geometry)[name]
        if math.prod(shape) > _MOST_ELEMENTS:
            raise MemoryError(f"{name} of shape {shape} has {math.prod(shape)} elements")


def _shapes(geometry: ConvGeometry) -> dict[str, tuple[int, ...]]:
    return {"input": geometry.input_shape, "weight": geometry.weight_shape, "grad_output": geometry.output_shape}


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` indices below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _members(groups: np.ndarray | None, count: int, group_count: int) -> np.ndarray:
    """The channels of the given groups; all of them without groups."""
    if groups is None:
        return np.arange(count)
    size = count // group_count
    return (groups[:, None] * size + np.arange(size)).ravel()
