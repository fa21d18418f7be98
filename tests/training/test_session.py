"""`TrainingSession`: state, batches of other sizes, resuming, memory, refusals."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.integrations import saving
from convgrad_export.training import load_checkpoint

from .parity import assert_same_training, batches, small_network

DYNAMIC = {"input": {0: "batch"}, "target": {0: "batch"}}


def with_dropout() -> nn.Module:
    return nn.Sequential(small_network(torch.float32)[:-1], nn.Dropout(0.5), nn.Linear(24, 5))


def arrays(count: int, size: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(x.numpy(), y.numpy()) for x, y in batches(count, torch.float32, size)]


@pytest.fixture(scope="module")
def step_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step") / "step.onnx"
    module = with_dropout()
    batch = batches(1, torch.float32)[0]
    cg.export_training_step(module, "cross_entropy", "adam", batch, path, dynamic_shapes=DYNAMIC)
    return path


def test_parameters_are_in_the_checkpoint_and_not_in_the_graph(step_file: Path) -> None:
    model = onnx.load(step_file)
    names = {name for name, _ in with_dropout().named_parameters()}
    assert names <= {value.name for value in model.graph.input}
    assert not names & {value.name for value in model.graph.initializer}
    assert {opset.domain for opset in model.opset_import} == {""}
    assert names <= set(load_checkpoint(step_file.with_suffix(".checkpoint.safetensors")))


def test_resuming_from_a_checkpoint_continues_bit_for_bit(step_file: Path, tmp_path: Path) -> None:
    data = arrays(6)
    whole = cg.TrainingSession(step_file, seed=7)
    expected = [whole.step(*batch)["loss"] for batch in data]
    first = cg.TrainingSession(step_file, seed=7)
    got = [first.step(*batch)["loss"] for batch in data[:3]]
    first.save(tmp_path / "half.safetensors")
    second = cg.TrainingSession(step_file, tmp_path / "half.safetensors", seed=7)
    assert second.steps == 3
    got += [second.step(*batch)["loss"] for batch in data[3:]]
    assert got == expected
    for name, value in whole.state().items():
        np.testing.assert_array_equal(second.state()[name], value)


def test_the_seed_decides_the_dropout(step_file: Path) -> None:
    batch = arrays(1)[0]
    losses = [cg.TrainingSession(step_file, seed=seed).step(*batch)["loss"] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    session = cg.TrainingSession(step_file, learning_rate=0.0)
    assert session.step(*batch)["loss"] != session.step(*batch)["loss"]  # the step counter takes part


def test_state_goes_back_to_pytorch(step_file: Path) -> None:
    session = cg.TrainingSession(step_file, threads=1)
    for batch in arrays(3):
        session.step(*batch)
    module = with_dropout()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in session.state_dict().items()})
    module.eval()
    report = cg.export(module, (torch.randn(6, 1, 8, 8),))
    assert report.verified
    assert set(session.state_dict()) == set(module.state_dict())


class Shared(nn.Module):
    """Tied parameters, a submodule with two names, buffers that are not saved, and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.decoder = nn.Linear(64, 8, bias=False), nn.Linear(64, 8)
        self.decoder.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(8)
        self.again = self.norm
        self.head, self.unused = nn.Linear(8, 5), nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)
        self.register_buffer("micro_step", torch.ones(1))
        self.head.register_buffer("offset", torch.ones(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embedding(x.flatten(1)) * self.scale) + self.again(self.decoder(x.flatten(1)))
        return self.head(x) + self.head.offset * self.micro_step


def test_the_state_has_the_names_of_the_modules_own(tmp_path: Path) -> None:
    module, path = Shared(), tmp_path / "step.onnx"
    cg.export_training_step(module, "cross_entropy", "adam", batches(1, torch.float32)[0], path)
    session = cg.TrainingSession(path)
    session.step(*arrays(1)[0])
    expected = module.state_dict()
    for state in (session.state_dict(), session.state_dict(expected)):
        assert set(state) == set(expected)
        other = Shared()
        other.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
        np.testing.assert_array_equal(other.decoder.weight.detach(), session.state()["embedding.weight"])
        np.testing.assert_array_equal(other.unused.weight.detach(), module.unused.weight.detach())
    session.save(tmp_path / "saved.safetensors")
    assert set(cg.TrainingSession(path, tmp_path / "saved.safetensors").state_dict()) == set(expected)
    with torch.no_grad():
        module.decoder.weight.fill_(0.25)
    session.load(module.state_dict())
    assert (session.state()["embedding.weight"] == 0.25).all()
    assert session.steps == 1
    assert set(session.state_dict(["scale", "decoder.weight"])) == {"scale", "decoder.weight"}
    assert set(session.state_dict({**module.state_dict(), "another.weight": None})) == set(expected)
    with pytest.raises(cg.ArgumentTypeError, match=r"names holds \['another.weight'\], which the state does not have"):
        session.state_dict(["another.weight", "scale"])


def test_every_batch_size_and_torch_tensors_are_taken(step_file: Path) -> None:
    session = cg.TrainingSession(step_file)
    for size in (2, 6, 17):
        x, y = batches(1, torch.float32, size)[0]
        assert np.isfinite(session.step(x, target=y)["loss"])
    assert session.steps == 3


def test_the_last_state_survives_a_failed_save(
    step_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = cg.TrainingSession(step_file)
    path = session.save(tmp_path / "state.safetensors")
    before = path.read_bytes()
    session.step(*arrays(1)[0])

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(cg.OutputPathError, match="No space left"):
        session.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_file_that_outgrows_its_limit_leaves_the_last_state(step_file: Path, tmp_path: Path) -> None:
    """A real refusal by the kernel, in the middle of the file: what a full disk or a quota does."""
    path = cg.TrainingSession(step_file).save(tmp_path / "state.safetensors")
    before = path.read_bytes()
    code = f"""
import resource, signal
import convgrad_export as cg
session = cg.TrainingSession({str(step_file)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, {len(before) // 2}))
try:
    session.save({str(path)!r})
except cg.OutputPathError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "refused: cannot write" in done.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_process_killed_while_it_saves_leaves_a_complete_checkpoint(step_file: Path, tmp_path: Path) -> None:
    """SIGKILL at eight moments of a loop that saves without a pause, at several saves; the file loads every time."""
    path = tmp_path / "state.safetensors"
    code = f"""
import numpy as np, convgrad_export as cg
session = cg.TrainingSession({str(step_file)!r})
x, y = np.ones((4, 1, 8, 8), np.float32), np.zeros(4, np.int64)
session.save({str(path)!r})
print("saved", flush=True)
while True:
    session.step(x, y)
    session.save({str(path)!r})
    print("saved", flush=True)
"""
    steps = []
    for moment in range(8):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(1 + moment):
            process.stdout.readline()
        time.sleep(0.002 * moment)
        process.kill()
        process.wait()
        steps.append(cg.TrainingSession(step_file, path).steps)
    assert max(steps) > 0


def test_damaged_and_foreign_checkpoints_are_refused(step_file: Path, tmp_path: Path) -> None:
    good = step_file.with_suffix(".checkpoint.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    cases = {
        "truncated": (good[:-100], "truncated"),
        "no safetensors": (b"not a checkpoint", "cannot be read"),
        "one byte changed": (good[:-5] + bytes([good[-5] ^ 1]) + good[-4:], "checksum"),
    }
    for data, message in cases.values():
        bad.write_bytes(data)
        with pytest.raises(cg.ModelFileError, match=message):
            cg.TrainingSession(step_file, bad)
    with pytest.raises(cg.ModelFileError, match="does not exist"):
        cg.TrainingSession(step_file, tmp_path / "none.safetensors")
    other = cg.export_training_step(small_network(torch.float32), "cross_entropy", "sgd", batches(1, torch.float32)[0])
    with pytest.raises(cg.ModelFileError, match=r"missing: 0\.0\.weight(.|\n)*unknown: 0\.weight"):
        cg.TrainingSession(step_file, other.state)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((np.zeros((6, 1, 8, 9), np.float32), np.zeros(6, np.int64)), "shape"),
        ((np.zeros((6, 1, 8, 8), np.float64), np.zeros(6, np.int64)), "float64, expected float32"),
        ((np.zeros((6, 1, 8, 8), np.float32), np.zeros(6, np.int32)), "int32, expected int64"),
        ((np.zeros((6, 1, 8, 8), np.float32), np.zeros(5, np.int64)), "batch = 6"),
        ((np.zeros((6, 8, 8), np.float32), np.zeros(6, np.int64)), "shape"),
        ((np.zeros((6, 1, 8, 8), np.float32),), "missing"),
        (([[1.0]], np.zeros(6, np.int64)), "list"),
        ((np.zeros((6, 1, 8, 8), np.float32), np.full(6, 77)), "within step 1(.|\n)*label"),
    ],
)
def test_wrong_batches_are_refused_and_change_nothing(step_file: Path, batch: tuple, message: str) -> None:
    session = cg.TrainingSession(step_file)
    before = session.state()
    with pytest.raises(cg.ConvGradError, match=message):
        session.step(*batch)
    for name, value in session.state().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_loss_that_is_not_finite_is_reported_before_the_update(step_file: Path) -> None:
    x, y = arrays(1)[0]
    session = cg.TrainingSession(step_file)
    before = session.state()
    with pytest.raises(cg.NonFiniteLossError, match="at step 1"):
        session.step(x * np.float32("nan"), y)
    for name, value in session.state().items():
        np.testing.assert_array_equal(value, before[name])
    careless = cg.TrainingSession(step_file, stop_on_non_finite=False)
    assert np.isnan(careless.step(x * np.float32("nan"), y)["loss"])
    assert careless.steps == 1


class Adversaries(nn.Module):
    """A generator, and what tells its results from real ones; both steps hold both, or the second one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
        self.d = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.d(self.g(noise))


class OnlyJudge(nn.Module):
    def __init__(self, whole: Adversaries) -> None:
        super().__init__()
        self.d = whole.d

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        return functional.softplus(self.d(made)).mean() + functional.softplus(-self.d(real)).mean()


@pytest.mark.parametrize("in_place", [None, False])
def test_two_steps_that_share_parameters_hand_them_on(in_place: bool | None) -> None:
    whole = Adversaries().double()
    judge = OnlyJudge(whole)
    noise, real = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)

    def of_generator(scores: Tensor) -> Tensor:
        return functional.softplus(-scores).mean()

    first = cg.export_training_step(judge, lambda output: output, "adam", (real, real))
    second = cg.export_training_step(whole, of_generator, "adam", (noise,), frozen=["d"])
    judging = cg.TrainingSession(first.model, first.state, in_place=in_place)
    making = cg.TrainingSession(second.model, second.state, in_place=in_place)
    of_d, of_g = torch.optim.Adam(whole.d.parameters()), torch.optim.Adam(whole.g.parameters())
    for _ in range(4):
        noise, real = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
        made = whole.eval().g(noise).detach()
        whole.train()
        judging.step(made, real)
        making.load(judging.state_dict(making.state_dict()))
        making.step(noise)
        judging.load(making.state_dict(judging.state_dict()))
        whole.zero_grad()
        judge(made, real).backward()
        of_d.step()
        whole.zero_grad()
        of_generator(whole(noise)).backward()
        of_g.step()
    assert (judging.steps, making.steps) == (4, 4)
    for name, value in whole.state_dict().items():
        np.testing.assert_allclose(making.state()[name], value, rtol=1e-9, err_msg=name)
    for name, value in judging.state_dict().items():
        np.testing.assert_array_equal(value, making.state()[name])
    with pytest.raises(cg.ModelFileError, match=r"unknown: g\.0\.weight"):
        judging.load(making.state_dict())


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(400_000)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first * x).sum() + (self.second * x).sum()


@pytest.mark.parametrize("in_place", [None, False])
def test_a_state_that_another_thread_reads_is_that_of_one_step(in_place: bool | None) -> None:
    x = torch.ones(1)
    report = cg.export_training_step(Sums(), lambda output: output, "sgd", (x,), verify=False)
    session = cg.TrainingSession(report.model, report.state, learning_rate=1.0, in_place=in_place)
    states: list[set[float]] = []

    def read() -> None:
        for _ in range(40):
            state = session.state()
            states.append({-float(state["step"])}.union(*(np.unique(state[name]) for name in ("first", "second"))))

    with ThreadPoolExecutor() as pool:
        reader, trainer = pool.submit(read), pool.submit(lambda: [session.step(x) for _ in range(80)])
        assert len(trainer.result()) == 80
        reader.result()
    assert all(len(state) == 1 for state in states), states


@pytest.mark.parametrize("loss", ["mse", "l1", "cross_entropy"])
def test_an_empty_batch_has_no_loss_and_changes_nothing(loss: str) -> None:
    example = (torch.randn(4, 3), torch.randint(0, 2, (4,)) if loss == "cross_entropy" else torch.randn(4, 2))
    shapes = {"input": {0: "n"}, "target": {0: "n"}}
    report = cg.export_training_step(nn.Linear(3, 2), loss, "adam", example, dynamic_shapes=shapes)
    session = cg.TrainingSession(report.model, report.state)
    before = session.state()
    with pytest.raises(cg.NonFiniteLossError, match="the loss is nan at step 1"):
        session.step(*(each[:0] for each in example))
    assert all(np.array_equal(value, before[name]) for name, value in session.state().items())
    assert session.step(*example)["loss"] > 0


def test_a_norm_that_is_not_finite_is_reported_before_the_update() -> None:
    """The loss of zeros is 0 here, its gradient not a number."""
    module = nn.Linear(3, 2, bias=False)
    example = torch.randn(4, 3)
    report = cg.export_training_step(module, lambda out: out.abs().sqrt().mean(), "adam", (example,), max_grad_norm=1.0)
    session = cg.TrainingSession(report.model, report.state, in_place=True)
    before = session.state()
    with pytest.raises(cg.NonFiniteLossError, match="the gradient norm is nan at step 1"):
        session.step(torch.zeros(4, 3))
    for name, value in session.state().items():
        np.testing.assert_array_equal(value, before[name])
    assert np.isfinite(session.step(example)["gradient_norm"])


def test_models_that_are_no_training_step_are_refused() -> None:
    model = cg.build_model("conv1d_input", input_shape=(1, 1, 3), weight_shape=(1, 1, 1))
    with pytest.raises(cg.ModelFileError, match="no training step"):
        cg.TrainingSession(model, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": "2"}, "threads is '2'"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, expected a finite number"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"seed": 1.5}, "seed is 1.5, expected a 64-bit integer"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_settings_that_cannot_be_are_refused(step_file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(cg.ArgumentTypeError, match=message):
        cg.TrainingSession(step_file, **options)


def test_an_option_that_the_provider_does_not_have_is_refused(step_file: Path) -> None:
    with pytest.raises(cg.ProviderError, match="no option 'no_such'"):
        cg.TrainingSession(step_file, providers=[("cpu", {"no_such": "1"})])


def test_a_learning_rate_that_is_no_number_leaves_the_state(step_file: Path) -> None:
    session = cg.TrainingSession(step_file)
    before = session.state()
    for rate in (float("nan"), float("inf"), "fast", 1e39, -1e39):  # float32 makes infinity of the last two
        with pytest.raises(cg.ArgumentTypeError, match="learning_rate is"):
            session.step(*arrays(1)[0], learning_rate=rate)  # type: ignore[arg-type]
        with pytest.raises(cg.ArgumentTypeError, match="learning_rate is"):
            cg.TrainingSession(step_file, learning_rate=rate)  # type: ignore[arg-type]
    for name, value in session.state().items():
        np.testing.assert_array_equal(value, before[name])


def test_an_array_given_twice_is_refused(step_file: Path) -> None:
    x, y = arrays(1)[0]
    with pytest.raises(cg.ArgumentTypeError, match="step got target twice"):
        cg.TrainingSession(step_file).step(x, y, target=y)


def test_a_state_in_bfloat16_is_refused_by_name(step_file: Path) -> None:
    session = cg.TrainingSession(step_file)
    with pytest.raises(cg.ModelFileError, match=r"2\.weight: is bfloat16 \(5, 24\), expected float32"):
        session.load(with_dropout().bfloat16().state_dict())


def test_names_of_a_mapping_are_texts(step_file: Path) -> None:
    session = cg.TrainingSession(step_file)
    with pytest.raises(cg.ArgumentTypeError, match="checkpoint holds the name 3, expected texts"):
        session.load({**session.state(), 3: np.zeros(1)})  # type: ignore[dict-item]


def test_sizes_without_a_name_are_any(step_file: Path) -> None:
    model = onnx.load(step_file)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.ClearField("dim_param")
    session = cg.TrainingSession(model, load_checkpoint(step_file.with_suffix(".checkpoint.safetensors")))
    assert session.step(*arrays(1)[0])["loss"] == cg.TrainingSession(step_file).step(*arrays(1)[0])["loss"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"is \[\], expected a JSON object"),
        ("3", "is 3, expected a JSON object"),
        ("null", "is null"),
        ("{", "no JSON text"),
        ("[" * 100_000, "no JSON text"),
        ('{"version": 2}', "version 2"),
        ('{"version": 1}', "no 'learning_rate'"),
        ({"learning_rate": "fast"}, "'learning_rate' is 'fast', expected a number"),
        ({"learning_rate": 10**400}, "'learning_rate' is 10+, expected a number"),
        ({"state": 3}, "'state' is 3, expected a list of names"),
        ({"state": []}, "'state' has no 'step'"),
        ({"trained": ["0.weight", 1]}, "'trained' is .*, expected a list of names"),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("in_place", [None, True])
def test_damaged_descriptions_of_a_step_are_refused(
    step_file: Path, text: Any, message: str, in_place: bool | None
) -> None:
    model = onnx.load(step_file)
    (entry,) = [entry for entry in model.metadata_props if entry.key == "convgrad.training"]
    if not isinstance(text, str):
        text = json.dumps({**json.loads(entry.value), **text})
    entry.value = text
    with pytest.raises(cg.ModelFileError, match=message):
        cg.TrainingSession(model, load_checkpoint(step_file.with_suffix(".checkpoint.safetensors")), in_place=in_place)


def test_frozen_parameters_and_modules_stay() -> None:
    module, data = small_network(torch.float32), arrays(2)
    module[3].weight.requires_grad_(False)
    example = batches(1, torch.float32)[0]
    report = cg.export_training_step(module, "cross_entropy", "sgd", example, frozen=["0.weight", "7"])
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.1)
    before = session.state()
    for batch in data:
        session.step(*batch)
    changed = {name for name, value in session.state().items() if not np.array_equal(value, before[name])}
    assert changed == {
        *("1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"),
        *("5.weight", "5.bias", "step"),
    }


def test_tied_parameters_get_the_sum_of_their_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Conv2d(1, 1, 3, padding=1)
            self.second = nn.Conv2d(1, 1, 3, padding=1)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    module = Tied().double()
    x, y = torch.randn(2, 1, 5, 5).double(), torch.randn(2, 1, 5, 5).double()
    report = cg.export_training_step(module, "mse", "sgd", (x, y))
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.5)
    session.step(x.numpy(), y.numpy())
    functional.mse_loss(module(x), y).backward()
    expected = module.first.weight - 0.5 * module.first.weight.grad
    np.testing.assert_allclose(session.state()["first.weight"], expected.detach().numpy(), rtol=1e-12)


def test_a_submodule_with_two_names_trains_and_keeps_its_own_tensors() -> None:
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(3)
    module = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), shared, nn.SiLU(), shared, nn.Flatten(), nn.Linear(108, 5))
    module.double()
    before = {name: (tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    assert_same_training(
        module,
        "cross_entropy",
        functional.cross_entropy,
        lambda p: torch.optim.SGD(p, lr=0.1),
        batches(3),
    )
    for name, tensor in module.state_dict(keep_vars=True).items():
        own, value = before[name]
        assert tensor is own
        assert torch.equal(tensor, value)


def test_existing_files_are_kept(step_file: Path) -> None:
    with pytest.raises(cg.OutputExistsError):
        cg.export_training_step(
            with_dropout(), "cross_entropy", "adam", batches(1, torch.float32)[0], step_file, verify=False
        )


def test_a_link_to_a_step_stays_and_its_weights_lie_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    link = tmp_path / "step.onnx"
    link.symlink_to(tmp_path / "store" / "v1.onnx")
    monkeypatch.setitem(saving.save.__kwdefaults__, "external_data_above", 0)
    batch = batches(1, torch.float32)[0]
    for _ in range(2):
        report = cg.export_training_step(with_dropout(), "cross_entropy", "adam", batch, link, overwrite=True)
        assert link.is_symlink()
        assert sorted(os.listdir(tmp_path)) == ["step.checkpoint.safetensors", "step.onnx", "store"]
        assert sorted(os.listdir(tmp_path / "store")) == ["v1.onnx", "v1.onnx.data"]
        for path in (link, link.resolve()):
            assert np.isfinite(cg.TrainingSession(path, report.checkpoint).step(*arrays(1)[0])["loss"])


def test_an_export_without_room_leaves_the_old_model_and_its_state(tmp_path: Path) -> None:
    """The limit lets the model through and stops the checkpoint: neither file may be replaced then."""
    code = """
import resource, signal, sys
import convgrad_export as cg
from tests.training.parity import batches, small_network
import torch
from torch import nn
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = sys.argv[1]
module = nn.Sequential(small_network(torch.float32)[:-1], nn.Linear(24, 5000))
options = {"verify": False, "overwrite": True}
for learning_rate in (1.0, 2.0):
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    try:
        cg.export_training_step(module, "cross_entropy", optimizer, batches(1, torch.float32)[0], path, **options)
    except cg.OutputPathError as error:
        print("refused:", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
"""
    path = tmp_path / "step.onnx"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, cwd=root)
    assert "refused: cannot write" in done.stdout
    assert path.stat().st_size < 600_000 < path.with_suffix(".checkpoint.safetensors").stat().st_size
    assert cg.TrainingSession(path).learning_rate == 1.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step.checkpoint.safetensors", "step.onnx"]


def test_memory_stays_the_same_over_a_thousand_steps(step_file: Path) -> None:
    session = cg.TrainingSession(step_file, threads=1)
    batch = arrays(1, 4)[0]
    for _ in range(100):
        session.step(*batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        session.step(*batch)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    assert grown < 2048, grown


def test_a_session_runs_without_torch(step_file: Path) -> None:
    code = f"""
import sys, json
sys.modules["torch"] = None
import numpy as np
from convgrad_export.training import TrainingSession
session = TrainingSession({str(step_file)!r})
rng = np.random.default_rng(0)
x, y = rng.standard_normal((4, 1, 8, 8), dtype=np.float32), np.arange(4) % 5
print(json.dumps([session.step(x, y)["loss"] for _ in range(40)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    losses = json.loads(done.stdout)
    assert losses[-1] < losses[0]


def test_an_existing_file_is_not_replaced_because_of_a_word(step_file: Path, tmp_path: Path) -> None:
    session, path = cg.TrainingSession(step_file), tmp_path / "state.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(cg.ArgumentTypeError, match="overwrite is 'no'"):
        session.save(path, overwrite="no")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
