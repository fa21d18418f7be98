"""What a forward, a loss or a hook does to the module's own tensors, and through which references it reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.training import artifacts
from convgrad_export.training.api import CheckpointState, Module, Optimizer

from .parity import assert_same_training, batches, small_network, train_artifacts, train_in_pytorch


def data(count: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(4, 3, generator=generator).to(dtype), torch.randn(4, 2, generator=generator).to(dtype))
        for _ in range(count)
    ]


def linear(dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


class Clamped(nn.Module):
    """Weights that the forward keeps between bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.3, 0.3)
        return self.layer(x)


class Averaged(nn.Module):
    """A teacher that follows the network, as in MoCo: frozen, and changed by the forward."""

    def __init__(self, follow: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.network, self.teacher, self.follow = linear(), linear().requires_grad_(False), follow

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
                self.follow(old, new)
            guided = self.teacher(x)
        return self.network(x) * guided


class Remembering(nn.Module):
    """Buffers that become what another one, a parameter or a constant is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        for name, value in {
            "first": torch.ones(2),
            "second": torch.full((2,), 0.5),
            "before": torch.zeros(2, 3),
        }.items():
            self.register_buffer(name, value.double())
        self.register_buffer("seen", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        result = torch.where(self.seen, self.layer(x) - x @ self.before.T, self.layer(x)) * self.first
        self.first, self.second = self.second, self.first
        self.before, self.seen = self.layer.weight.detach().clone(), torch.tensor(True)
        return result


def in_place(old: Tensor, new: Tensor) -> None:
    old.mul_(0.5).add_(new, alpha=0.5)


def through_data(old: Tensor, new: Tensor) -> None:
    old.data.mul_(0.5).add_(new.data, alpha=0.5)


def assigned(old: Tensor, new: Tensor) -> None:
    old.data = old.data * 0.5 + new.data * 0.5


@pytest.mark.parametrize("make", [Clamped, lambda: Averaged(in_place), lambda: Averaged(through_data), Remembering])
def test_what_the_forward_changes_of_its_own_is_state(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    assert_same_training(make(), "mse", functional.mse_loss, sgd, data())
    eager, batches = make().float(), data(3, torch.float32)
    artifacts.generate_artifacts(eager, loss="mse", optimizer="sgd", args=batches[0], artifact_directory=tmp_path)
    state = CheckpointState.load_checkpoint(tmp_path / "checkpoint")
    module = Module(tmp_path / "training_model.onnx", state)
    optimizer = Optimizer(tmp_path / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(0.5)
    train_artifacts(module, optimizer, batches)
    train_in_pytorch(eager, functional.mse_loss, sgd(eager.parameters()), batches)
    for name, value in (*eager.named_parameters(), *eager.named_buffers()):
        np.testing.assert_allclose(state.arrays[name], value.detach(), rtol=1e-4, atol=1e-6, err_msg=name)


def test_assigning_to_data_is_refused() -> None:
    with pytest.raises(cg.UnsupportedOperatorError, match=r"\.data of teacher\.weight, teacher\.bias"):
        cg.export_training_step(Averaged(assigned), "mse", "sgd", data()[0])


class Referring(nn.Module):
    """A buffer that becomes what `assign` makes of the module."""

    def __init__(self, assign: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.norm, self.assign = linear(), nn.BatchNorm1d(2).double(), assign
        self.register_buffer("held", torch.zeros_like(assign(self)))

    def forward(self, x: Tensor) -> Tensor:
        result = self.norm(self.layer(x)) + self.held.sum()
        self.held = self.assign(self)
        return result


REFERENCES: list[tuple[Callable[[Any], Tensor], str]] = [
    (lambda module: module.layer.weight.detach(), "layer.weight"),
    (lambda module: module.layer.weight.data[0], "layer.weight"),
    (lambda module: module.norm.running_mean, "norm.running_mean"),
]


@pytest.mark.parametrize(("assign", "name"), REFERENCES, ids=["detached", "a slice", "a statistic"])
def test_buffers_that_refer_to_what_changes_are_refused(
    assign: Callable[[Any], Tensor], name: str, tmp_path: Path
) -> None:
    message = f"assigns {name}, or a view of it.* to held"
    with pytest.raises(cg.ArgumentTypeError, match=message):
        cg.export_training_step(Referring(assign), "mse", "sgd", data()[0])
    options: dict[str, Any] = {"loss": "mse", "args": data()[0], "artifact_directory": tmp_path}
    with pytest.raises(cg.ArgumentTypeError, match=message):
        artifacts.generate_artifacts(Referring(assign), **options)


def test_buffers_may_refer_to_what_stays() -> None:
    module = Referring(lambda module: module.norm.weight.detach())
    module.norm.weight.requires_grad_(False)
    assert_same_training(module, "mse", functional.mse_loss, sgd, data())


FORMS: list[tuple[Tensor, Callable[[Tensor, Tensor], Tensor], str]] = [
    (torch.zeros(()), lambda held, x: x.mean(0), r"float64 \(3\) to held, which is torch.float64 \(\)"),
    (torch.zeros(1), lambda held, x: torch.cat([held, x.mean().reshape(1)]), r"float64 \(2\) to held.* \(1\)"),
    (torch.tensor(0), lambda held, x: held + 1.0, r"float32 \(\) to held, which is torch.int64 \(\)"),
    (torch.zeros(4, 3), lambda held, x: x.clone(), r"float64 \(a dynamic size, 3\) to held, which is .* \(4, 3\)"),
]


@pytest.mark.parametrize(("held", "assign", "message"), FORMS, ids=["shape", "growing", "dtype", "batch"])
def test_buffers_that_change_their_form_are_refused(
    held: Tensor, assign: Callable[[Tensor, Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()
            self.register_buffer("held", held.double() if held.is_floating_point() else held)

        def forward(self, x: Tensor) -> Tensor:
            self.held = assign(self.held, x.detach())
            return self.layer(x)

    with pytest.raises(cg.ArgumentTypeError, match=message):
        cg.export_training_step(
            Changing(), "mse", "sgd", data()[0], dynamic_shapes=({0: "batch"}, {0: "batch"}), verify=False
        )
    with pytest.raises(cg.ArgumentTypeError, match=message):
        artifacts.generate_artifacts(Changing(), loss="mse", args=data()[0], artifact_directory=tmp_path)


def doubled_in_place(output: Tensor, target: Tensor) -> Tensor:
    target.mul_(2)
    return functional.mse_loss(output, target)


def test_a_batch_may_be_changed_in_place() -> None:
    module, batches = nn.Sequential(nn.ReLU(inplace=True), linear()), data()
    before = copy.deepcopy(batches[0])
    report = cg.export_training_step(module, doubled_in_place, sgd(module.parameters()), batches[0])
    assert all(torch.equal(one, other) for one, other in zip(batches[0], before, strict=True))
    session = cg.TrainingSession(report.model, report.state)
    for x, y in batches:
        session.step(x, y)
    train_in_pytorch(module, doubled_in_place, sgd(module.parameters()), batches)
    for name, value in module.named_parameters():
        np.testing.assert_allclose(session.state()[name], value.detach(), rtol=1e-9, err_msg=name)


class Listed(nn.Module):
    """A module that reads its parameter through a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.weights = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[0], self.layer.bias)


def penalized(module: nn.Module) -> Any:
    weight = module.weight
    return lambda output, target: functional.mse_loss(output, target) + weight.square().sum()


def hooked() -> nn.Module:
    module = linear()
    module.weight.register_hook(lambda gradient, weight=module.weight: gradient + weight)
    return module


def test_parameters_read_by_references_of_ones_own_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[nn.Module, Any, str]] = [
        (module := linear(), penalized(module), "reads weight by"),
        (hooked(), "mse", "reads weight by"),
        (Listed(), "mse", r"reads layer\.weight by"),
    ]
    for module, loss, message in cases:
        with pytest.raises(cg.ArgumentTypeError, match=message):
            cg.export_training_step(module, loss, "sgd", data()[0])
        with pytest.raises(cg.ArgumentTypeError, match=message):
            artifacts.generate_artifacts(module, loss=loss, args=data()[0], artifact_directory=tmp_path)


def test_parameters_read_from_the_module_and_copies_are_right() -> None:
    module = linear()
    start = [parameter.detach().clone() for parameter in module.parameters()]

    def of(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            moved = sum((p - s).square().sum() for p, s in zip(network.parameters(), start, strict=True))
            return functional.mse_loss(output, target) + moved

        return loss

    report = cg.export_training_step(module, of(module), sgd(module.parameters()), data()[0])
    session = cg.TrainingSession(report.model, report.state)
    for x, y in data():
        session.step(x, y)
    train_in_pytorch(module, of(module), sgd(module.parameters()), data())
    for name, value in module.named_parameters():
        np.testing.assert_allclose(session.state()[name], value.detach(), rtol=1e-9, err_msg=name)


def test_two_tensors_in_one_memory_are_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight.data = module[0].weight.data
    batch = (torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(cg.ArgumentTypeError, match=r"0\.weight and 1\.weight are two tensors in the same memory"):
        cg.export_training_step(module, "mse", "sgd", batch)
    with pytest.raises(cg.ArgumentTypeError, match="same memory"):
        artifacts.generate_artifacts(module, loss="mse", args=batch, artifact_directory=tmp_path)
    assert cg.export_training_step(module, "mse", "sgd", batch, frozen=["0.weight", "1.weight"]).verified
    module[1].weight = module[0].weight
    assert cg.export_training_step(module, "mse", "sgd", batch).verified


class Viewed(nn.Module):
    """A buffer that the forward changes, and another in its memory."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = linear()
        sums = torch.zeros(2, 4, dtype=torch.float64)
        self.register_buffer("sums", sums[:, :2])
        self.register_buffer("seen", view(sums))

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(x)
        with torch.no_grad():
            self.sums.add_(result.mean(0))
        return result + self.seen.sum()


@pytest.mark.parametrize(
    "view", [lambda s: s.detach(), lambda s: s[1], lambda s: s[:, 1]], ids=["all", "row", "column"]
)
def test_a_view_of_a_buffer_that_the_forward_changes_is_refused(view: Any, tmp_path: Path) -> None:
    with pytest.raises(cg.ArgumentTypeError, match=r"se.* are two tensors in the same memory"):
        cg.export_training_step(Viewed(view), "mse", "sgd", data()[0])
    with pytest.raises(cg.ArgumentTypeError, match="same memory"):
        artifacts.generate_artifacts(Viewed(view), loss="mse", args=data()[0], artifact_directory=tmp_path)


def test_parts_of_one_memory_are_tensors_of_their_own() -> None:
    assert_same_training(Viewed(lambda sums: sums[:, 2:]), "mse", functional.mse_loss, sgd, data())


def test_the_reports_state_stays_when_the_module_trains_on() -> None:
    module = linear()
    report = cg.export_training_step(module, "mse", "sgd", data()[0])
    before = report.state["weight"].clone()
    with torch.no_grad():
        module.weight.fill_(7)
    assert torch.equal(report.state["weight"], before)


@pytest.mark.parametrize("inside", [False, True])
def test_a_module_under_data_parallel_keeps_the_names_of_its_state_dict(inside: bool, tmp_path: Path) -> None:
    layers = small_network(torch.float32)
    module: nn.Module = nn.Sequential(nn.DataParallel(layers[:5]), layers[5:]) if inside else nn.DataParallel(layers)
    eager, data = copy.deepcopy(module), batches(3, torch.float32)
    shapes = {"input": {0: "batch"}, "target": {0: "batch"}}
    report = cg.export_training_step(module, "cross_entropy", "sgd", data[0], dynamic_shapes=shapes)
    assert list(report.inputs)[:2] == ["input", "target"]
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.1)
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.1)
    for x, y in data:
        optimizer.zero_grad()
        loss = functional.cross_entropy(eager(x), y)
        loss.backward()
        optimizer.step()
        assert session.step(x, y)["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert set(session.state_dict()) == set(module.state_dict())
    assert cg.export(module, (data[0][0],)).verified
    artifacts.generate_artifacts(module, loss="cross_entropy", args=data[0], artifact_directory=tmp_path)
    assert set(CheckpointState.load_checkpoint(tmp_path / "checkpoint").arrays) == set(module.state_dict())
