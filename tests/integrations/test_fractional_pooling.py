"""Fractional max pooling: values, places and gradients of ATen's kernels, and exports that draw their numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.integrations.fractional_pooling import FRACTIONAL

from .onnx_check import compare_gradients

POOLINGS = {2: functional.fractional_max_pool2d_with_indices, 3: functional.fractional_max_pool3d_with_indices}
# Kernel, output size, and by how much the input is longer than it has to be.
SIZES = [((2, 2, 2), (3, 4, 2), (3, 1, 2)), ((3, 1, 2), (5, 1, 3), (8, 3, 1)), ((1, 3, 1), (1, 2, 4), (1, 7, 5))]


@pytest.mark.parametrize(("kernel", "outputs", "spare"), SIZES)
@pytest.mark.parametrize("rank", POOLINGS)
def test_values_places_and_gradients(
    rank: int, kernel: tuple[int, ...], outputs: tuple[int, ...], spare: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    sizes = [k + o - 1 + s for k, o, s in zip(kernel, outputs, spare, strict=True)][:rank]
    for _ in range(5):
        x, samples = torch.randn(2, 3, *sizes, requires_grad=True), torch.rand(2, 3, rank)
        arguments = (x, kernel[:rank], outputs[:rank])
        value, places = POOLINGS[rank](*arguments, _random_samples=samples)
        found, at = FRACTIONAL[POOLINGS[rank]](*arguments, _random_samples=samples)
        assert torch.equal(found, value)
        assert torch.equal(at, places)
        (expected,) = torch.autograd.grad(value.square().sum(), x)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], expected)


class Pooled(nn.Module):
    """With random numbers that are an input."""

    def forward(self, x: Tensor, samples: Tensor) -> Tensor:
        pooled, places = functional.fractional_max_pool2d(
            x, 2, output_ratio=(0.5, 0.4), return_indices=True, _random_samples=samples.detach()
        )
        return pooled.cos() + places.to(x.dtype)


def test_gradients_over_a_dynamic_batch() -> None:
    torch.manual_seed(0)
    args, fresh = ((torch.randn(n, 3, 8, 10), torch.rand(n, 3, 2)) for n in (2, 5))
    compare_gradients(Pooled(), args, dynamic_shapes={"x": {0: "n"}, "samples": {0: "n"}}, fresh=fresh)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_step_draws_the_numbers(rank: int) -> None:
    torch.manual_seed(0)
    convolution, pooling = (nn.Conv2d, nn.FractionalMaxPool2d) if rank == 2 else (nn.Conv3d, nn.FractionalMaxPool3d)
    module = nn.Sequential(convolution(1, 2, 3), pooling(2, output_size=3), nn.Flatten(), nn.Linear(2 * 3**rank, 4))
    batch = (torch.randn(2, 1, *[9] * rank), torch.tensor([1, 3]))
    dynamic = ({0: "batch"}, {0: "batch"})
    report = cg.export_training_step(module, "cross_entropy", "sgd", batch, dynamic_shapes=dynamic)
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.0)
    losses = {float(session.step(*batch)["loss"]) for _ in range(4)}
    assert len(losses) > 1, "windows in other places in every step"
