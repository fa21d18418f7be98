"""Parameters updated together over memory that they share: the bits of one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import convgrad_export as cg
from convgrad_export.tensor_names import UPDATED
from convgrad_export.training import preparation
from convgrad_export.training.chunks import chunk_updates
from convgrad_export.training.flat_memory import FlatMemory, FlatTensor
from convgrad_export.training.flat_updates import flatten_updates
from convgrad_export.training.optimizers import SGD, AdamW
from convgrad_export.training.phases import Phases, split

from .parity import batches, small_network
from .test_phases import OPTIMIZERS, assert_same_bits, exported, through_a_checkpoint, trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_joined_updates_give_the_bits_of_single_ones(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, options = OPTIMIZERS[name]
    report = exported(optimizer, dtype, **options)
    whole = trained(report, False, dtype)
    found: list[Phases] = []

    def kept(phases: Phases, *known: Any, **options: Any) -> Phases:
        found.append(flatten_updates(phases, *known, **options))
        return found[-1]

    monkeypatch.setattr(preparation, "flatten_updates", kept)
    assert_same_bits(whole, trained(report, True, dtype), name == "clipped")
    if name == "fixed rate":  # nothing tells the update from the gradients
        assert not found
        return
    phases = found[-1]  # the one before is for updates within the backward, and these parameters are too small
    onnx.checker.check_model(phases.gradients)
    joined = [tensor for tensor in phases.flat if tensor.dtype != "int64"]  # counters
    if name in ("accumulated", "normalized"):  # each is held twice; each is looked at as a whole
        assert not joined
        return
    parts = {part for tensor in joined for part in tensor.parts}
    assert {name for name, _ in small_network().named_parameters()} <= parts
    for tensor in joined:
        assert tensor.dtype == str(dtype).removeprefix("torch.")
        assert len(tensor.parts) > 1
    monkeypatch.setattr("convgrad_export.training.opening.chunk_updates", lambda m: chunk_updates(m, large=8, chunk=16))
    assert_same_bits(whole, trained(report, True, dtype), name == "clipped")


def step_of(optimizer: Callable[[nn.Module], Any]) -> tuple[cg.TrainingStepReport, Phases]:
    """A step of a small network whose optimizer is made of its parameters, and its phases."""
    module = small_network(torch.float32)
    report = cg.export_training_step(module, "cross_entropy", optimizer(module), batches(1, torch.float32)[0])
    model = onnx_ir.to_proto(report.model)
    ready = preparation.prepare(b"", model, None, False)
    assert ready.phases is not None
    return report, ready.phases


def test_one_update_for_all_parameters() -> None:
    _, phases = step_of(lambda module: AdamW())
    assert [node.op_type for node in phases.update.graph.node].count("Sqrt") == 1
    assert len(phases.flat) == 4  # the parameters, two moments, the gradients
    assert not any(node.op_type in ("Concat", "Slice") for node in phases.update.graph.node)


def test_groups_with_other_settings_stay_apart() -> None:
    def groups(module: nn.Module) -> torch.optim.Optimizer:
        decayed = [p for p in module.parameters() if p.dim() > 1]
        others = [p for p in module.parameters() if p.dim() == 1]
        return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1, "lr": 0.01}, {"params": others}], lr=0.02)

    report, phases = step_of(groups)
    assert [node.op_type for node in phases.update.graph.node].count("Sqrt") == 2
    wholes = [set(tensor.parts) for tensor in phases.flat]
    assert any({"0.weight", "3.weight", "5.weight", "7.weight"} == parts for parts in wholes)
    assert any({"1.weight", "1.bias", "5.bias", "7.bias"} == parts for parts in wholes)
    assert_same_bits(trained(report, False), trained(report, True))


def test_parts_keep_their_place_through_loading_and_steps(tmp_path: Path) -> None:
    report = exported(AdamW(), path=tmp_path / "step.onnx")
    session, other = cg.TrainingSession(report.path), cg.TrainingSession(report.path, in_place=False)
    lowest = {name: value.data_ptr() for name, value in session._flat.whole.items()}
    for current in (session, other):
        through_a_checkpoint(current, tmp_path / f"{current is session}.safetensors")
    for name, value in other.state().items():
        np.testing.assert_array_equal(session.state()[name], value, err_msg=name)
    held = session.state()
    held["0.weight"][:] = 7.0
    assert not (session.state()["0.weight"] == 7.0).any()  # a copy
    parts = session._flat.parts
    assert all(session._current[name] is value for name, value in parts.items() if name in session._current)
    for name, value in session._flat.whole.items():
        assert value.data_ptr() == lowest[name]
        assert value.data_ptr() % 64 == 0


def test_flat_memory_is_that_of_its_parts() -> None:
    memory = FlatMemory([FlatTensor("all", "float32", (1, 20), {"a": (0, (2, 3)), "b": (16, (4,))})])
    memory.parts["a"].update_inplace(np.arange(6, dtype=np.float32).reshape(2, 3))
    memory.parts["b"].update_inplace(np.full(4, 9, np.float32))
    np.testing.assert_array_equal(memory.whole["all"].numpy(), [[*range(6), *[0] * 10, *[9] * 4]])
    assert memory.parts["b"].data_ptr() == memory.whole["all"].data_ptr() + 64


def phases_of(*lines: str, constants: dict[str, Any] | None = None) -> Phases:
    """Two parameters, `v` and `w`, with a moment each, and what the lines compute of them."""
    names = [f"{name}{moment}" for name in "vw" for moment in ("", ".m")]
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in (*names, "x", "y")}
    rate = helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, [])
    nodes = []
    for line in lines:
        output, _, call = line.partition(" = ")
        operator, _, inputs = call.rstrip(")").partition("(")
        nodes.append(helper.make_node(operator, inputs.split(), output.split()))
    outputs = [helper.make_tensor_value_info(name + UPDATED, TensorProto.FLOAT, [8]) for name in names]
    graph = helper.make_graph(nodes, "step", [*infos.values(), rate], outputs)
    graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in ("g", "h"))
    for name, value in (constants or {}).items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    model = helper.make_model(graph)
    phases = split(model, {"v", "w"}, set(names), {name: name + UPDATED for name in names})
    assert phases is not None
    return flatten_updates(phases, {"v", "w"}, {"g": (8,), "h": (8,)})


M = "w.m.updated = Add(w.m b)"
FIRST = ["g = Relu(x)", "a = Mul(g learning_rate)", "v.m.updated = Add(v.m a)", "v.updated = Sub(v v.m.updated)"]


@pytest.mark.parametrize(
    ("second", "joined"),
    [
        (["b = Mul(h learning_rate)", M, "w.updated = Sub(w w.m.updated)"], True),
        # the operands the other way round
        (["b = Mul(h learning_rate)", M, "w.updated = Sub(w.m.updated w)"], False),
        # another operator, another number
        (["b = Div(h learning_rate)", M, "w.updated = Sub(w w.m.updated)"], False),
        (["b = Mul(h half)", M, "c = Mul(w.m.updated learning_rate)", "w.updated = Sub(w c)"], False),
        # the moment and the parameter change places
        (["b = Mul(h learning_rate)", "w.updated = Add(w b)", "w.m.updated = Sub(w.m w.updated)"], False),
        # not elementwise
        (["b = Mul(h learning_rate)", M, "s = Softmax(w.m.updated)", "w.updated = Sub(w s)"], False),
    ],
)  # fmt: skip
def test_what_is_joined(second: list[str], joined: bool) -> None:
    phases = phases_of(*FIRST, "h = Sigmoid(y)", *second, constants={"half": 0.5})
    assert bool(phases.flat) == joined
    assert set(phases.carried) == (set() if joined else {"g", "h"})


def test_equal_numbers_of_other_names_and_ranks_are_one() -> None:
    first = ["c = Mul(g ein)", "a = Mul(c learning_rate)", "v.m.updated = Add(v.m a)", "v.updated = Sub(v v.m.updated)"]
    second = ["d = Mul(h one)", "b = Mul(d learning_rate)", M, "w.updated = Sub(w w.m.updated)"]
    lines = ["g = Relu(x)", "h = Sigmoid(y)", *first, *second]
    assert phases_of(*lines, constants={"one": 0.1, "ein": [0.1]}).flat
    assert not phases_of(*lines, constants={"one": 0.1, "ein": [0.2]}).flat


def test_gradients_are_written_without_a_copy() -> None:
    """The first phase gives what a gradient is a view of: onnxruntime would copy a view into memory that is given."""
    _, phases = step_of(lambda module: SGD(momentum=0.9))
    made = {name: node.op_type for node in phases.gradients.graph.node for name in node.output}
    names = {value.name for value in phases.gradients.graph.output}
    gradients = {part for tensor in phases.flat for part in tensor.parts if part in names}
    assert gradients
    assert not {made[name] for name in gradients} & {"Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten"}


def test_a_parameter_of_one_element_has_an_update_of_its_own() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), small_network(torch.float32))
    data = batches(3, torch.float32)
    report = cg.export_training_step(module, "cross_entropy", AdamW(), data[0])
    states = []
    for in_place in (False, True):
        session = cg.TrainingSession(report.model, report.state, in_place=in_place)
        for batch in data:
            session.step(*batch)
        states.append(session.state())
    assert "0.weight" not in session._flat.parts
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value, err_msg=name)


def test_half_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their updates are computed in float32: single ones over the old state, which can differ from one graph's."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 5)).half()
    x, y = batches(1, torch.float32)[0]
    report = cg.export_training_step(module, "cross_entropy", AdamW(), (x.half(), y))
    states = []
    for joined in (True, False):
        if not joined:
            monkeypatch.setattr(preparation, "flatten_updates", lambda phases, *_, **__: phases)
        session = cg.TrainingSession(report.model, report.state, learning_rate=0.01)
        assert bool(session._flat.parts) == joined
        session.step(x.half(), y)
        states.append(session.state())
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value, err_msg=name)


def test_statistics_and_counters_of_all_layers_are_updated_at_once() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU()]
        others = [nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, momentum=0.3), nn.Flatten(), nn.Linear(216, 5)]
        return nn.Sequential(*layers, *others)

    module, data = network(), batches(3, torch.float32)
    report = cg.export_training_step(module, "cross_entropy", SGD(), data[0])
    phases = preparation.prepare(b"", onnx_ir.to_proto(report.model), None, False).phases
    assert phases is not None
    joined = [set(tensor.parts) for tensor in phases.flat]
    assert {"1.num_batches_tracked", "3.num_batches_tracked", "6.num_batches_tracked", "step"} in joined
    assert {"1.running_mean", "3.running_mean"} in joined  # of one momentum
    assert {"1.running_var", "3.running_var"} in joined
    assert "6.running_mean" in phases.in_place
    assert not any("running" in name or "num_batches" in name for name in phases.carried)
    states = []
    for in_place in (False, True):
        session = cg.TrainingSession(report.model, report.state, in_place=in_place)
        for batch in data:
            session.step(*batch)
        states.append(session.state())
    assert session.steps == 3
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value, err_msg=name)
    expected = network()
    for x, _ in data[:1]:
        expected(x)
    one = cg.TrainingSession(report.model, report.state)
    one.step(*data[0])
    for name, value in one.state_dict().items():
        if "running" in name or "num_batches" in name:
            np.testing.assert_allclose(value, expected.state_dict()[name].numpy(), rtol=1e-5, atol=1e-7, err_msg=name)


def test_statistics_stay_where_something_else_reads_them() -> None:
    """A teacher follows the parameter, which is written in place; a forward reads the statistic that it has updated."""

    class Following(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 5)
            self.register_buffer("teacher", torch.zeros(5, 64))
            self.register_buffer("seen", torch.zeros(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.teacher.copy_(0.9 * self.teacher + 0.1 * self.layer.weight)
            result = self.layer(x.flatten(1))
            self.seen.copy_(0.5 * self.seen + 0.5 * result.detach().mean(0))
            return result + self.seen

    torch.manual_seed(0)
    data = batches(3, torch.float32)
    report = cg.export_training_step(Following(), "cross_entropy", SGD(), data[0])
    phases = preparation.prepare(b"", onnx_ir.to_proto(report.model), None, False).phases
    assert phases is not None
    assert "layer.weight" in phases.in_place
    assert not {"teacher", "seen"} & phases.in_place
    states = []
    for in_place in (False, True):
        session = cg.TrainingSession(report.model, report.state, in_place=in_place, learning_rate=0.1)
        for batch in data:
            session.step(*batch)
        states.append(session.state())
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value, err_msg=name)
