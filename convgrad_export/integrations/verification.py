"""Running an exported model beside eager PyTorch: fresh inputs, further sizes, float64 as the truth.

The bound. Let r be the float64 result of eager PyTorch with oneDNN off, and e how far rounding moves it: the largest
distance from r of eager float32, and of float64 runs in which each operator rounds at random by up to 2**-21 of its
results (see `rounding.py`). onnxruntime's result must be within

    8 * e + 2**-16 * ||r||        (Euclidean norms, each output by itself)

Eager float32 alone is asked first: where its distance is small beside the result and large enough for the bound (a ReLU
as good as tied fell the other way in it too), no random run could change the judgement, and each costs more than the
float64 run. A result outside is looked at again with more such runs before it is refused: where a ReLU or a max pooling
is as good as tied, the first may miss the side that onnxruntime's rounding took. The same holds for float64 models with
2**-49 and 2**-38, for float16 with 2**-9 and 2**-10, for bfloat16 with 2**-6 and 2**-7. A module that does not run in
float64 is its own reference, in its own types; as r is then rounded itself, the 8 becomes a 9. A gradient that is off
by a factor, a missing border row or another loss reduction is outside by orders of magnitude.

Where a result is zero because equal numbers cancel, the random runs may see nothing: the gradient of a mean that is
subtracted is 1 - n * (1 / n), each part of which float32 holds, and whether the difference is zero or 2**-24 depends on
how it is computed. What is still outside is therefore run with every number moved, held or not, and where the result is
small beside the terms, and its move vanishes with the amount, e is that move (`cancelling_moves`).

The report. Errors and bounds are relative to ||r||. Where r is nothing but cancellation (the gradient of a bias before
a normalization), that would say nothing, and they are relative to the size of the terms that cancel: the distance that
random rounding moves r, divided by the rounding's size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from convgrad_export.errors import VerificationError
from convgrad_export.integrations.eager_run import EagerRun, eager, is_double, run_eagerly, taken
from convgrad_export.integrations.fresh_inputs import fresh_input
from convgrad_export.integrations.not_numbers import (
    REDRAWS,
    agreeing,
    require_numbers,
    says_nothing,
    undecided,
    without,
)
from convgrad_export.integrations.other_sizes import Verification, other_sizes
from convgrad_export.integrations.program import CapturedProgram, GraphOutput
from convgrad_export.integrations.report import OutputError, merged
from convgrad_export.integrations.rounding import RandomRounding

SLACK = 8.0
_SEED = 20240
# Random runs until the judgement stands: the next stage follows where something is outside, or seems cancelled. Most
# outputs are within 2**-16 of their norm, and then no run is needed to know that they are within the bound.
_STAGES = (0, 1, 2, 8, 24)
# A bound below this part of the result says that the result is no mere cancellation, without a random run.
_CLEAR = 2.0**-5
# Below this part of the terms that it sums up, a result is called cancelled.
CANCELLED = 2.0**-10
# Runs in which numbers that do not round are moved as well, by each of two amounts.
_WHOLE_RUNS = 4
# The two amounts are that many times apart, and what vanishes with the smaller one shrinks at least this much.
_FARTHER, _FARTHER_DOUBLE, _VANISHED = 2.0**-24, 2.0**12, 2.0**-5


@dataclass(frozen=True)
class Precision:
    """What eager runs in beside float64, and the bound's constants; a float64 model is held to float64.

    Attributes:
        dtype: of the compared eager run. floor: relative error that is always allowed. rounding: of a stored value.
        perturbations: relative changes of inputs and weights, a few layers' rounding (training steps).
        storage: type whose values count as exact, None for none but zero. noise: relative rounding of each operator in
        the random runs.
        slack: what the distance that rounding moves a result is multiplied by. stages: random runs, see `_STAGES`.
    """

    dtype: torch.dtype
    floor: float
    rounding: float
    perturbations: tuple[float, ...]
    storage: torch.dtype | None
    noise: float
    slack: float = SLACK
    stages: tuple[int, ...] = _STAGES


SINGLE = Precision(
    torch.float32, 2.0**-16, 2.0**-23, (0.0, 2.0**-20, 2.0**-20, 2.0**-19), storage=torch.float32, noise=2.0**-21
)
DOUBLE = Precision(
    torch.float64, 2.0**-38, 2.0**-52, (2.0**-51, 2.0**-49, 2.0**-49), storage=torch.float32, noise=2.0**-49
)
# Half results are rounded once an operator, by up to half of 2**-10 (float16) or 2**-7 (bfloat16).
FLOAT16 = Precision(torch.float32, 2.0**-10, 2.0**-10, (0.0, 2.0**-9), storage=torch.float16, noise=2.0**-9)
BFLOAT16 = Precision(torch.float32, 2.0**-7, 2.0**-7, (0.0, 2.0**-6), storage=torch.bfloat16, noise=2.0**-6)
_HALF = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
# A result in one type moves by a part of itself that a type as coarse as this one does not hold.
_COARSER = {torch.float32: torch.bfloat16, torch.float16: torch.float8_e5m2, torch.bfloat16: torch.float8_e5m2}


def precision_of(program: CapturedProgram) -> Precision:
    """By the parameters' type, or the inputs' where there are none: `DOUBLE` if all are float64, the coarsest half.

    What the forward casts to counts as well: a float32 module under autocast is as exact as bfloat16 is, and a float64
    one that computes a part in float32 as exact as that.
    """
    floats = [spec for spec in program.inputs if spec.value.is_floating_point()]
    computed = _computed_in(program)
    dtypes = {spec.value.dtype for spec in floats} | computed
    for half in (torch.bfloat16, torch.float16):
        if half in dtypes:
            return _HALF[half]
    return DOUBLE if is_double(program) and torch.float32 not in computed else SINGLE


def _computed_in(program: CapturedProgram) -> set[torch.dtype]:
    """Floating-point types that the graph narrows a value to."""
    found = set()
    for node in program.graph_module.graph.nodes:
        value = node.meta.get("val")
        if node.target is not torch.ops.aten._to_copy.default or not isinstance(value, torch.Tensor):
            continue
        source = node.args[0].meta.get("val")
        if source is not None and source.is_floating_point() and source.dtype.itemsize > value.dtype.itemsize:
            found.add(value.dtype)
    return found


def in_own_types(precision: Precision) -> Precision:
    """For a truth that is itself rounded: once more what rounding moves, and random runs from the start."""
    storage = _COARSER.get(precision.storage, precision.storage) if precision.storage is not None else None
    return replace(precision, storage=storage, slack=precision.slack + 1, stages=precision.stages[2:])


def verify(runner: Any, program: CapturedProgram, *, samples: int = 3) -> Verification:
    """Compare on `samples` fresh inputs of the example's sizes, and on further sizes of every dynamic dimension.

    Args:
        runner: A session of the model without the session's own layout: what the file says, for any runtime.

    Raises:
        VerificationError: An output is outside the bound, or onnxruntime refuses an input that eager takes; or eager
            gives nothing but NaN for an output.
    """
    users = [spec for spec in program.inputs if spec.kind == "user"]
    random = np.random.default_rng(_SEED)
    errors: dict[str, OutputError] = {}
    for number in range(samples + REDRAWS):
        if number >= samples and not undecided(program, errors):
            break
        drawn = {spec.name: fresh_input(spec, spec.value.shape, random) for spec in users}
        errors = merged(errors, compare(runner, program, *taken(program, users, drawn, random)))
    require_numbers(program, errors)
    return other_sizes(program, users, random, functools.partial(compare, runner, program), errors)


def run_once(runner: Any, program: CapturedProgram) -> None:
    """For a model with random numbers, whose values say nothing: it runs on the example, with eager's shapes.

    Raises:
        VerificationError: onnxruntime refuses the model or the input, or an output has another shape than eager's.
    """
    inputs = {spec.name: spec.value.detach() for spec in program.inputs if spec.kind == "user"}
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it is
        expected = run_eagerly(program, inputs, torch.float64).outputs
    actual = _actual(runner, inputs)
    for spec in program.outputs:
        _check_shape(spec.name, actual[spec.name].shape, expected[spec.name].shape)


def _actual(runner: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    try:
        results = runner.run({name: as_numpy(inputs[name]) for name in runner.input_names})
    except Exception as refused:
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        raise VerificationError(f"the exported model fails on inputs {shapes} that eager takes: {refused}") from refused
    return {name: np.asarray(value) for name, value in results.items()}


def _check_shape(name: str, got: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(got) != tuple(wanted):
        raise VerificationError(f"output {name!r} has shape {tuple(got)}, eager gives {tuple(wanted)}")


def compare(
    runner: Any, program: CapturedProgram, inputs: Mapping[str, torch.Tensor], exact: EagerRun | None = None
) -> dict[str, OutputError]:
    """One run beside eager: the errors of all outputs but those that are NaN everywhere, on both sides.

    Args:
        exact: the float64 run on these inputs, where it was made already.

    Raises:
        VerificationError: Outside the bound, another shape, or onnxruntime fails.
    """
    exact = exact or run_eagerly(program, inputs, torch.float64)
    truth = {name: value.double() for name, value in exact.outputs.items()}
    precision = precision_of(program) if exact.refusal is None else in_own_types(precision_of(program))
    actual = _actual(runner, inputs)
    values: dict[str, torch.Tensor] = {}
    for spec in program.outputs:
        _check_shape(spec.name, actual[spec.name].shape, truth[spec.name].shape)
        values[spec.name] = torch.from_numpy(actual[spec.name].astype(np.float64))
    agreed = agreeing(truth, values)
    compared = [spec for spec in program.outputs if not says_nothing(truth[spec.name]) or not agreed[spec.name].all()]
    truth, values = without(truth, agreed), without(values, agreed)
    runs: list[dict[str, float]] = []
    errors: dict[str, OutputError] = {}
    plain: dict[str, float] | None = None
    for stage in precision.stages:
        if stage and plain is None:
            plain = _distances(without(eager(program, inputs, precision.dtype), agreed), truth)
            errors = _judged(compared, values, truth, plain, runs, precision)
            if all(error.within and error.bound < _CLEAR for error in errors.values()):
                break
        for seed in range(len(runs), stage):
            rounded = _randomly_rounded(program, inputs, precision, seed)
            runs.append(_distances(without(rounded, agreed), truth))
        errors = _judged(compared, values, truth, plain, runs, precision)
        doubtful = stage == 1 and any(error.cancelled for error in errors.values())
        if not doubtful and all(error.within for error in errors.values()):
            break
    if exact.refusal is None and not all(error.within for error in errors.values()):

        def moved(amount: float, storage: torch.dtype | None, seed: int) -> dict[str, float]:
            rounded = _randomly_rounded(program, inputs, replace(precision, noise=amount, storage=storage), seed)
            return _distances(without(rounded, agreed), truth)

        norms = {name: float(value.norm()) for name, value in truth.items()}
        cancelling = cancelling_moves(moved, norms, precision)
        errors = _judged(compared, values, truth, plain, runs, precision, cancelling)
    if not all(error.within for error in errors.values()):
        # Not-a-number, which no comparison finds, is the worst.
        name, error = max(errors.items(), key=lambda item: np.nan_to_num(item[1].relative / item[1].bound, nan=np.inf))
        reference = "float64 eager" if exact.refusal is None else "eager"
        raise VerificationError(
            f"output {name!r} of the exported model is wrong: relative error {error.relative:.3g} against {reference}, "
            f"bound {error.bound:.3g}{', relative to the terms that cancel in it' * error.cancelled}. "
            f"Inputs { ({name: tuple(v.shape) for name, v in inputs.items()}) }. Nothing was written."
        )
    return errors


def _judged(
    outputs: Sequence[GraphOutput],
    values: Mapping[str, torch.Tensor],
    truth: Mapping[str, torch.Tensor],
    plain: Mapping[str, float] | None,
    runs: Sequence[Mapping[str, float]],
    precision: Precision,
    cancelling: Mapping[str, float] | None = None,
) -> dict[str, OutputError]:
    """Each output's error and bound; see this module's docstring."""
    errors, cancelling = {}, cancelling or {}
    for spec in outputs:
        difference = values[spec.name] - truth[spec.name]
        norm, error = float(truth[spec.name].norm()), float(difference.norm())
        moved = [run[spec.name] for run in (*runs, *([plain] if plain is not None else []))]
        allowed = precision.slack * max(*moved, cancelling.get(spec.name, 0.0), 0.0) + precision.floor * norm
        # The least of the runs: a tie that fell the other way in some of them says nothing about cancellation.
        least = min((run[spec.name] for run in runs), default=0.0)
        terms = cancelling.get(spec.name, least) / precision.noise
        cancelled = norm < CANCELLED * terms
        scale = (terms if cancelled else norm) or 1.0
        largest = float(difference.abs().max()) if difference.numel() else 0.0
        errors[spec.name] = OutputError(error / scale, (allowed + 1e-30) / scale, largest, cancelled)
    return errors


def cancelling_moves(
    moved: Callable[[float, torch.dtype | None, int], Mapping[str, float]],
    norms: Mapping[str, float],
    precision: Precision,
) -> dict[str, float]:
    """How far rounding moves the results that are zero only because equal numbers cancel, by name.

    Here every number moves, also those that the model's type holds. A result is left out that is not small beside the
    terms, or whose move does not vanish with the rounding: an index on the other side of an integer stays there.

    Args:
        moved: how far rounding moves each result, of the relative amount, the type whose values stay, and a seed.
        norms: of what is compared.
    """
    noise = precision.noise
    small, large = sorted((noise, noise * (_FARTHER_DOUBLE if precision is DOUBLE else _FARTHER)))
    runs = {amount: [moved(amount, None, seed) for seed in range(_WHOLE_RUNS)] for amount in (small, large)}
    found = {}
    for name, norm in norms.items():
        vanishes = max(run[name] for run in runs[small]) <= _VANISHED * min(run[name] for run in runs[large])
        moves = [run[name] for run in runs[noise]]
        if vanishes and norm < CANCELLED * min(moves) / noise:
            found[name] = max(moves)
    return found


def _distances(results: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((results[name].double() - exact).norm()) for name, exact in truth.items()}


def _randomly_rounded(
    program: CapturedProgram, inputs: Mapping[str, torch.Tensor], precision: Precision, seed: int
) -> dict[str, torch.Tensor]:
    """The results of one run with random rounding in every operator."""
    with RandomRounding(precision.noise, precision.storage, seed):
        return eager(program, inputs, torch.float64)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
