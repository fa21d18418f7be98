"""Every loss by itself: value and gradients through an exported SGD step, in float64 against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.training import artifacts
from convgrad_export.training.losses import NAMES

from .parity import assert_same_training, batches, short, small_network

GENERATOR = torch.Generator().manual_seed(3)


def with_targets(kind: str) -> list[tuple[Tensor, Tensor]]:
    """Batches whose targets suit the loss: class indices, probabilities, ..."""
    data = []
    for x, labels in batches(3):
        shape = (x.shape[0], 5)
        if kind == "classes":
            target: Any = labels
        elif kind == "ignored":
            target = labels.clone()
            target[::2] = -100
        elif kind == "probabilities":
            target = torch.softmax(torch.randn(shape, generator=GENERATOR, dtype=torch.float64), 1)
        elif kind == "bits":
            target = torch.randint(0, 2, shape, generator=GENERATOR).double()
        elif kind == "signs":
            target = torch.randint(0, 2, shape, generator=GENERATOR).double() * 2 - 1
        elif kind == "multilabel":
            target = torch.stack([torch.randperm(5, generator=GENERATOR) for _ in range(x.shape[0])])
            target[:, 2] = -1
        else:
            target = torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
        data.append((x, target))
    return data


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25], dtype=torch.float64)
LOSSES: list[tuple[Any, Callable[..., Tensor], str]] = [
    ("cross_entropy", functional.cross_entropy, "classes"),
    ("cross_entropy", functional.cross_entropy, "ignored"),
    ("cross_entropy", functional.cross_entropy, "probabilities"),
    ("bce_with_logits", functional.binary_cross_entropy_with_logits, "bits"),
    ("mse", functional.mse_loss, "values"),
    ("l1", functional.l1_loss, "values"),
    ("huber", functional.huber_loss, "values"),
    ("smooth_l1", functional.smooth_l1_loss, "values"),
    *(
        (module, module, kind)
        for module, kind in [
            (nn.CrossEntropyLoss(weight=WEIGHT), "classes"),
            (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2, ignore_index=1), "classes"),
            (nn.CrossEntropyLoss(reduction="sum"), "classes"),
            (nn.CrossEntropyLoss(label_smoothing=0.3), "probabilities"),
            (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT), "bits"),
            (nn.MSELoss(reduction="sum"), "values"),
            (nn.HuberLoss(delta=0.3), "values"),
            (nn.SmoothL1Loss(beta=0.2), "values"),
            (nn.KLDivLoss(reduction="batchmean"), "probabilities"),
            (nn.KLDivLoss(reduction="sum", log_target=True), "values"),
            (nn.PoissonNLLLoss(), "bits"),
            (nn.SoftMarginLoss(), "signs"),
            (nn.MultiLabelSoftMarginLoss(), "bits"),
            (nn.HingeEmbeddingLoss(), "signs"),
            (nn.MultiMarginLoss(), "classes"),
            (nn.MultiMarginLoss(p=2, weight=WEIGHT), "classes"),
            (nn.MultiLabelMarginLoss(), "multilabel"),
        ]
    ),
]


@pytest.mark.parametrize(("loss", "reference", "targets"), LOSSES, ids=short)
def test_loss_and_gradients_follow_pytorch(loss: Any, reference: Callable[..., Tensor], targets: str) -> None:
    assert_same_training(
        small_network(), loss, reference, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), with_targets(targets)
    )


def test_nll_after_log_softmax() -> None:
    module = nn.Sequential(*small_network(), nn.LogSoftmax(1))
    assert_same_training(module, "nll", functional.nll_loss, lambda p: torch.optim.SGD(p, lr=0.1), batches(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [torch.ones_like, torch.zeros_like, lambda x: (x > 0).to(x.dtype)], ids=range(3))
def test_targets_stay_in_the_range_that_a_loss_asks_for(make: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """nn.BCELoss refuses targets outside of [0, 1]: a GAN's are all ones and all zeros."""
    x, _ = batches(1, dtype)[0]
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten(), nn.Linear(2, 1), nn.Sigmoid()).to(dtype)
    report = cg.export_training_step(module, nn.BCELoss(), "sgd", (x, make(x[:, 0, :1, 0])))
    assert not report.notes
    gradients = cg.export_gradient(module, (x,), of=nn.BCELoss(), of_args=(make(x[:, 0, :1, 0]),))
    assert gradients.verified
    assert not gradients.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_targets_of_another_type_than_the_output(dtype: torch.dtype) -> None:
    data = [(x, (5 * torch.randn(6, 5, generator=GENERATOR)).to(dtype)) for x, _ in batches(3)]
    assert_same_training(small_network(), "mse", functional.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1), data)


def test_label_smoothing() -> None:
    assert_same_training(
        small_network(),
        "cross_entropy",
        lambda output, target: functional.cross_entropy(output, target, label_smoothing=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1),
        batches(3),
        label_smoothing=0.1,
    )


def test_per_pixel_cross_entropy() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 5, 1)).double()
    data = [(x, torch.randint(0, 5, (x.shape[0], 8, 8), generator=GENERATOR)) for x, _ in batches(3)]
    assert_same_training(module, "cross_entropy", functional.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.5), data)


def test_a_function_of_several_targets() -> None:
    def weighted(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return ((output - target) ** 2 * weight).mean()

    module, (x, _) = small_network(), batches(1)[0]
    target, weight = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    report = cg.export_training_step(module, weighted, "sgd", (x, target, weight))
    assert list(report.inputs)[:3] == ["input", "target", "weight"]
    session = cg.TrainingSession(report.model, report.state)
    loss = session.step(input=x.numpy(), target=target.numpy(), weight=weight.numpy())["loss"]
    assert loss == pytest.approx(weighted(module(x), target, weight).item(), rel=1e-12)


class Called(nn.Module):
    """A loss with a `__call__` instead of a forward, as timm's JsdCrossEntropy is written."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(output.log_softmax(1), target, reduction="batchmean")


def test_a_loss_module_that_is_called_without_a_forward() -> None:
    """Its forward is nn.Module's, which takes anything: the loss was said to take no output."""
    data = with_targets("probabilities")
    assert_same_training(small_network(), Called(), Called(), lambda p: torch.optim.SGD(p, lr=0.1), data)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("dice", {}, "expected one of: cross_entropy"),
        (3.0, {}, "expected a name"),
        ("mse", {"label_smoothing": 0.1}, "cross_entropy"),
        ("cross_entropy", {"label_smoothing": 1.5}, "from 0 to 1"),
        (nn.CrossEntropyLoss(), {"label_smoothing": 0.1}, "has its own"),
        (nn.MSELoss(reduction="none"), {}, "one element"),
        (lambda: 0, {}, "takes no output"),
        (nn.Module(), {}, "loss Module takes no output"),
        (nn.MSELoss, {}, "the class MSELoss, expected an instance"),
    ],
    ids=short,
)
def test_losses_that_cannot_be_are_refused(loss: Any, options: dict[str, Any], message: str) -> None:
    x, _ = batches(1)[0]
    target = torch.zeros(6, 5, dtype=torch.float64)
    with pytest.raises(cg.ConvGradError, match=message):
        cg.export_training_step(small_network(), loss, "sgd", (x, target), **options)


class Centers(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self, centers: Tensor) -> None:
        super().__init__()
        self.centers = nn.Parameter(centers)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - self.centers[target]).square().mean()


def centers() -> Centers:
    return Centers(torch.randn(5, 5, generator=GENERATOR, dtype=torch.float64))


def test_a_loss_whose_parameters_the_optimizer_holds_is_refused(tmp_path: Path) -> None:
    module, loss, batch = small_network(), centers(), batches(1)[0]
    optimizer = torch.optim.SGD([*module.parameters(), *loss.parameters()], lr=0.1)
    with pytest.raises(cg.ArgumentTypeError, match="Centers has the parameters centers"):
        cg.export_training_step(module, loss, optimizer, batch)
    with pytest.raises(cg.ArgumentTypeError, match="Centers has the parameters centers"):
        artifacts.generate_artifacts(module, loss=loss, optimizer=optimizer, args=batch, artifact_directory=tmp_path)
    module.register_parameter("shared", loss.centers)
    with pytest.raises(cg.ArgumentTypeError, match="centers, which the optimizer or the module holds"):
        cg.export_training_step(module, loss, "sgd", batch)


def test_a_loss_whose_parameters_stay_is_noted() -> None:
    report = cg.export_training_step(small_network(), centers(), "sgd", batches(1)[0])
    assert any("the loss's own: centers" in note for note in report.notes)


def test_a_loss_inside_the_module_trains_its_parameters() -> None:
    """What the refusal proposes."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.loss = small_network(), centers()

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.loss(self.network(x), labels)

    module, data = WithLoss(), batches(3)
    report = cg.export_training_step(module, lambda output: output, "sgd", data[0])
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for x, y in data:
        loss = session.step(x, y)["loss"]
        optimizer.zero_grad()
        expected = module(x, y)
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(torch.from_numpy(session.state()["loss.centers"]), module.loss.centers.detach())


class Centered(nn.Module):
    """A loss with a moving average of its own, as in DINO."""

    def __init__(self, assign: bool) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(5, dtype=torch.float64))
        self.assign = assign

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        value = functional.cross_entropy(output - self.center, target)
        if self.training:
            with torch.no_grad():
                if self.assign:
                    self.center = self.center * 0.5 + output.mean(0) * 0.5
                else:
                    self.center.mul_(0.5).add_(output.mean(0), alpha=0.5)
        return value


@pytest.mark.parametrize("assign", [True, False])
def test_a_loss_that_changes_its_buffers_is_refused(assign: bool, tmp_path: Path) -> None:
    loss, module, batch = Centered(assign), small_network(), batches(1)[0]
    with pytest.raises(cg.UnsupportedOperatorError, match="Centered changes its buffers center"):
        cg.export_training_step(module, loss, "sgd", batch)
    with pytest.raises(cg.UnsupportedOperatorError, match="Centered changes its buffers center"):
        artifacts.generate_artifacts(module, loss=loss, args=batch, artifact_directory=tmp_path)
    assert not loss.center.any()
    assert cg.export_training_step(module, loss.eval(), "sgd", batch).verified


@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(), "nll", nn.NLLLoss()], ids=short)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_class_indices_of_other_types_are_refused(loss: Any, dtype: torch.dtype) -> None:
    x, y = batches(1)[0]
    with pytest.raises(cg.DTypeError, match=rf"target is {dtype}, expected torch.int64.*target\.long"):
        cg.export_training_step(small_network(), loss, "sgd", (x, y.to(dtype)), verify=False)


def test_what_pytorch_says_about_a_batch_is_passed_on() -> None:
    x, y = batches(1)[0]
    with pytest.raises(cg.VerificationError, match=r"fails in PyTorch.*Long.* Int"):
        cg.export_training_step(small_network(), lambda o, t: functional.cross_entropy(o, t), "sgd", (x, y.int()))
    with pytest.raises(cg.VerificationError, match=r"fails in PyTorch.*Target \d is out of bounds"):
        cg.export_training_step(small_network(), "cross_entropy", "sgd", (x, y + 5))


def test_every_named_loss_is_tested_above() -> None:
    tested = {loss for loss, *_ in LOSSES if isinstance(loss, str)} | {"nll"}
    assert tested == set(NAMES)


@pytest.mark.parametrize("ignored", [-100, -1, 3, 5])  # 3: one more than the last class
@pytest.mark.parametrize("space", [(), (4, 4)], ids=["vectors", "images"])
def test_a_negative_class_is_refused_unless_it_is_ignored(space: tuple[int, ...], ignored: int, tmp_path: Path) -> None:
    """ONNX counts a negative index from the end: label -1, often "no class", would train the last one."""
    net = nn.Conv2d(2, 3, 1) if space else nn.Linear(2, 3)
    x, labels = torch.randn(2, 2, *space), torch.randint(0, 3, (2, *space))
    loss = nn.CrossEntropyLoss(ignore_index=ignored, weight=torch.tensor([0.5, 2.0, 1.0]))
    cg.export_training_step(net, loss, "sgd", (x, labels), tmp_path / "step.onnx")
    session = cg.TrainingSession(tmp_path / "step.onnx")
    for negative in {-3, -2, -1} - {ignored}:
        wrong = labels.clone()
        wrong[0] = negative
        with pytest.raises(cg.ArgumentTypeError, match="a label outside the classes"):
            session.step(x.numpy(), wrong.numpy())
    labels[0] = ignored
    result = session.step(x.numpy(), labels.numpy())
    assert float(result["loss"]) == pytest.approx(loss(net(x), labels).item(), rel=1e-5)
