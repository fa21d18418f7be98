"""The convolution layers of published networks, as tables of their distinct geometries.

Sizes are those of the papers' usual inputs. Each table gives every distinct convolution once, with the number of times
the network has it.
"""

from __future__ import annotations

from collections.abc import Callable

from . import classifiers, dense_prediction, sequences
from .layer import Layer

NETWORKS: dict[str, Callable[[], list[Layer]]] = {
    "resnet18": classifiers.resnet18,
    "resnet50": classifiers.resnet50,
    "resnext50": classifiers.resnext50,
    "vgg16": classifiers.vgg16,
    "mobilenet_v2": classifiers.mobilenet_v2,
    "efficientnet_b0": classifiers.efficientnet_b0,
    "convnext_tiny": classifiers.convnext_tiny,
    "inception_v3": classifiers.inception_v3,
    "r3d_18": classifiers.r3d18,
    "unet": dense_prediction.unet,
    "deeplab_v3": dense_prediction.deeplab_v3,
    "tcn": sequences.tcn,
    "wavenet": sequences.wavenet,
    "hifi_gan": sequences.hifi_gan,
}
