"""Gradients in float64 by numpy alone: what a candidate's result is held to before it is timed.

Independent of the catalogue and of torch: one matrix product for each kernel tap, written from the definition of the
forward pass. Only some channels are computed where there are many, so that large layers are checked in bounded time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import dtypes
from ..accuracy import ErrorReport, compare, error_bound
from ..geometry import ConvGeometry
from ..lowering import compute_dtype

_CHECKED_CHANNELS = 32


@dataclass(frozen=True)
class Expected:
    """Reference and error bound of the channels `channels` of a gradient, along axis `axis`."""

    axis: int
    channels: np.ndarray
    reference: np.ndarray
    bound: np.ndarray

    def report(self, result: np.ndarray, error_factor: float) -> ErrorReport:
        return compare(np.take(result, self.channels, self.axis), self.reference, self.bound, error_factor)


def expected(
    gradient: str, geometry: ConvGeometry, operands: Mapping[str, np.ndarray], dtype: str, seed: int = 0
) -> Expected:
    """What the gradient must be on these operands (float64, representable in `dtype`), and within what bound.

    Args:
        gradient: ``"input"`` or ``"weight"``. geometry: batch included, all integers.
        operands: ``grad_output`` and the other operand of that gradient.
        seed: of the choice of channels, where not all are computed.
    """
    count = geometry.in_channels if gradient == "input" else geometry.out_channels
    rng = np.random.default_rng(seed)
    channels = np.arange(count)
    if count > _CHECKED_CHANNELS:
        channels = np.sort(rng.choice(count, _CHECKED_CHANNELS, replace=False))
    axis = 1 if gradient == "input" or geometry.transposed else 0
    if axis == 1 and gradient == "weight":
        # A transposed weight has its output channels group by group on axis 1: all of them are computed.
        channels = np.arange(geometry.out_channels_per_group)
    function = input_gradient if gradient == "input" else weight_gradient
    reference = function(geometry, operands, channels)
    magnitude = function(geometry, {name: np.abs(value) for name, value in operands.items()}, channels)
    length = int(geometry.sum_length(gradient))
    bound = error_bound(reference, magnitude, length, dtype, compute_dtype(dtype))  # half types are summed in float32
    return Expected(axis, channels, reference, bound)


def input_gradient(g: ConvGeometry, operands: Mapping[str, np.ndarray], channels: np.ndarray) -> np.ndarray:
    """Channels `channels` of grad_input (N, C, *I), float64, from ``grad_output`` and ``weight``."""
    grad, weight = operands["grad_output"], operands["weight"]
    batch = grad.shape[0]
    per_in, per_out = g.in_channels_per_group, g.out_channels_per_group
    if g.transposed:
        data = _padded(g, grad, g.output_size)
        result = np.zeros((batch, len(channels), *g.input_size))
        for tap in _taps(g):
            part = data[(slice(None), slice(None), *_range(g, tap, g.input_size))]
            for row, channel in enumerate(channels.tolist()):
                group = channel // per_in
                filters = weight[channel][(slice(None), *tap)]
                result[:, row] += np.tensordot(filters, part[:, group * per_out : (group + 1) * per_out], (0, 1))
        return result
    padded = np.zeros((batch, len(channels), *(i + lo + hi for i, (lo, hi) in zip(g.input_size, g.pads, strict=True))))
    flat = grad.reshape(batch, g.groups, per_out, math.prod(g.output_size))
    groups, within = np.divmod(channels, per_in)
    for tap in _taps(g):
        kernel: tuple[Any, ...] = (slice(None), slice(None), *tap)
        taps = weight[kernel].reshape(g.groups, per_out, per_in)
        place: tuple[Any, ...] = (slice(None), slice(None), *_range(g, tap, g.output_size))
        if g.groups == 1:
            product = np.matmul(taps[0][:, within].T, flat[:, 0])
        else:
            product = np.matmul(taps[groups, :, within][:, None, :], flat[:, groups])
        padded[place] += product.reshape(batch, len(channels), *g.output_size)
    inner = tuple(slice(lo, lo + i) for (lo, _), i in zip(g.pads, g.input_size, strict=True))
    return padded[(slice(None), slice(None), *inner)]


def weight_gradient(g: ConvGeometry, operands: Mapping[str, np.ndarray], channels: np.ndarray) -> np.ndarray:
    """The part of grad_weight for output channels `channels`, float64, from ``grad_output`` and ``input``."""
    grad, data = operands["grad_output"], operands["input"]
    if g.transposed:
        adjoint = g.adjoint()
        return weight_gradient(adjoint, {"grad_output": data, "input": grad}, np.arange(adjoint.out_channels))
    batch, per_in = grad.shape[0], g.in_channels_per_group
    padded = _padded(g, data, g.input_size)
    positions = math.prod(g.output_size)
    lines = np.moveaxis(grad[:, channels], 1, 0).reshape(len(channels), batch * positions)
    groups = channels // g.out_channels_per_group
    result = np.zeros((len(channels), per_in, *g.kernel_size))
    for tap in _taps(g):
        part = padded[(slice(None), slice(None), *_range(g, tap, g.output_size))]
        planes = np.moveaxis(part.reshape(batch, g.groups, per_in, positions), 0, 2)
        columns = planes.reshape(g.groups, per_in, batch * positions)
        place: tuple[Any, ...] = (slice(None), slice(None), *tap)
        if g.groups == 1:
            result[place] = lines @ columns[0].T
        else:
            result[place] = np.matmul(columns[groups], lines[:, :, None])[:, :, 0]
    return result


def operands_for(
    gradient: str, geometry: ConvGeometry, dtype: str, *, integers: bool, seed: int = 0
) -> dict[str, np.ndarray]:
    """float64 arrays with values that `dtype` holds exactly: -1, 0 and 1, or normal deviates rounded."""
    rng = np.random.default_rng(seed)
    other = "weight" if gradient == "input" else "input"
    shapes = {
        other: geometry.weight_shape if gradient == "input" else geometry.input_shape,
        "grad_output": geometry.output_shape,
    }
    if integers:
        return {name: rng.integers(-1, 2, shape, np.int8).astype(np.float64) for name, shape in shapes.items()}
    rounded = dtypes.numpy_dtype(dtype)
    return {name: rng.standard_normal(shape).astype(rounded).astype(np.float64) for name, shape in shapes.items()}


def _taps(g: ConvGeometry) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(k) for k in g.kernel_size)))


def _range(g: ConvGeometry, tap: tuple[int, ...], counts: tuple[int, ...]) -> tuple[slice, ...]:
    """What a tap reads of each padded axis, for `counts` positions."""
    return tuple(
        slice(d * k, d * k + (n - 1) * s + 1, s) for d, k, n, s in zip(g.dilation, tap, counts, g.stride, strict=True)
    )


def _padded(g: ConvGeometry, value: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """`value` with its zeros around, long enough for every tap (a transposed operator may stop short or reach past)."""
    if not g.transposed:
        return np.pad(value, [(0, 0), (0, 0), *g.pads])
    after = [max(0, f - lo - n) for f, (lo, _), n in zip(g.span, g.pads, sizes, strict=True)]
    return np.pad(value, [(0, 0), (0, 0), *((lo, more) for (lo, _), more in zip(g.pads, after, strict=True))])


def with_checked_batch(geometry: ConvGeometry) -> ConvGeometry:
    """The geometry at the batch size that results are checked at: 2 tells batch and channels apart."""
    return replace(geometry, batch=min(geometry.batch, 2))
