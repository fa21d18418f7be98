"""Running an exported training step beside PyTorch, step by step from the same state.

Each step of the model and of eager PyTorch (float64 and float32) starts from the same float32 state, so that one
step's rounding is not the next one's input. What is compared is the loss and the *change* of each state tensor, within

    8 * e32 + 2**-16 * ||change|| + 2**-23 * ||value||

where e32 is the distance of eager float32's change from float64's, under small perturbations of the inputs too, and the
last term is the rounding of the stored result. Float64 models are held to float64's own constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..errors import VerificationError
from ..integrations.eager_run import eager
from ..integrations.fresh_inputs import fresh_input
from ..integrations.other_sizes import Verification, other_sizes
from ..integrations.program import CapturedProgram
from ..integrations.report import OutputError, merged
from ..integrations.verification import SLACK, precision_of

_SUFFIX = ".updated"


def verify_step(
    model: ir.Model, program: CapturedProgram, state: Mapping[str, torch.Tensor], learning_rate: float, steps: int = 3
) -> Verification:
    """`steps` steps on fresh batches, and one more at another size of each dynamic dimension.

    Raises:
        VerificationError: an output is outside the bound, or onnxruntime or PyTorch itself refuses the batch.
        DynamicShapeError: the forward or the loss does something else at another size.
    """
    from ..runtime.session import GradientSession

    runner = GradientSession(model, blocked_layout=False)  # what the file says, for any runtime
    settings = {
        "learning_rate": lambda spec, number: torch.tensor(learning_rate, dtype=spec.value.dtype),
        "seed": lambda spec, number: torch.tensor(number, dtype=torch.int64),
    }
    users = [spec for spec in program.inputs if spec.kind == "user"]
    batch = [spec for spec in users if spec.name not in settings]
    random = np.random.default_rng(20240)
    current = {name: value.clone() for name, value in state.items()}
    errors: dict[str, OutputError] = {}

    def others(number: int) -> dict[str, torch.Tensor]:
        return {spec.name: settings[spec.name](spec, number) for spec in users if spec.name in settings}

    for number in range(steps):
        inputs = {spec.name: fresh_input(spec, spec.value.shape, random) for spec in batch} | others(number)
        actual = _run(runner, {**inputs, **current})
        errors = merged(errors, _compare(program, inputs, current, actual))
        for name, value in actual.items():
            if name.endswith(_SUFFIX):
                current[name.removesuffix(_SUFFIX)] = torch.from_numpy(np.array(value))

    def judge(inputs: Mapping[str, torch.Tensor]) -> dict[str, OutputError]:
        return _compare(program, inputs, current, _run(runner, {**inputs, **current}))

    return other_sizes(program, batch, random, judge, errors, others(steps))


def _run(runner: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    try:
        result: dict[str, np.ndarray] = runner.run({name: feeds[name].detach().numpy() for name in runner.input_names})
    except Exception as refused:
        raise VerificationError(f"the exported step fails on a batch that PyTorch takes: {refused}") from refused
    return result


def _compare(
    program: CapturedProgram,
    inputs: Mapping[str, torch.Tensor],
    current: Mapping[str, torch.Tensor],
    actual: Mapping[str, np.ndarray],
) -> dict[str, OutputError]:
    with_state = _with_values(program, current)
    exact = eager(with_state, inputs, torch.float64)
    precision = precision_of(program)
    amounts = precision.perturbations
    single = [eager(with_state, inputs, precision.dtype, amount, seed) for seed, amount in enumerate(amounts)]
    errors = {}
    for spec in program.outputs:
        value = np.asarray(actual[spec.name]).astype(np.float64)
        truth = exact[spec.name].double().numpy()
        if value.shape != truth.shape:
            raise VerificationError(f"output {spec.name!r} has shape {value.shape}, PyTorch gives {truth.shape}")
        before = current.get(spec.target or "")
        start = before.double().numpy() if before is not None else 0.0
        change = truth - start
        own = max(
            float(np.linalg.norm(s[spec.name].double().numpy() - truth - _moved(spec, with_state, before, a, i)))
            for i, (s, a) in enumerate(zip(single, amounts, strict=True))
        )
        norm, stored = float(np.linalg.norm(change)), float(np.linalg.norm(truth))
        error = float(np.linalg.norm(value - truth))
        allowed = (
            SLACK * own + precision.floor * norm + (precision.rounding * stored if before is not None else 0.0) + 1e-30
        )
        scale = max(norm, own) or 1.0
        errors[spec.name] = OutputError(error / scale, allowed / scale, float(np.abs(value - truth).max(initial=0.0)))
        if not error <= allowed:
            raise VerificationError(
                f"output {spec.name!r} of the exported step is wrong: its change is off by {error / scale:.3g} of "
                f"itself against float64 PyTorch, bound {allowed / scale:.3g}. Nothing was written."
            )
    return errors


def _with_values(program: CapturedProgram, values: Mapping[str, torch.Tensor]) -> CapturedProgram:
    """The program with other values of its state."""
    import dataclasses

    specs = tuple(
        dataclasses.replace(s, value=values[s.name].detach().requires_grad_(s.value.requires_grad))
        if s.name in values
        else s
        for s in program.inputs
    )
    return dataclasses.replace(program, inputs=specs)


def _moved(spec: Any, program: CapturedProgram, before: torch.Tensor | None, amount: float, seed: int) -> Any:
    """How far the perturbation itself moved a state tensor: no part of what the step's arithmetic adds."""
    from ..integrations.eager_run import perturbed

    if before is None or amount == 0.0 or not before.is_floating_point():
        return 0.0
    index = next(i for i, s in enumerate(program.inputs) if s.name == spec.target)
    single = before.to(torch.float64 if before.dtype == torch.float64 else torch.float32)
    return perturbed(single, amount, 1000 * seed + index).double().numpy() - single.double().numpy()
