"""Six networks in the manner of published ones, in PyTorch alone: the part of the zoo that every test run exports."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .networks import Network, image


class Residual(nn.Module):
    """He et al., arXiv:1512.03385: strided stem, max pooling, two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)
        )
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.shortcut = nn.Conv2d(8, 16, 1, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = functional.relu(self.first(x) + x)
        x = functional.relu(self.second(x) + self.shortcut(x))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    """Ronneberger et al., arXiv:1505.04597, in 2-D or 3-D, with instance normalization after biased convolutions."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv = nn.Conv2d if rank == 2 else nn.Conv3d
        norm = nn.InstanceNorm2d if rank == 2 else nn.InstanceNorm3d
        up = nn.ConvTranspose2d if rank == 2 else nn.ConvTranspose3d
        self.down = nn.Sequential(conv(1, 4, 3, padding=1), norm(4, affine=True), nn.LeakyReLU(0.1))
        self.bottom = nn.Sequential(conv(4, 8, 3, 2, 1), norm(8, affine=True), nn.LeakyReLU(0.1))
        self.up = up(8, 4, 2, 2)
        self.out = conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(self.bottom(skip))], 1))


class Separable(nn.Module):
    """Howard et al., arXiv:1905.02244: depthwise convolution, squeeze and excitation, hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 5, 2, 2, groups=12, bias=False), nn.BatchNorm2d(12))
        self.squeeze = nn.Sequential(nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 1), nn.Hardsigmoid())
        self.project = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        return self.project(functional.hardswish(x * self.squeeze(x.mean((2, 3), keepdim=True))))


class WaveNet(nn.Module):
    """van den Oord et al., arXiv:1609.03499: dilated causal convolutions with gates and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 6, 1)
        self.gates = nn.ModuleList(nn.Conv1d(6, 12, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(6, 6, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), torch.zeros(())
        for i, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            a, b = gate(functional.pad(x, (2**i, 0))).chunk(2, 1)
            y = skip(torch.tanh(a) * torch.sigmoid(b))
            x, total = x + y, total + y
        return total


class PatchTransformer(nn.Module):
    """Dosovitskiy et al., arXiv:2010.11929: patches by a strided convolution, then attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.block(tokens).mean(1))


SMALL_NETWORKS = [
    Network("residual", "torch", Residual, image(2, 3, 33, 30)),
    Network("unet", "torch", lambda: UNet(2), image(1, 1, 16, 20)),
    Network("unet3d", "torch", lambda: UNet(3), image(1, 1, 8, 6, 10)),
    Network("separable", "torch", Separable, image(2, 3, 15, 16)),
    Network("wavenet", "torch", WaveNet, image(2, 1, 40)),
    Network("patch_transformer", "torch", PatchTransformer, image(2, 3, 16, 16)),
]
