"""The sampled reference is a part of the full one, and sees errors inside and outside the sample."""

from __future__ import annotations

import numpy as np
import pytest

from convgrad_export.accuracy import reference_and_bounds
from convgrad_export.bench.contenders import operands, torch_call
from convgrad_export.bench.layer import Layer
from convgrad_export.bench.sampling import FORWARD, INPUT, OPERATIONS, WEIGHT, expected

LAYERS = [
    Layer("dense", 9, 12, (11, 8), (3, 2), (2, 1), (1, 0)),
    Layer("grouped", 20, 30, (7, 6), (3, 3), 1, 1, groups=5),
    Layer("depthwise", 24, 24, (9, 9), (5, 5), 2, 2, groups=24),
    Layer("causal", 6, 8, (40,), (3,), 1, ((8, 0),), 4),
    Layer("cube", 5, 7, (6, 5, 4), (2, 2, 2), 1, 0),
    Layer("transposed", 10, 6, (7,), (4,), 2, 1, transposed=True),
    Layer("transposed, grouped", 12, 18, (5, 6), (3, 3), 2, 1, groups=3, transposed=True, output_padding=1),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("operation", [INPUT, WEIGHT])
def test_the_sample_is_a_part_of_the_full_reference(layer: Layer, operation: str) -> None:
    geometry = layer.geometry(3)
    feeds = operands(geometry)
    sample = expected(operation, geometry, feeds)
    reference, bound = reference_and_bounds(geometry, feeds, "float32", "float32")[operation]
    assert sample.reference.size < reference.size or min(geometry.weight_shape[:2]) <= 4
    np.testing.assert_allclose(sample.reference, reference[sample.first][:, sample.second], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(sample.bound, bound[sample.first][:, sample.second], rtol=1e-12)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_pytorch_passes_and_one_wrong_element_does_not(layer: Layer, operation: str) -> None:
    geometry = layer.geometry(3)
    feeds = operands(geometry)
    sample = expected(operation, geometry, feeds)
    right = torch_call(operation, geometry, feeds).result()
    assert sample.report(right).within
    assert sample.agrees(right, right.copy())
    wrong = right.copy()
    wrong[sample.first[-1], sample.second[-1]].flat[-1] += 1e-3
    assert not sample.report(wrong).within
    assert not sample.agrees(wrong, right)
    assert not sample.report(right[..., :-1]).within
    assert not sample.agrees(right[..., :-1], right)


def test_an_error_outside_the_sample_is_seen() -> None:
    geometry = Layer("dense", 16, 16, (6, 6), (3, 3), 1, 1).geometry(2)
    feeds = operands(geometry)
    sample = expected(FORWARD, geometry, feeds)
    right = torch_call(FORWARD, geometry, feeds).result()
    wrong = right.copy()
    outside = next(channel for channel in range(16) if channel not in sample.second)
    wrong[0, outside, 2, 3] += 1e-3
    assert sample.report(wrong).within
    assert not sample.agrees(wrong, right)
