"""The shared case table: convolutions whose every parameter is off its default somewhere.

Each case is chosen for something that a formula can get wrong; the name says what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from convgrad_export import dtypes
from convgrad_export.accuracy import reference_and_bounds
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import compute_dtype


@dataclass(frozen=True)
class ConvCase:
    """One convolution: sizes of the forward call and its attributes."""

    name: str
    n: int
    c: int
    m: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    transposed: bool = False
    output_padding: Any = 0

    @property
    def geometry(self) -> ConvGeometry:
        channels = (self.c, self.m // self.groups) if self.transposed else (self.m, self.c // self.groups)
        return ConvGeometry.from_forward(
            (self.n, self.c, *self.size),
            (*channels, *self.kernel),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            transposed=self.transposed,
            output_padding=self.output_padding,
        )

    def operands(self, dtype: str, *, integers: bool, seed: int = 0) -> dict[str, np.ndarray]:
        """float64 arrays with values that `dtype` represents exactly: small integers, or normal deviates rounded."""
        rng = np.random.default_rng([seed, len(self.name), self.n, self.c, *self.size])
        geometry = self.geometry
        shapes = {
            "input": geometry.input_shape,
            "weight": geometry.weight_shape,
            "grad_output": geometry.output_shape,
        }
        if integers:
            limit = 2 if dtypes.is_half(dtype) else 8
            return {name: rng.integers(-limit, limit + 1, shape).astype(np.float64) for name, shape in shapes.items()}
        rounded = dtypes.numpy_dtype(dtype)
        return {name: rng.standard_normal(shape).astype(rounded).astype(np.float64) for name, shape in shapes.items()}

    def expected(self, operands: dict[str, np.ndarray], dtype: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(float64 reference, error bound) for each gradient."""
        return reference_and_bounds(self.geometry, operands, dtype, compute_dtype(dtype))


CASES = [
    ConvCase("plain1d", 2, 3, 4, (9,), (3,)),
    ConvCase("plain2d", 2, 3, 4, (7, 6), (3, 3), padding=1),
    ConvCase("plain3d", 2, 2, 3, (5, 4, 6), (3, 2, 3), padding=1),
    ConvCase("mixed1d", 3, 4, 6, (23,), (4,), stride=3, padding=2, dilation=2, groups=2),
    ConvCase("mixed2d", 2, 4, 6, (10, 8), (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2), groups=2),
    ConvCase("mixed3d", 2, 4, 4, (7, 9, 6), (2, 3, 2), (2, 3, 1), (1, 2, 0), (2, 1, 3), groups=2),
    ConvCase("remainder_every_axis", 2, 2, 3, (11, 13), (3, 3), stride=(4, 5), padding=(0, 1)),
    ConvCase("rows_never_read", 2, 2, 3, (12, 12), (2, 2), stride=(5, 5)),
    ConvCase("dilated_with_stride", 2, 3, 4, (15, 14), (3, 3), stride=(2, 3), padding=3, dilation=(3, 2)),
    ConvCase(
        "stride_and_dilation_share_a_factor", 2, 2, 3, (17, 16), (3, 4), stride=(4, 6), padding=4, dilation=(2, 4)
    ),
    ConvCase("depthwise", 2, 6, 6, (8, 9), (3, 3), padding=1, groups=6),
    ConvCase("depthwise_strided", 2, 5, 5, (11, 10), (3, 5), stride=(2, 3), padding=(1, 2), groups=5),
    ConvCase("depthwise_multiplier", 2, 4, 12, (7, 8), (3, 2), stride=(1, 2), padding=1, groups=4),
    ConvCase("depthwise_wide_rows", 1, 3, 3, (5, 70), (3, 3), padding=1, groups=3),
    ConvCase("depthwise1d_dilated", 3, 4, 8, (41,), (5,), padding=8, dilation=4, groups=4),
    ConvCase("depthwise3d", 1, 3, 3, (4, 5, 6), (3, 3, 3), padding=1, groups=3),
    ConvCase("groups_between_1_and_c", 2, 6, 9, (6, 7), (3, 3), padding=(2, 1), groups=3),
    ConvCase("kernel_larger_than_input", 2, 2, 3, (2, 3), (5, 4), padding=(2, 3)),
    ConvCase("stride_larger_than_kernel", 2, 3, 2, (13, 11), (2, 1), stride=(4, 3)),
    ConvCase("pointwise", 2, 5, 3, (6, 7), (1, 1)),
    ConvCase("pointwise_strided", 2, 4, 6, (7, 9), (1, 1), stride=(2, 3), groups=2),
    ConvCase("pointwise_padded", 2, 3, 2, (4, 5), (1, 1), stride=2, padding=(1, 2)),
    ConvCase("patches", 2, 3, 8, (8, 12), (4, 4), stride=4),
    ConvCase("patches_with_remainder_and_padding", 2, 3, 4, (11, 9), (3, 2), stride=(4, 3), padding=(2, 1)),
    ConvCase("padding_beyond_kernel", 2, 2, 3, (4, 5), (2, 3), padding=(5, 4)),
    ConvCase("padding_beyond_kernel_strided", 2, 2, 3, (4, 5), (2, 3), stride=(3, 2), padding=(5, 4)),
    ConvCase("only_padding_is_read", 2, 2, 3, (1, 1), (3, 3), stride=(12, 12), padding=5),
    ConvCase("unit_axis", 2, 3, 4, (1, 9), (1, 3), padding=(0, 1)),
    ConvCase("unit_everything", 1, 1, 1, (1,), (1,)),
    ConvCase("asymmetric_kernel", 2, 2, 3, (9, 5), (5, 1), padding=(2, 0)),
    ConvCase("asymmetric_padding", 2, 3, 4, (8, 7), (3, 3), stride=(2, 1), padding=((0, 2), (3, 1))),
    ConvCase("asymmetric_padding_1d_causal", 2, 4, 4, (12,), (3,), padding=((4, 0),), dilation=2),
    ConvCase("same_even_kernel", 2, 2, 3, (6, 7), (4, 2), padding="same"),
    ConvCase("valid_by_name", 2, 2, 3, (6, 7), (3, 2), padding="valid"),
    ConvCase("wide_planes3d", 2, 2, 3, (3, 9, 8), (3, 3, 3), padding=1),
    ConvCase("depth_taps_apart3d", 2, 2, 3, (2, 3, 4), (7, 2, 2), (3, 1, 2), (6, 1, 0)),
    ConvCase("winograd_channels", 2, 5, 7, (9, 10), (3, 3), padding=1),
    ConvCase("winograd_dilated", 2, 3, 4, (11, 8), (3, 2), padding=(3, 0), dilation=(3, 2)),
    ConvCase("winograd_1d_dilated", 2, 3, 4, (13,), (3,), padding=((4, 0),), dilation=2),
    ConvCase("winograd_3d", 1, 3, 2, (5, 6, 4), (3, 3, 3), padding=1),
    ConvCase("winograd_mixed_kernel", 2, 3, 2, (7, 8), (1, 3), padding=(0, 1)),
    ConvCase("one_window", 3, 4, 5, (3, 2), (3, 2), stride=2),
    ConvCase("one_window1d", 2, 3, 4, (5,), (5,)),
    ConvCase("one_window3d", 1, 2, 3, (2, 3, 2), (2, 3, 2)),
    ConvCase("one_window_but_for_padding", 2, 3, 4, (3, 3), (3, 3), padding=((0, 1), (0, 0))),
    ConvCase("one_position", 3, 6, 4, (1, 1), (1, 1), dilation=2),
    ConvCase("transposed_from_one_position", 2, 4, 3, (1, 1), (4, 3), transposed=True),
    ConvCase("batch_0", 0, 3, 4, (7, 6), (3, 3), padding=1),
    ConvCase("batch_0_grouped_strided", 0, 4, 6, (9,), (3,), stride=2, groups=2),
    ConvCase("batch_1", 1, 3, 4, (7, 6), (3, 3), stride=2, padding=1),
    ConvCase("transposed1d", 2, 3, 4, (7,), (4,), stride=2, padding=1, transposed=True),
    ConvCase("transposed2d", 2, 4, 6, (5, 4), (3, 4), (2, 3), (1, 2), groups=2, transposed=True, output_padding=(1, 2)),
    ConvCase("transposed3d", 1, 2, 3, (3, 4, 3), (2, 3, 2), 2, 1, transposed=True, output_padding=1),
    ConvCase("transposed_output_padding_past_stride", 2, 2, 3, (4, 5), (3, 2), 1, 2, 3, 1, True, (2, 1)),
    ConvCase("transposed_output_padding_2s", 2, 2, 4, (4, 3), (2, 2), 2, 1, 5, 2, True, (4, 3)),
    ConvCase("transposed_depthwise", 2, 4, 4, (6, 5), (3, 3), 2, 1, groups=4, transposed=True, output_padding=1),
    ConvCase("transposed_padding_crops_all_but_one", 1, 2, 2, (2, 2), (3, 3), 1, (1, 1), transposed=True),
    ConvCase("transposed_batch_0", 0, 2, 3, (4, 4), (3, 3), 2, 1, transposed=True),
]
