"""Layer tables of image and video classifiers."""

from __future__ import annotations

from .layer import Layer, image, merged


def resnet18() -> list[Layer]:
    """He et al., arXiv:1512.03385, 224x224."""
    layers = [image("conv1", 3, 64, 224, 7, 2), image("layer1", 64, 64, 56, 3, count=4)]
    size, channels = 56, 64
    for stage in (2, 3, 4):
        wide = 2 * channels
        layers += [
            image(f"layer{stage}.0.conv1", channels, wide, size, 3, 2),
            image(f"layer{stage}.0.downsample", channels, wide, size, 1, 2),
            image(f"layer{stage}", wide, wide, size // 2, 3, count=3),
        ]
        size, channels = size // 2, wide
    return layers


def resnet50(groups: int = 1, width: int = 64) -> list[Layer]:
    """He et al., arXiv:1512.03385, 224x224, the stride on the 3x3; ResNeXt (arXiv:1611.05431) with groups and width."""
    layers = [image("conv1", 3, 64, 224, 7, 2)]
    size, channels = 56, 64
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        inner, outer, stride = width * 2 ** (stage - 1), 256 * 2 ** (stage - 1), 1 if stage == 1 else 2
        after = size // stride
        layers += [
            image(f"layer{stage}.0.conv1", channels, inner, size, 1),
            image(f"layer{stage}.0.conv2", inner, inner, size, 3, stride, groups),
            image(f"layer{stage}.conv3", inner, outer, after, 1, count=blocks),
            image(f"layer{stage}.0.downsample", channels, outer, size, 1, stride),
            image(f"layer{stage}.conv1", outer, inner, after, 1, count=blocks - 1),
            image(f"layer{stage}.conv2", inner, inner, after, 3, 1, groups, blocks - 1),
        ]
        size, channels = after, outer
    return merged(layers)


def resnext50() -> list[Layer]:
    """ResNeXt-50 32x4d: Xie et al., arXiv:1611.05431."""
    return resnet50(groups=32, width=128)


def vgg16() -> list[Layer]:
    """Simonyan and Zisserman, arXiv:1409.1556, configuration D, 224x224."""
    layers, size, channels = [], 224, 3
    for stage, (filters, repeats) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1):
        for repeat in range(1, repeats + 1):
            layers.append(image(f"conv{stage}_{repeat}", channels, filters, size, 3))
            channels = filters
        size //= 2
    return merged(layers)


def mobilenet_v2() -> list[Layer]:
    """Sandler et al., arXiv:1801.04381, table 2, 224x224."""
    layers = [image("features.0", 3, 32, 224, 3, 2)]
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
                layers.append(image(f"features.{index}.expand", channels, hidden, size, 1))
            layers.append(image(f"features.{index}.depthwise", hidden, hidden, size, 3, stride, hidden))
            size //= stride
            layers.append(image(f"features.{index}.project", hidden, filters, size, 1))
            channels, index = filters, index + 1
    return merged([*layers, image("features.18", 320, 1280, 7, 1)])


def efficientnet_b0() -> list[Layer]:
    """Tan and Le, arXiv:1905.11946, table 1, 224x224, the squeeze-and-excitation layers as 1x1 convolutions."""
    layers = [image("stem", 3, 32, 224, 3, 2)]
    size, channels = 112, 32
    for stage, (expansion, kernel, first_stride, filters, repeats) in enumerate(
        (
            (1, 3, 1, 16, 1),
            (6, 3, 2, 24, 2),
            (6, 5, 2, 40, 2),
            (6, 3, 2, 80, 3),
            (6, 5, 1, 112, 3),
            (6, 5, 2, 192, 4),
            (6, 3, 1, 320, 1),
        ),
        start=1,
    ):
        for repeat in range(repeats):
            stride, hidden, name = first_stride if repeat == 0 else 1, channels * expansion, f"stage{stage}.{repeat}"
            if expansion > 1:
                layers.append(image(f"{name}.expand", channels, hidden, size, 1))
            layers.append(image(f"{name}.depthwise", hidden, hidden, size, kernel, stride, hidden))
            size //= stride
            squeezed = channels // 4
            layers.append(image(f"{name}.squeeze", hidden, squeezed, 1, 1))
            layers.append(image(f"{name}.excite", squeezed, hidden, 1, 1))
            layers.append(image(f"{name}.project", hidden, filters, size, 1))
            channels = filters
    return merged([*layers, image("head", 320, 1280, 7, 1)])


def convnext_tiny() -> list[Layer]:
    """Liu et al., arXiv:2201.03545, 224x224; the pointwise layers, linear in the authors' code, are left out."""
    layers = [Layer("stem", 3, 96, (224, 224), (4, 4), 4)]
    size, channels = 56, 96
    for stage, blocks in enumerate((3, 3, 9, 3), start=1):
        if stage > 1:
            layers.append(Layer(f"downsample{stage}", channels, 2 * channels, (size, size), (2, 2), 2))
            size, channels = size // 2, 2 * channels
        layers.append(image(f"stage{stage}.depthwise", channels, channels, size, 7, groups=channels, count=blocks))
    return layers


def inception_v3() -> list[Layer]:
    """Szegedy et al., arXiv:1512.00567, 299x299, without the auxiliary classifier; sizes as in torchvision."""

    def conv(name: str, c: int, m: int, size: int, k: tuple[int, int], s: int = 1, padded: bool = True) -> Layer:
        return Layer(name, c, m, (size, size), k, s, (k[0] // 2, k[1] // 2) if padded else 0)

    one, three, row, column = (1, 1), (3, 3), (1, 7), (7, 1)
    layers = [
        conv("stem.1", 3, 32, 299, three, 2, padded=False),
        conv("stem.2", 32, 32, 149, three, padded=False),
        conv("stem.3", 32, 64, 147, three),
        conv("stem.4", 64, 80, 73, one),
        conv("stem.5", 80, 192, 73, three, padded=False),
    ]
    for name, c, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        layers += [
            conv(f"{name}.1x1", c, 64, 35, one),
            conv(f"{name}.5x5.1", c, 48, 35, one),
            conv(f"{name}.5x5.2", 48, 64, 35, (5, 5)),
            conv(f"{name}.3x3.1", c, 64, 35, one),
            conv(f"{name}.3x3.2", 64, 96, 35, three),
            conv(f"{name}.3x3.3", 96, 96, 35, three),
            conv(f"{name}.pool", c, pooled, 35, one),
        ]
    layers += [
        conv("6a.3x3", 288, 384, 35, three, 2, padded=False),
        conv("6a.double.1", 288, 64, 35, one),
        conv("6a.double.2", 64, 96, 35, three),
        conv("6a.double.3", 96, 96, 35, three, 2, padded=False),
    ]
    for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        layers += [
            conv(f"{name}.1x1", 768, 192, 17, one),
            conv(f"{name}.7x7.1", 768, c, 17, one),
            conv(f"{name}.7x7.2", c, c, 17, row),
            conv(f"{name}.7x7.3", c, 192, 17, column),
            conv(f"{name}.double.1", 768, c, 17, one),
            conv(f"{name}.double.2", c, c, 17, column),
            conv(f"{name}.double.3", c, c, 17, row),
            conv(f"{name}.double.4", c, c, 17, column),
            conv(f"{name}.double.5", c, 192, 17, row),
            conv(f"{name}.pool", 768, 192, 17, one),
        ]
    layers += [
        conv("7a.3x3.1", 768, 192, 17, one),
        conv("7a.3x3.2", 192, 320, 17, three, 2, padded=False),
        conv("7a.7x7.1", 768, 192, 17, one),
        conv("7a.7x7.2", 192, 192, 17, row),
        conv("7a.7x7.3", 192, 192, 17, column),
        conv("7a.7x7.4", 192, 192, 17, three, 2, padded=False),
    ]
    for name, c in (("7b", 1280), ("7c", 2048)):
        layers += [
            conv(f"{name}.1x1", c, 320, 8, one),
            conv(f"{name}.3x3.1", c, 384, 8, one),
            conv(f"{name}.3x3.2a", 384, 384, 8, (1, 3)),
            conv(f"{name}.3x3.2b", 384, 384, 8, (3, 1)),
            conv(f"{name}.double.1", c, 448, 8, one),
            conv(f"{name}.double.2", 448, 384, 8, three),
            conv(f"{name}.double.3a", 384, 384, 8, (1, 3)),
            conv(f"{name}.double.3b", 384, 384, 8, (3, 1)),
            conv(f"{name}.pool", c, 192, 8, one),
        ]
    return merged(layers)


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
