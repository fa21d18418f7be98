"""Every layer by itself in a training step: parameters and buffers in float64 against PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import convgrad_export as cg

from .parity import assert_same_training


class Residual(nn.Module):
    """A block whose input is used twice and whose ReLU works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return functional.relu(self.conv(x) + x, inplace=True)


def images(layers: Callable[[], list[nn.Module]]) -> Callable[[], nn.Module]:
    """The layers between a convolution and a mean over space: input 2x4x8x8."""
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def line(layers: Callable[[], list[nn.Module]]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(4, 4, 3, padding=1), *layers(), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )


def volume(layers: Callable[[], list[nn.Module]]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Unflatten(3, (4, 2)), nn.Conv3d(4, 4, 3, padding=1), *layers(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    )


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": images(lambda: [nn.BatchNorm2d(4)]),
    "batch_norm_momentum": images(lambda: [nn.BatchNorm2d(4, eps=0.1, momentum=0.7)]),
    "batch_norm_not_affine": images(lambda: [nn.BatchNorm2d(4, affine=False), nn.Tanh()]),
    "batch_norm_without_statistics": images(lambda: [nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh()]),
    "batch_norm_eval": images(lambda: [nn.BatchNorm2d(4).eval()]),
    "batch_norm1d": line(lambda: [nn.BatchNorm1d(4)]),
    "batch_norm3d": volume(lambda: [nn.BatchNorm3d(4)]),
    "batch_norm_not_affine_eval": images(lambda: [nn.BatchNorm2d(4, affine=False).eval(), nn.Tanh()]),
    "batch_norm_cumulative": images(lambda: [nn.BatchNorm2d(4, momentum=None)]),
    "batch_norm1d_cumulative": line(lambda: [nn.BatchNorm1d(4, momentum=None, affine=False), nn.Tanh()]),
    "batch_norm1d_eval": line(lambda: [nn.BatchNorm1d(4).eval()]),
    "batch_norm1d_of_vectors": images(
        lambda: [nn.Flatten(), nn.BatchNorm1d(256), nn.Tanh(), nn.Unflatten(1, (4, 8, 8))]
    ),
    "batch_norm3d_eval": volume(lambda: [nn.BatchNorm3d(4).eval()]),
    "batch_norm3d_without_statistics": volume(lambda: [nn.BatchNorm3d(4, track_running_stats=False), nn.Tanh()]),
    "instance_norm1d": line(lambda: [nn.InstanceNorm1d(4), nn.Tanh()]),
    "group_norm": images(lambda: [nn.GroupNorm(2, 4), nn.Tanh()]),
    "instance_norm": images(lambda: [nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh()]),
    "layer_norm": images(lambda: [nn.LayerNorm([4, 8, 8]), nn.Tanh()]),
    "local_response_norm": images(lambda: [nn.LocalResponseNorm(3)]),
    "weight_norm": images(lambda: [parametrizations.weight_norm(nn.Conv2d(4, 4, 3))]),
    "spectral_norm": images(lambda: [parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))]),
    "max_pool": images(lambda: [nn.MaxPool2d(3, stride=2, padding=1)]),
    "max_pool_ceil_dilated": images(lambda: [nn.MaxPool2d(2, stride=3, dilation=2, ceil_mode=True)]),
    "max_pool_window_behind": images(lambda: [nn.MaxPool2d((2, 1), (2, 4), (1, 0), ceil_mode=True)]),
    "max_pool1d": line(lambda: [nn.MaxPool1d(3, stride=2)]),
    "max_pool3d": volume(lambda: [nn.MaxPool3d(2, stride=1)]),
    "avg_pool": images(lambda: [nn.AvgPool2d(3, stride=2, padding=1)]),
    "avg_pool_exclusive": images(lambda: [nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)]),
    "avg_pool_window_behind": images(lambda: [nn.AvgPool2d((2, 1), (2, 4), (1, 0), ceil_mode=True)]),
    "avg_pool1d": line(lambda: [nn.AvgPool1d(3, stride=2)]),
    "avg_pool3d": volume(lambda: [nn.AvgPool3d(2, stride=1)]),
    "adaptive_avg_pool": images(lambda: [nn.AdaptiveAvgPool2d((3, 5))]),
    "adaptive_max_pool": images(lambda: [nn.AdaptiveMaxPool2d((3, 5))]),
    "lp_pool": images(lambda: [nn.Softplus(), nn.LPPool2d(2, 2)]),
    "lp_pool1d": line(lambda: [nn.Softplus(), nn.LPPool1d(3, 2)]),
    "adaptive_avg_pool1d": line(lambda: [nn.AdaptiveAvgPool1d(5)]),
    "adaptive_max_pool1d": line(lambda: [nn.AdaptiveMaxPool1d(5)]),
    "adaptive_avg_pool3d": volume(lambda: [nn.AdaptiveAvgPool3d((2, 3, 2))]),
    "adaptive_max_pool3d": volume(lambda: [nn.AdaptiveMaxPool3d((2, 3, 2))]),
    "reflect1d": line(lambda: [nn.ReflectionPad1d((1, 2)), nn.Conv1d(4, 4, 3)]),
    "replicate1d": line(lambda: [nn.ReplicationPad1d((2, 1)), nn.Conv1d(4, 4, 3)]),
    "circular1d": line(lambda: [nn.CircularPad1d((2, 1)), nn.Conv1d(4, 4, 3)]),
    "reflect3d": volume(lambda: [nn.ReflectionPad3d(1), nn.Conv3d(4, 4, 3)]),
    "replicate3d": volume(lambda: [nn.ReplicationPad3d((0, 1, 2, 0, 1, 1)), nn.Conv3d(4, 4, 2)]),
    "circular3d": volume(lambda: [nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular")]),
    "zero_pad": images(lambda: [nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 4, 3)]),
    "transposed": images(lambda: [nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2)]),
    "dilated": images(lambda: [nn.Conv2d(4, 4, 3, dilation=2, padding=(2, 1), padding_mode="reflect")]),
    "replicate": images(lambda: [nn.ReplicationPad2d((1, 2, 0, 1)), nn.Conv2d(4, 4, 3)]),
    "circular": images(lambda: [nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular")]),
    "constant_pad": images(lambda: [nn.ConstantPad2d((1, -1, 0, 2), 0.5), nn.Conv2d(4, 4, 3)]),
    "bilinear": images(lambda: [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3)]),
    "bicubic_aligned": images(lambda: [nn.Upsample(size=(5, 11), mode="bicubic", align_corners=True)]),
    "nearest": images(lambda: [nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3)]),
    "pixel_shuffle": images(lambda: [nn.Conv2d(4, 16, 1), nn.PixelShuffle(2), nn.Tanh(), nn.PixelUnshuffle(2)]),
    "residual_in_place": images(lambda: [Residual(), Residual()]),
    **{
        f"activation_{type(layer).__name__}": images(lambda layer=layer: [copy.deepcopy(layer), nn.Conv2d(4, 4, 1)])
        for layer in [
            *(nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.ELU(), nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish()),
            *(nn.Sigmoid(), nn.Softplus(beta=2), nn.Hardswish(), nn.Hardsigmoid(), nn.ReLU6(), nn.Softsign()),
            *(nn.PReLU(4), nn.Softmax(1), nn.GLU(dim=2), nn.CELU(), nn.Hardtanh(), nn.LogSigmoid(), nn.Tanhshrink()),
        ]
    },
}


# PyTorch's own float64 kernel has 1/6 in float32. In float32 the export's own verification compares three steps.
NO_FLOAT64 = {"activation_Hardsigmoid"}


def batches_for(module: nn.Module, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    images = [torch.randn(3, 4, 8, 8, generator=generator).to(dtype) for _ in range(2)]
    with torch.no_grad():
        shape = copy.deepcopy(module)(images[0]).shape
    return [(image, torch.randn(shape, generator=generator).to(dtype)) for image in images]


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in NO_FLOAT64])
def test_parameters_and_buffers_follow_pytorch(name: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[name]().double()
    assert_same_training(
        module,
        "mse",
        functional.mse_loss,
        lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5),
        batches_for(module, torch.float64),
    )


@pytest.mark.parametrize("name", LAYERS)
def test_float32_steps_are_verified_against_float64(name: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[name]()
    batch = batches_for(module, torch.float32)[0]
    report = cg.export_training_step(module, "mse", torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5), batch)
    assert report.verified
    assert {f"{p}.updated" for p, _ in module.named_parameters()} <= set(report.errors)


def test_a_sparse_embedding_trains_with_a_dense_gradient() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten(), nn.Linear(12, 2)).double()
    data = [(torch.randint(0, 7, (n, 4)), torch.randn(n, 2, dtype=torch.float64)) for n in (5, 3)]
    assert_same_training(
        module,
        "mse",
        functional.mse_loss,
        lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5),
        data,
        dynamic_shapes=({0: "batch"}, {0: "batch"}),
    )
