"""Layer tables of one-dimensional networks: sequence models and vocoders."""

from __future__ import annotations

from .layer import Layer, merged


def tcn() -> list[Layer]:
    """A temporal convolutional network after Bai et al., arXiv:1803.01271: causal, dilated, 64 channels."""
    return [
        Layer(f"level{level}", 64, 64, (1024,), (3,), 1, ((2 * 2**level, 0),), 2**level, count=2) for level in range(8)
    ]


def wavenet() -> list[Layer]:
    """Van den Oord et al., arXiv:1609.03499, in the size of Deep Voice (arXiv:1702.07825): half a second at 16 kHz.

    40 layers in four cycles of dilations 1 to 512, kernel 2, causal; 64 residual and 256 skip channels, 256 levels.
    """
    length, residual, skip, levels = 8000, 64, 256, 256

    def causal(name: str, c: int, m: int, k: int = 1, d: int = 1, count: int = 1) -> Layer:
        return Layer(name, c, m, (length,), (k,), 1, ((d * (k - 1), 0),), d, count=count)

    return merged(
        [
            causal("first", levels, residual, 2),
            *(causal(f"dilation{2**step}", residual, 2 * residual, 2, 2**step, count=4) for step in range(10)),
            causal("residual", residual, residual, count=40),
            causal("skip", residual, skip, count=40),
            causal("output.1", skip, levels),
            causal("output.2", levels, levels),
        ]
    )


def hifi_gan() -> list[Layer]:
    """Kong et al., arXiv:2010.05646, generator V1 on a training segment of 32 mel frames (8192 samples)."""
    layers, size, channels = [Layer("conv_pre", 80, 512, (32,), (7,), 1, 3)], 32, 512
    for index, (rate, kernel) in enumerate(((8, 16), (8, 16), (2, 4), (2, 4)), start=1):
        half = channels // 2
        layers.append(
            Layer(f"up{index}", channels, half, (size,), (kernel,), rate, (kernel - rate) // 2, transposed=True)
        )
        size, channels = size * rate, half
        for width in (3, 7, 11):
            layers += [
                Layer(
                    f"block{index}.kernel{width}.dilation{d}",
                    channels,
                    channels,
                    (size,),
                    (width,),
                    1,
                    d * (width // 2),
                    d,
                    count=4 if d == 1 else 1,
                )
                for d in (1, 3, 5)
            ]
    return merged([*layers, Layer("conv_post", 32, 1, (size,), (7,), 1, 3)])
