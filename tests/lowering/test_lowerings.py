"""Every lowering on every case it applies to, in every dtype, against float64 autograd."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convgrad_export import dtypes
from convgrad_export.accuracy import compare, reference_and_bounds
from convgrad_export.errors import GeometryError
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import LOWERINGS, compute_dtype

from ..cases import CASES, ConvCase
from ..running import model_of, run_lowering

APPLICABLE = [
    pytest.param(case, lowering, id=f"{case.name}-{lowering.name}")
    for case in CASES
    for lowering in LOWERINGS.values()
    if lowering.why_not(case.geometry) is None
]


@pytest.mark.parametrize(("case", "lowering"), APPLICABLE)
def test_integer_data_is_exact_and_random_data_within_the_bound(case: ConvCase, lowering) -> None:
    for dtype in dtypes.NAMES:
        if lowering.why_not(case.geometry, dtype) is not None:
            continue
        for integers in (True, False):
            operands = case.operands(dtype, integers=integers)
            reference, bound = case.expected(operands, dtype)[lowering.gradient]
            for any_batch in (True, False):
                result = run_lowering(case.geometry, lowering, operands, dtype, any_batch=any_batch)
                assert result.dtype == dtypes.numpy_dtype(dtype)
                report = compare(result, reference, bound, lowering.error_factor)
                assert report.within, (dtype, integers, any_batch, report)
                if integers and lowering.exact_on_integers:
                    assert report.exact, (dtype, any_batch, report)


def test_every_lowering_is_covered_by_the_case_table() -> None:
    covered = {parameter.values[1].name for parameter in APPLICABLE}
    assert covered == set(LOWERINGS)


@pytest.mark.parametrize("opset", [13, 14, 17, 18, 21, 23])
@pytest.mark.parametrize(
    "name", ["mixed2d", "plain3d", "depthwise", "pointwise_strided", "transposed2d", "winograd_channels"]
)
def test_models_are_valid_at_every_opset(name: str, opset: int) -> None:
    case = next(case for case in CASES if case.name == name)
    operands = case.operands("float32", integers=True)
    expected = case.expected(operands, "float32")
    for lowering in LOWERINGS.values():
        if lowering.why_not(case.geometry, opset=opset) is not None:
            continue
        model = model_of(case.geometry, lowering, opset=opset)
        onnx.checker.check_model(model, full_check=True)
        assert {item.domain for item in model.opset_import} == {""}
        result = run_lowering(case.geometry, lowering, operands, opset=opset)
        reference, bound = expected[lowering.gradient]
        assert compare(result, reference, bound, lowering.error_factor).within, lowering.name


@st.composite
def geometries(draw: st.DrawFn) -> ConvGeometry:
    """Random convolutions in 1 to 3 dimensions, small enough that float32 sums of small integers are exact."""
    rank = draw(st.integers(1, 3))
    largest = (30, 10, 5)[rank - 1]

    def axis(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    groups = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    stride, dilation = axis(1, 4), axis(1, 3)
    first, second = groups * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding = [(p, p) for p in axis(0, 4)] if transposed else list(zip(axis(0, 4), axis(0, 4), strict=True))
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    try:
        return ConvGeometry.from_forward(
            (draw(st.integers(0, 3)), first if transposed else second * groups, *axis(1, largest)),
            (first, second, *axis(1, 4)),
            stride,
            padding,
            dilation,
            groups,
            transposed=transposed,
            output_padding=extra if transposed else 0,
        )
    except GeometryError:
        from hypothesis import reject

        reject()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
@given(geometry=geometries(), seed=st.integers(0, 2**16))
def test_random_geometries_agree_exactly_on_integers(geometry: ConvGeometry, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = {"input": geometry.input_shape, "weight": geometry.weight_shape, "grad_output": geometry.output_shape}
    operands = {name: rng.integers(-4, 5, shape).astype(np.float64) for name, shape in shapes.items()}
    expected = reference_and_bounds(geometry, operands, "float32", "float32")
    for lowering in LOWERINGS.values():
        if lowering.why_not(geometry) is None:
            reference, bound = expected[lowering.gradient]
            report = compare(run_lowering(geometry, lowering, operands), reference, bound, lowering.error_factor)
            assert report.within, (lowering.name, report)
            assert report.exact or not lowering.exact_on_integers, (lowering.name, report)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["plain2d", "mixed2d", "depthwise", "pointwise_strided", "transposed2d"])
def test_nan_and_infinity_reach_what_depends_on_them_and_nothing_else(name: str, value: float) -> None:
    case = next(case for case in CASES if case.name == name)
    operands = case.operands("float32", integers=True)
    # No zero in the finite operands: zero times infinity is NaN, and formulas may or may not multiply by padding.
    operands = {key: np.where(array == 0, 1.0, array) for key, array in operands.items()}
    # In the middle, so that every product it is part of has a real element on the other side.
    middle = tuple(size // 2 for size in case.geometry.output_size)
    operands["grad_output"][(0, 0, *middle)] = value
    expected = case.expected(operands, "float32")
    for lowering in LOWERINGS.values():
        if lowering.why_not(case.geometry) is None and not lowering.spreads_non_finite:
            result = run_lowering(case.geometry, lowering, operands).astype(np.float64)
            touched = ~np.isfinite(expected[lowering.gradient][0])
            assert touched.any(), lowering.name
            assert np.array_equal(~np.isfinite(result), touched), lowering.name


def test_half_types_accumulate_in_float32() -> None:
    """4096 ones added in float16 stop at 2048; in float32 they give 4096."""
    geometry = ConvGeometry.from_forward((1, 1, 4096), (1, 1, 1))
    ones = {
        name: np.ones(shape)
        for name, shape in (("input", (1, 1, 4096)), ("weight", (1, 1, 1)), ("grad_output", (1, 1, 4096)))
    }
    for lowering in LOWERINGS.values():
        if lowering.gradient == "weight" and lowering.why_not(geometry, "float16") is None:
            for dtype in ("float16", "bfloat16"):
                assert run_lowering(geometry, lowering, ones, dtype).item() == 4096.0, (lowering.name, dtype)
    assert compute_dtype("float16") == compute_dtype("bfloat16") == "float32"
