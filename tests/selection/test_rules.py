"""Which form the rules choose, where batch 32 and one sample ask for another than batch 8 (benchmarks/NOTES.md)."""

from __future__ import annotations

import pytest

from convgrad_export.geometry import ConvGeometry
from convgrad_export.selection.policy import choose

Layer = tuple[tuple[int, ...], tuple[int, ...], int]  # sizes of one sample, of the weight, and the stride
SAMPLES = (1, 8, 32)


def chosen(gradient: str, layer: Layer, batch: int, threads: int, **options: bool) -> str:
    sizes, weight, stride = layer
    rank = len(weight) - 2
    padding = [[(k - 1) // 2, (k - 1) // 2] for k in weight[2:]]
    g = ConvGeometry.from_forward((batch, *sizes), weight, [stride] * rank, padding, [1] * rank)
    return choose(gradient, g, threads=threads, **options).name.split(".")[1]


@pytest.mark.parametrize(
    ("gradient", "layer", "threads", "expected"),
    [
        ("input", ((64, 56, 56), (64, 64, 3, 3), 1), 1, ["winograd4", "winograd4", "flipped_conv"]),
        ("input", ((128, 28, 28), (128, 128, 3, 3), 1), 1, ["winograd4", "winograd4", "winograd4"]),
        ("input", ((256, 256), (256, 256, 3), 1), 2, ["winograd4", "winograd4", "col2im"]),
        ("input", ((128, 256), (128, 128, 3), 1), 1, ["col2im", "col2im", "col2im"]),
        (
            "weight",
            ((96, 35, 35), (96, 96, 3, 3), 1),
            2,
            ["channels_last_flipped_conv", "winograd4", "channels_last_conv"],
        ),
        ("weight", ((768, 17, 17), (128, 768, 1, 1), 1), 1, ["columns", "columns", "sample_matmul"]),
        ("weight", ((576, 14, 14), (96, 576, 1, 1), 1), 2, ["columns", "sample_matmul", "sample_matmul"]),
        ("weight", ((2048, 7, 7), (512, 2048, 1, 1), 1), 2, ["columns", "matmul_taps", "matmul_taps"]),
        ("input", ((192, 15, 15), (192, 192, 3, 3), 2), 2, ["conv_transpose", "col2im", "col2im"]),
        ("input", ((128, 28, 28), (256, 128, 3, 3), 2), 2, ["col2im", "col2im", "col2im"]),
    ],
)
def test_form_by_batch(gradient: str, layer: Layer, threads: int, expected: list[str]) -> None:
    assert [chosen(gradient, layer, batch, threads) for batch in SAMPLES] == expected


def test_one_strided_sample_under_a_constant_weight_stays_with_conv_transpose() -> None:
    layer = ((3, 224, 224), (64, 3, 7, 7), 2)
    assert chosen("input", layer, 1, 1) == "col2im"
    assert chosen("input", layer, 1, 1, constant_weight=True) == "conv_transpose"
