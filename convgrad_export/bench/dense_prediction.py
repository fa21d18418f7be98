"""Layer tables of networks that give one output per pixel."""

from __future__ import annotations

from .layer import Layer, image, merged


def unet() -> list[Layer]:
    """Ronneberger et al., arXiv:1505.04597, figure 1: 572x572 grey, unpadded 3x3, upwards by 2x2 transposed ones."""

    def valid(name: str, c: int, m: int, size: int) -> Layer:
        return Layer(name, c, m, (size, size), (3, 3))

    layers, size, channels = [], 572, 1
    for level in range(5):
        wide = 64 * 2**level
        layers += [valid(f"down{level}.1", channels, wide, size), valid(f"down{level}.2", wide, wide, size - 2)]
        size, channels = (size - 4) // 2, wide
    size *= 2  # the last level is not pooled
    for level in (3, 2, 1, 0):
        wide = 64 * 2**level
        layers.append(Layer(f"up{level}", 2 * wide, wide, (size, size), (2, 2), 2, transposed=True))
        size *= 2
        layers += [valid(f"up{level}.1", 2 * wide, wide, size), valid(f"up{level}.2", wide, wide, size - 2)]
        size -= 4
    return merged([*layers, Layer("classes", 64, 2, (size, size), (1, 1))])


def deeplab_v3() -> list[Layer]:
    """Chen et al., arXiv:1706.05587: ResNet-50 at output stride 8, 513x513, 21 classes, without the auxiliary head."""
    layers = [image("conv1", 3, 64, 513, 7, 2)]
    size, channels, dilation = 129, 64, 1
    for stage, (blocks, stride, dilated) in enumerate(((3, 1, 1), (4, 2, 1), (6, 1, 2), (3, 1, 4)), start=1):
        inner, outer = 64 * 2 ** (stage - 1), 256 * 2 ** (stage - 1)
        after = (size + stride - 1) // stride
        layers += [
            image(f"layer{stage}.0.conv1", channels, inner, size, 1),
            image(f"layer{stage}.0.conv2", inner, inner, size, 3, stride, d=dilation),
            image(f"layer{stage}.conv3", inner, outer, after, 1, count=blocks),
            image(f"layer{stage}.0.downsample", channels, outer, size, 1, stride),
            image(f"layer{stage}.conv1", outer, inner, after, 1, count=blocks - 1),
            image(f"layer{stage}.conv2", inner, inner, after, 3, d=dilated, count=blocks - 1),
        ]
        size, channels, dilation = after, outer, dilated
    layers.append(image("aspp.1x1", 2048, 256, size, 1))
    layers += [image(f"aspp.rate{rate}", 2048, 256, size, 3, d=rate) for rate in (12, 24, 36)]
    layers += [
        image("aspp.pooled", 2048, 256, 1, 1),
        image("aspp.project", 5 * 256, 256, size, 1),
        image("head", 256, 256, size, 3),
        image("classes", 256, 21, size, 1),
    ]
    return merged(layers)
