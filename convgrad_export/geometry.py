"""The integers of a convolution gradient: validated once, derived once, used by every formula.

Neither torch nor onnx is imported here. A size may be a Python int, a symbolic integer of a tracer (any object with
integer arithmetic), or, for the batch alone, a name such as ``"batch"`` that becomes a symbolic dimension in ONNX.

Letters, the same everywhere in the package: ``N`` batch, ``C`` input channels, ``M`` output channels, ``G`` groups,
``I`` input size, ``O`` output size, ``K`` kernel size, ``s`` stride, ``d`` dilation, ``lo``/``hi`` zero padding before
and after. A forward convolution reads ``X (N, C, I)`` and ``W (M, C/G, K)`` and writes ``Y (N, M, O)``; a transposed
one has ``W (C, M/G, K)``. Derived: the kernel's extent ``E = d(K-1)+1`` and the span ``F = (O-1)s+E`` of the padded
input that the forward pass reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from .arguments import as_bool, as_groups, as_int, as_padding, as_shape, as_sizes, is_symbolic
from .errors import ArgumentTypeError, ConvGradError, GeometryError
from .geometry_checks import check_channels, check_output_padding, check_ranks, output_size_of_axis, shown
from .windows import Phase, Size, Window, window

Sizes: TypeAlias = tuple[Size, ...]


@dataclass(frozen=True)
class ConvGeometry:
    """One convolution, checked: make it with `from_forward` or `from_backward`.

    Attributes:
        batch: N; an int, a symbolic integer, or a name.
        in_channels: C. out_channels: M. groups: G.
        input_size: I per spatial axis. kernel_size: K. output_size: O.
        stride, dilation: per spatial axis, in elements.
        pads: (lo, hi) per spatial axis, in elements of the forward input (of the output when `transposed`).
        transposed: a forward conv_transpose.
        output_padding: per spatial axis, used by transposed convolutions only.
    """

    batch: Size
    in_channels: int
    out_channels: int
    groups: int
    input_size: Sizes
    kernel_size: Sizes
    output_size: Sizes
    stride: tuple[int, ...]
    pads: tuple[tuple[Size, Size], ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def from_forward(
        cls,
        input_shape: Sequence[Size],
        weight_shape: Sequence[Size],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] | Sequence[tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
        rank: int | None = None,
        names: tuple[str, str] = ("input", "weight"),
    ) -> ConvGeometry:
        """Geometry of the forward call; the output size follows from it.

        Args:
            input_shape: (N, C, *I); N may be a name.
            weight_shape: (M, C/G, *K), or (C, M/G, *K) when `transposed`.
            stride, dilation, output_padding: one int, or one per spatial axis.
            padding: an int, one per axis, a (begin, end) pair per axis, ``"same"`` or ``"valid"``.
            groups: G.
            transposed: the forward operator is conv_transpose.
            rank: number of spatial axes demanded by the caller (2 for ``conv2d_*``); None accepts 1 to 3.
            names: what the caller calls the two shapes, for error messages.

        Raises:
            GeometryError: no convolution has these sizes. ArgumentTypeError: an argument is not an integer.
        """
        input_shape = as_shape(input_shape, names[0], allow_name=True)
        weight_shape = as_shape(weight_shape, names[1])
        rank = None if rank is None else as_int(rank, "rank", minimum=1)
        spatial = check_ranks(input_shape, weight_shape, rank, names)
        transposed = as_bool(transposed, "transposed")
        strides = as_sizes(stride, spatial, "stride", minimum=1)
        dilations = as_sizes(dilation, spatial, "dilation", minimum=1)
        extra = as_sizes(output_padding, spatial, "output_padding", minimum=0)
        groups = as_groups(groups)
        check_channels(input_shape, weight_shape, groups, transposed, names)
        kernel = tuple(weight_shape[2:])
        pads = as_padding(padding, kernel, strides, dilations)
        check_output_padding(extra, strides, dilations, transposed)
        sizes = tuple(input_shape[2:])
        output = tuple(
            output_size_of_axis(axis, size, k, s, pair, d, more, transposed)
            for axis, (size, k, s, pair, d, more) in enumerate(
                zip(sizes, kernel, strides, pads, dilations, extra, strict=True)
            )
        )
        return cls(
            batch=input_shape[0],
            in_channels=input_shape[1],
            out_channels=weight_shape[1] * groups if transposed else weight_shape[0],
            groups=groups,
            input_size=sizes,
            kernel_size=kernel,
            output_size=output,
            stride=strides,
            pads=pads,
            dilation=dilations,
            transposed=transposed,
            output_padding=extra,
        )

    @classmethod
    def from_backward(
        cls,
        grad_output_shape: Sequence[Size],
        input_shape: Sequence[Size],
        weight_shape: Sequence[Size],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] | Sequence[tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
        rank: int | None = None,
        names: tuple[str, str, str] = ("grad_output", "input", "weight"),
    ) -> ConvGeometry:
        """`from_forward`, and the check that `grad_output_shape` is the shape of that forward call's output.

        PyTorch accepts several inconsistent calls in silence, or fails inside oneDNN; here each is a GeometryError
        that gives the expected and the actual size.
        """
        geometry = cls.from_forward(
            input_shape,
            weight_shape,
            stride,
            padding,
            dilation,
            groups,
            transposed=transposed,
            output_padding=output_padding,
            rank=rank,
            names=names[1:],
        )
        given = as_shape(grad_output_shape, names[0], allow_name=True)
        expected = geometry.output_shape
        if len(given) != len(expected):
            raise GeometryError(
                f"{names[0]} has {len(given)} dimensions {shown(given)}, expected {len(expected)}: {shown(expected)}"
            )
        labels = ("batch", "channels", *(f"spatial axis {axis}" for axis in range(geometry.rank)))
        for label, got, want in zip(labels, given, expected, strict=True):
            if isinstance(got, str) or isinstance(want, str):
                continue
            if got != want:
                raise GeometryError(
                    f"{names[0]} {label} is {got}, expected {want}: a forward call with {geometry.describe()} "
                    f"gives an output of shape {shown(expected)}, {names[0]} has shape {shown(given)}"
                )
        return geometry

    @classmethod
    def from_dict(cls, arguments: Mapping[str, Any]) -> ConvGeometry:
        """What `to_dict` describes.

        Raises:
            GeometryError, ArgumentTypeError: as `from_forward`. The latter for other keys, too.
        """
        try:
            return cls.from_forward(**arguments)
        except ConvGradError:
            raise
        except TypeError as error:  # no mapping, or other keys
            raise ArgumentTypeError(f"arguments is {arguments!r:.80}, expected what to_dict gives: {error}") from error

    # --- sizes -------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @property
    def input_shape(self) -> Sizes:
        return (self.batch, self.in_channels, *self.input_size)

    @property
    def output_shape(self) -> Sizes:
        return (self.batch, self.out_channels, *self.output_size)

    @property
    def weight_shape(self) -> Sizes:
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def in_channels_per_group(self) -> int:
        return self.in_channels // self.groups

    @property
    def out_channels_per_group(self) -> int:
        return self.out_channels // self.groups

    @property
    def taps(self) -> int:
        """Number of kernel elements of one filter and channel."""
        return math.prod(self.kernel_size)

    @property
    def is_pointwise(self) -> bool:
        return all(k == 1 for k in self.kernel_size)

    @property
    def unit_stride(self) -> bool:
        """Stride 1 on every axis."""
        return all(s == 1 for s in self.stride)

    @property
    def is_depthwise(self) -> bool:
        """One input channel a group, more than one group (any channel multiplier)."""
        return self.groups > 1 and self.in_channels_per_group == 1

    # --- derived integers, per spatial axis ----------------------------------------------------------------------

    @cached_property
    def extent(self) -> Sizes:
        """E: elements of the input that one output element's kernel spans."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))

    @cached_property
    def span(self) -> Sizes:
        """F: elements of the padded input between the first and the last that the forward pass reads.

        For a transposed convolution the roles are exchanged: the span covers the padded output.
        """
        counts = self.input_size if self.transposed else self.output_size
        return tuple((n - 1) * s + e for n, s, e in zip(counts, self.stride, self.extent, strict=True))

    @cached_property
    def begin(self) -> Sizes:
        """lo: zeros before each axis."""
        return tuple(lo for lo, _ in self.pads)

    @property
    def onnx_pads(self) -> list[Size]:
        """`pads` as ONNX attributes have them: all beginnings, then all ends."""
        return [*self.begin, *(hi for _, hi in self.pads)]

    @cached_property
    def end(self) -> Sizes:
        """Zeros the forward pass really reads after each axis, ``F - lo - size``; negative where it stops short."""
        sizes = self.output_size if self.transposed else self.input_size
        return tuple(f - lo - n for f, lo, n in zip(self.span, self.begin, sizes, strict=True))

    @cached_property
    def remainder(self) -> Sizes:
        """r: rows of the padded input after the span, ``0 <= r < s``: ONNX ConvTranspose's output_padding."""
        return tuple(hi - end for (_, hi), end in zip(self.pads, self.end, strict=True))

    def read_windows(self) -> tuple[Window, ...]:
        """What the forward pass reads of each axis of its input (of its output, when transposed)."""
        sizes = self.output_size if self.transposed else self.input_size
        return tuple(window(n, -lo, f) for n, lo, f in zip(sizes, self.begin, self.span, strict=True))

    def write_windows(self) -> tuple[Window, ...]:
        """Where the input lies inside the span: what to crop from and append to a full transposed convolution."""
        return tuple(window(f, lo, n) for f, lo, n in zip(self.span, self.begin, self.input_size, strict=True))

    def flipped_windows(self) -> tuple[Window, ...]:
        """At stride 1, what a Conv over grad_output with the kernel reversed reads of each axis."""
        axes = zip(self.output_size, self.begin, self.extent, self.input_size, strict=True)
        return tuple(window(o, lo - (e - 1), i + e - 1) for o, lo, e, i in axes)

    def phases(self, axis: int) -> tuple[Phase | None, ...]:
        """Grad-input along `axis` split by position modulo the stride; None for a phase that no tap reaches.

        With ``g = gcd(s, d)``, the positions ``i`` with ``(i + lo) mod s = p`` are reached by the taps ``k`` with
        ``d*k = p (mod s)``, which exist when g divides p and are ``s/g`` apart.
        """
        s, d, k, lo = self.stride[axis], self.dilation[axis], self.kernel_size[axis], self.begin[axis]
        step = s // math.gcd(s, d)
        result: list[Phase | None] = []
        for first in range(s):
            residue = (first + lo) % s
            tap_first = next((t for t in range(min(step, k)) if (d * t - residue) % s == 0), None)
            if tap_first is None:
                result.append(None)
                continue
            taps = len(range(tap_first, k, step))
            base = (first + lo - d * tap_first) // s
            result.append(Phase(first, tap_first, step, taps, base, d // math.gcd(s, d)))
        return tuple(result)

    @property
    def is_one_sample(self) -> bool:
        """The batch is fixed, and 1."""
        return isinstance(self.batch, int) and self.batch == 1

    # --- related geometries --------------------------------------------------------------------------------------

    def adjoint(self) -> ConvGeometry:
        """The plain convolution whose input gradient is this transposed convolution's forward pass.

        Its input is this operator's output and the reverse, with one weight tensor. Rows of the output that come from
        output_padding are never read, so the adjoint's remainder may reach the stride.
        """
        if not self.transposed:
            raise GeometryError("adjoint: expected a transposed convolution, got a plain one")
        return replace(
            self,
            in_channels=self.out_channels,
            out_channels=self.in_channels,
            input_size=self.output_size,
            output_size=self.input_size,
            transposed=False,
            output_padding=(0,) * self.rank,
        )

    def with_batch(self, batch: Size) -> ConvGeometry:
        return replace(self, batch=batch)

    @property
    def is_static(self) -> bool:
        """Every size except the batch is a plain int."""
        values = (*self.input_size, *self.kernel_size, *self.output_size, self.in_channels, self.out_channels)
        return not any(is_symbolic(value) for value in values)

    def sum_length(self, operation: str) -> Size:
        """Most products added up in one element of the ``"forward"`` pass or of one gradient, ``"bias"`` included."""
        if operation == "forward":
            return self.in_channels_per_group * self.taps
        if operation == "input":
            return self.out_channels_per_group * self.taps
        counts = self.input_size if self.transposed and operation == "weight" else self.output_size
        return self.batch * math.prod(counts)

    def to_dict(self) -> dict[str, Any]:
        """The arguments of `from_forward` that give this geometry, as JSON types: for `from_dict`."""
        return {
            "input_shape": list(self.input_shape),
            "weight_shape": list(self.weight_shape),
            "stride": list(self.stride),
            "padding": [list(pair) for pair in self.pads],
            "dilation": list(self.dilation),
            "groups": self.groups,
            "transposed": self.transposed,
            "output_padding": list(self.output_padding),
        }

    def describe(self) -> str:
        """One line for error messages and tables: shapes and every attribute that is not at its default."""
        parts = [f"input {shown(self.input_shape)}", f"weight {shown(self.weight_shape)}"]
        symmetric = all(lo == hi for lo, hi in self.pads)
        attributes: list[tuple[str, Any, bool]] = [
            ("stride", self.stride, any(s != 1 for s in self.stride)),
            ("padding", self.begin if symmetric else self.pads, any(lo or hi for lo, hi in self.pads)),
            ("dilation", self.dilation, any(d != 1 for d in self.dilation)),
            ("groups", self.groups, self.groups != 1),
            ("output_padding", self.output_padding, any(self.output_padding)),
        ]
        parts += [f"{name} {value}" for name, value, shown in attributes if shown]
        return ("transposed, " if self.transposed else "") + ", ".join(parts)


def aten_attributes(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: Any,
    output_padding: Sequence[int],
    groups: int,
) -> dict[str, Any]:
    """The attributes of a call of `aten.convolution`, in its order, as `ConvGeometry` takes them.

    Autograd passes output_padding on for a plain convolution too, where it means nothing.
    """
    return {
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "groups": groups,
        "transposed": bool(transposed),
        "output_padding": list(output_padding) if transposed else 0,
    }
