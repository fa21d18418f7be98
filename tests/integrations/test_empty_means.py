"""Means over a dynamic size of 0: NaN, as in PyTorch, and none in the statistics of a batch norm."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg

from .gradient_modules import Apply

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(),
    "mean-kept": lambda x: x.mean(0, keepdim=True) + x.sum(0),
    "mean-axes": lambda x: x.mean((-1, 0)),
    "mean-dtype": lambda x: (x > 0).to(torch.int64).mean(0, dtype=x.dtype) + x.sum(),
    "mean-inner": lambda x: x.mean(1),
    "mse": lambda x: functional.mse_loss(x, x.detach() * 0.5),
    "mse-sum": lambda x: functional.mse_loss(x, x.detach() * 0.5, reduction="sum"),
    "l1": lambda x: functional.l1_loss(x, x.detach() * 0.5),
    "huber": lambda x: functional.huber_loss(x, x.detach() * 0.5),
    "smooth_l1": lambda x: functional.smooth_l1_loss(x, x.detach() * 0.5),
    "bce": lambda x: functional.binary_cross_entropy_with_logits(x, x.detach().cos()),
    "cross_entropy": lambda x: functional.cross_entropy(x, x.detach().argmin(1)),
    "kl": lambda x: functional.kl_div(x.log_softmax(1), x.detach().sigmoid()),
    "variance": lambda x: x.var(0),
    "variance-uncorrected": lambda x: x.var(0, correction=0),
    "variance-of-all": lambda x: torch.var_mean(x, correction=0)[0],
}


OTHER_TYPES = [(name, dtype) for name in ("mean-axes", "mse", "variance") for dtype in (torch.float64, torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in FUNCTIONS), *OTHER_TYPES])
def test_means_of_an_empty_batch(name: str, dtype: torch.dtype) -> None:
    module, x = Apply(FUNCTIONS[name]), torch.randn(4, 6).to(dtype)
    report = cg.export_gradient(module, (x,), of=torch.sum, dynamic_shapes={"input": {0: "batch"}})
    model = cg.GradientSession(report.model)
    for batch in (0, 1, 5):
        x = torch.randn(batch, 6).to(dtype).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of degrees of freedom
            value = module(x).sum()
        value.backward()
        found = model.run({"input": x.detach()})
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found["value"], value.detach(), equal_nan=True, **tolerance)
        torch.testing.assert_close(found["input.grad"], x.grad, equal_nan=True, **tolerance)


@pytest.mark.parametrize("axes", [(2, 3), (-1, -2)])
def test_several_dynamic_sizes(axes: tuple[int, int]) -> None:
    """Height and width, of which either may be 0."""
    module, shapes = Apply(lambda x: x.mean(axes)), ({2: "height", 3: "width"},)
    report = cg.export(module, (torch.randn(2, 3, 4, 5),), dynamic_shapes=shapes)
    for shape in ((2, 3, 0, 5), (2, 3, 4, 0), (2, 3, 2, 2)):
        x = torch.randn(shape)
        found = cg.GradientSession(report.model).run({"input": x})["output"]
        torch.testing.assert_close(found, module(x), equal_nan=True)


def _moved() -> nn.BatchNorm2d:
    """Running statistics that are not the initial ones."""
    layer = nn.BatchNorm2d(3)
    layer(torch.randn(2, 3, 4, 4) + 1)
    return layer


@pytest.mark.parametrize("second_order", [False, True])
def test_statistics_of_a_batch_norm_stay_as_they_are(second_order: bool) -> None:
    """They are state of a training step: NaN in them would be in every step that follows."""
    layer, x = _moved(), torch.randn(2, 3, 4, 4)
    report = cg.export_gradient(
        layer, (x,), wrt=["inputs", "parameters"], of=lambda out: out.pow(3).sum(), hessian_vector=second_order,
        dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    for batch in (0, 3):
        feeds = {"input": torch.randn(batch, 3, 4, 4)}
        vectors = {"input.vector": feeds["input"], "weight.vector": torch.ones(3), "bias.vector": torch.ones(3)}
        results = cg.GradientSession(report.model).run({**feeds, **(vectors if second_order else {})})
        assert {"running_mean.updated", "weight.grad"} <= set(results)
        assert all(result.isfinite().all() for result in results.values())
        eager = copy.deepcopy(layer)
        eager(feeds["input"])
        torch.testing.assert_close(results["running_mean.updated"], eager.running_mean)
        torch.testing.assert_close(results["running_var.updated"], eager.running_var)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_after_an_empty_batch_of_training(momentum: float | None, tmp_path: Path) -> None:
    layer = nn.BatchNorm2d(3, momentum=momentum)
    batches = [torch.randn(batch, 3, 4, 4) + 1 for batch in (2, 0, 3)]
    shapes = {"input": {0: "batch"}}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    cg.export_training_step(
        layer, lambda out: out.square().sum(), optimizer, batches[:1], tmp_path / "step.onnx", dynamic_shapes=shapes
    )
    session = cg.TrainingSession(tmp_path / "step.onnx")
    for batch in batches:
        layer(batch)
        session.step(batch.numpy())
        state = session.state_dict()
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(torch.from_numpy(state[name]), getattr(layer, name))
