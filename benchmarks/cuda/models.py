"""ResNet-50, ConvNeXt-tiny and R3D-18 for training steps, written out so that the benchmark needs torch alone.

`small=True` keeps the kinds of layers and cuts depth, width and image, for a run of the benchmark's own code on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """He et al., arXiv:1512.03385, figure 5; the stride on the 3x3."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        outer = 4 * inner
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
            *(nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
            *(nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50(small: bool = False) -> nn.Module:
    """He et al., arXiv:1512.03385, table 1."""
    depths, width, classes = ((1, 1), 8, 10) if small else ((3, 4, 6, 3), 64, 1000)
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        for block in range(depth):
            layers.append(Bottleneck(channels, inner, 2 if stage > 0 and block == 0 else 1))
            channels = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Liu et al., arXiv:2201.03545, figure 4: depthwise 7x7, then two layers along the channels, scaled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.widen, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        branch = self.scale * self.narrow(nn.functional.gelu(self.widen(branch)))
        return x + branch.permute(0, 3, 1, 2)


def convnext_tiny(small: bool = False) -> nn.Module:
    """Liu et al., arXiv:2201.03545, without stochastic depth, whose randomness has no place in a comparison."""
    depths, widths, classes = ((1, 1), (8, 16), 10) if small else ((3, 3, 9, 3), (96, 192, 384, 768), 1000)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0])]
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage > 0:
            layers += [ChannelNorm(widths[stage - 1]), nn.Conv2d(widths[stage - 1], width, 2, 2)]
        layers += [ConvNextBlock(width) for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], classes)]
    return nn.Sequential(*layers, *head)


class BasicBlock3d(nn.Module):
    """Tran et al., arXiv:1711.11248, R3D: two 3x3x3 convolutions and a shortcut."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv3d(channels, filters, 3, stride, 1, bias=False), nn.BatchNorm3d(filters), nn.ReLU()),
            *(nn.Conv3d(filters, filters, 3, 1, 1, bias=False), nn.BatchNorm3d(filters)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != filters:
            self.shortcut = nn.Sequential(nn.Conv3d(channels, filters, 1, stride, bias=False), nn.BatchNorm3d(filters))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def r3d_18(small: bool = False) -> nn.Module:
    """Tran et al., arXiv:1711.11248, table 1, 16 frames of 112x112, the 400 classes of Kinetics."""
    widths, classes = ((8, 16), 10) if small else ((64, 128, 256, 512), 400)
    layers: list[nn.Module] = [
        nn.Conv3d(3, widths[0], (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
        nn.BatchNorm3d(widths[0]),
        nn.ReLU(),
    ]
    channels = widths[0]
    for stage, width in enumerate(widths):
        layers += [BasicBlock3d(channels, width, 2 if stage else 1), BasicBlock3d(width, width, 1)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, classes))


# name: how to build it, and the shape of its input without the batch, whole and small
MODELS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "resnet50": (resnet50, (3, 224, 224), (3, 32, 32)),
    "convnext_tiny": (convnext_tiny, (3, 224, 224), (3, 32, 32)),
    "r3d_18": (r3d_18, (3, 16, 112, 112), (3, 4, 16, 16)),
}


def example(name: str, batch: int, small: bool, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """(model in training mode, input, labels), the same for every call."""
    build, whole, cut = MODELS[name]
    torch.manual_seed(0)
    model = build(small)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((batch, *(cut if small else whole)), generator=generator)
    labels: Any = torch.randint(0, 10, (batch,), generator=generator)
    return model.to(device).train(), x.to(device), labels.to(device)
