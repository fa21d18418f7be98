"""The catalogue's rules: names, reasons, errors, and the operators each formula is made of."""

from __future__ import annotations

import pytest

from convgrad_export.errors import UnsupportedLoweringError
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import CPU, CUDA, GRADIENTS, LOWERINGS, by_name, candidates
from convgrad_export.lowering.catalogue import _by_name
from convgrad_export.selection.policy import choose

from ..cases import CASES
from ..running import model_of

PLAIN = ConvGeometry.from_forward((2, 4, 8, 8), (6, 4, 3, 3), padding=1)
STRIDED = ConvGeometry.from_forward((2, 4, 9, 9), (6, 4, 3, 3), stride=2, padding=1)
PADDING_ONLY = ConvGeometry.from_forward((2, 2, 1, 4, 4), (3, 2, 2, 2, 2), stride=(9, 1, 1), padding=(4, 0, 0))
UNEVEN = ConvGeometry.from_forward((2, 4, 8, 8), (6, 4, 3, 3), padding=((1, 0), (1, 1)))


def operators(name: str, geometry: ConvGeometry) -> list[str]:
    return [node.op_type for node in model_of(geometry, LOWERINGS[name]).graph.node]


@pytest.mark.parametrize(
    ("name", "geometry", "expected"),
    [
        ("input.conv_transpose", STRIDED, ["ConvTranspose"]),
        ("input.conv_transpose_crop", STRIDED, ["ConvTranspose", "Slice", "Pad"]),
        (
            "input.flipped_conv",
            PLAIN,
            ["Reshape", "Transpose", "Reshape", "Gather", "Transpose", "Reshape", "Conv"],
        ),
        ("weight.swapped_conv", STRIDED, ["Slice", "Transpose", "Transpose", "Conv", "Transpose"]),
        ("bias.reduce_sum", PLAIN, ["ReduceSum"]),
    ],
)
def test_formulas_are_made_of_the_expected_operators(name: str, geometry: ConvGeometry, expected: list[str]) -> None:
    if name in ("input.conv_transpose_crop", "weight.swapped_conv"):
        geometry = ConvGeometry.from_forward((2, 4, 10, 10), (6, 4, 3, 3), stride=3)  # one row is never read
        expected = ["ConvTranspose", "Pad"] if name.startswith("input") else expected
    assert operators(name, geometry) == expected


def test_names_start_with_their_gradient_and_duplicates_are_refused() -> None:
    for name, lowering in LOWERINGS.items():
        assert name == lowering.name
        assert name.split(".")[0] == lowering.gradient
        assert lowering.gradient in GRADIENTS
        assert len(lowering.summary) > 20
    with pytest.raises(AssertionError, match="duplicate"):
        _by_name([LOWERINGS["input.conv"], LOWERINGS["input.conv"]])


@pytest.mark.parametrize(
    ("name", "geometry", "options", "reason"),
    [
        ("input.flipped_conv", STRIDED, {}, "stride is (2, 2)"),
        ("input.phase_conv", PLAIN, {}, "stride is 1"),
        ("input.conv", PLAIN, {}, "not transposed"),
        ("input.pixel_shuffle", PLAIN, {}, "overlap"),
        ("input.col2im", PLAIN, {"opset": 17}, "opset 17"),
        ("input.conv_transpose", PLAIN, {"dtype": "float64"}, "float64"),
        ("input.conv_transpose", UNEVEN, {"provider": CUDA}, "uneven pads"),
        ("input.col2im", PLAIN, {"provider": CUDA}, "no CUDA kernel"),
        ("weight.depthwise_taps", PLAIN, {}, "4 input channels"),
        ("weight.winograd4", STRIDED, {}, "stride"),
        ("input.winograd6", PLAIN, {"dtype": "float64"}, "constants are float32"),
        ("weight.shifted_matmul", STRIDED, {}, "stride"),
        ("input.plane_col2im", PLAIN, {}, "spatial axes: 2, it needs 3"),
        ("weight.depth_taps", PADDING_ONLY, {}, "every depth tap reads padding only"),
    ],
)
def test_a_lowering_says_why_it_does_not_apply(name: str, geometry: ConvGeometry, options: dict, reason: str) -> None:
    assert reason in LOWERINGS[name].why_not(geometry, **options)


def test_asking_for_a_lowering_that_does_not_apply_names_those_that_do() -> None:
    with pytest.raises(UnsupportedLoweringError, match=r"stride is \(2, 2\).*input\.conv_transpose"):
        by_name("input.flipped_conv", "input", STRIDED)
    with pytest.raises(UnsupportedLoweringError, match="no such lowering"):
        by_name("input.nothing", "input", STRIDED)
    with pytest.raises(UnsupportedLoweringError, match="computes the weight gradient"):
        by_name("weight.im2col", "input", STRIDED)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_policy_always_finds_a_lowering_and_keeps_to_direct_forms(case) -> None:
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        for provider in (CPU, CUDA):
            for gradient in GRADIENTS:
                lowering = choose(gradient, case.geometry, dtype, provider=provider, opset=13)
                assert lowering.why_not(case.geometry, dtype, provider, 13) is None
                assert lowering.error_factor == 1.0  # the cases are small


def test_the_policy_obeys_the_allowed_error() -> None:
    wide = ConvGeometry.from_forward((8, 256, 14, 14), (256, 256, 3, 3), padding=1)
    chosen = {factor: choose("weight", wide, max_error_factor=factor).name for factor in (1.0, 2.0, 8.0)}
    assert chosen == {1.0: "weight.channels_last_conv", 2.0: "weight.winograd4", 8.0: "weight.winograd6"}
    narrow = ConvGeometry.from_forward((8, 16, 14, 14), (16, 16, 3, 3), padding=1)
    assert choose("weight", narrow, max_error_factor=8.0).error_factor == 1.0


def test_planes_that_no_depth_tap_tells_apart_share_their_products() -> None:
    """One plane under three taps: a third of the products, and for 16 planes one set of them in spite of the edges."""
    for depth, count in ((1, 9), (4, 27), (16, 9)):
        geometry = ConvGeometry.from_forward((8, 4, depth, 5, 5), (6, 4, 3, 3, 3), padding=1)
        assert operators("weight.depth_taps", geometry).count("MatMul") == count
        assert operators("weight.depth_taps_gathered", geometry).count("MatMul") == count


def test_three_axes_are_taken_plane_by_plane() -> None:
    def chosen(channels: int, size: tuple[int, ...], kernel: int = 3, stride: int = 1, batch: int = 8) -> list[str]:
        geometry = ConvGeometry.from_forward(
            (batch, channels, *size), (64, channels, *[kernel] * 3), stride, padding=kernel // 2
        )
        return [choose(gradient, geometry, threads=1).name.split(".")[1] for gradient in ("input", "weight")]

    assert chosen(64, (4, 16, 16)) == ["plane_col2im", "depth_taps"]
    assert chosen(64, (2, 8, 8)) == ["plane_col2im", "depth_taps_gathered"]
    assert chosen(64, (4, 16, 16), batch=1) == ["plane_col2im", "channels_last_conv"]
    assert chosen(64, (2, 8, 8), batch=1) == ["conv_transpose", "channels_last_conv"]
    assert chosen(64, (1, 8, 8), batch=1) == ["plane_col2im", "channels_last_conv"]
    assert chosen(64, (1, 2, 2)) == ["plane_col2im", "columns"]
    assert chosen(64, (4, 16, 16), 1, 2) == ["conv_transpose", "depth_taps_gathered"]
    assert chosen(64, (1, 4, 4), 1, 2) == ["plane_col2im", "depth_taps_gathered"]
    assert chosen(64, (1, 4, 4), 1, 2, batch=1) == ["plane_col2im", "matmul_taps"]


def test_a_constant_weight_changes_the_choice_where_the_runtime_profits() -> None:
    depthwise = ConvGeometry.from_forward((8, 96, 14, 14), (96, 1, 3, 3), padding=1, groups=96)
    assert choose("input", depthwise, threads=1).name == "input.conv_transpose"
    assert choose("input", depthwise, threads=1, constant_weight=True).name == "input.flipped_conv"


@pytest.mark.parametrize(
    ("gradient", "input_shape", "weight_shape", "stride", "one", "several"),
    [
        ("input", (8, 32, 28, 28), (32, 32, 3, 3), 1, "input.winograd4", "input.flipped_conv"),
        ("input", (8, 64, 28, 28), (64, 64, 3, 3), 2, "input.col2im", "input.col2im"),
        ("input", (8, 512, 2, 2), (512, 512, 3, 3), 1, "input.columns", "input.columns"),
        ("input", (8, 3, 224, 224), (64, 3, 7, 7), 2, "input.conv_transpose", "input.conv_transpose"),
        ("input", (8, 96, 56, 56), (96, 1, 3, 3), 1, "input.conv_transpose", "input.flipped_conv"),
        ("weight", (8, 48, 56, 56), (48, 48, 3, 3), 1, "weight.channels_last_conv", "weight.channels_last_conv"),
        ("weight", (8, 512, 2, 2), (512, 512, 3, 3), 1, "weight.channels_last_conv", "weight.columns"),
        ("input", (1, 512, 2, 2), (2048, 512, 1, 1), 1, *["input.matmul_taps"] * 2),
        ("input", (1, 256, 4, 4), (256, 256, 3, 3), 1, "input.conv_transpose", "input.conv_transpose"),
        ("input", (1, 64, 56, 56), (256, 64, 1, 1), 1, "input.flipped_conv", "input.flipped_conv"),
        ("input", (1, 192, 7, 7), (1152, 192, 1, 1), 1, *["input.matmul_taps"] * 2),
        ("input", (1, 256, 14, 14), (1024, 256, 1, 1), 1, "input.matmul_taps", "input.flipped_conv"),
        ("weight", (1, 448, 8, 8), (384, 448, 3, 3), 1, *["weight.channels_last_conv"] * 2),
        ("input", (1, 192, 17, 17), (320, 192, 3, 3), 2, *["input.col2im"] * 2),
        ("input", (1, 192, 15, 15), (320, 192, 3, 3), 2, *["input.conv_transpose"] * 2),
        ("input", (1, 128, 16, 16), (128, 128, 5, 5), 1, "input.col2im", "input.conv_transpose"),
        ("input", (1, 256, 28, 28), (256, 8, 3, 3), 1, *["input.conv_transpose"] * 2),
        ("input", (1, 256, 56, 56), (256, 8, 3, 3), 2, "input.conv_transpose", "input.col2im"),
        ("input", (8, 480, 1, 1), (20, 480, 1, 1), 1, *["input.columns"] * 2),
        ("input", (8, 16, 5, 5), (120, 16, 5, 5), 6, *["input.columns"] * 2),
        ("weight", (8, 16, 5, 5), (120, 16, 5, 5), 6, *["weight.columns"] * 2),
        ("weight", (1, 64, 56, 56), (256, 64, 1, 1), 1, *["weight.sample_matmul"] * 2),
        ("weight", (1, 64, 14, 14), (384, 64, 1, 1), 1, *["weight.columns"] * 2),
        ("weight", (1, 128, 28, 28), (256, 128, 1, 1), 2, *["weight.matmul_taps"] * 2),
        ("weight", (1, 256, 14, 14), (256, 256, 3, 3), 1, "weight.winograd4", "weight.channels_last_flipped_conv"),
        ("weight", (1, 512, 14, 14), (512, 512, 3, 3), 1, *["weight.winograd4"] * 2),
        ("weight", (1, 3, 224, 224), (32, 3, 3, 3), 2, "weight.channels_last_conv", "weight.sample_matmul"),
        ("weight", (1, 128, 4, 4), (32, 128, 3, 3), 1, "weight.channels_last_conv", "weight.columns"),
        ("weight", (8, 256, 56, 56), (64, 256, 1, 1), 1, "weight.sample_matmul", "weight.sample_matmul"),
        ("weight", (8, 64, 14, 14), (384, 64, 1, 1), 1, "weight.sample_matmul", "weight.sample_matmul"),
        ("weight", (2, 64, 14, 14), (384, 64, 1, 1), 1, "weight.matmul_taps", "weight.sample_matmul"),
        ("input", (8, 960, 2, 2), (160, 960, 1, 1), 1, "input.columns", "input.columns"),
        ("input", (8, 160, 4, 4), (960, 160, 1, 1), 1, "input.flipped_conv", "input.flipped_conv"),
        ("input", (8, 512, 7, 7), (2048, 512, 1, 1), 1, "input.columns", "input.columns"),
        ("weight", (8, 2048, 7, 7), (512, 2048, 1, 1), 1, "weight.matmul_taps", "weight.matmul_taps"),
        ("weight", (8, 3, 224, 224), (64, 3, 7, 7), 2, "weight.channels_last_conv", "weight.channels_last_conv"),
        ("weight", (8, 3, 224, 224), (96, 3, 4, 4), 4, "weight.channels_last_conv", "weight.swapped_conv"),
        ("weight", (2, 3, 128, 128), (32, 3, 11, 11), 2, "weight.channels_last_conv", "weight.channels_last_conv"),
        ("weight", (2, 128, 64, 64), (3, 128, 3, 3), 1, *["weight.channels_last_flipped_conv"] * 2),
        ("weight", (8, 128, 32, 32), (64, 128, 1, 7), 1, *["weight.channels_last_flipped_conv"] * 2),
        ("weight", (8, 128, 32, 32), (64, 128, 1, 7), 2, *["weight.channels_last_conv"] * 2),
        ("weight", (8, 64, 256), (128, 64, 5), 1, *["weight.channels_last_conv"] * 2),
    ],
)
def test_the_rules_know_the_number_of_threads(gradient, input_shape, weight_shape, stride, one, several) -> None:
    groups = input_shape[1] // weight_shape[1]
    padding = weight_shape[2] // 2 if stride < weight_shape[2] else 0
    geometry = ConvGeometry.from_forward(input_shape, weight_shape, stride, padding, groups=groups)
    chosen = [choose(gradient, geometry, threads=threads).name for threads in (1, 2, None)]
    assert chosen == [one, several, several]


@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "stride", "one", "several"),
    [
        ((8, 48, 56, 56), (48, 48, 3, 3), 1, "weight.matmul_taps", "weight.sample_matmul"),
        ((8, 512, 2, 2), (512, 512, 3, 3), 1, "weight.columns", "weight.columns"),
        ((8, 3, 224, 224), (64, 3, 7, 7), 2, "weight.sample_matmul", "weight.sample_matmul"),
        ((2, 3, 128, 128), (32, 3, 5, 5), 1, "weight.columns", "weight.sample_matmul"),
        ((2, 128, 64, 64), (3, 128, 3, 3), 1, "weight.shifted_matmul", "weight.shifted_matmul"),
    ],
)
def test_without_a_conv_weight_gradients_are_matrix_products(input_shape, weight_shape, stride, one, several) -> None:
    """onnxruntime has no Conv in float64."""
    geometry = ConvGeometry.from_forward(input_shape, weight_shape, stride, padding=weight_shape[2] // 2)
    assert [choose("weight", geometry, "float64", threads=count).name for count in (1, 2)] == [one, several]


def test_a_name_for_one_gradient_leaves_the_others_to_the_policy() -> None:
    assert choose("weight", PLAIN, lowering="input.flipped_conv").gradient == "weight"
    assert choose("input", PLAIN, lowering="input.flipped_conv").name == "input.flipped_conv"


def test_candidates_cover_the_catalogue_once() -> None:
    listed = [lowering.name for gradient in GRADIENTS for lowering in candidates(gradient)]
    assert sorted(listed) == sorted(LOWERINGS)
    assert all(lowering.why_not(PLAIN, provider=CPU) is None for lowering in candidates("bias"))


@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry.from_forward((2, 64, 2**40, 2**40), (64, 64, 3, 3), padding=1),
        ConvGeometry.from_forward((2, 4, 2**40, 8, 8), (6, 4, 3, 3, 3), padding=1),
        ConvGeometry.from_forward((2, 4, 2**40, 8, 8), (4, 6, 3, 3, 3), stride=2, transposed=True),
        ConvGeometry.from_forward((2, 4, 8, 2**20, 2**20), (6, 4, 3, 3, 3), padding=1),
    ],
    ids=["image", "depth", "transposed depth", "planes"],
)
def test_what_lists_positions_is_not_for_sizes_beyond_all_lists(geometry: ConvGeometry) -> None:
    """And says so at once, instead of counting to 2**40."""
    for entry in LOWERINGS.values():
        entry.why_not(geometry)
    assert "positions, more than" in str(LOWERINGS["weight.columns"].why_not(geometry))
    for gradient in ("input", "weight"):
        choose(gradient, geometry)
    for name in ("input.plane_col2im", "weight.depth_taps_gathered"):
        assert geometry.rank == 2 or LOWERINGS[name].why_not(geometry) is not None or geometry.input_size[0] < 2**40
