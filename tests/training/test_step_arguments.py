"""What `export_training_step` makes of a module, a batch and options: refusals, and the names of inputs and outputs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg

from .parity import Named, batches, small_network, train_in_pytorch


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (lambda x, y: (x,), {}, "target"),
        (lambda x, y: (x, y, y), {}, "does not take"),
        (lambda x, y: (x, 3), {}, "int"),
        (lambda x, y: (x, y), {"frozen": ["nothing"]}, "frozen"),
        (lambda x, y: (x, y), {"frozen": "0"}, "sequence"),
        (lambda x, y: (x, y), {"frozen": ["0", "1", "3", "5", "7"]}, "no parameter left"),
        (lambda x, y: (x, y), {"gradient_accumulation": 0}, "an integer from 1"),
        (lambda x, y: (x, y), {"max_grad_norm": -1.0}, "above 0"),
        (lambda x, y: (x, y), {"dynamic_shapes": {"image": {0: "batch"}}}, "image"),
        (lambda x, y: (x, y), {"dynamic_shapes": {"labels": {0: "batch"}}}, r"'labels'.*\(input\).*\(target\)"),
        (lambda x, y: (x, y), {"dynamic_shapes": ({0: "batch"},)}, r"has 1 entries.*\(input\).*\(target\)"),
        (lambda x, y: None, {}, "args is a NoneType"),
        (lambda x, y: {"x": x, "y": y}, {}, "args is a dict"),
        (lambda x, y: (x, y), {"frozen": None}, "frozen is None"),
        (lambda x, y: (x, y), {"dynamic_shapes": 3}, "dynamic_shapes is 3"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, options: dict[str, Any], message: str) -> None:
    x, y = batches(1, torch.float32)[0]
    with pytest.raises(cg.ConvGradError, match=message):
        cg.export_training_step(small_network(torch.float32), "cross_entropy", "sgd", arguments(x, y), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loss", {}),
        ("learning_rate", {}),
        ("seed", {}),
        ("step", {}),
        ("micro_step", {"gradient_accumulation": 2}),
        ("gradient_norm", {"max_grad_norm": 1.0}),
    ],
)
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_names_that_the_step_uses_are_refused(name: str, options: dict[str, Any], kind: str) -> None:
    batch = batches(1, torch.float32)[0]
    with pytest.raises(cg.ArgumentTypeError, match=f"Named.*{name}.*rename"):
        cg.export_training_step(Named(name, kind), "cross_entropy", "sgd", batch, **options)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_complex_tensors_are_refused(kind: str) -> None:
    module = Named("factor", kind)
    tensor = torch.ones(1, dtype=torch.complex64)
    module.factor = nn.Parameter(tensor) if kind == "parameter" else tensor
    with pytest.raises(cg.DTypeError, match="factor of Named is complex"):
        cg.export_training_step(module, "cross_entropy", "sgd", batches(1, torch.float32)[0], verify=False)


def test_complex_targets_are_refused() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 1)
    with pytest.raises(cg.DTypeError, match="target of the loss is complex"):
        cg.export_training_step(nn.Linear(3, 1), "mse", "sgd", (x, y + 0j))


def test_a_function_is_no_module() -> None:
    for loss in ("mse", nn.MSELoss()):
        with pytest.raises(cg.ArgumentTypeError, match=r"expected a torch.nn.Module instance"):
            cg.export_training_step(lambda x: x, loss, "sgd", batches(1)[0])  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_module_of_torch_jit_trace_is_a_module() -> None:
    """It has no signature but a schema, and records its convolutions as another operator."""
    torch.manual_seed(0)
    data = batches(2, torch.float32)
    eager = small_network(torch.float32)
    traced = torch.jit.trace(copy.deepcopy(eager), data[0][0], check_trace=False)
    traced.load_state_dict(eager.state_dict())
    report = cg.export_training_step(traced, "cross_entropy", torch.optim.SGD(traced.parameters(), 0.1), data[0])
    session = cg.TrainingSession(report.model, report.state)
    assert session.batch_names == ("input", "target")
    losses = [session.step(*batch)["loss"] for batch in data]
    optimizer = torch.optim.SGD(eager.parameters(), 0.1)
    expected = train_in_pytorch(eager, functional.cross_entropy, optimizer, data)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_two_inputs_of_one_name_are_refused() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = small_network(torch.float32)

        def forward(self, x: Tensor, x_input: Tensor) -> Tensor:
            return self.scores(x) + x_input

    x, y = batches(1, torch.float32)[0]
    with pytest.raises(cg.ArgumentTypeError, match="two inputs of the step are called x_input"):
        cg.export_training_step(
            Shifted(), lambda output, x: functional.cross_entropy(output, x), "sgd", (x, torch.ones(6, 5), y)
        )


class Branching(nn.Module):
    """Another output for large batches."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = small_network(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        return 2 * scores if x.shape[0] > 6 else scores


def test_a_branch_on_a_dynamic_size_is_refused() -> None:
    shapes = ({0: "batch"}, {0: "batch"})
    with pytest.raises(cg.DynamicShapeError, match="'batch' was declared dynamic, but at 7"):
        cg.export_training_step(
            Branching(), "cross_entropy", "sgd", batches(1, torch.float32)[0], dynamic_shapes=shapes
        )


def test_every_dynamic_size_is_run_at_another_size() -> None:
    module = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    shapes = ({0: "batch", 2: "height"}, {0: "batch"})
    report = cg.export_training_step(
        module, "cross_entropy", "sgd", batches(1, torch.float32)[0], dynamic_shapes=shapes
    )
    assert report.verified_sizes == [
        {"batch": 6, "height": 8},
        {"batch": 7, "height": 8},
        {"batch": 6, "height": 9},
    ]


def test_a_loss_without_gradients_is_refused() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.unused = small_network(torch.float32), nn.Linear(2, 2)
            self.detach = True

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(x).detach() if self.detach else self.scores(x)

    module, batch = Detached(), batches(1, torch.float32)[0]
    with pytest.raises(cg.ConstantGradientError, match="depends on no parameter"):
        cg.export_training_step(module, "cross_entropy", "sgd", batch)
    module.detach = False
    optimizer = torch.optim.SGD(module.unused.parameters(), lr=0.1)
    with pytest.raises(cg.ConstantGradientError, match="none of the parameters that the optimizer holds"):
        cg.export_training_step(module, "cross_entropy", optimizer, batch, max_grad_norm=1.0)


class Mapped(nn.Module):
    """Scores, and what transformers' models put beside them."""

    def __init__(self, **others: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores, self.others = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), others

    def forward(self, x: Tensor) -> dict[str, Any]:
        scores = self.scores(x)
        others = {name: 2 * scores.mean() if value else None for name, value in self.others.items()}
        return {**others, "logits": scores}


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ({"loss": True}, {"output.loss", "logits"}),
        ({"loss": None, "hidden": None}, {"logits"}),
        ({"x": True, "output.x": True, "gradient_norm": True}, {"output.output.x", "output.x", "output.gradient_norm"}),
    ],
)
def test_outputs_have_names_of_their_own(others: dict[str, Any], names: set[str]) -> None:
    def loss(output: dict[str, Any], target: Tensor) -> Tensor:
        return functional.cross_entropy(output["logits"], target)

    module, (x, y) = Mapped(**others), batches(1, torch.float32)[0]
    report = cg.export_training_step(module, loss, "sgd", (x, y), return_outputs=True, max_grad_norm=100.0)
    result = cg.TrainingSession(report.model, report.state).step(x, y)
    assert set(result) == {"loss", "gradient_norm", "logits"} | names
    scores = module(x)["logits"].detach()
    assert result["loss"] == pytest.approx(functional.cross_entropy(scores, y).item(), rel=1e-5)
    np.testing.assert_allclose(result["logits"], scores, rtol=1e-4, atol=1e-5)
    for name in names - {"logits"}:
        assert result[name] == pytest.approx(2 * scores.mean().item(), rel=1e-4, abs=1e-6)


def test_random_numbers_that_no_seed_can_give_are_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + torch.poisson(x)

    batch = (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(cg.UnsupportedOperatorError, match=r"poisson.*Use dropout, bernoulli, multinomial, rand"):
        cg.export_training_step(Noisy(), "mse", "sgd", batch)
