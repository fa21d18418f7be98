"""The catalogue: every formula for a convolution gradient, when it applies, and why it does not.

Adding a lowering is one function in a module beside this one and one entry in `LOWERINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import UnsupportedLoweringError
from ..geometry import ConvGeometry
from . import input_conv, input_matmul, transposed_input, weight_grad
from .blocks import Ops, Value
from .kernels import CPU, CUDA, missing_kernel

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
        min_opset: first standard opset that has all its operators.
    """

    name: str
    gradient: str
    body: Callable[..., Value]
    condition: Callable[[ConvGeometry], str | None] = _always
    operators: frozenset[str] = frozenset()
    transposed: bool | None = None
    min_opset: int = 13

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
        if provider == CUDA and "ConvTranspose" in self.operators and self.name == "input.conv_transpose":
            uneven = next(((lo, hi) for lo, hi in geometry.pads if lo != hi), None)
            if uneven:
                return f"a ConvTranspose with uneven pads {uneven} leaves the CUDA provider (onnxruntime#11312)"
        return self.condition(self._plain(geometry)) or missing_kernel(self.operators, dtype, provider)

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


_CONV, _CONV_TRANSPOSE, _COL2IM = frozenset({"Conv"}), frozenset({"ConvTranspose"}), frozenset({"Col2Im"})

LOWERINGS: dict[str, Lowering] = _by_name(
    [
        Lowering("input.conv_transpose", "input", input_conv.conv_transpose, _always, _CONV_TRANSPOSE, False),
        Lowering("input.conv_transpose_crop", "input", input_conv.conv_transpose_crop, _always, _CONV_TRANSPOSE, False),
        Lowering("input.flipped_conv", "input", input_conv.flipped_conv, input_conv.flipped_conv_why_not, _CONV, False),
        Lowering("input.phase_conv", "input", input_conv.phase_conv, input_conv.phase_conv_why_not, _CONV, False),
        Lowering("input.col2im", "input", input_conv.col2im, input_conv.col2im_why_not, _COL2IM, False, min_opset=18),
        Lowering("input.matmul_taps", "input", input_matmul.matmul_taps, _always, frozenset(), False),
        Lowering(
            "input.pixel_shuffle",
            "input",
            input_matmul.pixel_shuffle,
            input_matmul.pixel_shuffle_why_not,
            frozenset(),
            False,
        ),
        Lowering("input.conv", "input", transposed_input.conv, _always, _CONV, True),
        Lowering("input.im2col", "input", transposed_input.im2col, _always, frozenset(), True),
        Lowering("weight.swapped_conv", "weight", weight_grad.swapped_conv, _always, _CONV),
        Lowering("weight.flipped_conv", "weight", weight_grad.flipped_conv, weight_grad.flipped_conv_why_not, _CONV),
        Lowering("weight.im2col", "weight", weight_grad.im2col),
        Lowering("weight.matmul_taps", "weight", weight_grad.matmul_taps),
        Lowering("weight.depthwise_taps", "weight", weight_grad.depthwise_taps, weight_grad.depthwise_why_not),
        Lowering("bias.reduce_sum", "bias", weight_grad.reduce_sum),
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
