"""Convolutions whose every parameter is off its default somewhere, as arguments of `aten.convolution_backward`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ConvCase:
    """One convolution. `weight` is the weight's shape, in torch's layout for plain or transposed convolutions."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.stride)

    @property
    def attributes(self) -> list[Any]:
        extra = list(self.output_padding or (0,) * self.rank)
        return [list(self.stride), list(self.padding), list(self.dilation), self.transposed, extra, self.groups]

    @property
    def out_channels(self) -> int:
        return self.weight[1] * self.groups if self.transposed else self.weight[0]

    def operands(self, dtype: torch.dtype, *, integers: bool, seed: int = 0) -> list[torch.Tensor]:
        """(grad_output, input, weight): integers from -3 to 3, or positive numbers from 0.5 to 1.5.

        Positive numbers make the sum of the products' magnitudes the result itself, so bounds need no second pass.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            if integers:
                return torch.randint(-3, 4, shape, generator=generator).to(dtype)
            return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)

        x, w = draw(self.input), draw(self.weight)
        with torch.backends.mkldnn.flags(enabled=False):
            stride, padding, dilation, transposed, extra, groups = self.attributes
            y = torch.ops.aten.convolution.default(
                x.double(), w.double(), None, stride, padding, dilation, transposed, extra, groups
            )
        return [draw(tuple(y.shape)), x, w]

    def arguments(self, dtype: torch.dtype, *, integers: bool = True, seed: int = 0) -> list[Any]:
        operands = self.operands(dtype, integers=integers, seed=seed)
        return [*operands, [self.out_channels], *self.attributes, [True, True, True]]


def reference(arguments: list[Any]) -> list[torch.Tensor]:
    """(dX, dW, db) in float64 from PyTorch's own kernel without oneDNN, on exactly the operands given."""
    operands = [value.double() for value in arguments[:3]]
    if operands[1].shape[0] == 0:  # PyTorch leaves the weight gradient of an empty batch uninitialised
        return [torch.zeros_like(operands[1]), torch.zeros_like(operands[2]), torch.zeros(arguments[3]).double()]
    with torch.backends.mkldnn.flags(enabled=False):
        return list(torch.ops.aten.convolution_backward.default(*operands, *arguments[3:]))


CASES = [
    ConvCase("mixed1d", (2, 4, 11), (6, 2, 3), (2,), (1,), (3,), groups=2),
    ConvCase("dilation_shares_factor_with_stride1d", (2, 3, 13), (2, 3, 3), (2,), (2,), (2,)),
    ConvCase("depthwise_multiplier1d", (3, 2, 9), (4, 1, 4), (1,), (2,), (1,), groups=2),
    ConvCase("mixed2d", (2, 4, 10, 8), (6, 2, 3, 2), (2, 3), (1, 0), (1, 2), groups=2),
    ConvCase("plain3x3", (2, 3, 7, 6), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    ConvCase("pointwise2d", (2, 3, 5, 4), (4, 3, 1, 1), (1, 1), (0, 0), (1, 1)),
    ConvCase("pointwise_strided2d", (2, 3, 6, 5), (4, 3, 1, 1), (2, 2), (0, 0), (1, 1)),
    ConvCase("patches2d", (2, 3, 9, 8), (5, 3, 4, 4), (4, 4), (0, 0), (1, 1)),
    ConvCase("depthwise2d", (2, 6, 9, 7), (6, 1, 3, 3), (2, 1), (1, 1), (1, 2), groups=6),
    ConvCase("padded_beyond_kernel2d", (2, 2, 4, 5), (3, 2, 2, 2), (1, 3), (3, 2), (1, 1)),
    ConvCase("empty_batch2d", (0, 4, 6, 5), (2, 2, 3, 3), (2, 1), (1, 1), (1, 1), groups=2),
    ConvCase("mixed3d", (2, 4, 5, 6, 4), (4, 2, 2, 3, 1), (1, 2, 3), (0, 1, 0), (2, 1, 1), groups=2),
    ConvCase("transposed1d", (2, 4, 5), (4, 3, 3), (2,), (1,), (2,), groups=2, transposed=True, output_padding=(1,)),
    ConvCase(
        "transposed2d", (2, 4, 4, 5), (4, 3, 3, 2), (2, 3), (1, 0), (1, 2), transposed=True, output_padding=(1, 2)
    ),
    ConvCase(
        "transposed_output_padding_over_stride2d",
        (2, 2, 4, 3),
        (2, 2, 2, 3),
        (1, 2),
        (0, 1),
        (3, 3),
        groups=2,
        transposed=True,
        output_padding=(2, 2),
    ),
    ConvCase("transposed3d", (2, 2, 3, 2, 3), (2, 2, 2, 3, 2), (2, 1, 2), (1, 1, 0), (1, 2, 1), transposed=True),
    ConvCase("flat_volume3d", (2, 3, 1, 5, 4), (4, 3, 3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
]
