"""Running an exported model beside eager PyTorch: fresh inputs, further sizes, float64 as the truth.

The bound. Let r be the float64 result of eager PyTorch with oneDNN off, and e32 the distance of eager float32 from it,
the largest over the inputs as they are and with every input and weight moved, three times over, by up to 2**-19 of
itself, about what a few layers' rounding adds up to: what this network makes of rounding, of kinks of ReLU and of ties
of max pooling. onnxruntime's result must be within

    8 * e32 + 2**-16 * ||r||        (Euclidean norms, each output by itself)

The same holds for float64 models with 2**-49 and 2**-38 for 2**-19 and 2**-16. A gradient that is off by a factor, a
missing border row or another loss reduction is outside by orders of magnitude.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from convgrad_export.errors import VerificationError
from convgrad_export.integrations.program import CapturedProgram, GraphInput
from convgrad_export.integrations.report import OutputError, merged

SLACK = 8.0
_SEED = 20240


@dataclass(frozen=True)
class Precision:
    """What eager runs in beside float64, and the bound's constants; a float64 model is held to float64.

    Attributes:
        dtype: of the compared eager run. floor: relative error that is always allowed. rounding: of a stored value.
        perturbations: relative changes of inputs and weights, a few layers' rounding.
    """

    dtype: torch.dtype
    floor: float
    rounding: float
    perturbations: tuple[float, ...]


SINGLE = Precision(torch.float32, 2.0**-16, 2.0**-23, (0.0, 2.0**-20, 2.0**-20, 2.0**-19))
DOUBLE = Precision(torch.float64, 2.0**-38, 2.0**-52, (2.0**-51, 2.0**-49, 2.0**-49))


def precision_of(program: CapturedProgram) -> Precision:
    """`DOUBLE` for a program with float64 parameters, or inputs where it has no parameters."""
    floats = [spec for spec in program.inputs if spec.value.is_floating_point()]
    deciding = [spec for spec in floats if spec.kind == "parameter"] or [s for s in floats if s.kind == "user"]
    double = bool(deciding) and all(spec.value.dtype == torch.float64 for spec in deciding)
    return DOUBLE if double else SINGLE


@dataclass(frozen=True)
class Verification:
    """Errors by output, and the sizes of the dynamic dimensions that were run."""

    errors: dict[str, OutputError]
    sizes: list[dict[str, int]]
    notes: list[str]


def eager(
    program: CapturedProgram, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype, amount: float = 0.0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The captured Python function run by PyTorch itself, every floating-point tensor in `dtype`, oneDNN off.

    Nothing of the capture, of the decompositions or of the translation takes part in this.
    """
    values = {}
    for index, spec in enumerate(program.inputs):
        if spec.kind == "constant":
            continue  # the function holds these itself
        tensor = (inputs[spec.name] if spec.kind == "user" else spec.value).detach()
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()
        values[spec.name] = perturbed(tensor, amount, 1000 * seed + index).requires_grad_(spec.value.requires_grad)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # the switch talks about other hardware
            with torch.backends.mkldnn.flags(enabled=False):
                outputs = program.function(values)
    finally:
        torch.set_default_dtype(default)
    return {output.spec.name: output.tensor.detach() for output in outputs}


def verify(
    model: ir.Model,
    program: CapturedProgram,
    *,
    samples: int = 3,
    session: Callable[[ir.Model], Any] | None = None,
) -> Verification:
    """Compare on `samples` fresh inputs of the example's sizes, and on further sizes of every dynamic dimension.

    Raises:
        VerificationError: An output is outside the bound, or onnxruntime refuses an input that eager takes.
    """
    from convgrad_export.runtime.session import GradientSession

    runner = (session or GradientSession)(model)
    users = [spec for spec in program.inputs if spec.kind == "user"]
    random = np.random.default_rng(_SEED)
    errors: dict[str, OutputError] = {}
    sizes_run: list[dict[str, int]] = []
    notes: list[str] = []
    example = _example_sizes(users)
    for _ in range(max(samples, 1)):
        fresh = {spec.name: _fresh(spec, spec.value.shape, random) for spec in users}
        errors = merged(errors, compare(runner, program, fresh))
    if example:
        sizes_run.append(dict(example))
    for label in [name for name in example if name not in _dependent(program)]:
        run = _second_size(runner, program, users, label, random)
        if run is None:
            notes.append(f"no second size of dimension {label!r} was found that eager PyTorch accepts")
            continue
        sizes, more = run
        errors, sizes_run = merged(errors, more), [*sizes_run, sizes]
    return Verification(errors, sizes_run, notes)


def compare(runner: Any, program: CapturedProgram, inputs: Mapping[str, torch.Tensor]) -> dict[str, OutputError]:
    """One run beside eager.

    Raises:
        VerificationError: Outside the bound, another shape, or onnxruntime fails.
    """
    exact = eager(program, inputs, torch.float64)
    precision = precision_of(program)
    single = [
        eager(program, inputs, precision.dtype, amount, seed) for seed, amount in enumerate(precision.perturbations)
    ]
    feed = {name: inputs[name].detach().numpy() for name in runner.input_names}
    try:
        actual = runner.run(feed)
    except Exception as refused:
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        raise VerificationError(f"the exported model fails on inputs {shapes} that eager takes: {refused}") from refused
    errors: dict[str, OutputError] = {}
    for spec in program.outputs:
        truth = exact[spec.name].detach().double().numpy()
        value = np.asarray(actual[spec.name]).astype(np.float64)
        if value.shape != truth.shape:
            raise VerificationError(f"output {spec.name!r} has shape {value.shape}, eager gives {truth.shape}")
        norm = float(np.linalg.norm(truth))
        own = max(float(np.linalg.norm(s[spec.name].detach().double().numpy() - truth)) for s in single)
        difference = value - truth
        error = float(np.linalg.norm(difference))
        allowed = SLACK * own + precision.floor * norm + 1e-30
        scale = max(norm, own) or 1.0  # a gradient that is zero but for rounding has no relative error of its own
        largest = float(np.abs(difference).max(initial=0.0))
        errors[spec.name] = OutputError(error / scale, allowed / scale, largest)
        if not error <= allowed:  # not-a-number fails as well
            raise VerificationError(
                f"output {spec.name!r} of the exported model is wrong: relative error {error / scale:.3g} against "
                f"float64 eager, bound {allowed / scale:.3g} (eager float32 itself is off by {own / scale:.3g}). "
                f"Inputs { ({name: tuple(v.shape) for name, v in inputs.items()}) }. Nothing was written."
            )
    return errors


def _example_sizes(users: Sequence[GraphInput]) -> dict[str, int]:
    return {label: int(spec.value.shape[axis]) for spec in users for axis, label in spec.dynamic.items()}


def _second_size(
    runner: Any,
    program: CapturedProgram,
    users: Sequence[GraphInput],
    label: str,
    random: np.random.Generator,
) -> tuple[dict[str, int], dict[str, OutputError]] | None:
    """The first other size of `label` that the captured constraints and eager allow, compared."""
    example = _example_sizes(users)
    old, dependent = example[label], _dependent(program)
    candidates = [old + 1, old + 2, old + 3, old + 4, 2 * old, old + 8, old + 16, old + 32, 3 * old, old // 2]
    for size in dict.fromkeys(c for c in candidates if c >= 1 and c != old):
        sizes = {**example, label: size}
        for name, expression in dependent.items():
            sizes[name] = int(_substituted(program, expression, sizes))
        if not _allowed(program, sizes):
            continue
        fresh = {
            s.name: _fresh(s, [sizes.get(s.dynamic.get(a, ""), n) for a, n in enumerate(s.value.shape)], random)
            for s in users
        }
        try:
            eager(program, fresh, torch.float64)
        except Exception:  # whatever the user's module raises for a size that it does not take
            continue
        return sizes, compare(runner, program, fresh)
    return None


def _allowed(program: CapturedProgram, sizes: Mapping[str, int]) -> bool:
    """Whether the sizes satisfy what the trace found out about them (a U-Net's multiples of 16, say)."""
    import sympy

    guards = [guard.expr for guard in program.shape_env.guards]
    return all(_substituted(program, guard, sizes) != sympy.false for guard in guards)


def _substituted(program: CapturedProgram, expression: Any, sizes: Mapping[str, int]) -> Any:
    named = {s: program.symbol_names[str(s)] for s in expression.free_symbols if str(s) in program.symbol_names}
    return expression.subs({symbol: sizes[label] for symbol, label in named.items() if label in sizes})


def _dependent(program: CapturedProgram) -> dict[str, Any]:
    """Dimensions whose size follows from others (an output's height, given as a cotangent), with the expression."""
    return {name: expression for name, expression in program.dimensions.items() if not expression.is_Symbol}


def _fresh(spec: GraphInput, shape: Sequence[int], random: np.random.Generator) -> torch.Tensor:
    """Values drawn from the example's own: labels stay labels, an image keeps its range.

    Zeros get noise; another constant (a noise level, say) is scaled by up to a tenth and keeps its sign.
    """
    example = spec.value.detach()
    count = int(np.prod(shape))
    values = example.reshape(-1)
    if values.numel() == 0:
        return torch.zeros(tuple(shape), dtype=example.dtype)
    drawn = values[torch.from_numpy(random.integers(0, values.numel(), count))].reshape(tuple(shape)).clone()
    if example.is_floating_point() and bool((values == values[0]).all()):
        noise = torch.from_numpy(np.asarray(random.uniform(-1.0, 1.0, tuple(shape)))).to(example.dtype)
        drawn = drawn * (1 + 0.1 * noise) if bool(values[0]) else drawn + 2 * noise
    return drawn


def perturbed(tensor: torch.Tensor, amount: float, seed: int) -> torch.Tensor:
    """Each element moved by up to `amount` of itself; integers as they are."""
    if amount == 0.0 or not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(seed)
    return tensor * (1 + amount * (2 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 1))
