"""The convolution layers of published networks, as tables of their distinct geometries.

Sizes are those of the papers' usual inputs. Each table gives every distinct convolution once, with the number of times
the network has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


def _image(name: str, c: int, m: int, size: int, k: int, s: int = 1, groups: int = 1, count: int = 1) -> Layer:
    """A square 2-D layer padded to keep its size at stride 1."""
    return Layer(name, c, m, (size, size), (k, k), s, k // 2, 1, groups, count=count)


def resnet18() -> list[Layer]:
    """He et al., arXiv:1512.03385, 224x224."""
    layers = [_image("conv1", 3, 64, 224, 7, 2), _image("layer1", 64, 64, 56, 3, count=4)]
    size, channels = 56, 64
    for stage in (2, 3, 4):
        wide = 2 * channels
        layers += [
            _image(f"layer{stage}.0.conv1", channels, wide, size, 3, 2),
            _image(f"layer{stage}.0.downsample", channels, wide, size, 1, 2),
            _image(f"layer{stage}", wide, wide, size // 2, 3, count=3),
        ]
        size, channels = size // 2, wide
    return layers


def resnet50(groups: int = 1, width: int = 64) -> list[Layer]:
    """He et al., arXiv:1512.03385, 224x224, the stride on the 3x3; ResNeXt (arXiv:1611.05431) with groups and width."""
    layers = [_image("conv1", 3, 64, 224, 7, 2)]
    size, channels = 56, 64
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        inner, outer, stride = width * 2 ** (stage - 1), 256 * 2 ** (stage - 1), 1 if stage == 1 else 2
        after = size // stride
        layers += [
            _image(f"layer{stage}.0.conv1", channels, inner, size, 1),
            _image(f"layer{stage}.0.conv2", inner, inner, size, 3, stride, groups),
            _image(f"layer{stage}.conv3", inner, outer, after, 1, count=blocks),
            _image(f"layer{stage}.0.downsample", channels, outer, size, 1, stride),
            _image(f"layer{stage}.conv1", outer, inner, after, 1, count=blocks - 1),
            _image(f"layer{stage}.conv2", inner, inner, after, 3, 1, groups, blocks - 1),
        ]
        size, channels = after, outer
    return _merged(layers)


def resnext50() -> list[Layer]:
    """ResNeXt-50 32x4d: Xie et al., arXiv:1611.05431."""
    return resnet50(groups=32, width=128)


def mobilenet_v2() -> list[Layer]:
    """Sandler et al., arXiv:1801.04381, table 2, 224x224."""
    layers = [_image("features.0", 3, 32, 224, 3, 2)]
    size, channels, index = 112, 32, 1
    for expansion, filters, repeats, first_stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for repeat in range(repeats):
            stride, hidden = first_stride if repeat == 0 else 1, channels * expansion
            if expansion > 1:
                layers.append(_image(f"features.{index}.expand", channels, hidden, size, 1))
            layers.append(_image(f"features.{index}.depthwise", hidden, hidden, size, 3, stride, hidden))
            size //= stride
            layers.append(_image(f"features.{index}.project", hidden, filters, size, 1))
            channels, index = filters, index + 1
    return _merged([*layers, _image("features.18", 320, 1280, 7, 1)])


def r3d18() -> list[Layer]:
    """Tran et al., arXiv:1711.11248, R3D-18, 16 frames of 112x112."""

    def cube(name: str, c: int, m: int, size: tuple[int, ...], k: int, s: int = 1, count: int = 1) -> Layer:
        return Layer(name, c, m, size, (k, k, k), s, k // 2, count=count)

    layers = [Layer("stem", 3, 64, (16, 112, 112), (3, 7, 7), (1, 2, 2), (1, 3, 3))]
    size: tuple[int, ...] = (16, 56, 56)
    channels = 64
    layers.append(cube("layer1", 64, 64, size, 3, count=4))
    for stage in (2, 3, 4):
        wide, half = 2 * channels, tuple(length // 2 for length in size)
        layers += [
            cube(f"layer{stage}.0.conv1", channels, wide, size, 3, 2),
            cube(f"layer{stage}.0.downsample", channels, wide, size, 1, 2),
            cube(f"layer{stage}", wide, wide, half, 3, count=3),
        ]
        size, channels = half, wide
    return layers


def tcn() -> list[Layer]:
    """A temporal convolutional network after Bai et al., arXiv:1803.01271: causal, dilated, 64 channels."""
    return [
        Layer(f"level{level}", 64, 64, (1024,), (3,), 1, ((2 * 2**level, 0),), 2**level, count=2) for level in range(8)
    ]


def _merged(layers: list[Layer]) -> list[Layer]:
    """Layers of equal geometry as one entry with their counts added."""
    merged: dict[tuple[Any, ...], Layer] = {}
    for layer in layers:
        key = (layer.geometry(1).to_dict().__repr__(),)
        known = merged.get(key)
        count = layer.count + (known.count if known else 0)
        merged[key] = Layer(**{**vars(known or layer), "count": count})
    return list(merged.values())


NETWORKS: dict[str, Callable[[], list[Layer]]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnext50": resnext50,
    "mobilenet_v2": mobilenet_v2,
    "r3d_18": r3d18,
    "tcn": tcn,
}
