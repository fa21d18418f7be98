"""Arrays to train and test on, and the order they are visited in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ModelFileError
from ..files import read_arrays


@dataclass(frozen=True)
class Dataset:
    """Inputs and targets, first axis the sample; the test part may be empty."""

    inputs: np.ndarray
    targets: np.ndarray
    test_inputs: np.ndarray
    test_targets: np.ndarray

    def batches(self, size: int, epoch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Whole batches of one epoch in an order that (seed, epoch) decides; the remainder is left out."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.targets))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield self.inputs[chosen], self.targets[chosen]


def read_dataset(path: str | os.PathLike[str], test_share: float = 0.2) -> Dataset:
    """A dataset from an ``.npz`` file with ``x`` and ``y``, and optionally ``x_test`` and ``y_test``.

    Without the last two, every n-th sample is for testing. float64 becomes float32, integers int64; no other array is
    looked at.

    Raises:
        ModelFileError: no readable npz, missing arrays, pickled objects, no numbers, values that are not finite, or
            numbers of samples that differ.
    """
    source, arrays = Path(path), read_arrays(path)
    if missing := [name for name in ("x", "y") if name not in arrays]:
        raise ModelFileError(f"data {source} holds {sorted(arrays)}, expected x and y; missing: {', '.join(missing)}")
    arrays = {name: _plain(array) for name, array in arrays.items() if name in ("x", "y", "x_test", "y_test")}
    for name, array in arrays.items():
        if array.ndim == 0 or array.dtype.kind not in "fi":
            raise ModelFileError(
                f"data {source}: {name} is {array.dtype} {array.shape}, expected numbers with the sample as first axis"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise ModelFileError(f"data {source}: {name} holds {count} infinite or not-a-number values; remove them")
    for first, second in (("x", "y"), ("x_test", "y_test")):
        if first in arrays and len(arrays[first]) != len(arrays.get(second, ())):
            count = len(arrays.get(second, ()))
            raise ModelFileError(f"data {source}: {first} has {len(arrays[first])} samples and {second} {count}")
    if "x_test" in arrays:
        return Dataset(arrays["x"], arrays["y"], arrays["x_test"], arrays["y_test"])
    every = max(2, round(1 / test_share))
    test = np.arange(len(arrays["y"])) % every == every - 1
    return Dataset(arrays["x"][~test], arrays["y"][~test], arrays["x"][test], arrays["y"][test])


def _plain(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":  # from any byte order
        return array.astype(np.float16 if array.dtype.itemsize == 2 else np.float32, copy=False)
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    return array
