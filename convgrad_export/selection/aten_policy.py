"""Which lowering for an ATen graph. What wins on onnxruntime is not what wins in ATen, so the rules are separate.

Three ways to choose, besides a catalogue name:

- ``"portable"``: one ConvTranspose or Conv for the input gradient, matrix products for the weight gradient. Nothing but
  operators that every backend has.
- ``"auto"``: the lowering that was measured to beat PyTorch's kernel under Inductor, the portable one otherwise.
- ``"fastest"``: the lowering that was measured to beat the kernel; otherwise None, and the kernel stays.

On the CPU these are rules, from the measurements in benchmarks/torch_compile/layers.json. On CUDA there is no rule: a
lowering is taken where this very convolution was measured on this kind of device (`aten_measurements`), and the kernel
stays everywhere else.
"""

from __future__ import annotations

from ..arguments import as_text
from ..errors import ArgumentTypeError, UnsupportedLoweringError
from ..geometry import ConvGeometry
from ..lowering import CPU, LOWERINGS, Lowering, candidates
from . import aten_measurements

_LARGE_KERNEL = 5
_FEW_CHANNELS = 16

AUTO, PORTABLE, FASTEST = "auto", "portable", "fastest"
WAYS = (AUTO, PORTABLE, FASTEST)

_PORTABLE = {
    "input": ("input.conv_transpose", "input.conv"),
    "weight": ("weight.matmul_taps",),
    "bias": ("bias.reduce_sum",),
}


def check_lowering(lowering: object, *, complete: bool = False) -> str:
    """`lowering` if it is one of `WAYS` or a catalogue name.

    Args:
        complete: no gradient may be left to PyTorch's kernel.

    Raises:
        ArgumentTypeError: not a string, or ``"fastest"`` where it may not keep a kernel. UnsupportedLoweringError: an
            unknown name.
    """
    name = as_text(lowering, "lowering")
    if complete and name == FASTEST:
        raise ArgumentTypeError(
            "lowering is 'fastest', which may keep PyTorch's kernel, expected 'auto', 'portable' or a catalogue name"
        )
    if name not in WAYS and name not in LOWERINGS:
        ways = [way for way in WAYS if way != FASTEST] if complete else WAYS
        raise UnsupportedLoweringError(
            f"lowering {name!r} is unknown, expected one of: {', '.join((*ways, *LOWERINGS))}"
        )
    return name


def choose_aten(
    gradient: str, geometry: ConvGeometry, dtype: str, *, lowering: str = AUTO, device: str = "cpu"
) -> Lowering | None:
    """The lowering of one gradient for an ATen graph, or None where ``"fastest"`` leaves PyTorch's kernel in place.

    Args:
        gradient: ``"input"``, ``"weight"`` or ``"bias"``.
        geometry: every size an integer; for a symbolic batch, its value in the example.
        dtype: element type of the tensors.
        lowering: one of `WAYS`, or a catalogue name, which decides its own gradient; the others are ``"auto"``.
        device: torch device type; for CUDA, ``"cuda "`` and the device's name, which measurements belong to.

    Raises:
        UnsupportedLoweringError: the named lowering does not apply.
    """
    named = LOWERINGS.get(lowering)
    if named is not None and named.gradient == gradient:
        reason = why_not(named, geometry, dtype)
        if reason is None:
            return named
        applicable = [entry.name for entry in candidates(gradient) if why_not(entry, geometry, dtype) is None]
        raise UnsupportedLoweringError(
            f"lowering {lowering!r} cannot give the {gradient} gradient of a {geometry.rank}-D convolution with "
            f"{geometry.describe()} in {dtype}: {reason}. Lowerings that can: {', '.join(applicable)}"
        )
    if lowering != PORTABLE:
        winner = _winner(gradient, geometry, dtype, device)
        if winner is not None:
            return LOWERINGS[winner]
        if lowering == FASTEST:
            return None
    return next(LOWERINGS[name] for name in _PORTABLE[gradient] if why_not(LOWERINGS[name], geometry, dtype) is None)


def why_not(lowering: Lowering, geometry: ConvGeometry, dtype: str) -> str | None:
    """Why `lowering` cannot be used in an ATen graph, or None. ATen has every operator in every dtype."""
    if dtype == "float64" and lowering.float32_only:
        return "its transforms are float32 constants"
    return lowering.why_not(geometry, "float32", CPU)


def _winner(gradient: str, geometry: ConvGeometry, dtype: str, device: str) -> str | None:
    """The lowering that beat PyTorch's kernel under Inductor, at 1 and at 2 threads, for convolutions like this one."""
    if device.startswith("cuda "):
        measured = aten_measurements.winner(gradient, geometry, dtype, device.removeprefix("cuda "))
        return measured if measured in LOWERINGS and why_not(LOWERINGS[measured], geometry, dtype) is None else None
    if device != "cpu" or dtype != "float32" or geometry.transposed:
        return None  # measured on CPU in float32 only
    if gradient == "input":
        name = _input_winner(geometry)
    elif gradient == "weight" and geometry.is_depthwise and not geometry.is_pointwise:
        # Inductor fuses the taps' products and sums into one loop. oneDNN leads on small kernels at stride 1 alone.
        strided = not geometry.unit_stride
        name = "weight.depthwise_taps" if strided or max(geometry.kernel_size) >= _LARGE_KERNEL else None
    elif gradient == "weight" and geometry.rank == 3 and geometry.is_pointwise and not geometry.unit_stride:
        name = "weight.matmul_taps"
    else:
        name = None
    return name if name is not None and why_not(LOWERINGS[name], geometry, dtype) is None else None


def _input_winner(g: ConvGeometry) -> str | None:
    if not g.unit_stride:
        few_channels = g.in_channels <= _FEW_CHANNELS
        return "input.pixel_shuffle" if g.is_pointwise or few_channels else None
    if g.is_pointwise:
        return None  # both are one GEMM
    # Dense layers too gain 5 to 20% by themselves, but lose more in whole networks: the flipped weight and the tensors
    # around it are then copied between memory layouts (ResNet-18's step 198 -> 238 ms).
    return "input.flipped_conv" if g.is_depthwise else None
