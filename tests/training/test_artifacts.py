"""onnxruntime-training's interface: artifacts, CheckpointState, Module, Optimizer."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.training import artifacts
from convgrad_export.training.api import CheckpointState, LinearLRScheduler, Module, Optimizer

from .parity import Named, batches, small_network, train_artifacts, train_in_pytorch


def network() -> nn.Module:
    return small_network(torch.float32)


def write(folder: Path, model: nn.Module | None = None, **options) -> None:
    options = {"loss": artifacts.LossType.CrossEntropyLoss, "optimizer": artifacts.OptimType.AdamW, **options}
    if not isinstance(model, (onnx.ModelProto, str, Path)):
        options.setdefault("args", batches(1, torch.float32)[0])
    artifacts.generate_artifacts(model or network(), artifact_directory=folder, **options)


def load(folder: Path) -> tuple[CheckpointState, Module, Optimizer]:
    state = CheckpointState.load_checkpoint(folder / "checkpoint")
    module = Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
    return state, module, Optimizer(folder / "optimizer_model.onnx", module)


def assert_same_parameters(state: CheckpointState, module: nn.Module, rtol: float = 1e-4) -> None:
    for name, value in module.state_dict().items():
        np.testing.assert_allclose(state.arrays[name], value.numpy(), rtol=rtol, atol=1e-5, err_msg=name)


def test_a_script_trains_as_pytorch_does(tmp_path: Path) -> None:
    write(tmp_path)
    state, module, optimizer = load(tmp_path)
    optimizer.set_learning_rate(0.01)
    eager = network()
    reference = torch.optim.AdamW(eager.parameters(), lr=0.01)
    for x, y in batches(5, torch.float32):
        module.train()
        loss, output = module(x.numpy(), y.numpy())
        optimizer.step()
        module.lazy_reset_grad()
        expected = functional.cross_entropy(eager(x), y)
        reference.zero_grad()
        expected.backward()
        reference.step()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        assert output.shape == (6, 5)
    assert_same_parameters(state, eager, rtol=1e-3)
    x, y = batches(1, torch.float32)[0]
    loss, scores = module.eval()(x.numpy(), y.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(scores, eager.eval()(x).numpy(), rtol=1e-3, atol=1e-4)


def test_parameters_without_a_gradient_stay(tmp_path: Path) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = network(), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Partly()
    eager = copy.deepcopy(model)
    write(tmp_path, model)
    state, module, optimizer = load(tmp_path)
    optimizer.set_learning_rate(0.1)
    data = batches(2, torch.float32)
    train_artifacts(module, optimizer, data)
    train_in_pytorch(eager, functional.cross_entropy, torch.optim.AdamW(eager.parameters(), lr=0.1), data)
    assert_same_parameters(state, eager, rtol=1e-3)
    np.testing.assert_array_equal(state.arrays["unused.weight"], model.unused.weight.detach())
    assert state.parameters["unused.weight"].requires_grad
    assert state.parameters["unused.weight"].grad is None


def test_outputs_that_are_none_are_left_out_and_names_are_unique(tmp_path: Path) -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = network()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
            scores = self.scores(x)
            return {"hidden": None, "loss": scores.mean(), "logits": scores}

    write(tmp_path, Mapped(), loss=lambda output, target: functional.cross_entropy(output["logits"], target))
    _, module, _ = load(tmp_path)
    assert module.output_names() == ["loss", "output.loss", "logits"]
    assert module.eval().output_names() == ["loss", "output.loss", "logits"]


def test_an_optimizer_goes_on_from_the_steps_it_has_made(tmp_path: Path) -> None:
    eager, data = network(), batches(4, torch.float32)
    reference = torch.optim.AdamW(eager.parameters(), lr=0.01)
    train_in_pytorch(eager, functional.cross_entropy, reference, data[:2])
    write(tmp_path, eager, optimizer=reference)
    state, module, optimizer = load(tmp_path)
    assert int(state.arrays["step"]) == 2
    train_artifacts(module, optimizer, data[2:])
    train_in_pytorch(eager, functional.cross_entropy, reference, data[2:])
    assert_same_parameters(state, eager, rtol=1e-3)


def test_modes_stay_and_a_frozen_normalization_stays_frozen(tmp_path: Path) -> None:
    model = network()
    model[1].eval()
    modes = [part.training for part in model.modules()]
    write(tmp_path, model)
    assert [part.training for part in model.modules()] == modes
    state, module, optimizer = load(tmp_path)
    before = state.arrays["1.running_mean"].copy()
    (x, y), eager = batches(1, torch.float32)[0], copy.deepcopy(model)
    assert module(x.numpy(), y.numpy())[0] == pytest.approx(functional.cross_entropy(eager(x), y).item(), rel=1e-4)
    optimizer.step()
    np.testing.assert_array_equal(state.arrays["1.running_mean"], before)


def test_modes_stay_when_an_export_fails(tmp_path: Path) -> None:
    class Branching(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = Branching(*network())
    model.eval()
    model[1].train()
    modes = [part.training for part in model.modules()]
    with pytest.raises(cg.ConvGradError):
        write(tmp_path, model)
    assert [part.training for part in model.modules()] == modes


def test_gradients_accumulate_until_they_are_reset(tmp_path: Path) -> None:
    write(tmp_path, optimizer=artifacts.OptimType.SGD)
    state, module, optimizer = load(tmp_path)
    eager, data = network(), batches(2, torch.float32)
    for x, y in data:
        module(x.numpy(), y.numpy())
        functional.cross_entropy(eager(x), y).backward()
    name = "3.weight"
    np.testing.assert_allclose(state.parameters[name].grad, eager.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    optimizer.set_learning_rate(0.1)
    optimizer.step()
    torch.optim.SGD(eager.parameters(), lr=0.1).step()
    assert_same_parameters(state, eager)
    module.lazy_reset_grad()
    eager.zero_grad()
    x, y = data[0]
    module(x.numpy(), y.numpy())
    functional.cross_entropy(eager(x), y).backward()
    np.testing.assert_allclose(state.parameters[name].grad, eager.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("with_state", [True, False])
def test_checkpoints_keep_parameters_properties_and_the_optimizer(with_state: bool, tmp_path: Path) -> None:
    write(tmp_path)
    state, module, optimizer = load(tmp_path)
    x, y = (value.numpy() for value in batches(1, torch.float32)[0])
    module(x, y)
    optimizer.step()
    state.properties |= {"epoch": 3, "best": 0.5, "run": "first: try"}
    CheckpointState.save_checkpoint(state, tmp_path / "checkpoint", include_optimizer_state=with_state)
    again, module2, optimizer2 = load(tmp_path)
    assert again.properties == {"epoch": 3, "best": 0.5, "run": "first: try"}
    assert bool(again.arrays["3.weight.exp_avg"].any()) == with_state
    for name in state.parameter_names:
        np.testing.assert_array_equal(again.arrays[name], state.arrays[name])
    for m, o in ((module, optimizer), (module2, optimizer2)):
        m.lazy_reset_grad()
        m(x, y)
        o.step()
    assert np.array_equal(again.arrays["3.weight"], state.arrays["3.weight"]) == with_state


@pytest.mark.parametrize("with_state", [True, False])
def test_dropout_goes_on_where_a_checkpoint_left_it(with_state: bool, tmp_path: Path) -> None:
    write(tmp_path, nn.Sequential(network(), nn.Dropout(0.5)))
    state, module, _ = load(tmp_path)
    x, y = (value.numpy() for value in batches(1, torch.float32)[0])
    outputs = [module(x, y)[1] for _ in range(2)]
    CheckpointState.save_checkpoint(state, tmp_path / "checkpoint", with_state)
    outputs.append(module(x, y)[1])
    _, again, _ = load(tmp_path)
    dropped = [output == 0 for output in (*outputs, again(x, y)[1])]
    assert not np.array_equal(dropped[0], dropped[2])
    np.testing.assert_array_equal(dropped[3], dropped[2] if with_state else dropped[0])


def test_a_damaged_number_of_calls_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    state, _, _ = load(tmp_path)
    for header, message in (
        ({"calls": "many"}, "'many'"),
        ({"learning_rate": "fast"}, "'fast'"),
        ({"property.epoch": "int:last"}, "'last'"),
        ({"trained": "nothing"}, "lacks nothing"),
        ({"parameters": "nothing"}, "lacks nothing"),
    ):
        with pytest.raises(cg.ModelFileError, match=message):
            CheckpointState(state.arrays, {**state._header, **header})


def test_numbers_of_numpys_stay_numbers(tmp_path: Path) -> None:
    write(tmp_path)
    state, _, _ = load(tmp_path)
    state.properties |= {"mean": np.mean([0.5, 1.0]), "single": np.float32(0.5), "count": np.int64(3)}
    CheckpointState.save_checkpoint(state, tmp_path / "checkpoint")
    again = CheckpointState.load_checkpoint(tmp_path / "checkpoint").properties
    assert again == {"mean": 0.75, "single": 0.5, "count": 3}
    assert {type(value) for value in again.values()} == {float, int}


def test_parameters_and_properties_are_read_as_pairs(tmp_path: Path) -> None:
    write(tmp_path)
    state, _, _ = load(tmp_path)
    assert list(dict(state.parameters)) == [name for name, _ in state.parameters] == state.parameter_names
    assert "7.bias" in state.parameters
    assert "nothing" not in state.parameters
    state.parameters["7.bias"] = np.ones(5, np.float32)
    assert state.arrays["7.bias"].sum() == 5
    with pytest.raises(KeyError, match="nothing"):
        state.parameters["nothing"] = np.ones(5, np.float32)
    with pytest.raises(cg.GeometryError, match="assigned"):
        state.parameters["7.bias"] = np.ones(6, np.float32)
    state.properties["epoch"] = 3
    assert list(state.properties) == [("epoch", 3)]
    assert dict(state.properties) == {"epoch": 3}


def test_batches_may_be_ort_values(tmp_path: Path) -> None:
    write(tmp_path)
    _, module, _ = load(tmp_path)
    arrays = [value.numpy() for value in batches(1, torch.float32)[0]]
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]
    expected = module.eval()(*arrays)
    for result, array in zip(module(*values), expected, strict=True):
        assert isinstance(result, onnxruntime.OrtValue)
        np.testing.assert_array_equal(result.numpy(), array)
    for result, array in zip(module(values[0], arrays[1]), expected, strict=True):
        np.testing.assert_array_equal(result, array, strict=True)


def test_arrays_outlive_the_ort_values_that_they_were_read_from(tmp_path: Path) -> None:
    write(tmp_path)
    state, module, _ = load(tmp_path)
    batch = [onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()) for value in batches(1, torch.float32)[0]]
    expected = np.concatenate([state.arrays[name].ravel() for name in state.parameter_names])
    results = [value.numpy().copy() for value in module.eval()(*batch)]
    vectors = [module.get_contiguous_parameters().numpy() for _ in range(20)]
    outputs = [[value.numpy() for value in module(*batch)] for _ in range(20)]
    for vector in vectors:
        np.testing.assert_array_equal(vector, expected)
    for output in outputs:
        for value, result in zip(output, results, strict=True):
            np.testing.assert_array_equal(value, result)


def test_session_options_are_for_all_sessions(tmp_path: Path) -> None:
    write(tmp_path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 3
    state = CheckpointState.load_checkpoint(tmp_path / "checkpoint")
    module = Module(tmp_path / "training_model.onnx", state, tmp_path / "eval_model.onnx", "cpu:0", options)
    optimizer = Optimizer(tmp_path / "optimizer_model.onnx", module)
    for session in (module._train, module._eval, optimizer._session):
        assert session is not None
        assert session.inference_session.get_session_options().intra_op_num_threads == 3
    with pytest.raises(cg.ProviderError, match="tpu"):
        Module(tmp_path / "training_model.onnx", state, device="tpu")


def test_parameters_of_two_types_are_updated(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = network(), nn.Linear(5, 5).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).double())

    eager, data = Mixed(), batches(2, torch.float32)
    write(tmp_path, eager, optimizer=artifacts.OptimType.SGD)
    state, module, optimizer = load(tmp_path)
    optimizer.set_learning_rate(0.1)
    train_artifacts(module, optimizer, data)
    train_in_pytorch(eager, functional.cross_entropy, torch.optim.SGD(eager.parameters(), lr=0.1), data)
    assert_same_parameters(state, eager)


def test_parameters_move_as_one_vector(tmp_path: Path) -> None:
    write(tmp_path, frozen_params=["0.weight"])
    state, module, _ = load(tmp_path)
    count = sum(p.numel() for p in network().parameters())
    assert module.get_parameters_size(False) == count
    assert module.get_parameters_size() == count - 36
    vector = module.get_contiguous_parameters(trainable_only=True)
    assert vector.shape() == [count - 36]
    module.copy_buffer_to_parameters(vector.numpy() * 2)
    np.testing.assert_array_equal(state.arrays["7.bias"], 2 * network()[7].bias.detach().numpy())
    np.testing.assert_array_equal(state.arrays["0.weight"], network()[0].weight.detach().numpy())
    with pytest.raises(cg.GeometryError, match="elements"):
        module.copy_buffer_to_parameters(np.zeros(3, np.float32))
    assert not state.parameters["0.weight"].requires_grad
    assert {name for name, _ in state.parameters} == {name for name, _ in network().named_parameters()}
    state.parameters["7.bias"].data = np.ones(5, np.float32)
    assert state.arrays["7.bias"].sum() == 5
    with pytest.raises(cg.GeometryError, match="assigned"):
        state.parameters["7.bias"].data = np.ones(6, np.float32)


def test_statistics_named_among_the_frozen_parameters_are_parameters(tmp_path: Path) -> None:
    """As in onnxruntime-training: a federated server that averages all parameters averages them too."""
    torch.manual_seed(0)
    data = batches(1, torch.float32)
    statistics = ["norm.running_mean", "norm.running_var"]
    model = in_training_form(Viewed(), data[0][0], dynamic={})
    write(tmp_path, model, frozen_params=statistics, optimizer=artifacts.OptimType.SGD)
    client, server = load(tmp_path), load(tmp_path)
    train_artifacts(client[1], client[2], data)
    for name in statistics:
        assert not client[0].parameters[name].requires_grad
        assert not np.array_equal(client[0].parameters[name].data, server[0].parameters[name].data)
    assert client[1].get_parameters_size(False) == client[1].get_parameters_size() + 2 * 4
    server[1].copy_buffer_to_parameters(client[1].get_contiguous_parameters(), trainable_only=False)
    x, y = (value.numpy() for value in data[0])
    assert server[1].eval()(x, y) == client[1].eval()(x, y)


def test_the_inference_model_holds_the_trained_parameters(tmp_path: Path) -> None:
    write(tmp_path)
    state, module, optimizer = load(tmp_path)
    x, y = (value.numpy() for value in batches(1, torch.float32)[0])
    module(x, y)
    optimizer.step()
    module.export_model_for_inferencing(tmp_path / "inference.onnx", ["output"])
    session = cg.GradientSession(tmp_path / "inference.onnx")
    assert session.input_names == ("input",)
    eager = network()
    eager.load_state_dict({name: torch.from_numpy(state.arrays[name]) for name in eager.state_dict()})
    with torch.no_grad():
        expected = eager.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run({"input": x})["output"], expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(cg.ArgumentTypeError, match="logits"):
        module.export_model_for_inferencing(tmp_path / "other.onnx", ["logits"])


def test_an_onnx_forward_model_is_trained(tmp_path: Path) -> None:
    eager = nn.Sequential(*network()[:5], nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.0), nn.Linear(16, 5)).train()
    for index, layer in enumerate(eager):
        eager.add_module(str(index), layer)
    path = tmp_path / "forward.onnx"
    inference = copy.deepcopy(eager).eval()
    cg.export(inference, (torch.randn(2, 1, 8, 8),), path, dynamic_shapes=({0: "batch"},), verify=False)
    artifacts.generate_artifacts(
        str(path),
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=artifacts.OptimType.SGD,
        artifact_directory=tmp_path,
    )
    state, module, optimizer = load(tmp_path)
    assert set(state.parameter_names) == {name for name, _ in eager.named_parameters()}
    for name in ("1.running_mean", "1.running_var"):
        np.testing.assert_array_equal(state.arrays[name], eager.get_buffer(name))
    optimizer.set_learning_rate(0.1)
    reference, data = torch.optim.SGD(eager.parameters(), lr=0.1), batches(3, torch.float32)
    losses = [float(loss) for loss in train_artifacts(module, optimizer, data)]
    assert losses == pytest.approx(train_in_pytorch(eager, functional.cross_entropy, reference, data), rel=1e-4)
    for name in state.parameter_names:
        np.testing.assert_allclose(state.arrays[name], eager.get_parameter(name).detach(), rtol=1e-3, atol=1e-5)


def in_training_form(module: nn.Module, *args: torch.Tensor, dynamic: dict[int, str]) -> onnx.ModelProto:
    """As onnxruntime-training's instructions have it: the old exporter, nothing folded."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            args,
            file,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": dynamic, "output": dynamic} if dynamic else None,
            opset_version=15,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.TRAINING,
            dynamo=False,
        )
    return onnx.load_model_from_string(file.getvalue())


class Viewed(nn.Module):
    """A Linear over three dimensions, whose weight torch.onnx transposes in the graph, and sizes made of numbers.

    The channels are shuffled as in ShuffleNet: parts whose borders the graph computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.inner, self.outer = nn.Linear(9, 2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(self.norm(self.convolution(x)), 2)
        first, second = x.chunk(2, 1)
        x = torch.cat([second, first], 1).view(x.size(0), 2, x.size(1) // 2, x.size(2), -1).transpose(1, 2).flatten(1)
        return self.outer(self.inner(x.view(x.size(0), 4, -1)).view(x.size(0), -1))


@pytest.mark.parametrize("dynamic", [{}, {0: "n"}], ids=["fixed batch", "open batch"])
def test_a_script_of_onnxruntime_trainings_runs(dynamic: dict[int, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager, data = Viewed(), batches(2, torch.float32)
    model = in_training_form(copy.deepcopy(eager), data[0][0], dynamic=dynamic)
    trained = [name for name, _ in eager.named_parameters() if name != "convolution.bias"]
    others = [initializer.name for initializer in model.graph.initializer if initializer.name not in trained]
    assert "norm.running_mean" in others
    write(tmp_path, model, requires_grad=trained, frozen_params=others, optimizer=artifacts.OptimType.SGD)
    state, module, optimizer = load(tmp_path)
    assert module.input_names() == ["input", "labels"]
    assert module.output_names() == module.eval().output_names() == ["loss"]
    optimizer.set_learning_rate(0.1)
    eager.convolution.bias.requires_grad_(False)
    losses = [float(loss) for loss in train_artifacts(module.train(), optimizer, data)]
    reference = torch.optim.SGD(eager.parameters(), lr=0.1)
    assert losses == pytest.approx(train_in_pytorch(eager, functional.cross_entropy, reference, data), rel=1e-4)
    for name, value in eager.named_parameters():  # the old exporter has moved the statistics of its copy
        np.testing.assert_allclose(state.arrays[name], value.detach(), rtol=1e-3, atol=1e-5, err_msg=name)
    module.export_model_for_inferencing(tmp_path / "inference.onnx", ["output"])
    assert cg.GradientSession(tmp_path / "inference.onnx").output_names == ("output",)


def test_additional_outputs_follow_the_loss(tmp_path: Path) -> None:
    x, y = (value.numpy() for value in batches(1, torch.float32)[0])
    write(tmp_path, TwoOutputs(), loss_input_names=["logits", "labels"], additional_output_names=["logits"])
    loss, logits = load(tmp_path)[1](x, y)
    assert loss == pytest.approx(functional.cross_entropy(torch.tensor(logits), torch.tensor(y)).item(), rel=1e-5)
    with pytest.raises(cg.ArgumentTypeError, match="additional_output_names names scores, the forward's outputs are"):
        write(tmp_path, TwoOutputs(), loss_input_names=["logits", "labels"], additional_output_names=["scores"])


def test_axes_that_an_onnx_model_leaves_open_are_dynamic(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    model = in_training_form(network, torch.randn(2, 1, 9, 9), dynamic={0: "n", 2: "h", 3: "w"})
    write(tmp_path, model)
    module = load(tmp_path)[1]
    for height, width in ((9, 7), (5, 12)):
        x, y = torch.randn(3, 1, height, width), torch.randint(0, 2, (3, height - 4, width - 4))
        expected = functional.cross_entropy(network(x), y).item()
        assert module(x.numpy(), y.numpy()) == pytest.approx(expected, rel=1e-4)


def test_weights_under_the_name_of_a_method_are_trained(tmp_path: Path) -> None:
    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run = nn.Linear(64, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.run(x.flatten(1))

    eager, path = Run(), tmp_path / "forward.onnx"
    cg.export(eager, (torch.randn(2, 1, 8, 8),), path, dynamic_shapes=({0: "batch"},), verify=False)
    write(tmp_path, path, optimizer=artifacts.OptimType.SGD)
    state, module, _ = load(tmp_path)
    assert state.parameter_names == ["run_.weight", "run_.bias"]
    x, y = batches(1, torch.float32)[0]
    assert module(x, y) == pytest.approx(functional.cross_entropy(eager(x), y).item(), rel=1e-5)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = network()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.scores(x)
        return {"hidden": scores.tanh(), "logits": scores}


@pytest.mark.parametrize("as_onnx", [False, True])
def test_the_loss_takes_the_output_that_is_named(as_onnx: bool, tmp_path: Path) -> None:
    eager, ((x, y),) = TwoOutputs(), batches(1, torch.float32)
    model: Any = eager
    if as_onnx:
        model = tmp_path / "forward.onnx"
        cg.export(eager.eval(), (x,), model, dynamic_shapes=({0: "batch"},), verify=False)
        with pytest.raises(cg.ArgumentTypeError, match="outputs hidden, logits, of which loss_input_names"):
            write(tmp_path, model)
    with pytest.raises(cg.ArgumentTypeError, match="got 'scores'"):
        write(tmp_path, model, loss_input_names=["scores", "labels"])
    write(tmp_path, model, loss_input_names=["logits", "labels"], additional_output_names=["hidden", "logits"])
    _, module, _ = load(tmp_path)
    assert module.input_names() == ["x", "labels"]
    assert module.output_names() == ["loss", "hidden", "logits"]
    loss, _, logits = module(x.numpy(), y.numpy())
    assert loss == pytest.approx(functional.cross_entropy(torch.from_numpy(logits), y).item(), rel=1e-5)


def test_a_loss_without_targets_takes_the_whole_result(tmp_path: Path) -> None:
    model, ((x, _),) = TwoOutputs(), batches(1, torch.float32)
    write(tmp_path, model, loss=lambda output: output["logits"].square().mean(), args=(x,))
    loss, _, logits = load(tmp_path)[1](x.numpy())
    assert loss == pytest.approx(np.square(logits).mean(), rel=1e-5)


@pytest.mark.parametrize("model", [lambda x: x, 3])
def test_what_is_no_model_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(cg.ArgumentTypeError, match=r"model is a \w+, expected a torch.nn.Module or an ONNX"):
        write(tmp_path, model)


def test_unknown_operators_of_an_onnx_model_are_named(tmp_path: Path) -> None:
    model = cg.build_model("conv2d_input", input_shape=(1, 1, 4, 4), weight_shape=(1, 1, 3, 3), lowering="input.col2im")
    with pytest.raises(cg.UnsupportedOperatorError, match="Col2Im"):
        write(tmp_path, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ort_format": True}, "ort_format"),
        ({"requires_grad": ["nothing"]}, "nothing"),
        ({"requires_grad": ["7.bias"], "frozen_params": ["7.bias"]}, "both"),
        ({"args": None}, "args is missing"),
        ({"loss_input_names": ["a"]}, "loss_input_names"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "one element"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(cg.ConvGradError, match=message):
        write(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("step", "buffer"),
        ("learning_rate", "parameter"),
        ("loss", "parameter"),
        ("seed", "buffer"),
        ("lazy_reset_grad", "buffer"),
    ],
)
def test_names_that_the_models_use_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(cg.ArgumentTypeError, match=f"Named.*{name}.*rename"):
        write(tmp_path, Named(name, kind))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["step", "seed"])
def test_arguments_under_names_of_the_models_are_refused(name: str, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = network()

    forward = {}
    exec(f"def forward(self, x, {name}):\n    return self.scores(x) * {name}", forward)
    Scaled.forward = forward["forward"]
    x, y = batches(1, torch.float32)[0]
    with pytest.raises(cg.ArgumentTypeError, match=f"Scaled.*{name}.*rename"):
        write(tmp_path, Scaled(), args=(x, torch.ones(6, 1), y))


def test_parameters_that_the_module_freezes_cannot_be_asked_for(tmp_path: Path) -> None:
    model = network()
    model[7].bias.requires_grad_(False)
    with pytest.raises(cg.ArgumentTypeError, match=r"requires_grad names 7\.bias, which the module itself freezes"):
        write(tmp_path, model, requires_grad=["7.weight", "7.bias"])


def test_a_prefix_may_lead_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write(tmp_path, prefix="run/first_")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    names = {"training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {f"first_{name}" for name in names}


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    _, module, optimizer = load(tmp_path)
    with pytest.raises(cg.ArgumentTypeError, match="before any training call"):
        optimizer.step()
    with pytest.raises(cg.ArgumentTypeError, match="learning_rate is 1e\\+39, expected a number that float32 holds"):
        optimizer.set_learning_rate(1e39)
    with pytest.raises(cg.ArgumentTypeError, match="takes 2 inputs"):
        module(np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(cg.ArgumentTypeError, match="a label outside the classes"):
        module(np.zeros((1, 1, 8, 8), np.float32), np.array([1000]))
    assert module.input_names() == ["input", "target"]
    assert module.output_names() == ["loss", "output"]
    state = CheckpointState.load_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(cg.ArgumentTypeError, match="no eval model"):
        Module(tmp_path / "training_model.onnx", state).eval()(1, 2)
    state.properties["bad"] = [1]  # type: ignore[assignment]
    with pytest.raises(cg.ArgumentTypeError, match="bad"):
        CheckpointState.save_checkpoint(state, tmp_path / "other")


def test_the_linear_schedule_rises_and_falls_with_the_optimizers_steps(tmp_path: Path) -> None:
    write(tmp_path)
    state, module, optimizer = load(tmp_path)
    module(*(value.numpy() for value in batches(1, torch.float32)[0]))
    scheduler = LinearLRScheduler(optimizer, 2, 6, 1.0)
    rates = []
    for number in range(7):
        if number == 4:
            CheckpointState.save_checkpoint(state, tmp_path / "checkpoint", include_optimizer_state=True)
            _, module, optimizer = load(tmp_path)
            module(*(value.numpy() for value in batches(1, torch.float32)[0]))
            scheduler = LinearLRScheduler(optimizer, 2, 6, 1.0)
        rates.append(optimizer.get_learning_rate())
        scheduler.step()  # sets the same rate until the optimizer has made a step
        assert optimizer.get_learning_rate() == rates[-1]
        optimizer.step()
        scheduler.step()
    assert rates == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_interface_runs_without_torch(tmp_path: Path) -> None:
    write(tmp_path)
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from pathlib import Path
from convgrad_export.training.api import CheckpointState, Module, Optimizer
folder = Path({str(tmp_path)!r})
state = CheckpointState.load_checkpoint(folder / "checkpoint")
module = Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
optimizer = Optimizer(folder / "optimizer_model.onnx", module)
optimizer.set_learning_rate(0.01)
x, y = np.random.default_rng(0).standard_normal((6, 1, 8, 8), dtype=np.float32), np.arange(6) % 5
losses = []
for _ in range(20):
    losses.append(float(module(x, y)[0]))
    optimizer.step()
    module.lazy_reset_grad()
assert losses[-1] < losses[0], losses
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
