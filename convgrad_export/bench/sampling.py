"""Float64 references for some elements of a large result, so that checking a layer costs less than timing it.

A gradient restricted to some channels (and, where the sum does not run over the batch, to some samples) is the gradient
of a smaller convolution of the same kind: it goes to the ordinary reference of `accuracy`, with the full length of its
sums. The rest of the tensor is held to a second, looser test against another implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..accuracy import ErrorReport, compare, error_bound, reference_and_bounds
from ..geometry import ConvGeometry

FORWARD, INPUT, WEIGHT = "forward", "input", "weight"
OPERATIONS = (FORWARD, INPUT, WEIGHT)

_CHANNELS = 4  # of the result, or of each side of a weight gradient
_GROUPED_CHANNELS = 8
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


def expected(operation: str, geometry: ConvGeometry, operands: Mapping[str, np.ndarray]) -> Expected:
    """A sample of the result for float32 operands ``input``, ``weight`` and, unless forward, ``grad_output``."""
    g = geometry
    groups = _spread(g.groups, max(2, _GROUPED_CHANNELS // g.in_channels_per_group)) if g.groups > 1 else None
    channels = _members(groups, g.in_channels, g.groups)
    filters = _members(groups, g.out_channels, g.groups)
    if groups is None and operation != FORWARD:
        channels = _spread(g.in_channels, _CHANNELS)
    if groups is None and operation != INPUT:
        filters = _spread(g.out_channels, _CHANNELS)
    samples = np.arange(g.batch) if operation == WEIGHT else _spread(g.batch, 2)
    rows, columns = (channels, filters) if g.transposed else (filters, channels)
    whole_second = np.arange(g.weight_shape[1])
    columns = columns if groups is None else whole_second
    parts = {
        "input": operands["input"][samples][:, channels],
        "weight": operands["weight"][rows][:, columns],
    }
    part = ConvGeometry.from_forward(
        parts["input"].shape,
        parts["weight"].shape,
        g.stride,
        g.pads,
        g.dilation,
        1 if groups is None else len(groups),
        transposed=g.transposed,
        output_padding=g.output_padding,
    )
    if operation == FORWARD:
        reference, magnitude = _forward(part, parts), _forward(part, {k: np.abs(v) for k, v in parts.items()})
        length = g.in_channels_per_group * g.taps
        return Expected(samples, filters, reference, error_bound(reference, magnitude, length, "float32"))
    parts["grad_output"] = operands["grad_output"][samples][:, filters]
    reference, bound = reference_and_bounds(part, parts, "float32", "float32")[operation]
    first, second = (samples, channels) if operation == INPUT else (rows, columns)
    return Expected(first, second, reference, bound)


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` indices below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _members(groups: np.ndarray | None, count: int, group_count: int) -> np.ndarray:
    """The channels of the given groups; all of them without groups."""
    if groups is None:
        return np.arange(count)
    size = count // group_count
    return (groups[:, None] * size + np.arange(size)).ravel()


def _forward(geometry: ConvGeometry, operands: Mapping[str, np.ndarray]) -> np.ndarray:
    """The forward pass in float64, PyTorch's own kernels with oneDNN off."""
    import torch

    from ..torch_convolution import forward

    data, weight = (torch.from_numpy(operands[name].astype(np.float64)) for name in ("input", "weight"))
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        return forward(geometry, data, weight).numpy()
