"""Running an exported training step beside PyTorch, step by step from the same state.

Each step of the model and of eager PyTorch (float64 and float32) starts from the same float32 state, so that one
step's rounding is not the next one's input. What is compared is the loss and the *change* of each state tensor, within

    8 * e + 2**-16 * ||change|| + 2**-23 * ||value||

where e is the distance of eager float32's change from float64's, under small perturbations of the inputs too, and the
last term is the rounding of the stored result. Float64 models are held to float64's own constants.

A result outside is looked at again before it is refused, as `integrations/verification.py` does: float64 runs in which
each operator up to the gradients rounds at random add to e what rounding does to sums that cancel (the gradient of a
bias before a normalization, which Adam divides by its own size). Rounding in the update itself takes no part: of a
small change, that of the parameter it is added to would hide everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from ..errors import VerificationError
from ..integrations.eager_run import EagerRun, eager, perturbed, run_eagerly, taken
from ..integrations.fresh_inputs import fresh_input
from ..integrations.not_numbers import REDRAWS, agreeing, require_numbers, says_nothing, undecided, without
from ..integrations.other_sizes import Verification, other_sizes
from ..integrations.program import CapturedProgram, GraphOutput
from ..integrations.report import OutputError, merged
from ..integrations.rounding import RandomRounding
from ..integrations.verification import (
    CANCELLED,
    Precision,
    as_numpy,
    cancelling_moves,
    in_own_types,
    precision_of,
)
from ..tensor_names import UPDATED
from .update import is_updating

Settings = Mapping[str, Callable[[int], Any]]


def verify_step(
    model: ir.Model | onnx.ModelProto,
    program: CapturedProgram,
    state: Mapping[str, torch.Tensor],
    settings: Settings,
    *,
    drawn: Collection[str] = (),
    steps: int = 3,
    what: str = "exported step",
) -> Verification:
    """`steps` runs on fresh batches, and one more at another size of each dynamic dimension.

    Args:
        model: what the file will hold.
        program: what it was made from.
        state: inputs that are no batch, at the first run; what a run updates is the next one's input.
        settings: the value of each further input that is no batch, by the number of the run; those that the program
            does not have are left out.
        drawn: names of the state that is drawn anew for each run, from a normal distribution.
        what: the model's name in messages.

    Raises:
        VerificationError: an output is outside the bound, or onnxruntime or PyTorch itself refuses the batch; or
            PyTorch gives nothing but NaN for an output.
        DynamicShapeError: the forward or the loss does something else at another size.
    """
    from ..runtime.session import GradientSession

    runner = GradientSession(model, blocked_layout=False)  # what the file says, for any runtime
    users = [spec for spec in program.inputs if spec.kind == "user"]
    batch = [spec for spec in users if spec.name not in settings]
    random = np.random.default_rng(20240)
    current = {name: value.clone() for name, value in state.items()}
    errors: dict[str, OutputError] = {}

    def others(number: int) -> dict[str, torch.Tensor]:
        given = [spec for spec in users if spec.name in settings]
        return {spec.name: torch.tensor(settings[spec.name](number), dtype=spec.value.dtype) for spec in given}

    def judge(inputs: Mapping[str, torch.Tensor], _first_state: EagerRun) -> dict[str, OutputError]:
        return _compare(program, inputs, current, _run(runner, program, inputs, current, what), what)

    for number in range(steps + REDRAWS):
        if number >= steps and not undecided(program, errors):
            break
        for name in drawn:
            values = torch.from_numpy(random.standard_normal(tuple(state[name].shape)))
            current[name] = values.to(state[name].dtype)
        inputs = {spec.name: fresh_input(spec, spec.value.shape, random) for spec in batch} | others(number)
        inputs, exact = taken(_with_values(program, current), batch, inputs, random)
        actual = _run(runner, program, inputs, current, what)
        errors = merged(errors, _compare(program, inputs, current, actual, what, exact))
        updated = {n.removesuffix(UPDATED): np.array(value) for n, value in actual.items() if n.endswith(UPDATED)}
        if not any(np.isnan(value).any() for value in updated.values()):  # or the next runs would be NaN too
            current.update({name: torch.from_numpy(value) for name, value in updated.items()})
    require_numbers(program, errors)
    return other_sizes(program, batch, random, judge, errors, others(steps))


def _run(
    runner: Any,
    program: CapturedProgram,
    inputs: Mapping[str, torch.Tensor],
    current: Mapping[str, torch.Tensor],
    what: str,
) -> dict[str, np.ndarray]:
    feeds = {**inputs, **current}
    try:
        result: dict[str, np.ndarray] = runner.run({name: as_numpy(feeds[name]) for name in runner.input_names})
    except Exception as refused:
        run_eagerly(_with_values(program, current), inputs, torch.float64)  # says so where PyTorch refuses it too
        raise VerificationError(f"the {what} fails on a batch that PyTorch takes: {refused}") from refused
    return result


def _compare(
    program: CapturedProgram,
    inputs: Mapping[str, torch.Tensor],
    current: Mapping[str, torch.Tensor],
    actual: Mapping[str, np.ndarray],
    what: str,
    exact: EagerRun | None = None,
) -> dict[str, OutputError]:
    with_state = _with_values(program, current)
    exact = exact or run_eagerly(with_state, inputs, torch.float64)
    precision = precision_of(program) if exact.refusal is None else in_own_types(precision_of(program))
    truth = {spec.name: exact.outputs[spec.name].double() for spec in program.outputs}
    values = {name: torch.from_numpy(np.asarray(value).astype(np.float64)) for name, value in actual.items()}
    for name, wanted in truth.items():
        if values[name].shape != wanted.shape:
            got = tuple(values[name].shape)
            raise VerificationError(f"output {name!r} has shape {got}, PyTorch gives {tuple(wanted.shape)}")
    agreed = agreeing(truth, values)
    before = {s.name: current[s.target] for s in program.outputs if s.target is not None and s.target in current}
    comparison = _Comparison(
        with_state,
        inputs,
        without(before, {name: agreed[name] for name in before}),
        without(truth, agreed),
        without(values, agreed),
        agreed,
        precision,
    )
    errors = comparison.errors(exact.refusal is None)
    for name, error in errors.items():
        if not error.within:
            raise VerificationError(
                f"output {name!r} of the {what} is wrong: its change is off by {error.relative:.3g} of "
                f"{'the terms that cancel in it' if error.cancelled else 'itself'} against "
                f"{'float64 ' if exact.refusal is None else ''}PyTorch, bound {error.bound:.3g}. Nothing was written."
            )
    return {name: error for name, error in errors.items() if not says_nothing(truth[name])}


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """One run of the model beside PyTorch's.

    Attributes:
        program: with the state of this run. inputs: the batch and the settings.
        before: the old value of each output that is a state tensor's new one.
        truth, values: PyTorch's outputs and the model's, in float64.
        agreed: where both have the same infinity or NaN, which is zero in `before`, `truth` and `values`.
    """

    program: CapturedProgram
    inputs: Mapping[str, torch.Tensor]
    before: Mapping[str, torch.Tensor]
    truth: Mapping[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]
    agreed: Mapping[str, torch.Tensor]
    precision: Precision

    def errors(self, in_float64: bool) -> dict[str, OutputError]:
        """Each output's error and bound; rounding inside is looked at where one is outside.

        Args:
            in_float64: whether the truth is.
        """
        noise, storage = self.precision.noise, self.precision.storage
        plain, random = self._perturbed(), list[Mapping[str, float]]()
        errors = self._judged(plain, random, {})
        for stage in self.precision.stages[-3:]:
            if _all_within(errors):
                return errors
            random += [self._rounded(noise, storage, seed) for seed in range(len(random), stage)]
            errors = self._judged(plain, random, {})
        if in_float64 and not _all_within(errors):
            norms = {name: float(self._change(name).norm()) for name in self.truth}
            errors = self._judged(plain, random, cancelling_moves(self._rounded, norms, self.precision))
        return errors

    def _judged(
        self, plain: Mapping[str, float], random: Sequence[Mapping[str, float]], cancelling: Mapping[str, float]
    ) -> dict[str, OutputError]:
        precision, errors = self.precision, {}
        for name, truth in self.truth.items():
            difference, norm = self.values[name] - truth, float(self._change(name).norm())
            moved = [plain[name], cancelling.get(name, 0.0), *(run[name] for run in random)]
            stored = precision.rounding * float(truth.norm()) if name in self.before else 0.0
            allowed = precision.slack * max(moved) + precision.floor * norm + stored + 1e-30
            least = min((run[name] for run in random), default=0.0)
            terms = cancelling.get(name, least) / precision.noise
            cancelled = norm < CANCELLED * terms
            scale = (terms if cancelled else max(norm, plain[name])) or 1.0
            largest = float(difference.abs().max()) if difference.numel() else 0.0
            errors[name] = OutputError(float(difference.norm()) / scale, allowed / scale, largest, cancelled)
        return errors

    def _change(self, name: str) -> torch.Tensor:
        return self.truth[name] - self.before[name].double() if name in self.before else self.truth[name]

    def _perturbed(self) -> dict[str, float]:
        """How far eager in the model's own type is from the truth, under small changes of everything it is given."""
        largest = dict.fromkeys(self.truth, 0.0)
        for seed, amount in enumerate(self.precision.perturbations):
            outputs = without(eager(self.program, self.inputs, self.precision.dtype, amount, seed), self.agreed)
            for spec in self.program.outputs:
                name = spec.name
                moved = (
                    outputs[name].double() - self.truth[name] - _moved(spec, self.program, self.before, amount, seed)
                )
                largest[name] = max(largest[name], float(moved.norm()))
        return largest

    def _rounded(self, amount: float, storage: torch.dtype | None, seed: int) -> dict[str, float]:
        """How far rounding before the update moves each output, without what it does to a state tensor as a whole."""
        with _BeforeUpdate(amount, storage, seed):
            outputs = without(eager(self.program, self.inputs, torch.float64), self.agreed)
        moved = {}
        for name, truth in self.truth.items():
            own = amount * float(truth.norm()) if name in self.before else 0.0
            moved[name] = max(float((outputs[name].double() - truth).norm()) - own, 0.0)
        return moved


class _BeforeUpdate(RandomRounding):
    """Random rounding of everything up to the gradients."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_updating():
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _all_within(errors: Mapping[str, OutputError]) -> bool:
    return all(error.within for error in errors.values())


def _with_values(program: CapturedProgram, values: Mapping[str, torch.Tensor]) -> CapturedProgram:
    """The program with other values of its state."""
    specs = tuple(
        dataclasses.replace(s, value=values[s.name].detach().requires_grad_(s.value.requires_grad))
        if s.name in values
        else s
        for s in program.inputs
    )
    return dataclasses.replace(program, inputs=specs)


def _moved(
    spec: GraphOutput, program: CapturedProgram, before: Mapping[str, torch.Tensor], amount: float, seed: int
) -> Any:
    """How far the perturbation itself moved a state tensor: no part of what the step's arithmetic adds."""
    old = before.get(spec.name)
    if old is None or amount == 0.0 or not old.is_floating_point():
        return 0.0
    index = next(i for i, s in enumerate(program.inputs) if s.name == spec.target)
    single = old.to(torch.float64 if old.dtype == torch.float64 else torch.float32)
    return perturbed(single, amount, 1000 * seed + index).double() - single.double()
