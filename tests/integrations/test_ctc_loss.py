"""The CTC loss against ATen's kernel: values and gradients, every way to give targets and lengths, trained steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg
from convgrad_export.integrations.ctc_loss import ctc_loss

TARGETS = torch.tensor([[1, 1, 2, -1], [3, 4, 4, 1], [2, -5, 9, 0], [2, 2, 2, 2]])  # what is behind the end is not read
LENGTHS, INPUTS = [3, 4, 1, 0], [7, 6, 3, 7]
BEHIND_ONE_ANOTHER = torch.cat([row[:length] for row, length in zip(TARGETS, LENGTHS, strict=True)])

CASES: dict[str, tuple[Any, ...]] = {
    "rows": (TARGETS, torch.tensor(INPUTS), torch.tensor(LENGTHS)),
    "rows-int32": (TARGETS.int(), torch.tensor(INPUTS).int(), torch.tensor(LENGTHS).int()),
    "numbers": (TARGETS, INPUTS, tuple(LENGTHS)),
    "behind-one-another": (BEHIND_ONE_ANOTHER, torch.tensor(INPUTS), torch.tensor(LENGTHS)),
    "behind-one-another-numbers": (BEHIND_ONE_ANOTHER, INPUTS, LENGTHS),
    "blank-among-them": (TARGETS.clamp(0, 4), torch.tensor(INPUTS), torch.tensor(LENGTHS), 4),
    "nothing": (TARGETS[:, :0], INPUTS, [0, 0, 0, 0]),
}


def _compared(x: Tensor, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    found = []
    for function in (ctc_loss, torch.nn.functional.ctc_loss):
        leaf = x.clone().requires_grad_()
        value = function(leaf, *arguments, **options)
        weights = torch.arange(1.0, 1 + value.numel(), dtype=x.dtype).reshape(value.shape)
        found.append((value.detach(), *torch.autograd.grad((value * weights).nansum(), leaf)))
    return found


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case: str, reduction: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 4, 5, dtype=torch.float64)  # not even normalized: ATen's formula for that, too
    torch.testing.assert_close(*_compared(x, CASES[case], {"reduction": reduction}))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_one_sample_without_a_batch(reduction: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64).log_softmax(-1)
    arguments = (TARGETS[1, :3], torch.tensor(6), torch.tensor(3))
    torch.testing.assert_close(*_compared(x, arguments, {"reduction": reduction}))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_what_cannot_be_aligned(reduction: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 4, 5, dtype=torch.float64).log_softmax(-1)
    arguments = (TARGETS, torch.tensor([3, 6, 0, 0]), torch.tensor(LENGTHS))  # of these one is nothing in no time
    options = {"reduction": reduction}
    torch.testing.assert_close(*_compared(x, arguments, {**options, "zero_infinity": True}))
    (value, gradient), (expected, expected_gradient) = _compared(x, arguments, options)
    torch.testing.assert_close(value, expected)
    if reduction == "none":
        torch.testing.assert_close(gradient[:, [1, 3]], expected_gradient[:, [1, 3]])


class Reader(nn.Module):
    """Columns of an image to letters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d((6, 1)))
        self.letters = nn.Conv1d(4, 5, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.letters(self.features(image).squeeze(2)).permute(2, 0, 1).log_softmax(-1)


def _batch(samples: int) -> tuple[Tensor, ...]:
    lengths = torch.arange(samples) % 3 + 1
    return torch.randn(samples, 1, 6, 9), torch.randint(1, 5, (samples, 3)), torch.full_like(lengths, 9), lengths


@pytest.mark.parametrize(
    "loss", [nn.CTCLoss(zero_infinity=True), torch.nn.functional.ctc_loss], ids=["module", "function"]
)
def test_a_reader_is_trained_at_other_batch_sizes(loss: Callable[..., Tensor]) -> None:
    module = Reader()
    report = cg.export_training_step(module, loss, "sgd", _batch(3), dynamic_shapes=({0: "batch"},) * 4)
    assert report.verified
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for samples in (3, 5, 1):
        image, *targets = _batch(samples)
        optimizer.zero_grad()
        expected = loss(module(image), *targets)
        expected.backward()
        optimizer.step()
        assert session.step(image, *targets)["loss"] == pytest.approx(expected.item(), rel=1e-5)
    state = session.state()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(torch.as_tensor(state[name]), parameter.detach(), rtol=1e-4, atol=1e-6)
