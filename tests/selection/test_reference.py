"""The float64 reference of the tuner, against PyTorch's autograd over the whole case table."""

from __future__ import annotations

import numpy as np
import pytest

from convgrad_export.accuracy import reference_gradients
from convgrad_export.selection import reference
from tests.cases import CASES, ConvCase


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numpy_gradients_are_those_of_float64_autograd(case: ConvCase) -> None:
    operands = case.operands("float32", integers=True)
    geometry = case.geometry
    torch_result = reference_gradients(geometry, operands)
    everything = {"input": np.arange(geometry.in_channels), "weight": np.arange(geometry.out_channels)}
    got_input = reference.input_gradient(geometry, operands, everything["input"])
    got_weight = reference.weight_gradient(geometry, operands, everything["weight"])
    np.testing.assert_array_equal(got_input, torch_result["input"])
    np.testing.assert_array_equal(got_weight, torch_result["weight"])


def test_many_channels_are_sampled_and_every_sample_can_fail() -> None:
    case = ConvCase("wide", 2, 40, 72, (5, 4), (3, 3), padding=1, groups=2)
    operands = case.operands("float32", integers=True)
    exact = reference_gradients(case.geometry, operands)
    for gradient, axis, channels in (("input", 1, 40), ("weight", 0, 72)):
        check = reference.expected(gradient, case.geometry, operands, "float32")
        assert (check.axis, len(check.channels)) == (axis, 32)
        assert max(check.channels) < channels
        assert check.report(exact[gradient].astype(np.float32), 1.0).exact
        spoiled = exact[gradient].astype(np.float32)
        np.moveaxis(spoiled, axis, 0)[check.channels[5]] += 1
        assert not check.report(spoiled, 1.0).within
