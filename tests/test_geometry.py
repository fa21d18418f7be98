"""Geometry: derived integers, and every inconsistent call refused with what was expected and what arrived."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from convgrad_export.errors import ArgumentTypeError, ConvGradError, GeometryError
from convgrad_export.geometry import ConvGeometry
from convgrad_export.windows import Window, window

from .cases import CASES


def test_derived_integers_of_a_convolution_with_everything_off_its_default() -> None:
    geometry = ConvGeometry.from_forward((2, 4, 10, 8), (6, 2, 3, 2), (2, 3), (1, 0), (1, 2), 2)
    assert geometry.output_shape == (2, 6, 5, 2)
    assert geometry.extent == (3, 3)
    assert geometry.span == (11, 6)
    assert geometry.begin == (1, 0)
    assert geometry.end == (0, -2)
    assert geometry.remainder == (1, 2)
    assert geometry.sum_length("input") == 3 * 3 * 2
    assert geometry.sum_length("weight") == geometry.sum_length("bias") == 2 * 5 * 2


@pytest.mark.parametrize("case", [case for case in CASES if not case.transposed], ids=lambda case: case.name)
def test_the_remainder_is_what_the_stride_leaves(case) -> None:
    geometry = case.geometry
    for axis in range(geometry.rank):
        lo, hi = geometry.pads[axis]
        assert 0 <= geometry.remainder[axis] < geometry.stride[axis]
        assert geometry.span[axis] + geometry.remainder[axis] == geometry.input_size[axis] + lo + hi


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_phases_hold_each_product_exactly_once(case) -> None:
    """Enumerate input position, tap and output position; the phases must give the same triples."""
    geometry = case.geometry.adjoint() if case.transposed else case.geometry
    for axis in range(geometry.rank):
        s, d, lo = geometry.stride[axis], geometry.dilation[axis], geometry.begin[axis]
        size, kernel = geometry.input_size[axis], geometry.kernel_size[axis]
        direct = {
            (i, k, (i + lo - d * k) // s)
            for i, k in itertools.product(range(size), range(kernel))
            if (i + lo - d * k) % s == 0
        }
        phased = {
            (i, p.tap_first + t * p.tap_step, p.base + j - t * p.dilation)
            for p in geometry.phases(axis)
            if p is not None
            for j, i in enumerate(range(p.first, size, s))
            for t in range(p.taps)
        }
        assert phased == direct


@pytest.mark.parametrize(
    ("size", "start", "length", "expected"),
    [
        (5, 0, 5, Window(0, 0, 0, 0)),
        (5, 1, 3, Window(1, 1, 0, 0)),
        (5, -2, 9, Window(0, 0, 2, 2)),
        (5, 3, 4, Window(3, 0, 0, 2)),
        (5, 7, 3, Window(0, 5, 0, 3)),
        (5, -4, 4, Window(0, 5, 0, 4)),
    ],
)
def test_windows(size: int, start: int, length: int, expected: Window) -> None:
    assert window(size, start, length) == expected
    line = np.arange(1, size + 1)
    extended = np.pad(line[expected.crop_begin : size - expected.crop_end], (expected.pad_begin, expected.pad_end))
    assert extended.tolist() == [line[i] if 0 <= i < size else 0 for i in range(start, start + length)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_geometry_survives_its_dictionary(case) -> None:
    arguments = case.geometry.to_dict()
    restored = ConvGeometry.from_dict(arguments)
    assert restored == case.geometry


@pytest.mark.parametrize(
    "arguments", [3, {}, {1: 2}, {"input_shape": (1, 1, 3), "weight_shape": (1, 1, 3), "ranks": 1}]
)
def test_what_is_no_geometrys_dictionary_is_refused(arguments) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^arguments is .*expected what to_dict gives"):
        ConvGeometry.from_dict(arguments)


def test_the_adjoint_exchanges_input_and_output() -> None:
    geometry = ConvGeometry.from_forward((2, 4, 5), (4, 3, 4), 2, 1, transposed=True, output_padding=1)
    adjoint = geometry.adjoint()
    assert (adjoint.input_shape, adjoint.output_shape) == (geometry.output_shape, geometry.input_shape)
    assert adjoint.weight_shape == geometry.weight_shape
    with pytest.raises(GeometryError, match="transposed"):
        adjoint.adjoint()


def test_length_1_sequences_stand_for_every_axis_as_in_torch() -> None:
    short = ConvGeometry.from_forward((2, 4, 9, 9), (4, 4, 3, 3), [2], [1], [1])
    assert short == ConvGeometry.from_forward((2, 4, 9, 9), (4, 4, 3, 3), 2, 1, 1)


def test_numpy_arrays_are_sequences() -> None:
    """As they are for torch.nn.grad."""
    shapes, pads = ((2, 4, 9, 8), (6, 4, 3, 2)), ((1, 0), (0, 2))
    given = ConvGeometry.from_forward(*shapes, np.array([2, 1]), np.array(pads), np.array([1, 2]))
    assert given == ConvGeometry.from_forward(*shapes, (2, 1), pads, (1, 2))
    assert all(type(amount) is int for pair in given.pads for amount in pair)
    with pytest.raises(GeometryError, match="stride is"):
        ConvGeometry.from_forward(*shapes, np.array([1, 2, 3]))


def test_numpy_integers_are_integers() -> None:
    geometry = ConvGeometry.from_forward(np.array([2, 4, 9]), (4, 4, np.int64(3)), np.int32(2))
    assert geometry.output_shape == (2, 4, 4)
    assert all(type(size) is int for size in geometry.input_shape)


FORWARD = {"input_shape": (2, 4, 8, 8), "weight_shape": (6, 4, 3, 3)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_shape": (4, 8, 8)}, GeometryError, r"different numbers of dimensions"),
        ({"input_shape": (4, 8)}, GeometryError, r"input has 2 dimensions \(4, 8\), expected 3, 4 or 5"),
        ({"input_shape": (4, 8, 8), "weight_shape": (6, 8, 3), "rank": 2}, GeometryError, r"expected 4.*Add the batch"),
        ({"input_shape": (2, 3, 8, 8)}, GeometryError, r"input has 3 channels, expected 4: groups 1 times 4"),
        ({"groups": 4}, GeometryError, r"groups is 4, expected a divisor of weight dimension 0, which is 6"),
        ({"groups": 0}, GeometryError, r"groups is 0, expected at least 1"),
        ({"groups": -1}, GeometryError, r"groups is -1, expected at least 1"),
        ({"groups": 2.0}, ArgumentTypeError, r"groups is 2\.0 \(float\), expected an integer"),
        ({"groups": True}, ArgumentTypeError, r"groups is True \(bool\), expected an integer"),
        ({"stride": 0}, GeometryError, r"stride is 0, expected at least 1"),
        ({"stride": (1, -2)}, GeometryError, r"stride\[1\] is -2, expected at least 1"),
        ({"stride": (1, 2, 3)}, GeometryError, r"stride is \(1, 2, 3\), expected one integer or 2"),
        ({"stride": 1.5}, ArgumentTypeError, r"stride is 1\.5 \(float\)"),
        ({"dilation": 0}, GeometryError, r"dilation is 0, expected at least 1"),
        ({"padding": -1}, GeometryError, r"padding is -1, expected at least 0"),
        ({"padding": "full"}, GeometryError, r"padding is 'full', expected 'same', 'valid'"),
        (
            {"padding": 2**62},
            GeometryError,
            r"axis 0: the size of the padded input would be \d+, expected at most \d+: ONNX",
        ),
        ({"padding": "same", "dilation": 2**62}, GeometryError, r"axis 0: the size of the padded input would be \d+"),
        ({"padding": "same", "stride": 2}, GeometryError, r"'same' with stride \(2, 2\), expected stride 1"),
        ({"padding": ((1, 2),)}, GeometryError, r"expected 2 pairs \(begin, end\)"),
        ({"padding": ((1, 2), (0, -1))}, GeometryError, r"padding\[1\]\[1\] is -1"),
        ({"weight_shape": (6, 4, 0, 3)}, GeometryError, r"weight dimension 2 is 0, expected at least 1"),
        ({"input_shape": (2, 4, 0, 8)}, GeometryError, r"input dimension 2 is 0, expected at least 1"),
        ({"input_shape": (-1, 4, 8, 8)}, GeometryError, r"input dimension 0 is -1, expected at least 0"),
        ({"input_shape": 8}, ArgumentTypeError, r"shape of input is 8 \(int\)"),
        ({"weight_shape": (6, 4, 9, 3)}, GeometryError, r"axis 0: the kernel spans 9 elements.*padded input's 8"),
        ({"weight_shape": (6, 4, 3, 3), "dilation": (1, 5)}, GeometryError, r"axis 1: the kernel spans 11"),
        ({"output_padding": 1}, GeometryError, r"only a transposed convolution has it"),
        ({"rank": "x"}, ArgumentTypeError, r"rank is 'x' \(str\), expected an integer"),
        ({"rank": 0}, GeometryError, r"rank is 0, expected at least 1"),
        ({"transposed": "yes"}, ArgumentTypeError, r"transposed is 'yes'"),
        ({"transposed": True}, GeometryError, r"input has 4 channels, expected 6, dimension 0 of the transposed"),
    ],
)
def test_inconsistent_forward_calls_are_refused(changes: dict, error: type[ConvGradError], message: str) -> None:
    with pytest.raises(error, match=message):
        ConvGeometry.from_forward(**(FORWARD | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_padding": 2, "stride": 2}, r"output_padding on spatial axis 0 is 2, expected less than the larger"),
        (
            {"input_shape": (1, 4, 2**62), "stride": 4},
            r"axis 0: the size of the uncut output would be \d+, expected at most",
        ),
        ({"dilation": 2**62}, r"axis 0: the size of the uncut output would be \d+, expected at most"),
        (
            {"weight_shape": (4, 2**62, 3), "groups": 4},
            r"the output's channels, groups 4 times \d+ of weight, would be",
        ),
        ({"padding": 4, "input_shape": (1, 4, 1), "weight_shape": (4, 2, 3)}, r"the output would have -5 elements"),
    ],
)
def test_inconsistent_transposed_calls_are_refused(changes: dict, message: str) -> None:
    arguments = {"input_shape": (1, 4, 5), "weight_shape": (4, 2, 3), "transposed": True} | changes
    with pytest.raises(GeometryError, match=message):
        ConvGeometry.from_forward(**arguments)


@pytest.mark.parametrize(
    ("grad_output", "message"),
    [
        ((3, 6, 6, 6), r"grad_output batch is 3, expected 2"),
        ((2, 5, 6, 6), r"grad_output channels is 5, expected 6"),
        ((2, 6, 6, 7), r"grad_output spatial axis 1 is 7, expected 6.*input \(2, 4, 8, 8\)"),
        ((2, 6, 6), r"grad_output has 3 dimensions \(2, 6, 6\), expected 4"),
    ],
)
def test_a_grad_output_that_no_forward_call_gives_is_refused(grad_output: tuple[int, ...], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        ConvGeometry.from_backward(grad_output, **FORWARD)


def test_errors_are_the_builtin_a_caller_expects() -> None:
    assert issubclass(GeometryError, ValueError)
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(GeometryError, ConvGradError)
