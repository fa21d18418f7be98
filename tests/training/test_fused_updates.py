"""Updates within the backward: the bits of a step in one, and no state that is written too early or for nothing."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import convgrad_export as cg
from convgrad_export.runtime import ordered_session
from convgrad_export.runtime.graph_nodes import VIEWS, reads
from convgrad_export.tensor_names import UPDATED
from convgrad_export.training import fused_updates, opening, preparation
from convgrad_export.training.chunks import chunk_updates
from convgrad_export.training.fused_updates import AS_CHUNKS, BEGAN, FusedUpdates
from convgrad_export.training.fused_writer import write_updates

from .parity import batches
from .test_phases import OPTIMIZERS, assert_same_bits, exported, through_a_checkpoint, trained

# What depends on all gradients or on the whole of one, or is held twice; the last has no rate that tells it from them.
NOT_FUSED = ("clipped", "normalized", "accumulated", "fixed rate")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, FusedUpdates]]:
    """Parameters of a few elements are updated within the backward; the graphs that are written."""
    graphs: list[tuple[Any, FusedUpdates]] = []

    def write(graph: Any, fused: FusedUpdates) -> None:
        write_updates(graph, fused)
        graphs.append((graph, fused))

    monkeypatch.setattr(preparation, "_LARGEST_JOINED", 48)
    monkeypatch.setattr(fused_updates, "chunk_updates", lambda model: chunk_updates(model, large=8, chunk=4))
    monkeypatch.setattr(opening, "write_updates", write)
    return graphs


class Reread(nn.Module):
    """Parameters that are read several times, through views, and by the gradients of what comes before them.

    The gradients of two of them are sums, which the second phase adds up.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.twice = nn.Parameter(torch.randn(4, 4))
        self.last = nn.Linear(4 * 64, 5)
        self.scale = nn.Parameter(torch.randn(5, 256))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).movedim(1, -1) @ self.twice
        h = (torch.tanh(h @ self.twice.T) @ self.twice.reshape(2, 8).reshape(4, 4)).movedim(-1, 1).flatten(1)
        return self.last(h) + torch.tanh(h @ self.scale.T) * self.scale.square().mean()


def reread(optimizer: str) -> cg.TrainingStepReport:
    choice, _ = OPTIMIZERS[optimizer]
    return cg.export_training_step(Reread(), "cross_entropy", choice, batches(1, torch.float32)[0])


def in_two_phases(report: cg.TrainingStepReport) -> cg.TrainingSession:
    """Trained without updates in the first phase, whose nodes onnxruntime optimizes otherwise in a step in one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "prepare", functools.partial(opening.prepare, fuse=False))
        return trained(report, True)


def assert_same_training(first: cg.TrainingSession, second: cg.TrainingSession) -> None:
    assert first.losses == second.losses  # type: ignore[attr-defined]
    other = second.state()
    for name, value in first.state().items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_of_a_step_in_one(name: str, dtype: torch.dtype, written: list[tuple[Any, FusedUpdates]]) -> None:
    optimizer, options = OPTIMIZERS[name]
    report = exported(optimizer, dtype, **options)
    fused = trained(report, True, dtype)
    assert_same_bits(trained(report, False, dtype), fused, name == "clipped")
    assert len(written) == (name not in NOT_FUSED)
    for graph, updates in written:
        assert len(updates.updates) > 1  # joined as far as their gradients come together
        held = {part for parts in updates.holds.values() for part in parts}
        assert {"0.weight", "3.weight", "5.weight", "7.weight"} <= held
        outputs = {value.name for value in graph.output}
        assert not outputs.intersection(part for update in updates.updates for part in update.parts)


def closure(graph: Any) -> tuple[list[Any], list[set[int]]]:
    """The nodes, and of each the numbers of all that it depends on."""
    nodes = list(graph.node)
    producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    before: list[set[int]] = []
    for node in nodes:
        direct = {producer[name] for name in reads(node) if name in producer}
        before.append(direct.union(*(before[j] for j in direct)))
    return nodes, before


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov", "sgd"])
@pytest.mark.parametrize("export", [reread, lambda name: exported(OPTIMIZERS[name][0])], ids=["reread", "network"])
def test_state_is_written_after_all_that_read_it_in_any_order(
    optimizer: str, export: Callable[[str], Any], written: list[tuple[Any, FusedUpdates]]
) -> None:
    report = export(optimizer)
    fused = trained(report, True)
    assert_same_training(in_two_phases(report), fused)
    ((graph, updates),) = written
    nodes, before = closure(graph)
    (gate,) = (i for i, node in enumerate(nodes) if "convgrad.gate" in node.output)
    readers = 0
    for update in updates.updates:
        (writer,) = (i for i, node in enumerate(nodes) if list(node.output) == list(update.scan.output))
        assert gate in before[writer]
        for state in update.state:
            assert state + AS_CHUNKS in nodes[writer].input
            names = set(updates.holds[state])
            for i, node in enumerate(nodes):
                if i != writer and names.intersection(reads(node)):
                    readers += 1
                    assert i in before[writer], (state, node.name)
                    if node.op_type in VIEWS:
                        names.update(node.output)
    assert readers >= 4
    began = {i for i, node in enumerate(nodes) if BEGAN in node.output}
    assert sum(began <= before[i] for i, node in enumerate(nodes) if node.op_type == "Scan") == len(updates.updates) - 1


def test_the_bits_are_the_same_when_nodes_run_side_by_side(
    written: list[tuple[Any, FusedUpdates]], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = reread("adamw")
    apart = in_two_phases(report)
    opened: list[Any] = []
    plain = ordered_session.open_session

    def parallel(source: Any, options: Any, *rest: Any) -> Any:
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
        options.execution_order = onnxruntime.ExecutionOrder.DEFAULT
        options.inter_op_num_threads = 4
        opened.append(options)
        return plain(source, options, *rest)

    monkeypatch.setattr(ordered_session, "open_session", parallel)
    for _ in range(5):
        assert_same_training(apart, trained(report, True))
    assert len(written) == 5
    assert opened


def test_a_loss_that_is_not_finite_writes_nothing(
    written: list[tuple[Any, FusedUpdates]], capfd: pytest.CaptureFixture[str]
) -> None:
    report = exported("adam")
    session = cg.TrainingSession(report.model, report.state)
    whole = cg.TrainingSession(report.model, report.state, in_place=False)
    x, y = (tensor.numpy() for tensor in batches(1, torch.float32)[0])
    assert session.step(x, y) == whole.step(x, y)
    before = session.state()
    for bad in ("nan", "inf"):
        with pytest.raises(cg.NonFiniteLossError, match=r"the loss is nan at step 2: the update was not taken over"):
            session.step(x * np.float32(bad), y)
    with pytest.raises(cg.ArgumentTypeError, match=r"within step 2(.|\n)*label"):
        session.step(x, np.full_like(y, 77))
    for name, value in session.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert session.step(x, y) == whole.step(x, y)
    session.stop_on_non_finite = whole.stop_on_non_finite = False
    assert np.isnan(session.step(x * np.float32("nan"), y)["loss"])
    whole.step(x * np.float32("nan"), y)
    for name, value in session.state().items():
        np.testing.assert_array_equal(value, whole.state()[name], err_msg=name)
    assert np.isnan(session.state()["0.weight"]).all()
    assert len(written) == 1
    assert capfd.readouterr().err == ""  # onnxruntime tells what stopped it through the error alone


def test_a_run_that_breaks_off_after_an_update_is_never_taken_for_a_state(
    written: list[tuple[Any, FusedUpdates]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = exported("adam", path=tmp_path / "step.onnx")

    def write(graph: Any, fused: FusedUpdates) -> None:
        """Stop once updates have begun, if the images say so."""
        write_updates(graph, fused)
        graph.initializer.extend([helper.make_tensor("far", 1, [], [1e3]), helper.make_tensor("none", 7, [1], [0])])
        graph.node.extend(
            [
                helper.make_node("ReduceMax", [graph.input[0].name], ["largest"], keepdims=0),
                helper.make_node("Greater", ["largest", "far"], ["is_far"]),
                helper.make_node("Cast", ["is_far"], ["far_number"], to=7),
                helper.make_node("Add", ["far_number", BEGAN], ["index"]),
                helper.make_node("Gather", ["none", "index"], ["stopped"]),
            ]
        )
        graph.output.append(helper.make_tensor_value_info("stopped", 7, [1]))

    monkeypatch.setattr(opening, "write_updates", write)
    session = cg.TrainingSession(report.path)
    x, y = (tensor.numpy() for tensor in batches(1, torch.float32)[0])
    session.step(x, y)
    session.save(tmp_path / "good.safetensors")
    expected = session.step(x, y)["loss"]
    with pytest.raises(cg.ProviderError, match=r"step 3 broke off: .*Gather.*load a checkpoint"):
        session.step(x + np.float32(2e3), y)
    for use in (lambda: session.step(x, y), session.state, lambda: session.save(tmp_path / "bad.safetensors")):
        with pytest.raises(cg.ProviderError, match="load a checkpoint"):
            use()
    assert not (tmp_path / "bad.safetensors").exists()
    session.load(tmp_path / "good.safetensors")
    assert session.step(x, y)["loss"] == expected


@pytest.mark.parametrize("phase", [0, 1])
def test_an_interrupt_comes_after_the_step(phase: int, written: list[tuple[Any, FusedUpdates]], tmp_path: Path) -> None:
    report = exported(OPTIMIZERS["adamw"][0], path=tmp_path / "step.onnx")
    session, other = cg.TrainingSession(report.path), cg.TrainingSession(report.path)
    batch = batches(1, torch.float32)[0]
    running = session._phases[phase].run

    def interrupted(*arguments: Any) -> Any:
        made = running(*arguments)
        signal.raise_signal(signal.SIGINT)
        return made

    session._phases[phase].run = interrupted  # type: ignore[method-assign]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            session.step(*batch)
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    session._phases[phase].run = running  # type: ignore[method-assign]
    assert after is signal.default_int_handler
    other.step(*batch)
    assert session.steps == 1
    session.save(tmp_path / "interrupted.safetensors")
    for name, value in session.state().items():
        np.testing.assert_array_equal(value, other.state()[name], err_msg=name)
    assert session.step(*batch) == other.step(*batch)
    with ThreadPoolExecutor(1) as pool:  # where signals cannot be held back, and none arrive
        assert pool.submit(session.step, *batch).result() == other.step(*batch)
    assert len(written) == 2


def test_without_a_place_for_the_optimized_model_two_phases_run(
    written: list[tuple[Any, FusedUpdates]], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = exported(OPTIMIZERS["adamw"][0])
    fused = trained(report, True)
    monkeypatch.setattr(ordered_session, "_optimized", lambda *_: None)
    apart = trained(report, True)
    assert_same_training(fused, apart)
    assert len(written) == 1
    assert [BEGAN in session._phases[0].outputs for session in (fused, apart)] == [True, False]


def test_a_state_is_loaded_and_saved_as_it_is(written: list[tuple[Any, FusedUpdates]], tmp_path: Path) -> None:
    report = exported(OPTIMIZERS["adamw"][0], path=tmp_path / "step.onnx")
    session, whole = cg.TrainingSession(report.path), cg.TrainingSession(report.path, in_place=False)
    assert session.batch_names == whole.batch_names
    assert list(session.state()) == list(whole.state())
    assert list(session.state_dict()) == list(whole.state_dict())
    for current in (session, whole):
        assert set(through_a_checkpoint(current, tmp_path / f"{current is session}.safetensors")) == {"loss"}
    for name, value in whole.state().items():
        np.testing.assert_array_equal(session.state()[name], value, err_msg=name)
    assert len(written) == 1


def test_large_parameters_are_updated_within_the_backward_unasked() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8192), nn.Tanh(), nn.Linear(8192, 5))
    report = cg.export_training_step(module, "cross_entropy", "adamw", batches(1, torch.float32)[0])
    session = cg.TrainingSession(report.model, report.state)
    assert BEGAN in session._phases[0].outputs
    sizes = {name: value.shape for name, value in session._phases[0].outputs.items() if UPDATED not in name}
    assert [8192, 64] not in sizes.values()  # the other layer has too few elements
    assert_same_training(in_two_phases(report), trained(report, True))
