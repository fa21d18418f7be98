"""Networks that are trained here: small definitions of our own, and torchvision's and segmentation_models_pytorch's.

Random weights, small inputs; nothing is downloaded. The two packages are imported when one of their networks is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.networks import declare_torchvision_operators


def _sizes(count: int, first: int) -> list[int]:
    return [first * 2**i for i in range(count)]


class UNet(nn.Module):
    """Three levels with transposed convolutions on the way up, after Ronneberger et al., arXiv:1505.04597."""

    def __init__(self, width: int = 16, levels: int = 3, classes: int = 3) -> None:
        super().__init__()
        widths = _sizes(levels, width)
        self.down = nn.ModuleList(self._block(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(self._block(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skipped = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            skipped.append(x)
        skipped.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skipped.pop(), up(x)], 1))
        return self.head(x)


class _TemporalBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.reach = 2 * dilation
        self.first = parametrizations.weight_norm(nn.Conv1d(inputs, outputs, 3, dilation=dilation))
        self.second = parametrizations.weight_norm(nn.Conv1d(outputs, outputs, 3, dilation=dilation))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for convolution in (self.first, self.second):
            y = self.dropout(torch.relu(convolution(functional.pad(y, (self.reach, 0)))))
        return torch.relu(y + self.skip(x))


class TemporalNetwork(nn.Module):
    """Causal dilated residual blocks with weight normalization and dropout, after Bai et al., arXiv:1803.01271."""

    def __init__(self, width: int = 64, levels: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_TemporalBlock(width if i else 8, width, 2**i, 0.1) for i in range(levels)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


class _MultiReceptiveField(nn.Module):
    """The mean of residual stacks with several kernel sizes and dilations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                parametrizations.weight_norm(nn.Conv1d(channels, channels, k, dilation=d, padding=d * (k - 1) // 2))
                for d in (1, 3)
            )
            for k in (3, 7)
        )

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for stack in self.stacks:
            y = x
            for convolution in stack:
                y = y + convolution(functional.leaky_relu(y, 0.1))
            total = total + y
        return total / len(self.stacks)


class HifiGanGenerator(nn.Module):
    """Mel spectrogram to waveform by weight-normalized transposed convolutions, after Kong et al., arXiv:2010.05646."""

    def __init__(self, mels: int = 80, width: int = 64, rates: Sequence[int] = (8, 4, 2)) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv1d(mels, width, 7, padding=3))
        self.up, self.fields = nn.ModuleList(), nn.ModuleList()
        for level, rate in enumerate(rates):
            channels = width // 2**level
            layer = nn.ConvTranspose1d(channels, channels // 2, 2 * rate, stride=rate, padding=rate // 2)
            self.up.append(parametrizations.weight_norm(layer))
            self.fields.append(_MultiReceptiveField(channels // 2))
        self.last = parametrizations.weight_norm(nn.Conv1d(width // 2 ** len(rates), 1, 7, padding=3))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.first(mel)
        for up, field in zip(self.up, self.fields, strict=True):
            x = field(up(functional.leaky_relu(x, 0.1)))
        return torch.tanh(self.last(functional.leaky_relu(x)))


class DcganGenerator(nn.Module):
    """Noise to a 32x32 image by transposed convolutions and BatchNorm, after Radford et al., arXiv:1511.06434."""

    def __init__(self, noise: int = 64, width: int = 32) -> None:
        super().__init__()
        widths = [4 * width, 2 * width, width]
        layers: list[nn.Module] = [nn.ConvTranspose2d(noise, widths[0], 4, bias=False)]
        for inputs, outputs in zip(widths, [*widths[1:], 0], strict=True):
            layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
            layers.append(nn.ConvTranspose2d(inputs, outputs or 3, 4, stride=2, padding=1, bias=not outputs))
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise)


def without_dropout(module: nn.Module) -> nn.Module:
    """Dropout and stochastic depth switched off, in place: contenders draw different random numbers."""
    for part in module.modules():
        if isinstance(part, nn.Dropout) or type(part).__name__ == "StochasticDepth":
            part.p = 0.0
    return module


def auxiliary_cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Inception v3's loss in training: the auxiliary head counts 0.4 (Szegedy et al., arXiv:1512.00567)."""
    logits, auxiliary = output
    return functional.cross_entropy(logits, target) + 0.4 * functional.cross_entropy(auxiliary, target)


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with what it is trained on.

    Attributes:
        package: what it needs besides torch, None for our own.
        shape: of the input without the batch. batch: samples a step in the parity runs.
        loss: as for `export_training_step`. target: "class", "pixels" or "values".
        classes: number of classes, where there are any.
    """

    name: str
    package: str | None
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 2
    loss: Any = "cross_entropy"
    target: str = "class"
    classes: int = 10
    output_shape: tuple[int, ...] = ()

    def data(
        self, steps: int, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """`steps` batches of normally distributed inputs, and targets."""
        generator = torch.Generator().manual_seed(seed)
        result = []
        for _ in range(steps):
            x = torch.randn((batch, *self.shape), generator=generator)
            if self.target == "values":
                y = torch.rand((batch, *self.output_shape), generator=generator) - 0.5
            else:
                positions = self.shape[1:] if self.target == "pixels" else ()
                y = torch.randint(0, self.classes, (batch, *positions), generator=generator)
            result.append((x.to(dtype), y.to(dtype) if y.is_floating_point() else y))
        return result


def _vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_torchvision_operators()
        import torchvision

        return torchvision.models.get_model(name, weights=None, **{"num_classes": 10, **options})

    return build


def _deeplab() -> nn.Module:
    declare_torchvision_operators()
    import segmentation_models_pytorch

    return segmentation_models_pytorch.DeepLabV3Plus("resnet18", encoder_weights=None, classes=3)


IMAGE = (3, 64, 64)
NETWORKS = [
    TrainedNetwork("resnet18", "torchvision", _vision("resnet18"), IMAGE, 4),
    TrainedNetwork("resnet50", "torchvision", _vision("resnet50"), IMAGE, 4),
    TrainedNetwork("mobilenet_v2", "torchvision", _vision("mobilenet_v2"), IMAGE, 4),
    TrainedNetwork("mobilenet_v3_small", "torchvision", _vision("mobilenet_v3_small"), IMAGE, 4),
    TrainedNetwork("efficientnet_b0", "torchvision", _vision("efficientnet_b0"), IMAGE, 4),
    TrainedNetwork("convnext_tiny", "torchvision", _vision("convnext_tiny"), IMAGE),
    TrainedNetwork("vgg16_bn", "torchvision", _vision("vgg16_bn"), (3, 32, 32), 4),
    TrainedNetwork("densenet121", "torchvision", _vision("densenet121"), IMAGE, 4),
    TrainedNetwork(
        "inception_v3",
        "torchvision",
        _vision("inception_v3", init_weights=False, aux_logits=True),
        (3, 299, 299),
        loss=auxiliary_cross_entropy,
    ),
    TrainedNetwork("unet", None, UNet, IMAGE, target="pixels", classes=3),
    TrainedNetwork("deeplabv3plus", "segmentation_models_pytorch", _deeplab, IMAGE, target="pixels", classes=3),
    TrainedNetwork("r3d_18", "torchvision", _vision("r3d_18"), (3, 4, 32, 32)),
    TrainedNetwork("tcn", None, TemporalNetwork, (8, 128), 4),
    TrainedNetwork(
        "hifigan_generator", None, HifiGanGenerator, (80, 8), loss="l1", target="values", output_shape=(1, 512)
    ),
    TrainedNetwork("dcgan_generator", None, DcganGenerator, (64, 1, 1), 4, "mse", "values", output_shape=(3, 32, 32)),
]
BY_NAME = {network.name: network for network in NETWORKS}
