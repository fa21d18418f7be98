"""The network of the load test, in torch alone: Triton's own Python imports it for the eager handler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convgrad_export.recipes import GradCAM

SIZE = 96  # pixels a side
CLASSES = 1000
LAYER = "stages.7"


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv:1512.03385, figure 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """The 18 layers of the same paper's table 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths = [64, 64, 128, 128, 256, 256, 512, 512]
        strides = [1, 1, 2, 1, 2, 1, 2, 1]
        self.stages = nn.Sequential(
            *(Block(a, b, s) for a, b, s in zip([64, *widths[:-1]], widths, strides, strict=True))
        )
        self.classify = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.stages(self.stem(x)).mean((2, 3)))


def grad_cam(layer: str) -> nn.Module:
    """The same random weights in every process."""
    torch.manual_seed(0)
    network = ResNet18().eval().requires_grad_(False)
    return GradCAM(network, layer)
