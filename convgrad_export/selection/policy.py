"""The fixed policy: which lowering for a geometry, dtype and provider, by stated rules and without any measurement."""

from __future__ import annotations

from collections.abc import Callable

from ..arguments import as_text, check_workspace
from ..errors import UnsupportedLoweringError
from ..geometry import ConvGeometry
from ..lowering import CPU, CUDA, LOWERINGS, Lowering, by_name, candidates
from .graph_walk import workspace_bytes
from .preferences import cuda_preferences, input_preferences, weight_preferences
from .reduced_arithmetic import DEFAULT_ERROR_FACTOR, DIRECT, winograd_tiles
from .tuned import TUNED, is_tuned, tuned_name

AUTO = "auto"


def check_name(lowering: object) -> str:
    """`lowering` if it is "auto", "tuned", "tuned:PATH" or a catalogue name.

    Raises:
        ArgumentTypeError: not a string. UnsupportedLoweringError: an unknown name.
    """
    name = as_text(lowering, "lowering")
    if not is_way(name) and name not in LOWERINGS:
        raise UnsupportedLoweringError(f"lowering {name!r} is none of: {AUTO}, {TUNED}, {', '.join(LOWERINGS)}")
    return name


def is_way(lowering: str) -> bool:
    """A way to choose, not the name of a lowering."""
    return lowering == AUTO or is_tuned(lowering)


def choose(
    gradient: str,
    geometry: ConvGeometry,
    dtype: str = "float32",
    *,
    lowering: str = AUTO,
    provider: str = CPU,
    opset: int = 18,
    constant_weight: bool = False,
    max_error_factor: float = DEFAULT_ERROR_FACTOR,
    max_workspace: int | None = None,
    threads: int | None = None,
) -> Lowering:
    """The lowering for one gradient.

    Args:
        gradient: ``"input"``, ``"weight"`` or ``"bias"``.
        dtype: element type of the tensors.
        lowering: ``"auto"`` for the policy's choice, ``"tuned"`` for the fastest in the tuning cache (``"tuned:PATH"``
            names the file; what it lacks is the policy's), or a name of the catalogue. A name for another gradient than
            `gradient` leaves the choice to the policy, so that one name can be given for a whole backward call.
        provider: the onnxruntime execution provider that will run the graph.
        opset: version of the standard operators.
        constant_weight: the weight is an initializer of the model that no input overrides. Nothing measures that case,
            so ``"tuned"`` leaves it to the policy.
        max_error_factor: largest allowed error bound, in units of the direct form's: 1 takes direct forms only, 2 (the
            default) admits Winograd tiles of 4, and 8 tiles of 6 (`Lowering.error_factor`).
        max_workspace: most bytes of intermediate tensors, at the geometry's batch; None for no limit.
        threads: that will run the graph; None for onnxruntime's default, which the rules take for more than one.

    Raises:
        UnsupportedLoweringError: the named lowering is unknown, does not apply, or exceeds `max_workspace`, or none
            is left. ArgumentTypeError: a lowering that is no string, a limit that is no number of bytes.
            GeometryError: `max_workspace` with an open batch. TuningCacheError: as `tuned.tuned_name`.
    """
    as_text(lowering, "lowering")
    max_workspace = check_workspace(max_workspace)
    if not max_error_factor >= DIRECT:  # NaN too
        raise UnsupportedLoweringError(
            f"max_error_factor is {max_error_factor}, expected at least {DIRECT}: no form is better than the direct one"
        )
    named = LOWERINGS.get(lowering)
    if not is_way(lowering) and (named is None or named.gradient == gradient):
        entry = by_name(lowering, gradient, geometry, dtype, provider, opset)
        if reason := _workspace_why_not(entry.name, geometry, dtype, provider, opset, max_workspace):
            raise UnsupportedLoweringError(
                f"lowering {entry.name!r} for {geometry.describe()} in {dtype} {reason}: raise the limit, or leave the "
                f"choice to {AUTO!r}"
            )
        return entry
    if gradient == "bias":
        return LOWERINGS["bias.reduce_sum"]

    def why_not(name: str) -> str | None:
        entry = LOWERINGS[name]
        if entry.error_factor > max_error_factor:
            return f"its error factor is {entry.error_factor}, max_error_factor is {max_error_factor}"
        return entry.why_not(geometry, dtype, provider, opset) or _workspace_why_not(
            name, geometry, dtype, provider, opset, max_workspace
        )

    automatic = _automatic(
        gradient, geometry, dtype, provider, opset, constant_weight, max_error_factor, threads == 1, why_not
    )
    if not is_tuned(lowering) or constant_weight:
        return LOWERINGS[automatic]
    chosen = tuned_name(
        gradient,
        geometry,
        dtype,
        provider,
        threads,
        lowering=lowering,
        automatic=automatic,
        allowed=lambda name: name in LOWERINGS and why_not(name) is None,
    )
    return LOWERINGS[chosen]


def _automatic(
    gradient: str,
    geometry: ConvGeometry,
    dtype: str,
    provider: str,
    opset: int,
    constant_weight: bool,
    max_error_factor: float,
    one_thread: bool,
    why_not: Callable[[str], str | None],
) -> str:
    """The first preference that nothing speaks against, then any other entry of the catalogue."""
    plain = geometry.adjoint() if gradient == "weight" and geometry.transposed else geometry
    if provider == CUDA:
        preferences = cuda_preferences(gradient, plain, dtype, opset)
    elif gradient == "input":
        preferences = input_preferences(plain, constant_weight, one_thread)
    else:
        preferences = weight_preferences(plain, one_thread)
    if provider != CUDA:  # cuDNN chooses its own arithmetic
        tiles = winograd_tiles(
            gradient, plain, max_error_factor, constant_weight=constant_weight, one_thread=one_thread
        )
        preferences = (*(f"{gradient}.winograd{tile}" for tile in tiles), *preferences)
    others = [entry.name for entry in candidates(gradient) if entry.error_factor == DIRECT]
    reasons = []
    for name in dict.fromkeys((*preferences, *others)):
        reason = why_not(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise UnsupportedLoweringError(
        f"no lowering gives the {gradient} gradient of {geometry.describe()} in {dtype} on {provider} at opset "
        f"{opset}: {'; '.join(reasons)}"
    )


def _workspace_why_not(
    name: str, geometry: ConvGeometry, dtype: str, provider: str, opset: int, limit: int | None
) -> str | None:
    if limit is None:
        return None
    need = workspace_bytes(name, geometry, dtype, provider, opset)
    return f"needs {need} bytes of workspace, max_workspace is {limit}" if need > limit else None
