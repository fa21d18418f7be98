"""The layer tables are the published networks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from convgrad_export.bench.layer import Layer, multiplications, parameters
from convgrad_export.bench.networks import NETWORKS
from convgrad_export.geometry import ConvGeometry

from ..networks import declare_torchvision_operators

# name: convolutions, their parameters (weights alone), multiply-accumulate operations of the forward pass at batch 1.
# torchvision's tables give 11.69, 25.56, 25.03, 138.36, 3.50, 5.29, 28.59, 27.16 and 33.37 million parameters and 1.81,
# 4.09, 4.23, 15.47, 0.30, 0.39, -, 5.71 and 40.70 GMAC with linear layers, normalizations and auxiliary classifiers.
PUBLISHED = {
    "resnet18": (20, 11_166_912, 1.814),
    "resnet50": (53, 23_454_912, 4.087),
    "resnext50": (53, 22_911_680, 4.228),
    "vgg16": (13, 14_710_464, 15.347),  # 14,714,688 in the paper's configuration D with 4,224 biases
    "mobilenet_v2": (52, 2_189_760, 0.299),
    "efficientnet_b0": (81, 3_956_192, 0.385),
    "convnext_tiny": (22, 1_877_472, 0.293),
    "inception_v3": (94, 21_751_136, 5.711),
    "r3d_18": (20, 33_156_672, 40.696),
    "unet": (23, 31_023_808, 150.428),  # "in total the network has 23 convolutional layers"
    "deeplab_v3": (61, 39_582_144, 168.653),
    "tcn": (16, 196_608, 0.201),
    "wavenet": (123, 1_638_400, 13.107),
    "hifi_gan": (78, 13_916_384, 9.826),  # the paper's 13.92 million
}


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_parameters_and_operations_are_the_published_ones(name: str) -> None:
    layers = NETWORKS[name]()
    operations = sum(layer.count * multiplications(layer.geometry(1)) for layer in layers)
    assert (sum(layer.count for layer in layers), parameters(layers), round(operations / 1e9, 3)) == PUBLISHED[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_geometry_and_every_name_appears_once(name: str) -> None:
    layers = NETWORKS[name]()
    assert len({layer.geometry(1) for layer in layers}) == len(layers)
    assert len({layer.name for layer in layers}) == len(layers)
    assert all(layer.count > 0 for layer in layers)


def test_layers_follow_one_another() -> None:
    """The output of a U-Net layer is the next one's input: what the figure of the paper shows."""
    sizes = {layer.name: layer.geometry(1) for layer in NETWORKS["unet"]()}
    assert sizes["down4.2"].output_size == (28, 28)
    assert sizes["up0.2"].output_size == sizes["classes"].output_size == (388, 388)
    assert NETWORKS["hifi_gan"]()[-1].geometry(1).output_size == (8192,)


def test_wavenet_hears_four_cycles_of_dilations() -> None:
    dilated = [layer for layer in NETWORKS["wavenet"]() if layer.name.startswith("dilation")]
    receptive = 1 + sum(layer.count * layer.dilation * (layer.kernel[0] - 1) for layer in dilated)
    assert receptive == 4 * 1023 + 1
    assert all(layer.geometry(1).output_size == layer.size for layer in dilated)


def test_multiplications_of_a_transposed_convolution_are_those_of_its_adjoint() -> None:
    geometry = Layer("up", 8, 6, (5, 5), (4, 4), 2, 1, groups=2, transposed=True).geometry(3)
    assert multiplications(geometry) == multiplications(geometry.adjoint()) == 3 * 25 * 8 * 3 * 16


TORCHVISION: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "resnet18": ("resnet18", (3, 224, 224), {}),
    "resnet50": ("resnet50", (3, 224, 224), {}),
    "resnext50": ("resnext50_32x4d", (3, 224, 224), {}),
    "vgg16": ("vgg16", (3, 224, 224), {}),
    "mobilenet_v2": ("mobilenet_v2", (3, 224, 224), {}),
    "efficientnet_b0": ("efficientnet_b0", (3, 224, 224), {}),
    "convnext_tiny": ("convnext_tiny", (3, 224, 224), {}),
    "inception_v3": ("inception_v3", (3, 299, 299), {"aux_logits": False, "init_weights": False}),
    "r3d_18": ("r3d_18", (3, 16, 112, 112), {}),
    "deeplab_v3": ("deeplabv3_resnet50", (3, 513, 513), {"weights_backbone": None}),
}


@pytest.mark.peer
@pytest.mark.parametrize("name", TORCHVISION)
def test_tables_are_torchvisions_convolutions(name: str) -> None:
    declare_torchvision_operators()
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    builder, shape, options = TORCHVISION[name]
    with torch.device("meta"):
        network = torchvision.models.get_model(builder, weights=None, **options).eval()
        found: Counter[ConvGeometry] = Counter()

        def record(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            geometry = ConvGeometry.from_forward(
                tuple(inputs[0].shape),
                tuple(module.weight.shape),
                module.stride,
                module.padding,
                module.dilation,
                module.groups,
            )
            found[geometry] += 1

        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                module.register_forward_hook(record)
        network(torch.empty(1, *shape))
    assert found == {layer.geometry(1): layer.count for layer in NETWORKS[name]()}
