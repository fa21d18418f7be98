"""The fixed policy: which lowering for a geometry, dtype and provider, by stated rules and without any measurement.

The order of a preference list is the rule; the first entry that applies is taken. The rules come from the timings in
benchmarks/NOTES.md. Selection is separate from lowering: nothing here knows how a formula works.
"""

from __future__ import annotations

from ..errors import UnsupportedLoweringError
from ..geometry import ConvGeometry
from ..lowering import CPU, CUDA, LOWERINGS, Lowering, by_name

AUTO = "auto"


def _input_preferences(g: ConvGeometry, provider: str) -> tuple[str, ...]:
    if g.transposed:
        return ("input.conv", "input.im2col")
    if g.is_pointwise and g.groups == 1 and provider != CUDA:
        return ("input.pixel_shuffle", "input.conv_transpose", "input.matmul_taps")
    return (
        "input.conv_transpose",
        "input.conv_transpose_crop",
        "input.pixel_shuffle",
        "input.matmul_taps",
    )


def _weight_preferences(g: ConvGeometry, provider: str) -> tuple[str, ...]:
    plain = g.adjoint() if g.transposed else g
    if plain.is_depthwise:
        return ("weight.depthwise_taps",)
    if plain.is_pointwise or any(d > 1 for d in plain.dilation):
        return ("weight.matmul_taps",)
    return ("weight.im2col",)


def choose(
    gradient: str,
    geometry: ConvGeometry,
    dtype: str = "float32",
    *,
    lowering: str = AUTO,
    provider: str = CPU,
    opset: int = 18,
) -> Lowering:
    """The lowering for one gradient.

    Args:
        gradient: ``"input"``, ``"weight"`` or ``"bias"``.
        dtype: element type of the tensors.
        lowering: ``"auto"`` for the policy's choice, or a name of the catalogue. A name for another gradient than
            `gradient` leaves the choice to the policy, so that one name can be given for a whole backward call.
        provider: the onnxruntime execution provider that will run the graph.
        opset: version of the standard operators.

    Raises:
        UnsupportedLoweringError: the named lowering is unknown or does not apply, or none applies.
    """
    named = LOWERINGS.get(lowering)
    if lowering != AUTO and (named is None or named.gradient == gradient):
        return by_name(lowering, gradient, geometry, dtype, provider, opset)
    if gradient == "bias":
        return LOWERINGS["bias.reduce_sum"]
    preferences = _input_preferences if gradient == "input" else _weight_preferences
    reasons = []
    for name in preferences(geometry, provider):
        reason = LOWERINGS[name].why_not(geometry, dtype, provider, opset)
        if reason is None:
            return LOWERINGS[name]
        reasons.append(f"{name}: {reason}")
    raise UnsupportedLoweringError(
        f"no lowering gives the {gradient} gradient of {geometry.describe()} in {dtype} on {provider} at opset "
        f"{opset}: {'; '.join(reasons)}"
    )
