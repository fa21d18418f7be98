"""Public networks with random weights and small inputs, for the zoo test. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Network:
    """`build` imports its package itself; `inputs` are the example arguments."""

    name: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]


def declare_torchvision_operators() -> None:
    """torchvision from PyPI is a CUDA build; beside a CPU torch it only asks for the schemas of two operators."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


_LIBRARIES: list[Any] = []


def mean_square(output: Any) -> Tensor:
    """A scalar of whatever a network returns: the mean square of its first floating-point tensor."""
    leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    if not leaves:
        leaves = [x for x in vars(output).values() if isinstance(x, Tensor)]
    return leaves[0].pow(2).mean()


def image(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


def _vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_torchvision_operators()
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return build


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_torchvision_operators()
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return build


def _segmentation(name: str, encoder: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_torchvision_operators()
        import segmentation_models_pytorch

        return getattr(segmentation_models_pytorch, name)(encoder, encoder_weights=None, classes=3)

    return build


def _monai(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import monai.networks.nets

        return getattr(monai.networks.nets, name)(**options)

    return build


def _transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_torchvision_operators()  # imported by it where it is installed
        import transformers

        config = getattr(transformers, f"{name.removesuffix('Model')}Config")(**options)
        return getattr(transformers, name)(config)

    return build


def _diffusers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_torchvision_operators()  # as above, by way of transformers
        import diffusers

        return getattr(diffusers, name)(**options)

    return build


_BLOCKS = {"block_out_channels": (32, 32), "norm_num_groups": 8}

NETWORKS = [
    Network("resnet18", "torchvision", _vision("resnet18"), image(2, 3, 64, 64)),
    Network("resnet50", "torchvision", _vision("resnet50"), image(2, 3, 64, 64)),
    Network("mobilenet_v3_small", "torchvision", _vision("mobilenet_v3_small"), image(2, 3, 64, 64)),
    Network("efficientnet_b0", "torchvision", _vision("efficientnet_b0"), image(2, 3, 64, 64)),
    Network("densenet121", "torchvision", _vision("densenet121"), image(2, 3, 64, 64)),
    Network("shufflenet_v2_x0_5", "torchvision", _vision("shufflenet_v2_x0_5"), image(2, 3, 64, 64)),
    Network("squeezenet1_1", "torchvision", _vision("squeezenet1_1"), image(2, 3, 64, 64)),
    Network("inception_v3", "torchvision", _vision("inception_v3", init_weights=False), image(1, 3, 96, 96)),
    Network("convnext_tiny", "torchvision", _vision("convnext_tiny"), image(1, 3, 64, 64)),
    Network("regnet_y_400mf", "torchvision", _vision("regnet_y_400mf"), image(2, 3, 64, 64)),
    Network("swin_t", "torchvision", _vision("swin_t"), image(1, 3, 64, 64)),
    Network("r3d_18", "torchvision", _vision("r3d_18"), image(1, 3, 4, 32, 32)),
    Network(
        "lraspp_mobilenet_v3_large",
        "torchvision",
        _vision("lraspp_mobilenet_v3_large", weights_backbone=None),
        image(1, 3, 64, 64),
    ),
    Network("mobilenetv4_conv_small", "timm", _timm("mobilenetv4_conv_small"), image(2, 3, 64, 64)),
    Network("edgenext_xx_small", "timm", _timm("edgenext_xx_small"), image(1, 3, 64, 64)),
    Network("ghostnet_100", "timm", _timm("ghostnet_100"), image(2, 3, 64, 64)),
    Network("resnest14d", "timm", _timm("resnest14d"), image(2, 3, 64, 64)),
    Network("repvgg_a0", "timm", _timm("repvgg_a0"), image(2, 3, 64, 64)),
    Network("nf_resnet26", "timm", _timm("nf_resnet26"), image(1, 3, 64, 64)),
    Network("vit_tiny", "timm", _timm("vit_tiny_patch16_224", img_size=64), image(1, 3, 64, 64)),
    Network("unet_resnet18", "segmentation_models_pytorch", _segmentation("Unet", "resnet18"), image(1, 3, 64, 64)),
    Network("fpn_mobilenet", "segmentation_models_pytorch", _segmentation("FPN", "mobilenet_v2"), image(1, 3, 64, 64)),
    Network("pspnet", "segmentation_models_pytorch", _segmentation("PSPNet", "resnet18"), image(1, 3, 96, 96)),
    Network("linknet", "segmentation_models_pytorch", _segmentation("Linknet", "resnet18"), image(1, 3, 64, 64)),
    Network(
        "monai_unet3d",
        "monai",
        _monai("UNet", spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2)),
        image(1, 1, 16, 16, 16),
    ),
    Network("segresnet", "monai", _monai("SegResNet", spatial_dims=3, init_filters=8), image(1, 1, 16, 16, 16)),
    Network(
        "basic_unet",
        "monai",
        _monai("BasicUNet", spatial_dims=2, features=(8, 8, 16, 32, 64, 8)),
        image(1, 1, 32, 32),
    ),
    Network("vnet", "monai", _monai("VNet"), image(1, 1, 16, 16, 16)),
    Network(
        "hf_resnet",
        "transformers",
        _transformers("ResNetModel", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
        image(2, 3, 64, 64),
    ),
    Network(
        "hf_convnextv2",
        "transformers",
        _transformers("ConvNextV2Model", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]),
        image(1, 3, 64, 64),
    ),
    Network(
        "hf_segformer",
        "transformers",
        _transformers("SegformerModel", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]),
        image(1, 3, 64, 64),
    ),
    Network(
        "hf_wav2vec2",
        "transformers",
        _transformers(
            "Wav2Vec2Model",
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=(32, 32, 32),
            conv_kernel=(10, 3, 3),
            conv_stride=(5, 2, 2),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        image(1, 1600),
    ),
    Network(
        "diffusers_unet2d",
        "diffusers",
        _diffusers(
            "UNet2DModel",
            sample_size=16,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **_BLOCKS,
        ),
        lambda: (image(1, 3, 16, 16)()[0], torch.tensor([7])),
    ),
    Network(
        "diffusers_vae",
        "diffusers",
        _diffusers(
            "AutoencoderKL",
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        image(1, 3, 32, 32),
    ),
    Network(
        "diffusers_unet_condition",
        "diffusers",
        _diffusers(
            "UNet2DConditionModel",
            sample_size=16,
            cross_attention_dim=24,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **_BLOCKS,
        ),
        lambda: (image(1, 4, 16, 16)()[0], torch.tensor([7]), image(1, 5, 24)()[0]),
    ),
]
