"""A step in two phases that updates its state in place: the same bits as in one, and no half-new state unnoticed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

import convgrad_export as cg
from convgrad_export.training import RMSprop, opening, preparation
from convgrad_export.training.chunks import chunk_updates
from convgrad_export.training.optimizers import SGD, Adam, AdamW, State
from convgrad_export.training.phases import Phases, split

from .parity import batches, small_network


def normalized(parameter: Tensor, gradient: Tensor, state: State, rate: Tensor, step: Tensor) -> tuple[Tensor, State]:
    """An update that looks at a whole tensor, so that it cannot be done chunk by chunk."""
    return parameter - rate * gradient / (gradient.square().mean().sqrt() + 1e-8), {}


def fixed_rate(parameter: Tensor, gradient: Tensor, state: State, rate: Tensor, step: Tensor) -> tuple[Tensor, State]:
    """An update that needs neither the learning rate nor a state."""
    return parameter - 0.01 * gradient, {}


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD(), {}),
    "nesterov": (SGD(momentum=0.9, nesterov=True, weight_decay=1e-3), {}),
    "dampening": (SGD(momentum=0.9, dampening=0.5), {}),
    "adam": (Adam(amsgrad=True, weight_decay=1e-2), {}),
    "adamw": (AdamW(), {}),
    "rmsprop": (RMSprop(centered=True, momentum=0.9), {}),
    "clipped": (AdamW(), {"max_grad_norm": 0.5}),
    "clamped": (Adam(maximize=True), {"max_grad_value": 0.01}),
    "accumulated": (AdamW(), {"gradient_accumulation": 2}),
    "normalized": (normalized, {}),
    "fixed rate": (fixed_rate, {}),
}
MOMENTS = {"adamw": ("", ".exp_avg", ".exp_avg_sq"), "nesterov": ("", ".momentum_buffer"), "sgd": ("",)}


def exported(optimizer: Any, dtype: torch.dtype = torch.float32, **options: Any) -> cg.TrainingStepReport:
    module = small_network(dtype)
    batch = batches(1, dtype)[0]
    return cg.export_training_step(module, "cross_entropy", optimizer, batch, **options)


def trained(report: cg.TrainingStepReport, in_place: bool, dtype: torch.dtype = torch.float32) -> cg.TrainingSession:
    result = cg.TrainingSession(report.model, report.state, in_place=in_place, learning_rate=0.05)
    result.losses = [result.step(*batch) for batch in batches(5, dtype)]  # type: ignore[attr-defined]
    return result


def through_a_checkpoint(session: cg.TrainingSession, path: Path) -> dict[str, Any]:
    """Save after a step, take another, go back and take it again; what the last returns."""
    batch = batches(1, torch.float32)[0]
    session.step(*batch)
    session.save(path)
    session.step(*batch)
    session.load(path)
    return session.step(*batch)


def assert_same_bits(first: cg.TrainingSession, second: cg.TrainingSession, clipped: bool = False) -> None:
    """All bits; clipped by the norm but for rounding, for onnxruntime moves a Transpose behind a square, or not."""
    limit = 16 * float(np.finfo(first.state()["0.weight"].dtype).eps) if clipped else 0.0
    for mine, others in zip(first.losses, second.losses, strict=True):  # type: ignore[attr-defined]
        assert mine == pytest.approx(others, rel=limit, abs=0.0)
    other = second.state()
    for name, value in first.state().items():
        np.testing.assert_allclose(value, other[name], rtol=limit, atol=limit, err_msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_phases_and_small_chunks_give_the_bits_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, options = OPTIMIZERS[name]
    report = exported(optimizer, **options)
    whole = trained(report, in_place=False)
    assert_same_bits(whole, trained(report, in_place=True), name == "clipped")
    monkeypatch.setattr(preparation, "flatten_updates", lambda phases, *_, **__: phases)  # test_flat_updates.py
    chunked: list[dict[str, tuple[int, ...]]] = []

    def small_chunks(model: Any) -> dict[str, tuple[int, ...]]:
        chunked.append(chunk_updates(model, large=8, chunk=6))
        onnx.checker.check_model(model)
        return chunked[-1]

    monkeypatch.setattr(opening, "chunk_updates", small_chunks)
    assert_same_bits(whole, trained(report, in_place=True), name == "clipped")
    if name in MOMENTS:  # the convolutions' weights, the linear layer's, and all that belongs to them
        (views,) = chunked
        assert {f"{layer}.weight{moment}" for layer in (0, 3, 5, 7) for moment in MOMENTS[name]} <= set(views)
        assert views["7.weight"] == (20, 1, 6)


def test_float64_is_taken_too() -> None:
    report = exported(AdamW(), torch.float64)
    assert_same_bits(trained(report, False, torch.float64), trained(report, True, torch.float64))


def test_parameters_moments_and_statistics_lie_where_they_lay() -> None:
    report = exported(AdamW())
    updated = cg.TrainingSession(report.model, report.state, in_place=True)
    before = {name: value.data_ptr() for name, value in updated._current.items()}
    updated.step(*batches(1, torch.float32)[0])
    moved = {name for name, value in updated._current.items() if value.data_ptr() != before[name]}
    assert moved == {"step"}  # the bias corrections are computed of the new one


def test_the_state_is_updated_in_place_unasked() -> None:
    report = exported(AdamW())
    assert cg.TrainingSession(report.model, report.state)._in_place
    assert not cg.TrainingSession(report.model, report.state, in_place=False)._in_place


def test_a_loss_that_is_not_finite_and_a_wrong_label_leave_the_state() -> None:
    report = exported("adam")
    updated = cg.TrainingSession(report.model, report.state, in_place=True)
    x, y = (tensor.numpy() for tensor in batches(1, torch.float32)[0])
    updated.step(x, y)
    before = updated.state()
    with pytest.raises(cg.NonFiniteLossError, match="at step 2"):
        updated.step(x * np.float32("nan"), y)
    with pytest.raises(cg.ArgumentTypeError, match=r"within step 2(.|\n)*label"):
        updated.step(x, np.full_like(y, 77))
    for name, value in updated.state().items():
        np.testing.assert_array_equal(value, before[name])
    updated.step(x, y)
    assert updated.steps == 2


def test_an_update_that_breaks_off_is_never_taken_for_a_state(tmp_path: Path) -> None:
    report = exported("adam", path=tmp_path / "step.onnx")
    updated = cg.TrainingSession(report.path, in_place=True)
    batch = batches(1, torch.float32)[0]
    updated.step(*batch)
    updated.save(tmp_path / "good.safetensors")
    expected = updated.step(*batch)

    def broken(*_: Any) -> None:
        raise RuntimeError("Failed to allocate memory")

    working = updated._phases[1].run
    updated._phases[1].run = broken  # type: ignore[method-assign]
    with pytest.raises(cg.ProviderError, match="step 3 broke off: Failed to allocate"):
        updated.step(*batch)
    updated._phases[1].run = working  # type: ignore[method-assign]
    for use in (lambda: updated.step(*batch), updated.state, lambda: updated.save(tmp_path / "bad.safetensors")):
        with pytest.raises(cg.ProviderError, match="load a checkpoint"):
            use()
    assert not (tmp_path / "bad.safetensors").exists()
    updated.load(tmp_path / "good.safetensors")
    assert updated.step(*batch) == expected


def test_other_providers_keep_two_sets() -> None:
    report = exported("sgd")
    with pytest.raises(cg.ArgumentTypeError, match="in_place"):
        cg.TrainingSession(report.model, report.state, providers=["AzureExecutionProvider", "cpu"], in_place=True)


def graph(*nodes: Any, inputs: str = "w m g learning_rate", outputs: str = "w_ m_") -> Any:
    infos = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in names.split()]
        for names in (inputs, outputs)
    ]
    return helper.make_model(helper.make_graph(list(nodes), "step", *infos))


def node(line: str) -> Any:
    """``output = Operator(inputs)``"""
    output, _, call = line.partition(" = ")
    operator, _, names = call.rstrip(")").partition("(")
    return helper.make_node(operator, names.split(), output.split())


def cut(*lines: str, **options: str) -> Phases | None:
    model = graph(*(node(line) for line in lines), **options)
    return split(model, {"w"}, {"w", "w.m", "m"}, {"w": "w_", "m": "m_"})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # the writer comes after every reader
        (["u = Mul(g learning_rate)", "m_ = Add(m u)", "w_ = Sub(w m_)"], {"w", "m"}),
        # the old w is read beside its writer: in either order
        (["u = Mul(g learning_rate)", "w_ = Sub(w u)", "d = Mul(w learning_rate)", "m_ = Add(m d)"], {"m"}),
        # through a view of its memory
        (
            [
                "u = Mul(g learning_rate)",
                "v = Identity(w)",
                "w_ = Sub(w u)",
                "d = Mul(v learning_rate)",
                "m_ = Add(m d)",
            ],
            {"m"},
        ),
        # the writer is no elementwise operator
        (["u = Mul(g learning_rate)", "w_ = MatMul(w u)", "m_ = Add(m u)"], {"m"}),
        # the new value may be the memory of another tensor
        (["u = Mul(g learning_rate)", "n = Sub(w u)", "w_ = Identity(n)", "m_ = Add(m n)"], {"m"}),
    ],
)
def test_what_may_be_overwritten(lines: list[str], expected: set[str]) -> None:
    phases = cut(*lines)
    assert phases is not None
    assert phases.in_place == expected


def test_an_argument_that_nothing_reads_stays_an_argument() -> None:
    class Unread(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = small_network(torch.float32)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.scores(x)

    x, y = batches(1, torch.float32)[0]
    report = cg.export_training_step(Unread(), "cross_entropy", "adam", (x, torch.ones(3), y))
    for in_place in (False, True):
        session = cg.TrainingSession(report.model, report.state, in_place=in_place)
        assert session.batch_names == ("x", "mask", "target")
        assert np.isfinite(session.step(x, torch.ones(3), y)["loss"])


def last_gradient(
    parameter: Tensor, gradient: Tensor, state: State, rate: Tensor, step: Tensor
) -> tuple[Tensor, State]:
    new = parameter - rate * gradient
    return new, {"gradient": gradient, "before": parameter}


def test_state_that_is_written_without_being_read_is_carried_on() -> None:
    """Spectral norm's left vector is computed anew from the right one; an update may keep what it was given."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(64, 5))
    )

    class Keeping:
        def initial_state(self, parameter: Tensor) -> State:
            return {"gradient": torch.zeros_like(parameter), "before": torch.zeros_like(parameter)}

        update = staticmethod(last_gradient)

    report = cg.export_training_step(module, "cross_entropy", Keeping(), batches(1, torch.float32)[0])
    updated = trained(report, in_place=True)
    assert_same_bits(trained(report, in_place=False), updated)
    changed = {name for name, value in updated.state().items() if (value != report.state[name].numpy()).any()}
    assert changed == set(report.state)


def test_the_gradient_alone_is_carried() -> None:
    phases = cut("h = Relu(g)", "s = Mul(h h)", "u = Mul(s learning_rate)", "m_ = Add(m u)", "w_ = Sub(w m_)")
    assert phases is not None
    assert phases.carried == ("h",)  # not its square, which nothing but the update reads
    assert [n.op_type for n in phases.gradients.graph.node] == ["Relu"]


@pytest.mark.parametrize(
    "lines",
    [
        ["w_ = Sub(w g)", "m_ = Add(m g)"],  # nothing depends on the rate
        ["loss = Mul(g learning_rate)", "m_ = Add(m loss)", "w_ = Sub(w m_)"],  # the loss would come too late
    ],
)
def test_steps_that_cannot_be_cut(lines: list[str]) -> None:
    assert cut(*lines) is None


def test_chunks_are_divisors() -> None:
    make = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    for shape, expected in (([7, 10], (7, 1, 10)), ([11, 13], None), ([4, 2], None)):
        model = helper.make_model(
            helper.make_graph(
                [node("w_ = Sub(w g)")],
                "update",
                [make("w", shape=shape), make("g", shape=shape)],
                [make("w_", shape=shape)],
            )
        )
        views = chunk_updates(model, large=9, chunk=10)
        assert views == ({} if expected is None else dict.fromkeys(("w", "g", "w_"), expected)), shape
