"""The float64 reference of `convgrad tune` and `convgrad bench`: against PyTorch, and what a sample of it sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convgrad_export import dtypes
from convgrad_export.accuracy import reference_and_bounds, reference_gradients
from convgrad_export.bench.contenders import operands, torch_call
from convgrad_export.bench.layer import Layer
from convgrad_export.reference import FORWARD, INPUT, OPERATIONS, WEIGHT, compute, expected, make_operands
from convgrad_export.torch_convolution import forward
from tests.cases import CASES, ConvCase

LAYERS = [
    Layer("dense", 9, 12, (11, 8), (3, 2), (2, 1), (1, 0)),
    Layer("grouped", 20, 30, (7, 6), (3, 3), 1, 1, groups=5),
    Layer("depthwise", 24, 24, (9, 9), (5, 5), 2, 2, groups=24),
    Layer("causal", 6, 8, (40,), (3,), 1, ((8, 0),), 4),
    Layer("cube", 5, 7, (6, 5, 4), (2, 2, 2), 1, 0),
    Layer("transposed", 10, 6, (7,), (4,), 2, 1, transposed=True),
    Layer("transposed, grouped", 12, 18, (5, 6), (3, 3), 2, 1, groups=3, transposed=True, output_padding=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numpy_computes_what_pytorch_does(case: ConvCase) -> None:
    values = case.operands("float32", integers=True)
    geometry = case.geometry
    gradients = reference_gradients(geometry, values)
    tensors = (torch.from_numpy(values[name].astype(np.float64)) for name in ("input", "weight"))
    np.testing.assert_array_equal(compute(FORWARD, geometry, values), forward(geometry, *tensors).numpy())
    np.testing.assert_array_equal(compute(INPUT, geometry, values), gradients["input"])
    np.testing.assert_array_equal(compute(WEIGHT, geometry, values), gradients["weight"])


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


@pytest.mark.parametrize(("groups", "count"), [(1, 32), (2, 40)])
def test_many_channels_are_sampled_and_every_sample_can_fail(groups: int, count: int) -> None:
    case = ConvCase("wide", 2, 40, 72, (5, 4), (3, 3), padding=1, groups=groups)
    values = case.operands("float32", integers=True)
    exact = reference_gradients(case.geometry, values)
    for gradient in (INPUT, WEIGHT):
        check = expected(gradient, case.geometry, values, channels=32)
        assert len(check.second if gradient == INPUT else check.first) >= min(count, 32)
        result = exact[gradient].astype(np.float32)
        assert check.report(result).exact
        spoiled = result.copy()
        spoiled[check.first[1], check.second[5]] += 1
        assert not check.report(spoiled).within


@pytest.mark.parametrize("dtype", dtypes.NAMES)
@pytest.mark.parametrize("integers", [True, False])
def test_operands_are_values_of_their_type(dtype: str, integers: bool) -> None:
    geometry = LAYERS[0].geometry(2)
    values = make_operands(geometry, dtype, integers=integers)
    assert {name: value.shape for name, value in values.items()} == {
        "input": geometry.input_shape,
        "weight": geometry.weight_shape,
        "grad_output": geometry.output_shape,
    }
    for value in values.values():
        np.testing.assert_array_equal(value.astype(dtypes.numpy_dtype(dtype)).astype(np.float64), value)
        assert not integers or (np.abs(value).max() >= 1 and np.array_equal(value, value.round()))
    with pytest.raises(MemoryError):
        make_operands(Layer("huge", 4, 4, (2**40, 2**40), (3, 3)).geometry(2), dtype, integers=integers)
