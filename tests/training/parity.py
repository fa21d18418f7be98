"""Training the same module by PyTorch and by an exported step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import convgrad_export as cg


def small_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolutions (strided, depthwise, grouped), BatchNorm, pooling and a linear layer, for 1x8x8 images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),  # a bias before BatchNorm has a gradient of rounding only
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(24, 5),
    ).to(dtype)


class Named(nn.Module):
    """Scores times a tensor that has a name of the caller's choice."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.scores, self.name = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), name
        if kind == "buffer":
            self.register_buffer(name, torch.ones(1))
        else:
            self.register_parameter(name, nn.Parameter(torch.ones(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) * getattr(self, self.name)


def batches(count: int, dtype: torch.dtype = torch.float64, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def train_artifacts(module: Any, optimizer: Any, data: Sequence[tuple[Tensor, ...]]) -> list[Any]:
    """What a `training.api.Module` returns in each of as many steps as there are batches."""
    results = []
    for batch in data:
        results.append(module(*(tensor.numpy() for tensor in batch)))
        optimizer.step()
        module.lazy_reset_grad()
    return results


def train_in_pytorch(
    module: nn.Module,
    loss: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    data: Sequence[tuple[Tensor, ...]],
    before_update: Callable[[], Any] = lambda: None,
    accumulation: int = 1,
) -> list[float]:
    """Losses; the module is trained in place."""
    losses = []
    with torch.backends.mkldnn.flags(enabled=False):
        for number, (*inputs, target) in enumerate(data):
            value = loss(module(*inputs), target)
            (value / accumulation).backward()
            losses.append(value.item())
            if (number + 1) % accumulation == 0:
                before_update()
                optimizer.step()
                optimizer.zero_grad()
    return losses


def assert_same_training(
    module: nn.Module,
    loss: Any,
    torch_loss: Callable[..., Tensor],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    data: Sequence[tuple[Tensor, ...]],
    *,
    optimizer: Any = None,
    rtol: float = 1e-9,
    before_update: Callable[[nn.Module], Any] = lambda module: None,
    **options: Any,
) -> cg.TrainingSession:
    """Train by both from the same state on the same batches; every loss, parameter and buffer has to agree."""
    eager = copy.deepcopy(module)
    torch_optimizer = make_optimizer(eager.parameters())
    report = cg.export_training_step(
        module, loss, make_optimizer(module.parameters()) if optimizer is None else optimizer, data[0], **options
    )
    session = cg.TrainingSession(report.model, report.state, learning_rate=torch_optimizer.param_groups[0]["lr"])
    losses = [session.step(*(value.numpy() for value in batch))["loss"] for batch in data]
    expected = train_in_pytorch(
        eager, torch_loss, torch_optimizer, data, lambda: before_update(eager), options.get("gradient_accumulation", 1)
    )
    torch.testing.assert_close(
        torch.tensor(losses, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=rtol
    )
    state = session.state()
    for name, value in (*eager.named_parameters(), *eager.named_buffers()):
        got = torch.from_numpy(state[name]).reshape(value.shape)
        torch.testing.assert_close(got, value.detach(), rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")
    return session


def short(value: Any) -> str:
    """A test id that is the same in every process: no addresses."""
    if callable(value) and not isinstance(value, nn.Module):
        return str(getattr(value, "__name__", type(value).__name__))
    return str(value)[:60]
