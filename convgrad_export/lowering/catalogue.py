"""The catalogue: every formula for a convolution gradient, when it applies, and why it does not.

Adding a lowering is one function in a module beside this one and one entry in `LOWERINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import UnsupportedLoweringError
from ..geometry import ConvGeometry
from . import (
    columns,
    cook_toom,
    depth,
    depth_weight,
    depthwise,
    image_matmul,
    input_conv,
    input_matmul,
    transposed_input,
    weight_channels_last,
    weight_grad,
    weight_samples,
    weight_shifted,
    winograd,
)
from .blocks import Ops, Value, dense_why_not, strided_why_not
from .kernels import CPU, CUDA, compute_dtype, missing_kernel

GRADIENTS = ("input", "weight", "bias")


def _always(geometry: ConvGeometry) -> str | None:
    return None


@dataclass(frozen=True)
class Lowering:
    """One formula.

    Attributes:
        name: ``<gradient>.<data flow>``; the id in the command line, the cache and the tests.
        gradient: which gradient it computes: ``"input"``, ``"weight"`` or ``"bias"``.
        body: records the operators; operands in the order (grad_output, weight) for ``"input"``,
            (grad_output, input) for ``"weight"``, (grad_output,) for ``"bias"``.
        condition: the geometry's reason against it, or None. Weight lowerings are asked about the adjoint of a
            transposed convolution.
        operators: the operators in it that some provider lacks for some dtype.
        transposed: for input lowerings, the kind of convolution it is for; None serves both.
        when: in words, the convolutions it is for.
        min_opset: first standard opset that has all its operators.
        error_factor: its error bound in units of the direct form's; 1 for every direct form.
        exact_on_integers: integers come out exactly while its sums stay small enough for the type.
        spreads_non_finite: a NaN or infinity also reaches results that do not depend on it.
        float32_only: it holds float32 constants, so it cannot compute in another type.
        sums_once: every result is one sum inside one operator, so that a half type loses nothing but the final rounding
            where the operator accumulates in float32; everything else it does to values is to move them.
        lists_taps: its graph grows with the kernel, by a node or more for each tap.
    """

    name: str
    gradient: str
    body: Callable[..., Value]
    condition: Callable[[ConvGeometry], str | None] = _always
    operators: frozenset[str] = frozenset()
    transposed: bool | None = None
    when: str = "any convolution"
    min_opset: int = 13
    error_factor: float = 1.0
    exact_on_integers: bool = True
    spreads_non_finite: bool = False
    float32_only: bool = False
    sums_once: bool = False
    lists_taps: bool = False

    @property
    def summary(self) -> str:
        """First line of the formula's docstring."""
        return (self.body.__doc__ or "").strip().splitlines()[0]

    def why_not(
        self, geometry: ConvGeometry, dtype: str = "float32", provider: str = CPU, opset: int = 18
    ) -> str | None:
        """None when the lowering applies to this geometry on this provider, else the reason, as a phrase."""
        if self.transposed is not None and self.transposed != geometry.transposed:
            return "the convolution is transposed" if geometry.transposed else "the convolution is not transposed"
        if opset < self.min_opset:
            return f"opset {opset} lacks an operator of it, it needs {self.min_opset}"
        computed = self.computes_in(dtype, provider)
        if self.float32_only and computed != "float32":
            return f"its constants are float32, and {dtype} is computed in {computed}"
        if provider == CUDA and "ConvTranspose" in self.operators and self.name == "input.conv_transpose":
            uneven = next(((lo, hi) for lo, hi in geometry.pads if lo != hi), None)
            if uneven:
                return f"a ConvTranspose with uneven pads {uneven} leaves the CUDA provider (onnxruntime#11312)"
        return self.condition(self._plain(geometry)) or missing_kernel(self.operators, computed, provider, opset)

    def computes_in(self, dtype: str, provider: str = CPU) -> str:
        """Element type of its arithmetic for tensors of `dtype` on `provider`."""
        return compute_dtype(dtype, provider, self.sums_once)

    def build(self, op: Ops, geometry: ConvGeometry, grad_output: Value, operand: Value = None) -> Value:
        """Record the formula. `operand` is the weight (input gradient) or the input (weight gradient)."""
        if self.gradient == "bias":
            return self.body(op, geometry, grad_output)
        if self.gradient == "weight" and geometry.transposed:
            return self.body(op, self._plain(geometry), operand, grad_output)
        return self.body(op, geometry, grad_output, operand)

    def _plain(self, geometry: ConvGeometry) -> ConvGeometry:
        return geometry.adjoint() if self.gradient == "weight" and geometry.transposed else geometry


def _by_name(entries: Iterable[Lowering]) -> dict[str, Lowering]:
    catalogue: dict[str, Lowering] = {}
    for entry in entries:
        if entry.name in catalogue or entry.name.split(".")[0] != entry.gradient:
            raise AssertionError(f"lowering {entry.name}: duplicate, or not named after its gradient")
        catalogue[entry.name] = entry
    return catalogue


_ALSO_FLOAT64 = "any convolution, also in float64"
_CONV, _CONV_TRANSPOSE, _COL2IM = frozenset({"Conv"}), frozenset({"ConvTranspose"}), frozenset({"Col2Im"})

LOWERINGS: dict[str, Lowering] = _by_name(
    [
        Lowering(
            name="input.conv_transpose",
            gradient="input",
            body=input_conv.conv_transpose,
            operators=_CONV_TRANSPOSE,
            transposed=False,
            when="any plain convolution",
            sums_once=True,
        ),
        Lowering(
            name="input.conv_transpose_crop",
            gradient="input",
            body=input_conv.conv_transpose_crop,
            operators=_CONV_TRANSPOSE,
            transposed=False,
            when="any plain convolution",
            sums_once=True,
        ),
        Lowering(
            name="input.flipped_conv",
            gradient="input",
            body=input_conv.flipped_conv,
            condition=strided_why_not,
            operators=_CONV,
            transposed=False,
            when="stride 1",
            sums_once=True,
        ),
        Lowering(
            name="input.phase_conv",
            gradient="input",
            body=input_conv.phase_conv,
            condition=input_conv.phase_conv_why_not,
            operators=_CONV,
            transposed=False,
            when="stride above 1, at most 64 phases",
            sums_once=True,
        ),
        Lowering(
            name="input.col2im",
            gradient="input",
            body=input_conv.col2im,
            condition=input_conv.col2im_why_not,
            operators=_COL2IM,
            transposed=False,
            when="one or two spatial axes, opset 18 or newer",
            min_opset=18,
        ),
        Lowering(
            name="input.columns",
            gradient="input",
            body=columns.input_gradient,
            condition=input_conv.col2im_why_not,
            operators=_COL2IM,
            transposed=False,
            when="one or two spatial axes, opset 18 or newer",
            min_opset=18,
        ),
        Lowering(
            name="input.plane_col2im",
            gradient="input",
            body=depth.plane_col2im,
            condition=depth.why_not,
            operators=_COL2IM,
            transposed=False,
            when="three spatial axes, opset 18 or newer",
            min_opset=18,
        ),
        Lowering(
            name="input.matmul_taps",
            gradient="input",
            body=input_matmul.matmul_taps,
            lists_taps=True,
            transposed=False,
            when="any plain convolution, also in float64",
        ),
        Lowering(
            name="input.pixel_shuffle",
            gradient="input",
            body=input_matmul.pixel_shuffle,
            condition=input_matmul.pixel_shuffle_why_not,
            transposed=False,
            when="kernel no larger than the stride, also in float64",
            sums_once=True,
        ),
        Lowering(
            name="input.conv",
            gradient="input",
            body=transposed_input.conv,
            operators=_CONV,
            transposed=True,
            when="any transposed convolution",
            sums_once=True,
        ),
        Lowering(
            name="input.im2col",
            gradient="input",
            body=transposed_input.im2col,
            lists_taps=True,
            transposed=True,
            when="any transposed convolution, also in float64",
            sums_once=True,
        ),
        *(
            Lowering(
                name=f"{gradient}.image_matmul",
                gradient=gradient,
                body=body,
                condition=image_matmul.why_not,
                transposed=False if gradient == "input" else None,
                when="depthwise, small images",
                spreads_non_finite=True,
                float32_only=True,
            )
            for gradient, body in (
                ("input", image_matmul.input_gradient),
                ("weight", image_matmul.weight_gradient),
            )
        ),
        *(
            Lowering(
                name=f"{gradient}.winograd{tile}",
                gradient=gradient,
                body=bodies[tile],
                condition=winograd.why_not(tile),
                transposed=False if gradient == "input" else None,
                when=f"stride 1, one group, kernels of 2 to {tile - 1} taps an axis",
                error_factor=winograd.ERROR_FACTORS[tile],
                exact_on_integers=tile == 4,
                spreads_non_finite=True,
                float32_only=True,
            )
            for gradient, bodies in (("input", winograd.INPUT_BODIES), ("weight", winograd.WEIGHT_BODIES))
            for tile in cook_toom.TILES
        ),
        Lowering(
            name="weight.swapped_conv",
            gradient="weight",
            body=weight_grad.swapped_conv,
            operators=_CONV,
            sums_once=True,
        ),
        Lowering(
            name="weight.flipped_conv",
            gradient="weight",
            body=weight_grad.flipped_conv,
            condition=strided_why_not,
            operators=_CONV,
            when="stride 1",
            sums_once=True,
        ),
        Lowering(
            name="weight.channels_last_conv",
            gradient="weight",
            body=weight_channels_last.channels_last_conv,
            condition=weight_channels_last.why_not,
            operators=_CONV,
            when="fixed sizes; of three axes the last undilated",
            sums_once=True,
        ),
        Lowering(
            name="weight.channels_last_flipped_conv",
            gradient="weight",
            body=weight_channels_last.channels_last_flipped_conv,
            condition=weight_channels_last.flipped_why_not,
            operators=_CONV,
            when="stride 1, fixed sizes; of three axes the last undilated",
            sums_once=True,
        ),
        Lowering(
            name="weight.im2col",
            gradient="weight",
            body=weight_grad.im2col,
            lists_taps=True,
            when=_ALSO_FLOAT64,
            sums_once=True,
        ),
        Lowering(
            name="weight.shifted_matmul",
            gradient="weight",
            body=weight_shifted.shifted_matmul,
            condition=weight_shifted.shifted_matmul_why_not,
            when="two or three spatial axes, stride 1 except on the last, also in float64",
            sums_once=True,
        ),
        Lowering(
            name="weight.matmul_taps",
            gradient="weight",
            body=weight_grad.matmul_taps,
            lists_taps=True,
            when=_ALSO_FLOAT64,
            sums_once=True,
        ),
        Lowering(
            name="weight.columns",
            gradient="weight",
            body=columns.weight_gradient,
            condition=columns.why_not,
            when=_ALSO_FLOAT64,
            sums_once=True,
        ),
        Lowering(
            name="weight.sample_matmul",
            gradient="weight",
            body=weight_samples.sample_matmul,
            condition=weight_samples.sample_matmul_why_not,
            when="kernels with one tap, or several on an axis before the last, also in float64",
        ),
        Lowering(
            name="weight.depth_taps",
            gradient="weight",
            body=depth_weight.depth_taps,
            condition=depth.why_not,
            when="three spatial axes, also in float64",
        ),
        Lowering(
            name="weight.depth_taps_gathered",
            gradient="weight",
            body=depth_weight.depth_taps_gathered,
            condition=depth_weight.gathered_why_not,
            when="three spatial axes, also in float64",
        ),
        Lowering(
            name="weight.depthwise_taps",
            gradient="weight",
            body=weight_grad.depthwise_taps,
            lists_taps=True,
            condition=dense_why_not,
            when="one input channel a group, also in float64",
        ),
        Lowering(
            name="weight.depthwise_rows",
            gradient="weight",
            body=depthwise.weight_rows,
            condition=dense_why_not,
            when="one input channel a group, also in float64",
        ),
        Lowering(
            name="bias.reduce_sum", gradient="bias", body=weight_grad.reduce_sum, when=_ALSO_FLOAT64, sums_once=True
        ),
    ]
)


def candidates(gradient: str) -> tuple[Lowering, ...]:
    """The catalogue's entries for one gradient, in order."""
    return tuple(lowering for lowering in LOWERINGS.values() if lowering.gradient == gradient)


def by_name(
    name: str, gradient: str, geometry: ConvGeometry, dtype: str = "float32", provider: str = CPU, opset: int = 18
) -> Lowering:
    """The lowering a user asked for by name, when it applies.

    Raises:
        UnsupportedLoweringError: unknown, for another gradient, or not applicable; the message names those that apply.
    """
    applicable = [x.name for x in candidates(gradient) if x.why_not(geometry, dtype, provider, opset) is None]
    lowering = LOWERINGS.get(name)
    if lowering is None or lowering.gradient != gradient:
        reason = "there is no such lowering" if lowering is None else f"it computes the {lowering.gradient} gradient"
    else:
        refused = lowering.why_not(geometry, dtype, provider, opset)
        if refused is None:
            return lowering
        reason = refused
    raise UnsupportedLoweringError(
        f"lowering {name!r} cannot give the {gradient} gradient of a {geometry.rank}-D convolution with "
        f"{geometry.describe()} in {dtype}: {reason}. Lowerings that can: {', '.join(applicable)}"
    )
