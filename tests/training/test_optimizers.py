"""Every optimizer and option by itself: exported steps in float64 against torch.optim."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.training import SGD, Adam, AdamW, CustomOptimizer, RMSprop

from .parity import assert_same_training, batches, short, small_network, train_in_pytorch

OPTIONS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
    (torch.optim.SGD, {"lr": 0.01, "maximize": True}),
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.Adam, {"lr": 0.01, "betas": (0.7, 0.95), "eps": 1e-5, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "momentum": 0.5, "weight_decay": 0.05}),
    (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "maximize": True}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=short)
def test_updates_follow_torch_optim(kind: type, options: dict[str, Any]) -> None:
    assert_same_training(
        small_network(), "cross_entropy", functional.cross_entropy, lambda p: kind(p, **options), batches(5)
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=1e-3)),
        ("AdamW", lambda p: torch.optim.AdamW(p, lr=1e-3)),
        (SGD(momentum=0.9), lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)),
        (Adam(), lambda p: torch.optim.Adam(p, lr=1e-3)),
        (AdamW(weight_decay=0.2), lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.2)),
        (RMSprop(centered=True), lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True)),
    ],
    ids=short,
)
def test_own_classes_and_names_are_the_same_optimizers(ours: Any, theirs: Any) -> None:
    assert_same_training(small_network(), "cross_entropy", functional.cross_entropy, theirs, batches(3), optimizer=ours)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
        (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.AdamW, {"lr": 0.01}),
        (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    ],
    ids=short,
)
def test_an_optimizer_goes_on_from_the_steps_it_has_made(kind: type, options: dict[str, Any]) -> None:
    module, data = small_network(), batches(5)
    optimizer = kind(module.parameters(), **options)
    train_in_pytorch(module, functional.cross_entropy, optimizer, data[:3])
    report = cg.export_training_step(module, "cross_entropy", optimizer, data[0])
    session = cg.TrainingSession(report.model, report.state)
    for x, y in data[3:]:
        session.step(x, y)
    train_in_pytorch(module, functional.cross_entropy, optimizer, data[3:])
    for name, value in module.named_parameters():
        np.testing.assert_allclose(session.state()[name], value.detach(), rtol=1e-9, atol=1e-9, err_msg=name)
    assert any("state was taken over" in note for note in report.notes)
    if "Adam" in kind.__name__:
        assert session.steps == 5


class Branched(nn.Module):
    """Two heads, of which one is used at a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.use_second = nn.Linear(64, 5), nn.Linear(64, 5), False
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return (self.second if self.use_second else self.first)(x.flatten(1))


def test_parameters_at_different_steps_are_refused_where_the_step_counts() -> None:
    module, data = Branched(), batches(2)
    optimizer = torch.optim.Adam(module.parameters())
    train_in_pytorch(module, functional.cross_entropy, optimizer, data[:1])
    assert cg.export_training_step(module, "cross_entropy", optimizer, data[0]).verified  # the other head is not read
    module.use_second = True
    with pytest.raises(cg.ArgumentTypeError, match=r"second\.weight has made 0 steps, other parameters 1"):
        cg.export_training_step(module, "cross_entropy", optimizer, data[0])
    momentum = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    train_in_pytorch(module, functional.cross_entropy, momentum, data)
    module.use_second = False
    assert cg.export_training_step(module, "cross_entropy", momentum, data[0]).verified


def test_parameter_groups_keep_their_options_and_learning_rates() -> None:
    module = small_network()

    def optimizer(_parameters: Any, of: nn.Module = module) -> torch.optim.Optimizer:
        convolutions = [p for p in of.parameters() if p.dim() == 4]
        others = [p for p in of.parameters() if p.dim() != 4]
        groups = [{"params": convolutions, "lr": 0.1, "momentum": 0.9}, {"params": others, "weight_decay": 0.02}]
        return torch.optim.SGD(groups, lr=0.05)

    eager = copy.deepcopy(module)
    data = batches(4)
    report = cg.export_training_step(module, "cross_entropy", optimizer(None), data[0])
    session = cg.TrainingSession(report.model, report.state)
    theirs = optimizer(None, eager)
    for x, y in data:
        session.step(x.numpy(), y.numpy())
        theirs.zero_grad()
        functional.cross_entropy(eager(x), y).backward()
        theirs.step()
    for name, value in eager.named_parameters():
        torch.testing.assert_close(torch.from_numpy(session.state()[name]), value.detach(), rtol=1e-9, atol=1e-9)


def test_a_warm_up_from_zero_keeps_the_groups_ratio() -> None:
    module = small_network()

    def scheduled(of: nn.Module) -> Any:
        first, *others = of.parameters()
        optimizer = torch.optim.SGD([{"params": [first]}, {"params": others, "lr": 0.01}], lr=0.1)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)

    eager, data = copy.deepcopy(module), batches(4)
    report = cg.export_training_step(module, "cross_entropy", scheduled(module).optimizer, data[0])
    session, schedule = cg.TrainingSession(report.model, report.state), scheduled(eager)
    for x, y in data:
        session.step(x.numpy(), y.numpy(), learning_rate=schedule.get_last_lr()[0])
        schedule.optimizer.zero_grad()
        functional.cross_entropy(eager(x), y).backward()
        schedule.optimizer.step()
        schedule.step()
    for name, value in eager.named_parameters():
        torch.testing.assert_close(torch.from_numpy(session.state()[name]), value.detach(), rtol=1e-9, atol=1e-9)


def test_a_first_group_without_a_learning_rate_is_refused() -> None:
    module = small_network()
    first, *others = module.parameters()
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": others, "lr": 0.01}], lr=0.0)
    with pytest.raises(cg.ArgumentTypeError, match="put another group first"):
        cg.export_training_step(module, "cross_entropy", optimizer, batches(1)[0])


def test_short_vectors_are_updated_together_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node for all biases and scales of a rule instead of one each; the state is that of single updates."""
    from convgrad_export.training import update

    data = batches(3)
    found = []
    for longest in (4096, 0):
        monkeypatch.setattr(update, "_SHORT", longest)
        report = cg.export_training_step(small_network(), "cross_entropy", "adam", data[0])
        session = cg.TrainingSession(report.model, report.state, threads=1)
        for x, y in data:
            session.step(x.numpy(), y.numpy())
        found.append((report.operators["Sqrt"], session.state()))
    (together, state), (single, expected) = found
    vectors = sum(p.dim() == 1 for p in small_network().parameters())
    assert together == single - (vectors - 1)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_a_custom_update_function_with_state() -> None:
    """Lion (Chen et al., arXiv:2302.06675), which torch does not have."""

    def lion(parameter, gradient, state, learning_rate, step):
        direction = torch.sign(0.9 * state["momentum"] + 0.1 * gradient)
        return parameter - learning_rate * direction, {"momentum": 0.99 * state["momentum"] + 0.01 * gradient}

    module = small_network()
    data = batches(3)
    report = cg.export_training_step(module, "cross_entropy", CustomOptimizer(lion, ("momentum",)), data[0])
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.01)
    momentum = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for x, y in data:
        session.step(x.numpy(), y.numpy())
        module.zero_grad()
        functional.cross_entropy(module(x), y).backward()
        with torch.no_grad():
            for name, p in module.named_parameters():
                new, state = lion(p, p.grad, {"momentum": momentum[name]}, 0.01, 1)
                p.copy_(new)
                momentum[name] = state["momentum"]
    for name, value in module.named_parameters():
        torch.testing.assert_close(torch.from_numpy(session.state()[name]), value.detach(), rtol=1e-8, atol=1e-8)


def test_the_learning_rate_is_a_runtime_input() -> None:
    module, data = small_network(), batches(3)
    eager = copy.deepcopy(module)
    report = cg.export_training_step(module, "cross_entropy", "sgd", data[0])
    session = cg.TrainingSession(report.model, report.state)
    for rate, (x, y) in zip((0.5, 0.0, 0.125), data, strict=True):
        session.step(x.numpy(), y.numpy(), learning_rate=rate)
        optimizer = torch.optim.SGD(eager.parameters(), lr=rate)
        optimizer.zero_grad()
        functional.cross_entropy(eager(x), y).backward()
        optimizer.step()
    for name, value in eager.named_parameters():
        torch.testing.assert_close(torch.from_numpy(session.state()[name]), value.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [0.05, 100.0])
def test_gradients_are_clipped_by_norm(norm: float) -> None:
    session = assert_same_training(
        small_network(),
        "cross_entropy",
        functional.cross_entropy,
        lambda p: torch.optim.SGD(p, lr=0.5),
        batches(4),
        before_update=lambda module: torch.nn.utils.clip_grad_norm_(module.parameters(), norm),
        max_grad_norm=norm,
    )
    assert session.step(*(value.numpy() for value in batches(1)[0]))["gradient_norm"] > 0


def test_the_clipped_norm_is_that_of_the_optimizers_parameters() -> None:
    module, (x, y) = small_network(), batches(1)[0]
    held = list(module[7].parameters())
    optimizer = torch.optim.SGD(held, lr=0.5)
    report = cg.export_training_step(module, "cross_entropy", optimizer, (x, y), max_grad_norm=0.01)
    session = cg.TrainingSession(report.model, report.state)
    norm = session.step(x, y)["gradient_norm"]
    functional.cross_entropy(module(x), y).backward()
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(held, 0.01).item(), rel=1e-9)
    optimizer.step()
    np.testing.assert_allclose(session.state()["7.weight"], module[7].weight.detach(), rtol=1e-9)


def test_gradients_are_clipped_by_value() -> None:
    assert_same_training(
        small_network(),
        "cross_entropy",
        functional.cross_entropy,
        lambda p: torch.optim.Adam(p, lr=0.01),
        batches(4),
        before_update=lambda module: torch.nn.utils.clip_grad_value_(module.parameters(), 1e-3),
        max_grad_value=1e-3,
    )


def test_gradients_accumulate_over_several_calls() -> None:
    session = assert_same_training(
        small_network(),
        "cross_entropy",
        functional.cross_entropy,
        lambda p: torch.optim.AdamW(p, lr=0.01),
        batches(6),
        gradient_accumulation=3,
    )
    assert session.steps == 2


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("lamb", "expected one of: sgd"),
        (3, "expected a name"),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), "another module"),
        (torch.optim.Adagrad(small_network().parameters()), "torch.optim.SGD"),
        (torch.optim.AdamW, "the class AdamW, expected an instance"),
        (Adam, "the class Adam, expected an instance"),
    ],
    ids=short,
)
def test_other_optimizers_are_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(cg.ConvGradError, match=message):
        cg.export_training_step(small_network(), "cross_entropy", optimizer, batches(1)[0])


def test_hooks_of_an_optimizer_are_refused() -> None:
    module = small_network()
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        handle = getattr(optimizer, register)(lambda *_: None)
        with pytest.raises(cg.ArgumentTypeError, match="optimizer has hooks"):
            cg.export_training_step(module, "cross_entropy", optimizer, batches(1)[0])
        handle.remove()
        assert cg.export_training_step(module, "cross_entropy", optimizer, batches(1)[0], verify=False).opset


def test_updates_are_compared_where_a_warm_up_starts_at_zero() -> None:
    module = small_network(torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    report = cg.export_training_step(module, "cross_entropy", optimizer, batches(1, torch.float32)[0])
    assert report.learning_rate == 0.0
    assert report.errors["7.weight.updated"].maximum > 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {"momentum": -1}),
        (SGD, {"nesterov": True}),
        (Adam, {"betas": (0.9, 1.0)}),
        (AdamW, {"eps": "small"}),
        (RMSprop, {"alpha": float("nan")}),
        (SGD, {"maximize": 1}),
    ],
)
def test_hyperparameters_out_of_range_are_refused(kind: type, options: dict[str, Any]) -> None:
    with pytest.raises(cg.ConvGradError, match=next(iter(options))):
        kind(**options)


class OfTypes(nn.Module):
    """A layer in float32, one in another type, and a factor without axes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 5), nn.Linear(5, 5).to(dtype)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x.flatten(1)) * self.scale).to(self.second.weight.dtype)).float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("norm", [0.05, 100.0, float("inf")])
def test_gradients_of_several_types_are_clipped_together(dtype: torch.dtype, norm: float) -> None:
    module, data = OfTypes(dtype), batches(3, torch.float32)
    eager = copy.deepcopy(module)
    report = cg.export_training_step(module, "cross_entropy", "sgd", data[0], max_grad_norm=norm)
    assert report.verified
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.5)
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.5)
    tolerance = 1e-5 if dtype == torch.float64 else 2e-3
    for x, y in data:
        optimizer.zero_grad()
        functional.cross_entropy(eager(x), y).backward()
        expected = torch.nn.utils.clip_grad_norm_(eager.parameters(), norm)
        optimizer.step()
        assert session.step(x, y)["gradient_norm"] == pytest.approx(expected.item(), rel=tolerance)
    for name, value in eager.named_parameters():
        got = session.state()[name]
        assert torch.from_numpy(got).dtype == value.dtype
        np.testing.assert_allclose(got, value.detach(), rtol=tolerance, atol=tolerance, err_msg=name)


def halves() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 5)).half()


def scaled_loss(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: functional.cross_entropy(output.float(), target) * factor


@pytest.mark.parametrize("factor", [1e-3, 1.0, 3000.0])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_averages_of_half_parameters_neither_vanish_nor_overflow(kind: type, factor: float) -> None:
    """torch.optim keeps them in float16, where the squares of gradients of 1e-4 are zero and those of 1e4 infinite.

    Held to PyTorch's own update of a float32 copy with the same gradients.
    """
    module, data, loss = halves(), batches(3, torch.float16), scaled_loss(factor)
    optimizer = kind(module.parameters(), lr=1e-2)
    report = cg.export_training_step(module, loss, optimizer, data[0])
    assert report.verified
    session = cg.TrainingSession(report.model, report.state)
    eager = copy.deepcopy(module).float()
    reference = kind(eager.parameters(), lr=1e-2)
    for x, y in data:
        session.step(x, y)
        reference.zero_grad()
        loss(eager(x.float()), y).backward()
        reference.step()
    for name, value in eager.named_parameters():
        got = session.state()[name]
        assert got.dtype == np.float16
        np.testing.assert_allclose(got.astype(np.float32), value.detach(), atol=6e-3, err_msg=name)


def test_updates_of_half_parameters_are_those_of_pytorchs_kernels() -> None:
    """For a learning rate that float16 does not hold, and where torch.optim's float16 averages hold the numbers."""
    for make, factor, tolerance in (
        (lambda p: torch.optim.SGD(p, lr=2.5e-8), 3e4, 1e-3),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), 1.0, 4e-3),
        (lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-4), 100.0, 4e-3),
    ):
        module, data, loss = halves(), batches(3, torch.float16), scaled_loss(factor)
        report = cg.export_training_step(module, loss, make(module.parameters()), data[0])
        session = cg.TrainingSession(report.model, report.state)
        optimizer = make(module.parameters())
        for x, y in data:
            session.step(x, y)
            optimizer.zero_grad()
            loss(module(x), y).backward()
            optimizer.step()
        for name, value in module.named_parameters():
            got, start = session.state()[name], halves().get_parameter(name).detach().numpy()
            np.testing.assert_allclose(got, value.detach(), rtol=tolerance, atol=tolerance, err_msg=name)
            assert not np.array_equal(got, start)


def test_a_scalar_parameter_keeps_its_type() -> None:
    """The number of the step is float64, which a parameter without axes would take over."""

    def decayed(parameter, gradient, state, learning_rate, step):
        return parameter - learning_rate / step.sqrt() * gradient, {}

    module = OfTypes(torch.float32)
    report = cg.export_training_step(module, "cross_entropy", CustomOptimizer(decayed), batches(1, torch.float32)[0])
    session = cg.TrainingSession(report.model, report.state)
    session.step(*batches(1, torch.float32)[0])
    assert session.state()["scale"].dtype == np.float32


@pytest.mark.parametrize("kind", [CustomOptimizer, lambda function: function])
def test_an_update_function_of_other_arguments_is_refused(kind: Callable[[Any], Any]) -> None:
    with pytest.raises(cg.ArgumentTypeError, match=r"does not take \(parameter, gradient, state.*'another'"):
        cg.export_training_step(
            OfTypes(torch.float32),
            "cross_entropy",
            kind(lambda parameter, gradient, state, rate, step, another: (parameter, {})),
            batches(1, torch.float32)[0],
        )


def test_betas_may_be_a_list() -> None:
    assert Adam(betas=[0.8, 0.9]) == Adam(betas=(0.8, 0.9))  # type: ignore[arg-type]
    assert hash(Adam(betas=[0.8, 0.9]))  # type: ignore[arg-type]
