"""The example of `convgrad train`: a small CNN on scikit-learn's bundled handwritten digits (1,797 images of 8x8)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import raise_missing
from .data import Dataset


class DigitsNetwork(nn.Module):
    """Two convolutions with BatchNorm, pooling, dropout, and a linear layer: 10 classes from 1x8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.dropout = nn.Dropout(0.25)
        self.fc = nn.Linear(32 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = torch.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(self.dropout(x.flatten(1)))


def load_digits() -> Dataset:
    """Every fifth image is for testing.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise_missing(error, "give --data")
    digits = load()
    images = (digits.images / 16.0).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 4
    return Dataset(images[~test], labels[~test], images[test], labels[test])
