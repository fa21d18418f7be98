"""Training steps run in an order in which tensors live shorter: the shapes that it is found by, and the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import convgrad_export as cg
from convgrad_export.training import preparation


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GELU(), nn.Flatten(), nn.Linear(16 * 64, 10)),
    )


def batch(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 16, 16, generator=generator), torch.randint(0, 10, (size,), generator=generator)


def exported(folder: Path, dynamic: bool) -> Path:
    module = network()
    sizes = ({0: "batch"}, {0: "batch"}) if dynamic else None
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    path = folder / "step.onnx"
    cg.export_training_step(module, nn.CrossEntropyLoss(), optimizer, batch(8, 0), path, dynamic_shapes=sizes)
    return path


@pytest.mark.parametrize("dynamic", [False, True], ids=["batch of 8", "any batch"])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_order_changes_no_bit(dynamic: bool, in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = exported(tmp_path, dynamic)
    ordered = cg.TrainingSession(path, in_place=in_place, threads=1)
    monkeypatch.setattr(preparation, "declared_bytes", lambda graph: {})
    plain = cg.TrainingSession(path, in_place=in_place, threads=1)
    used = [session._phases[0]._session.get_session_options().execution_order for session in (ordered, plain)]
    assert used == [ort.ExecutionOrder.PRIORITY_BASED, ort.ExecutionOrder.DEFAULT]
    for seed in range(3):
        x, y = batch(5 if dynamic else 8, seed)
        assert ordered.step(x.numpy(), y.numpy()) == plain.step(x.numpy(), y.numpy())
    expected = plain.state()
    for name, value in ordered.state().items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("dynamic", [False, True], ids=["batch of 8", "any batch"])
def test_inner_tensors_have_shapes_and_sizes_no_names_that_nobody_gave(dynamic: bool, tmp_path: Path):
    graph = onnx.load(exported(tmp_path, dynamic), load_external_data=False).graph
    types = {value.name: value.type.tensor_type for value in [*graph.value_info, *graph.output]}
    made = [name for node in graph.node for name in node.output if name]
    unknown = [name for name in made if name not in types or not types[name].HasField("shape")]
    assert len(unknown) <= (0.1 if dynamic else 0) * len(made)
    given = {dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim} - {""}
    assert given == ({"batch"} if dynamic else set())
    named = {dim.dim_param for kind in types.values() for dim in kind.shape.dim} - {""}
    assert {name for name in named if name.startswith("unk")} == set()
