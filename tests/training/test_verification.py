"""What verifying a step and artifacts catches, and what it must not take for an error: gradients that cancel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.runtime import session
from convgrad_export.training import artifacts

from .parity import batches, small_network

Change = Callable[[dict[str, np.ndarray]], None]


def change_results(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Let verification see other results than the model's."""

    class Changed(session.GradientSession):
        def run(self, *arguments: Any) -> Any:
            results = super().run(*arguments)
            change(results)
            return results

    monkeypatch.setattr(session, "GradientSession", Changed)


def scaled(name: str, factor: float = 1.001) -> Change:
    def change(results: dict[str, np.ndarray]) -> None:
        if name in results:
            results[name] = results[name] * results[name].dtype.type(factor)

    return change


class Centered(nn.Module):
    """Its mean is subtracted from what a layer gives: the gradient of the layer's bias is 0, as 1 - n * (1 / n)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y - y.mean(0, keepdim=True)


class BiasBeforeNorm(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_that_cancel_are_no_error(optimizer: str) -> None:
    module, (x, y) = BiasBeforeNorm(), batches(1, torch.float32, 49)[0]
    report = cg.export_training_step(module, "cross_entropy", OPTIMIZERS[optimizer](module.parameters()), (x, y))
    assert report.verified


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("loss", [lambda out: out.sum(), lambda out: (out * 3).mean()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_subtracts_its_mean_is_no_error(optimizer: str, loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    module = Centered().to(dtype)
    x = torch.randn(49, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert cg.export_training_step(module, loss, OPTIMIZERS[optimizer](module.parameters()), (x,)).verified


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "rmsprop"])
def test_the_sum_of_what_is_normalized_is_no_error(optimizer: str) -> None:
    """All gradients but the normalization's own are zero, for the means that its backward kernel subtracts inside."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    make = OPTIMIZERS[optimizer]
    assert cg.export_training_step(module, lambda out: out.sum(), make(module.parameters()), (x,)).verified
    assert cg.export_gradient(module, (x,), wrt="parameters").errors["0.bias.grad"].cancelled


def tiny(name: str, part: float) -> Change:
    """A part of the terms in a result that is 0 where they cancel: what a sum lacks that leaves out a few of them."""

    def change(results: dict[str, np.ndarray]) -> None:
        if name in results:
            results[name] = results[name] + results[name].dtype.type(part)

    return change


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_wrong_gradient_is_caught_where_the_right_one_is_zero(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 49 terms of the bias' gradient are 1 each; with 1/1,000 of one of them missing, the rest has to show it."""
    module, x = Centered(), torch.randn(49, 7, generator=torch.Generator().manual_seed(1))
    name = {"sgd": "layer.bias.momentum_buffer.updated", "adam": "layer.bias.exp_avg.updated"}[optimizer]
    make = OPTIMIZERS["momentum" if optimizer == "sgd" else optimizer]
    for part, refused in ((2e-6, False), (1e-3, True)):
        with monkeypatch.context() as patch:
            change_results(patch, tiny(name, part if optimizer == "sgd" else 0.1 * part))
            if refused:
                with pytest.raises(cg.VerificationError, match=name):
                    cg.export_training_step(module, lambda out: out.sum(), make(module.parameters()), (x,))
            else:
                assert cg.export_training_step(module, lambda out: out.sum(), make(module.parameters()), (x,)).verified


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_small_errors_of_ordinary_gradients_are_caught(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another output is looked at again, the bounds of the others stay."""
    module, batch = BiasBeforeNorm(), batches(1, torch.float32)[0]
    name = {"sgd": "4.weight.momentum_buffer.updated", "adam": "4.weight.exp_avg.updated"}[optimizer]
    make = OPTIMIZERS["momentum" if optimizer == "sgd" else optimizer]
    change_results(monkeypatch, scaled(name, 1.0003))
    with pytest.raises(cg.VerificationError, match=name):
        cg.export_training_step(module, "cross_entropy", make(module.parameters()), batch)


def write(folder: Path, module: nn.Module | None = None, **options: Any) -> None:
    options = {"loss": "cross_entropy", "optimizer": "adamw", "args": batches(1, torch.float32)[0], **options}
    artifacts.generate_artifacts(module or small_network(torch.float32), artifact_directory=folder, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loss", "'loss' of the training model"),
        ("0.weight.grad.updated", r"'0\.weight\.grad\.updated' of the training model"),
        ("1.running_var.updated", r"'1\.running_var\.updated' of the training model"),
        ("7.weight.updated", r"'7\.weight\.updated' of the optimizer model"),
        ("7.weight.exp_avg_sq.updated", "'7.weight.exp_avg_sq.updated' of the optimizer model"),
    ],
)
def test_artifacts_that_are_wrong_are_not_written(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_results(monkeypatch, scaled(name, 1.01))
    with pytest.raises(cg.VerificationError, match=message):
        write(tmp_path)
    assert not list(tmp_path.iterdir())
    write(tmp_path, verify=False)
    assert len(list(tmp_path.iterdir())) == 4


def test_the_eval_model_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(results: dict[str, np.ndarray]) -> None:
        if not any(name.endswith(".updated") for name in results):
            results["output"] = results["output"] * np.float32(1.01)

    change_results(monkeypatch, change)
    with pytest.raises(cg.VerificationError, match="'output' of the eval model"):
        write(tmp_path)


def test_artifacts_add_gradients_up_while_they_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    run = session.GradientSession.run

    def noted(self: Any, feeds: Any, *others: Any) -> Any:
        if "lazy_reset_grad" in feeds:
            given.append(bool(feeds["lazy_reset_grad"]))
        return run(self, feeds, *others)

    monkeypatch.setattr(session.GradientSession, "run", noted)
    write(tmp_path, nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5)))
    assert set(given) == {True, False}


def test_a_branch_on_the_batch_is_refused_in_artifacts(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = small_network(torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.scores(x) if x.shape[0] > 6 else self.scores(x)

    with pytest.raises(cg.DynamicShapeError, match="'batch' was declared dynamic, but at 7"):
        write(tmp_path, Branching())
    assert not list(tmp_path.iterdir())


def test_artifacts_of_several_kinds_are_verified(tmp_path: Path) -> None:
    """float64, float16, a frozen part, an optimizer's own state, and a loss of the module's own."""
    write(tmp_path, small_network(), args=batches(1)[0])
    halves = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5)).half()
    x, y = batches(1, torch.float16)[0]
    write(tmp_path, halves, args=(x, y), loss=lambda out, y: functional.cross_entropy(out.float(), y))
    module = small_network(torch.float32)
    module[1].eval()
    write(tmp_path, module, frozen_params=["0.weight"], optimizer=torch.optim.RMSprop(module.parameters(), lr=0.0))
    write(tmp_path, nn.Sequential(nn.Linear(3, 1)), args=(torch.randn(4, 3),), loss=lambda out: out.square().mean())


class Masked(nn.Module):
    """Scores of which one class is ruled out."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.mask = nn.Linear(64, 5), torch.tensor([False, False, False, False, True])

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x.flatten(1)).masked_fill(self.mask, -torch.inf)


def test_infinities_that_both_have_are_equal_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, y), options = batches(1, torch.float32)[0], {"return_outputs": True}
    batch = (x, y % 4)
    assert cg.export_training_step(Masked(), "cross_entropy", "adam", batch, **options).verified
    write(tmp_path, Masked(), args=batch)

    def change(results: dict[str, np.ndarray]) -> None:
        results["output"][0, 4] = np.inf

    change_results(monkeypatch, change)
    with pytest.raises(cg.VerificationError, match="output 'output' of the exported step"):
        cg.export_training_step(Masked(), "cross_entropy", "adam", batch, **options)


def test_batches_whose_labels_are_all_ignored_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    change_results(monkeypatch, lambda results: losses.append(float(results["loss"])))
    args, shapes = (torch.randn(3, 6), torch.tensor([2, -100, -100])), {"input": {0: "b"}, "target": {0: "b"}}
    report = cg.export_training_step(nn.Linear(6, 5), "cross_entropy", "adam", args, dynamic_shapes=shapes)
    assert {"loss", "weight.updated", "weight.exp_avg.updated"} <= set(report.errors)
    assert report.errors["loss"].relative < 1e-6
    assert any(np.isnan(losses)), "no batch was without a label: the test tests nothing"


def test_a_batch_without_any_label_is_refused() -> None:
    args = torch.randn(3, 6), torch.tensor([-100, -100, -100])
    with pytest.raises(cg.VerificationError, match="output 'loss' is NaN everywhere in PyTorch too"):
        cg.export_training_step(nn.Linear(6, 5), "cross_entropy", "sgd", args)
