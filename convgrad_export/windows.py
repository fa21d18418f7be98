"""Ranges and phases of one axis of a convolution, as integers. Neither torch nor onnx is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

Size: TypeAlias = Any  # int, or a tracer's symbolic integer


@dataclass(frozen=True)
class Window:
    """A range of an axis that is extended by zeros on both sides: crop first, then pad. All in elements, all >= 0."""

    crop_begin: Size
    crop_end: Size
    pad_begin: Size
    pad_end: Size

    @property
    def crops(self) -> bool:
        return bool(self.crop_begin != 0 or self.crop_end != 0)

    @property
    def pads(self) -> bool:
        return bool(self.pad_begin != 0 or self.pad_end != 0)


def window(size: Size, start: Size, length: Size) -> Window:
    """Elements ``start .. start+length`` of an axis of `size` elements with zeros on both sides of it.

    A range that misses the axis altogether crops everything away, so the window is ``length`` zeros.
    """
    stop = start + length
    if stop <= 0 or start >= size:
        return Window(0, size, 0, length)
    return Window(max(start, 0), max(size - stop, 0), max(-start, 0), max(stop - size, 0))


@dataclass(frozen=True)
class Phase:
    """Input positions ``first, first+s, first+2s, ...`` of one axis and the kernel taps that reach them.

    ``input[first + s*j] = sum over t of weight[tap_first + t*tap_step] * grad_output[base + j - t*dilation]``
    """

    first: int
    tap_first: int
    tap_step: int
    taps: int
    base: int
    dilation: int
