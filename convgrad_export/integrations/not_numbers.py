"""Results of a verification run that are no numbers, in PyTorch itself: infinities of a mask, NaN of an empty mean.

Where both sides have the same infinity, or both NaN, they agree, and their difference is no number. An output that is
NaN everywhere (cross entropy of labels that are all ignored) says nothing about the model: that run does not count for
it, further inputs are drawn, and a model of which no run says anything is not written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from convgrad_export.errors import VerificationError
from convgrad_export.integrations.program import CapturedProgram

# How many times more inputs are drawn where PyTorch gave nothing but NaN.
REDRAWS = 8


def agreeing(truth: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The places where both sides have the same infinity or both NaN."""
    return {
        name: value.isinf() & (value == truth[name]) | value.isnan() & truth[name].isnan()
        for name, value in values.items()
    }


def without(results: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros at these places, see `agreeing`."""
    return {
        name: results[name].masked_fill(where, 0.0) if where.any() else results[name] for name, where in places.items()
    }


def says_nothing(result: torch.Tensor) -> bool:
    """Whether all elements are NaN."""
    return result.numel() > 0 and bool(result.isnan().all())


def undecided(program: CapturedProgram, judged: Collection[str]) -> list[str]:
    """The outputs that no run has said anything about yet.

    Args:
        judged: names of those that some run did.
    """
    return [spec.name for spec in program.outputs if spec.name not in judged]


def require_numbers(program: CapturedProgram, judged: Collection[str]) -> None:
    """After all runs.

    Raises:
        VerificationError: an output was NaN everywhere in all of them.
    """
    if names := undecided(program, judged):
        raise VerificationError(
            f"output {names[0]!r} is NaN everywhere in PyTorch too, on all inputs drawn from the example's values, "
            "so that there is nothing to compare. Nothing was written. Give an example on which it is a number (labels "
            "that are not all ignored, say), or pass verify=False"
        )
