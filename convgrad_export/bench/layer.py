"""One row of a layer table, and the shorthands the tables are written in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..geometry import ConvGeometry


@dataclass(frozen=True)
class Layer:
    """One distinct convolution of a network.

    Attributes:
        name: within the network. count: how often the network has it.
        channels: C. filters: M. size: I. kernel: K. The other attributes are those of the forward call.
    """

    name: str
    channels: int
    filters: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    transposed: bool = False
    output_padding: Any = 0
    count: int = 1

    def geometry(self, batch: int) -> ConvGeometry:
        """The geometry at a batch size."""
        first, second = (self.channels, self.filters) if self.transposed else (self.filters, self.channels)
        return ConvGeometry.from_forward(
            (batch, self.channels, *self.size),
            (first, second // self.groups, *self.kernel),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            transposed=self.transposed,
            output_padding=self.output_padding,
        )


def image(
    name: str, c: int, m: int, size: int, k: int, s: int = 1, groups: int = 1, count: int = 1, d: int = 1
) -> Layer:
    """A square 2-D layer padded to keep its size at stride 1."""
    return Layer(name, c, m, (size, size), (k, k), s, d * (k // 2), d, groups, count=count)


def merged(layers: Iterable[Layer]) -> list[Layer]:
    """Layers of equal geometry as one entry, under the first one's name, with their counts added."""
    found: dict[ConvGeometry, Layer] = {}
    for layer in layers:
        key = layer.geometry(1)
        known = found.get(key)
        found[key] = replace(known, count=known.count + layer.count) if known else layer
    return list(found.values())


def parameters(layers: Iterable[Layer]) -> int:
    """Weight elements of all convolutions, biases apart."""
    return sum(layer.count * math.prod(layer.geometry(1).weight_shape) for layer in layers)


def multiplications(geometry: ConvGeometry) -> int:
    """Products of the direct formula. The forward pass and both gradients have the same number.

    Taps that fall on padding are counted, as is customary.
    """
    positions = geometry.input_size if geometry.transposed else geometry.output_size
    filters = geometry.out_channels_per_group if geometry.transposed else geometry.out_channels
    channels = geometry.in_channels if geometry.transposed else geometry.in_channels_per_group
    return int(geometry.batch * filters * channels * geometry.taps * math.prod(positions))
