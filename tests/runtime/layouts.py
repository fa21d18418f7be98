"""Models with and without onnxruntime's blocked layout, for the tests of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch

import convgrad_export as cg
from convgrad_export.runtime.convolution_entries import METADATA


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def metadata(model: onnx.ModelProto) -> str | None:
    return next((entry.value for entry in model.metadata_props if entry.key == METADATA), None)


def assert_steps_agree(report: cg.TrainingStepReport, batch: tuple[Any, ...], in_place: bool) -> None:
    """Three steps in the blocked layout and by the file's own formulas."""
    states = []
    for layout in (True, False):
        session = cg.TrainingSession(report.model, report.state, blocked_layout=layout, in_place=in_place)
        losses = [session.step(*batch)["loss"] for _ in range(3)]
        states.append((losses, session.state()))
    np.testing.assert_allclose(states[0][0], states[1][0], rtol=1e-5)
    for name, value in states[0][1].items():
        np.testing.assert_allclose(value, states[1][1][name], rtol=1e-4, atol=1e-5, err_msg=name)
