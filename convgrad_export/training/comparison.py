"""PyTorch's own training on the same batches, with the same random numbers: what an exported step is held to."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..integrations.eager_run import CanonicalLayouts, WidenedCasts, quietly
from .backward import gradients
from .losses import Loss
from .randomness import SeededRandomness


@dataclass(frozen=True)
class LossCurves:
    """Losses of the first steps by onnxruntime, and by PyTorch in float32 and float64.

    Rounding grows from step to step, so the bound at a step is what it has done to PyTorch's own float32 so far:
    ``8 * max over earlier steps of |float32 - float64| + 2**-16 * |float64|``.
    """

    exported: np.ndarray
    float32: np.ndarray
    float64: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """Distance of the exported step from float64, in units of the bound, step by step."""
        drift = np.maximum.accumulate(np.abs(self.float32 - self.float64))
        bound = 8 * drift + 2.0**-16 * np.abs(self.float64)
        return np.asarray(np.abs(self.exported - self.float64) / bound)

    @property
    def within(self) -> bool:
        return bool(np.all(self.ratios <= 1.0))


def train_with_pytorch(
    module: torch.nn.Module,
    loss: Loss,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    batches: Iterable[tuple[np.ndarray, ...]],
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[float], torch.nn.Module]:
    """Losses and the trained copy of `module`, with the hooks of its parameters, which a copy would not have.

    In float64 oneDNN is off, as in every reference of this package, and what the forward casts to float32 is float64.
    """
    own = copy.deepcopy(module).to(dtype).train()
    for name, parameter in module.named_parameters():
        for hook in (parameter._backward_hooks or {}).values():
            own.get_parameter(name).register_hook(hook)
    optimizer = make_optimizer(own.parameters())
    parameters = {name: tensor for name, tensor in own.named_parameters() if tensor.requires_grad}
    losses = []
    with quietly(onednn=dtype != torch.float64):
        for step, arrays in enumerate(batches):
            *inputs, target = (torch.from_numpy(array) for array in arrays)
            inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
            target = target.to(dtype) if target.is_floating_point() else target
            optimizer.zero_grad()
            wide = WidenedCasts(dtype) if dtype == torch.float64 else contextlib.nullcontext()
            with SeededRandomness(torch.tensor(seed), torch.tensor(step)), wide, CanonicalLayouts():
                value = loss.call(own(*inputs), target)
                # in here for parts that are computed again, and not by value.backward(), which leaves the mode
                found = gradients(value, parameters)
            for name, gradient in found.items():
                parameters[name].grad = gradient
            optimizer.step()
            losses.append(value.item())
    return losses, own
