"""Runs of an exported model at sizes of its dynamic dimensions that are not the example's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from convgrad_export.errors import DynamicShapeError, VerificationError
from convgrad_export.integrations.eager_run import EagerRun, taken
from convgrad_export.integrations.fresh_inputs import fresh_input
from convgrad_export.integrations.not_numbers import REDRAWS, says_nothing
from convgrad_export.integrations.program import CapturedProgram, GraphInput
from convgrad_export.integrations.report import OutputError, merged

Judge = Callable[[Mapping[str, torch.Tensor], EagerRun], dict[str, OutputError]]


@dataclass(frozen=True)
class Verification:
    """Errors by output, and the sizes of the dynamic dimensions that were run."""

    errors: dict[str, OutputError]
    sizes: list[dict[str, int]]
    notes: list[str]


def other_sizes(
    program: CapturedProgram,
    users: Sequence[GraphInput],
    random: np.random.Generator,
    judge: Judge,
    errors: Mapping[str, OutputError],
    others: Mapping[str, torch.Tensor] | None = None,
) -> Verification:
    """A run for each dynamic dimension, at another size than the example's: what there is to report with them.

    Args:
        users: The inputs that have the dimensions.
        judge: Compares the model with eager on inputs by name, as `compare` does; given eager's float64 run on them.
        errors: At the example's sizes.
        others: Inputs of every run.

    Raises:
        VerificationError: As `judge`.
        DynamicShapeError: The model is right at the example's size alone.
    """
    worst, example, notes = dict(errors), example_sizes(users), list[str]()
    sizes_run = [example] if example else []
    names = [name for name in example if name not in _dependent(program)]
    for label in {program.dimensions[name]: name for name in names}.values():
        run = _second_size(program, users, label, random, judge, others or {})
        if run is None:
            notes.append(f"no second size of dimension {label!r} was found that eager PyTorch accepts")
            continue
        sizes, more = run
        worst, sizes_run = merged(worst, more), [*sizes_run, sizes]
    return Verification(worst, sizes_run, [*notes, *program.notes])


def example_sizes(users: Sequence[GraphInput]) -> dict[str, int]:
    return {label: int(spec.value.shape[axis]) for spec in users for axis, label in spec.dynamic.items()}


def _second_size(
    program: CapturedProgram,
    users: Sequence[GraphInput],
    label: str,
    random: np.random.Generator,
    judge: Judge,
    others: Mapping[str, torch.Tensor],
) -> tuple[dict[str, int], dict[str, OutputError]] | None:
    """The first other size of `label` that the captured constraints and eager allow, compared.

    A size that eager takes and the trace's constraints rule out is run as well: where the forward branches on a size,
    the model would silently hold one branch for all.

    Raises:
        DynamicShapeError: The model is wrong at such a size.
    """
    example = example_sizes(users)
    old, dependent = example[label], _dependent(program)
    candidates = [old + 1, old + 2, old + 3, old + 4, 2 * old, old + 8, old + 16, old + 32, 3 * old, old // 2]
    ruled_out_tried = False
    # Another name of the same size, where the forward adds one input to the other.
    same = [name for name, expression in program.dimensions.items() if expression == program.dimensions[label]]
    for size in dict.fromkeys(c for c in candidates if c >= 1 and c != old):
        sizes = {**example, **dict.fromkeys(same, size)}
        for name, expression in dependent.items():
            sizes[name] = int(substituted(program, expression, sizes))
        broken = _broken_constraint(program, sizes, example)
        if broken is not None and ruled_out_tried:
            continue
        try:
            fresh, exact = _fresh_inputs(program, users, sizes, random, others)
        except Exception:  # whatever the user's module raises for a size that it does not take
            continue
        if broken is None:
            return sizes, judge(fresh, exact)
        ruled_out_tried = True
        try:
            judge(fresh, exact)
        except VerificationError as wrong:
            raise DynamicShapeError(
                f"dimension {label!r} was declared dynamic, but at {size} the forward does something else than at the "
                f"example's {old}: the trace holds for {broken} only. Declare the dimension static, or compute the "
                "same for every size. Nothing was written."
            ) from wrong
    return None


def _fresh_inputs(
    program: CapturedProgram,
    users: Sequence[GraphInput],
    sizes: Mapping[str, int],
    random: np.random.Generator,
    others: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], EagerRun]:
    """Inputs of these sizes that eager takes, with numbers for all outputs as far as a few draws find such.

    Returns:
        Them, and eager's float64 run on them.
    """
    for _ in range(1 + REDRAWS):
        fresh = {
            s.name: fresh_input(s, [sizes.get(s.dynamic.get(a, ""), n) for a, n in enumerate(s.value.shape)], random)
            for s in users
        } | dict(others)
        fresh, exact = taken(program, users, fresh, random)
        if not any(says_nothing(exact.outputs[spec.name]) for spec in program.outputs):
            break
    return fresh, exact


def _broken_constraint(program: CapturedProgram, sizes: Mapping[str, int], example: Mapping[str, int]) -> str | None:
    """What the sizes violate of what the trace found out about them (a U-Net's multiples of 16, say), with its line.

    What the example violates too is left out: a trace takes no dynamic size to be 1, and an example's batch often is.
    """
    for guard in program.shape_env.guards:
        if _violates(program, sizes, guard.expr) and not _violates(program, example, guard.expr):
            return f"{_with_names(program, guard.expr)} (found at {guard.sloc})"
    return None


def _violates(program: CapturedProgram, sizes: Mapping[str, int], constraint: Any) -> bool:
    import sympy

    return bool(substituted(program, constraint, sizes) == sympy.false)


def _with_names(program: CapturedProgram, expression: Any) -> str:
    return re.sub(r"\bs\d+\b", lambda match: program.symbol_names.get(match[0], match[0]), str(expression))


def substituted(program: CapturedProgram, expression: Any, sizes: Mapping[str, int]) -> Any:
    """An expression of the trace's symbols with the sizes of the dimensions that they stand for."""
    named = {s: program.symbol_names[str(s)] for s in expression.free_symbols if str(s) in program.symbol_names}
    return expression.subs({symbol: sizes[label] for symbol, label in named.items() if label in sizes})


def _dependent(program: CapturedProgram) -> dict[str, Any]:
    """Dimensions whose size follows from others (an output's height, given as a cotangent), with the expression.

    Where the trace could not put the expression in the dimension's place, behind a stride, it noted an equation.
    """
    import sympy

    found = {name: expression for name, expression in program.dimensions.items() if not expression.is_Symbol}
    for guard in program.shape_env.guards:
        if not isinstance(guard.expr, sympy.Eq):
            continue
        for symbol, expression in (guard.expr.args, guard.expr.args[::-1]):
            name, others = program.symbol_names.get(str(symbol)), expression.free_symbols
            if name is None or name in found or expression.is_Symbol or not others or symbol in others:
                continue
            given = {program.symbol_names.get(str(other)) for other in others}
            if given.isdisjoint(found) and not any(symbol in other.free_symbols for other in found.values()):
                found[name] = expression
    return found
