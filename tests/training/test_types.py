"""Arguments of the wrong type: one error of ours that names the argument, what came, and what is expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import convgrad_export as cg
from convgrad_export.training import SGD, Adam, CustomOptimizer, artifacts, load_checkpoint, save_checkpoint
from convgrad_export.training.api import CheckpointState, LinearLRScheduler, Module, Optimizer

from .parity import batches, small_network


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen": [1]}, r"frozen holds 1 \(int\), expected names alone, such as 'fc.weight'"),
        ({"frozen": "0"}, r"frozen is '0' \(str\), expected a sequence of names: put it into a list, \['0'\]"),
        ({"frozen": 3}, r"frozen is 3 \(int\)"),
        ({"label_smoothing": "0.1"}, r"label_smoothing is '0.1' \(str\), expected a number from 0 to 1"),
        ({"label_smoothing": None}, "label_smoothing is None"),
        ({"label_smoothing": float("nan")}, "label_smoothing is nan"),
        ({"max_grad_norm": "1"}, "max_grad_norm is '1', expected a number above 0"),
        ({"max_grad_norm": True}, "max_grad_norm is True"),
        ({"max_grad_value": [1]}, r"max_grad_value is \[1\]"),
        ({"gradient_accumulation": 2.0}, "gradient_accumulation is 2.0"),
        ({"gradient_accumulation": 10**30}, "gradient_accumulation is 10+, expected an integer from 1 to"),
        ({"return_outputs": "no"}, "return_outputs is 'no'.*True or False"),
        ({"verify": None}, "verify is None"),
        ({"overwrite": "yes"}, "overwrite is 'yes'"),
        ({"path": 3}, "path is 3"),
        ({"opset_version": "18"}, "opset_version is '18'"),
        ({"lowering": 3}, "lowering is 3"),
        ({"lowering": "fastest"}, "lowering 'fastest' is none of"),
        ({"provider": "cpu"}, "provider is 'cpu', expected an onnxruntime name like 'CPUExecutionProvider'"),
        ({"provider": None}, "provider is None"),
        ({"threads": "2"}, "threads is '2'"),
        ({"max_error_factor": "2"}, "max_error_factor is '2'"),
        ({"dynamic_shapes": "batch"}, "dynamic_shapes is 'batch'"),
    ],
    ids=str,
)
def test_of_a_step(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cg.ConvGradError, match=message):
        cg.export_training_step(
            small_network(torch.float32), "cross_entropy", "sgd", batches(1, torch.float32)[0], **options
        )


def test_numbers_of_numpys_are_numbers() -> None:
    options = {"max_grad_norm": np.float64(1.0), "max_grad_value": np.float32(0.5), "label_smoothing": np.float32(0.1)}
    report = cg.export_training_step(
        small_network(torch.float32),
        "cross_entropy",
        "sgd",
        batches(1, torch.float32)[0],
        gradient_accumulation=np.int64(2),
        **options,
    )
    assert report.verified


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requires_grad": "7.bias"}, r"requires_grad is '7.bias' \(str\)"),
        ({"requires_grad": [1]}, r"requires_grad holds 1 \(int\)"),
        ({"requires_grad": np.ones(2)}, "requires_grad is array"),
        ({"ort_format": np.ones(2)}, "ort_format is array"),
        ({"nominal_checkpoint": torch.ones(2)}, "nominal_checkpoint is tensor"),
        ({"frozen_params": 3}, r"frozen_params is 3 \(int\)"),
        ({"loss": 3}, "loss is a int"),
        ({"optimizer": 3}, "optimizer is a int"),
        ({"artifact_directory": 3}, "artifact_directory is 3"),
        ({"prefix": 3}, "prefix is 3"),
        ({"additional_output_names": "output"}, "additional_output_names is 'output'"),
        ({"loss_input_names": "output"}, "loss_input_names is 'output'"),
        ({"loss_input_names": [1, 2]}, "loss_input_names holds 1"),
        ({"args": 3}, "args is a int"),
        ({"args": {"x": 1}}, "args is a dict"),
        ({"opset_version": "18"}, "opset_version is '18'"),
        ({"opset_version": 5}, "opset_version is 5"),
        ({"overwrite": "no"}, "overwrite is 'no'"),
        ({"verify": "no"}, "verify is 'no'"),
        ({"dynamic_shapes": 3}, "dynamic_shapes is 3"),
    ],
    ids=str,
)
def test_of_artifacts(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = {"loss": "cross_entropy", "args": batches(1, torch.float32)[0], "artifact_directory": tmp_path, **options}
    with pytest.raises(cg.ConvGradError, match=message):
        artifacts.generate_artifacts(small_network(torch.float32), **options)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    artifacts.generate_artifacts(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 5)),
        loss="cross_entropy",
        optimizer="sgd",
        args=batches(1, torch.float32)[0],
        artifact_directory=folder,
    )
    return folder


CALLS: list[tuple[Callable[[Path, CheckpointState, Module, Optimizer], Any], str]] = [
    (lambda f, s, m, o: CheckpointState.load_checkpoint(3), "checkpoint_uri is 3"),
    (lambda f, s, m, o: CheckpointState.save_checkpoint(3, f / "x"), "state is a int"),
    (lambda f, s, m, o: CheckpointState.save_checkpoint(s, 3), "checkpoint_uri is 3"),
    (lambda f, s, m, o: Module(3, s), "train_model_uri is 3"),
    (lambda f, s, m, o: Module(f / "training_model.onnx", {}), "state is a dict, expected a CheckpointState"),
    (lambda f, s, m, o: Module(f / "training_model.onnx", s, 3), "eval_model_uri is 3"),
    (lambda f, s, m, o: Module(f / "training_model.onnx", s, device=3), "device is 3"),
    (lambda f, s, m, o: Module(f / "training_model.onnx", s, device=np.ones(2)), r"device is array\(\[1\., 1"),
    (lambda f, s, m, o: Module(f / "training_model.onnx", s, session_options="fast"), "session_options is a str"),
    (lambda f, s, m, o: Optimizer(3, m), "optimizer_uri is 3"),
    (lambda f, s, m, o: Optimizer(f / "optimizer_model.onnx", s), "module is a CheckpointState"),
    (lambda f, s, m, o: m(None, None), "input is object"),
    (lambda f, s, m, o: m([[1.0], [2.0, 3.0]], [1]), "input is a list that is no array"),
    (lambda f, s, m, o: m(torch.zeros(2, 64, device="meta"), [1, 2]), "input is on meta, expected cpu or cuda"),
    (lambda f, s, m, o: m(np.ma.masked_less(np.ones((2, 64)), 0), [1, 2]), "input is a masked array"),
    (lambda f, s, m, o: m.copy_buffer_to_parameters("abc"), "buffer is <U3"),
    (lambda f, s, m, o: m.copy_buffer_to_parameters(torch.zeros(325, device="meta")), "buffer is on meta"),
    (lambda f, s, m, o: m.export_model_for_inferencing(f / "i.onnx", "output"), "graph_output_names is 'output'"),
    (lambda f, s, m, o: m.export_model_for_inferencing(f / "i.onnx", []), "graph_output_names is empty"),
    (lambda f, s, m, o: m.export_model_for_inferencing(3, ["output"]), "inference_model_uri is 3"),
    (lambda f, s, m, o: o.set_learning_rate("fast"), "learning_rate is 'fast'"),
    (lambda f, s, m, o: o.set_learning_rate(float("nan")), "learning_rate is nan"),
    (lambda f, s, m, o: LinearLRScheduler(m, 1, 2, 0.1), "optimizer is a Module"),
    (lambda f, s, m, o: LinearLRScheduler(o, 1.5, 2, 0.1), "warmup_step_count is 1.5"),
    (lambda f, s, m, o: LinearLRScheduler(o, 0, -1, 0.1), "total_step_count is -1"),
    (lambda f, s, m, o: m.get_parameters_size(np.ones(2)), r"trainable_only is array\(\[1\., 1"),
    (lambda f, s, m, o: m.train("yes"), "mode is 'yes'"),
    (lambda f, s, m, o: LinearLRScheduler(o, 1, 2, "fast"), "initial_lr is 'fast'"),
    (lambda f, s, m, o: s.properties.update({3: 1}) or CheckpointState.save_checkpoint(s, f / "x"), "property 3"),
    (lambda f, s, m, o: setattr(s.parameters["1.bias"], "data", None), "1.bias is float32"),
    (lambda f, s, m, o: setattr(s.parameters["1.bias"], "data", torch.ones(5).to_sparse()), "1.bias is a torch.sparse"),
    (lambda f, s, m, o: load_checkpoint(3), "checkpoint is 3"),
    (lambda f, s, m, o: save_checkpoint(3, {}), "path is 3"),
    (lambda f, s, m, o: save_checkpoint(f / "x", 3), "state is a int"),
    (lambda f, s, m, o: save_checkpoint(f / "x", {1: np.ones(1)}), "state is a dict"),
    (lambda f, s, m, o: save_checkpoint(f / "x", {"w": torch.ones(1, device="meta")}), "w is on meta"),
    (lambda f, s, m, o: save_checkpoint(f / "x", {}, metadata={"a": 1}), "metadata holds 'a': 1"),
    (lambda f, s, m, o: save_checkpoint(f / "x", {}, metadata=3), "metadata is a int"),
    (lambda f, s, m, o: save_checkpoint(f / "x", {}, metadata={"format": "mine"}), "the entry 'format'"),
    (lambda f, s, m, o: Adam(betas=0.9), "Adam.betas is 0.9"),
    (lambda f, s, m, o: Adam(betas=("a", "b")), "Adam.betas"),
    (lambda f, s, m, o: SGD(momentum=(0.9,)), "SGD.momentum"),
    (lambda f, s, m, o: CustomOptimizer(3), "CustomOptimizer.function is 3"),
    (lambda f, s, m, o: CustomOptimizer(lambda *_: None, "momentum"), "state_names is 'momentum'"),
    (lambda f, s, m, o: CustomOptimizer(lambda *_: None, ("a.b",)), "without dots"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=range(len(CALLS)))
def test_of_what_runs_artifacts(call: Callable[..., Any], message: str, folder: Path) -> None:
    state = CheckpointState.load_checkpoint(folder / "checkpoint")
    module = Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
    with pytest.raises(cg.ConvGradError, match=message):
        call(folder, state, module, Optimizer(folder / "optimizer_model.onnx", module))


def test_tensors_with_gradients_and_lists_are_batches(folder: Path) -> None:
    state = CheckpointState.load_checkpoint(folder / "checkpoint")
    module = Module(folder / "training_model.onnx", state)
    x, y = batches(1, torch.float32)[0]
    assert module(x.requires_grad_(), y)[0] == module(x.detach().numpy(), y.tolist())[0]
    state.parameters["1.bias"].data = nn.Parameter(torch.ones(5))
    np.testing.assert_array_equal(state.arrays["1.bias"], np.ones(5, np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": 3}, "checkpoint is 3"),
        ({"stop_on_non_finite": "no"}, "stop_on_non_finite is 'no'"),
        ({"in_place": "yes"}, "in_place is 'yes'"),
        ({"blocked_layout": None}, "blocked_layout is None"),
        ({"learning_rate": True}, "learning_rate is True"),
        ({"providers": 3}, "providers is 3"),
    ],
    ids=str,
)
def test_of_a_session(options: dict[str, Any], message: str, step: Any) -> None:
    with pytest.raises(cg.ConvGradError, match=re.escape(message)):
        cg.TrainingSession(step.model, **{"checkpoint": step.state, **options})


@pytest.fixture(scope="module")
def step() -> Any:
    return cg.export_training_step(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), "cross_entropy", "sgd", batches(1, torch.float32)[0]
    )


def test_of_a_sessions_methods(step: Any) -> None:
    session = cg.TrainingSession(step.model, step.state)
    for call, message in (
        (lambda: session.state_dict("1.weight"), "names is '1.weight'"),
        (lambda: session.state_dict(3), "names is 3"),
        (lambda: session.save(3), "path is 3"),
        (lambda: session.load(3), "checkpoint is 3"),
    ):
        with pytest.raises(cg.ArgumentTypeError, match=message):
            call()
    assert set(session.state_dict({"1.weight": None})) == {"1.weight"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, g, s, lr, t: p - lr * g, "returned a tensor, expected"),
        (lambda p, g, s, lr, t: (p.sum(), s), r"returned \(\) for parameter 1.weight, expected .* \(5, 64\)"),
        (lambda p, g, s, lr, t: (p, {"momentum": g.sum()}), r"returned \(\) for momentum of 1.weight"),
        (lambda p, g, s, lr, t: (p, {"momentum": 3}), r"returned int for momentum of 1.weight"),
        (lambda p, g, s, lr, t: (p, {}), r"returned the state \[\]"),
    ],
)
def test_what_an_update_function_returns(function: Any, message: str) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(cg.ArgumentTypeError, match=message):
        cg.export_training_step(
            module, "cross_entropy", CustomOptimizer(function, ("momentum",)), batches(1, torch.float32)[0]
        )


def test_files_of_other_models_and_kinds_are_refused(folder: Path, tmp_path: Path) -> None:
    artifacts.generate_artifacts(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 5)),
        loss="cross_entropy",
        optimizer="adamw",
        args=batches(1, torch.float32)[0],
        artifact_directory=tmp_path,
    )
    training, evaluating, updating = (f"{name}_model.onnx" for name in ("training", "eval", "optimizer"))
    own, other = (CheckpointState.load_checkpoint(path / "checkpoint") for path in (folder, tmp_path))
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: Module(tmp_path / training, own), r"(?s)missing: 3\.weight, 3\.bias\n.*1\.weight: is .*\(7, 64\)"),
        (lambda: Module(folder / training, own, tmp_path / evaluating), r"missing: 3\.weight"),
        (lambda: Module(folder / training, other), r"1\.bias: is float32 \(7,\), expected float32 \(5,\)"),
        (lambda: Optimizer(tmp_path / updating, Module(folder / training, own)), r"missing: .*1\.weight\.exp_avg"),
        (lambda: Module(folder / evaluating, own), "eval_model.onnx is no training model"),
        (lambda: Module(folder / updating, own), "optimizer_model.onnx is no training model"),
        (lambda: Module(folder / training, own, folder / updating), "optimizer_model.onnx is no eval model"),
        (lambda: Optimizer(folder / training, Module(folder / training, own)), "missing: .*input"),
    ]
    for call, message in calls:
        with pytest.raises(cg.ModelFileError, match=message):
            call()
