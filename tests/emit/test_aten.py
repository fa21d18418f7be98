"""Every lowering and canonical function as ATen calls, against PyTorch's own kernel in float64."""

from __future__ import annotations

import pytest
import torch

from convgrad_export import dtypes
from convgrad_export.emit import aten
from convgrad_export.emit.aten_rules import RULES
from convgrad_export.errors import UnsupportedLoweringError
from convgrad_export.geometry import ConvGeometry
from convgrad_export.integrations.aten_convolution import normalized, plan, read_call, run_plan
from convgrad_export.lowering import GRADIENTS, LOWERINGS
from convgrad_export.selection.aten_policy import choose_aten, why_not
from tests.emit.conv_cases import CASES, ConvCase, reference

DIRECT = [lowering for lowering in LOWERINGS.values() if lowering.error_factor == 1]
REDUCED = [lowering for lowering in LOWERINGS.values() if lowering.error_factor > 1]


def run_one(case: ConvCase, name: str, arguments: list) -> torch.Tensor:
    full = normalized(arguments, {})
    gradient = name.split(".")[0]
    chosen = {gradient: LOWERINGS[name]} if name in LOWERINGS else {gradient: name}
    return run_plan(read_call(*full), chosen, full)[GRADIENTS.index(gradient)]


def geometry_of(case: ConvCase) -> ConvGeometry:
    return read_call(*case.arguments(torch.float64)).geometry


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lowering", DIRECT, ids=lambda lowering: lowering.name)
def test_direct_lowering_is_exact_on_integers(lowering, dtype):
    ran = 0
    for case in CASES:
        if why_not(lowering, geometry_of(case), "float32") is not None:
            continue
        arguments = case.arguments(dtype)
        result = run_one(case, lowering.name, arguments)
        expected = reference(arguments)[GRADIENTS.index(lowering.gradient)]
        assert result.dtype == dtype
        assert result.shape == expected.shape, case.name
        assert torch.equal(result.double(), expected), case.name
        ran += 1
    assert ran >= 2


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", [case for case in CASES if case.input[0] > 0], ids=lambda case: case.name)
def test_canonical_function_is_exact_on_integers(case, gradient):
    arguments = case.arguments(torch.float64)
    result = run_one(case, f"{gradient}.dynamic", arguments)
    assert torch.equal(result, reference(arguments)[GRADIENTS.index(gradient)])


def bound(case: ConvCase, gradient: str, dtype: torch.dtype, expected: torch.Tensor) -> torch.Tensor:
    """Error of n products of positive numbers summed in float32 in any order, rounded once to `dtype`.

    gamma_n = n u / (1 - n u) for the sum (Higham, section 3.1), u of the dtype for the rounding, and half the smallest
    subnormal number for a result below the normal range. ATen sums in blocks, so the true error is far smaller.
    """
    name = dtypes.name_of(dtype)
    products = geometry_of(case).sum_length(gradient) + 1
    accumulated = products * 2.0**-24 / (1 - products * 2.0**-24)
    rounded = dtypes.unit_roundoff(name) if dtypes.is_half(name) else 0.0
    return (accumulated + rounded * (1 + accumulated)) * expected.abs() + torch.finfo(dtype).smallest_normal * 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lowering", DIRECT, ids=lambda lowering: lowering.name)
def test_half_types_are_rounded_once(lowering, dtype):
    for case in CASES:
        if case.input[0] == 0 or why_not(lowering, geometry_of(case), "float32") is not None:
            continue
        arguments = case.arguments(dtype, integers=False)
        result = run_one(case, lowering.name, arguments)
        expected = reference(arguments)[GRADIENTS.index(lowering.gradient)]
        assert result.dtype == dtype
        error = (result.double() - expected).abs()
        assert (error <= bound(case, lowering.gradient, dtype, expected)).all(), (case.name, error.max())


@pytest.mark.parametrize("lowering", REDUCED, ids=lambda lowering: lowering.name)
def test_winograd_stays_within_its_error_factor(lowering):
    ran = 0
    for case in CASES:
        if case.input[0] == 0 or why_not(lowering, geometry_of(case), "float32") is not None:
            continue
        arguments = case.arguments(torch.float32, integers=False)
        expected = reference(arguments)[GRADIENTS.index(lowering.gradient)]
        error = (run_one(case, lowering.name, arguments).double() - expected).abs()
        # A tile mixes its neighbours, so the bound is that of the largest element.
        largest = bound(case, lowering.gradient, torch.float32, expected).max()
        assert error.max() <= lowering.error_factor * largest, case.name
        ran += 1
    assert ran
    assert why_not(lowering, geometry_of(CASES[4]), "float64") == "its transforms are float32 constants"


def test_every_recorded_operator_has_a_rule():
    """Also for geometries that no case has: whatever the catalogue can record, the walker can run."""
    recorded = set()
    for lowering in LOWERINGS.values():
        for case in CASES:
            geometry = geometry_of(case)
            if why_not(lowering, geometry, "float32") is None:
                _, nodes, _ = aten._recorded(lowering.name, geometry.with_batch("batch"))
                recorded |= {node.op_type for node in nodes}
    for rank in (1, 2, 3):
        for name in ("input", "weight"):
            recorded |= {node.op_type for node in aten._function(f"conv{rank}d_{name}")}
    assert recorded <= set(RULES)
    assert set(RULES) - recorded == {"Cast"}  # recorded for half types only, by emit.onnx


def test_named_lowering_that_does_not_apply_is_refused_with_the_alternatives():
    geometry = geometry_of(CASES[3])
    with pytest.raises(UnsupportedLoweringError, match=r"input\.flipped_conv.*stride is \(2, 3\).*input\.phase_conv"):
        choose_aten("input", geometry, "float32", lowering="input.flipped_conv")


def test_a_name_decides_its_own_gradient_only():
    call = read_call(*CASES[4].arguments(torch.float32))
    chosen = plan(call, "weight.im2col")
    assert chosen["weight"].name == "weight.im2col"
    assert chosen["input"].gradient == "input"
    assert chosen["bias"].gradient == "bias"


MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("input_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("case", [CASES[3], CASES[4], CASES[8], CASES[13]], ids=lambda case: case.name)
def test_results_have_eagers_strides(case, input_format, weight_format, dtype):
    arguments = case.arguments(dtype)
    arguments[1] = arguments[1].contiguous(memory_format=input_format)
    arguments[2] = arguments[2].contiguous(memory_format=weight_format)
    eager = torch.ops.aten.convolution_backward.default(*arguments)
    full = normalized(arguments, {})
    call = read_call(*full)
    ours = run_plan(call, plan(call, "portable"), full)
    for gradient, expected, result in zip(GRADIENTS, eager, ours, strict=True):
        longer = [axis for axis, size in enumerate(result.shape) if size > 1]  # other strides mean nothing
        assert [expected.stride(a) for a in longer] == [result.stride(a) for a in longer], gradient
