"""Numbers that a forward takes from a tensor with `item()`, as parameters of operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg

from .gradient_modules import Apply
from .onnx_check import compare_gradients

POSITIONS = torch.arange(5)
SIGNS = torch.tensor([1, -1, -1, 1, -1])

OF_A_NUMBER: dict[str, Callable[[Tensor, float], Tensor]] = {
    "leaky_relu": lambda x, v: functional.leaky_relu(x, v) + functional.leaky_relu((x + 1) * 1, v, inplace=True),
    "elu": lambda x, v: functional.elu(x, v) + functional.elu(x - 1, alpha=v, inplace=True),
    "softplus": lambda x, v: functional.softplus(x * 9, v, 3.0) + functional.softplus(x * 9, 2.0, v),
    "addcmul": lambda x, v: torch.addcmul(x, x, x, value=v) + (x * 2).addcmul_(x, x, value=-v),
    "addcdiv": lambda x, v: torch.addcdiv(x, x, 1 + x * x, value=v) + (x * 2).addcdiv_(x, 1 + x * x, value=-v),
    "lerp": lambda x, v: torch.lerp(x, x * x, v) + (x * 2).lerp_(x * x, 1 - v),
    "add": lambda x, v: torch.add(x, x * x, alpha=v) - (x * 2).sub_(x * x, alpha=1 - v),
    "power": lambda x, v: (1 + x * x) ** v + (1 + x * x).pow_(v) * v**x,
    "attention": lambda x, v: functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=v),
    "celu": lambda x, v: functional.celu(x, v) + torch.celu(x * 2, v) + functional.celu(x - 1, v, inplace=True),
    "hardtanh": lambda x, v: functional.hardtanh(x * 2, -v, v) * x + functional.hardtanh(x + 1, 0, v, inplace=True),
    "softshrink": lambda x, v: functional.softshrink(x * 2, v) * x,
    "logit": lambda x, v: torch.logit(x.sigmoid(), v * 0.1) + (x.sigmoid() * 1).logit_(v * 0.2),
    "xlog1py": lambda x, v: torch.special.xlog1py(v, x * x) + torch.special.xlog1py(x, v),
    "pad": lambda x, v: (
        functional.pad(x, (1, -2, 2, 0), value=v) * functional.pad(x * x, (1, -2, 2, 0), "constant", -v)
    ),
    "products": lambda x, v: (
        torch.addmm(x[0], x[0, :, :3], x[1], alpha=v, beta=1 - v)
        + (x[1] * x[0]).addmm_(x[0, :, :3], x[1], alpha=v)
        + torch.addmv(x[0, 0], x[0].t(), x[0, :, 0], beta=v)
        + torch.addr(x[0], x[0, :, 0], x[0, 0], alpha=v, beta=-v)
    ),
    "batched-products": lambda x, v: (
        torch.baddbmm(x, x[:, :, :3], x, alpha=v, beta=1 - v) + x[0].addbmm(x[:, :, :3], x, alpha=v)
    ),
    "rsub": lambda x, v: torch.rsub(x, x * x, alpha=v),
    "index_add": lambda x, v: x.index_add(2, POSITIONS[:2], (x * x)[:, :, :2], alpha=v) * (x * 2),
    "scatter": lambda x, v: x.scatter(2, POSITIONS[:2].expand(x.shape[0], 3, 2), v) * x,
    "huber": lambda x, v: functional.huber_loss(x * 2, x.detach(), delta=v) + x,
    "smooth_l1": lambda x, v: functional.smooth_l1_loss(x * 2, x.detach(), beta=v) + x,
    "layer_norm": lambda x, v: functional.layer_norm(x, (3, 5), eps=v) + functional.rms_norm(x, (5,), x[0, 0], v),
    "group_norm": lambda x, v: functional.group_norm(x, 3, eps=v),
    "batch_norm": lambda x, v: functional.batch_norm(x, None, None, training=True, eps=v),
    "ranking": lambda x, v: functional.margin_ranking_loss(x, x.sin(), x.detach().sign(), margin=v) + x,
    "hinge": lambda x, v: functional.hinge_embedding_loss(x, x.detach().sign(), margin=v, reduction="none"),
    "cosine-embedding": lambda x, v: functional.cosine_embedding_loss(x[0], x[-1].sin(), SIGNS[:3], margin=-v) + x,
    "triplets": lambda x, v: (
        functional.triplet_margin_loss(x, x.sin(), x.cos(), margin=v, swap=True)
        + functional.triplet_margin_loss(x, x.sin(), x.cos(), p=1, eps=v * 0.1, reduction="none").sum()
        + functional.triplet_margin_with_distance_loss(x, x.sin(), x.cos(), margin=v)
        + x
    ),
    "smoothing": lambda x, v: (
        functional.cross_entropy(x, x.detach().argmin(1), label_smoothing=v * 0.1)
        + functional.cross_entropy(x, x.detach().argmin(1), x[0, :, 0].detach().exp(), None, 1, label_smoothing=v * 0.2)
        + functional.cross_entropy(x, x.detach().softmax(1), label_smoothing=v * 0.3)
        + x
    ),
    "poisson": lambda x, v: functional.poisson_nll_loss(
        x * x, 3 * x.detach().abs(), log_input=False, full=True, eps=v, reduction="none"
    ),
    "similarity": lambda x, v: (
        functional.cosine_similarity(x, x.sin(), 2, v) + functional.cosine_similarity(x, x[:1].cos(), eps=9 * v).sum()
    ),
    "distance": lambda x, v: functional.pairwise_distance(x, x.sin(), eps=v),
    "nan_to_num": lambda x, v: torch.nan_to_num(x.log(), nan=v, posinf=-v) + (x * 1).nan_to_num_(v) * x,
    "quantile": lambda x, v: torch.quantile(x, v * 0.3, 2) + x.nanquantile(v * 0.2),
    "dropout-off": lambda x, v: functional.dropout(x * x, v * 0.1, training=False),
    "remainder": lambda x, v: x % v + torch.remainder(x, -v),
    "integers": lambda x, v: x * (POSITIONS * v + POSITIONS / v + (v - POSITIONS) + POSITIONS**v + (x > 0) * v),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OF_A_NUMBER)
def test_operators_of_a_computed_number(name: str, dtype: torch.dtype) -> None:
    """PyTorch decided on the number, at which the trace ended, or torch.onnx asked for a constant."""
    module = Apply(lambda x: OF_A_NUMBER[name](x, x.square().mean().item()))
    x, fresh = (torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(n), dtype=dtype) for n in (2, 4))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    if name == "celu":
        tolerance = max(tolerance, 1e-7)  # PyTorch's gradient is off by the rounding of 1 / alpha to float32
    compare_gradients(module, (x,), dynamic_shapes={"input": {0: "batch"}}, fresh=(fresh,), tolerance=tolerance)


class Dropout(nn.Module):
    def forward(self, x: Tensor, rate: Tensor) -> Tensor:
        return functional.dropout(x * x, rate.item())


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_dropout_by_a_computed_rate(rate: float) -> None:
    report = cg.export_gradient(Dropout(), (torch.randn(2, 3), torch.tensor(0.5)), of="sum", wrt=["x"])
    x = torch.randn(2, 3)
    found = cg.GradientSession(report.model).run({"x": x, "rate": torch.tensor(rate)})
    kept = found["x.grad"] != 0
    assert kept.all() if rate == 0 else kept.any() <= (rate < 1)
    if rate < 1:
        torch.testing.assert_close(found["x.grad"], torch.where(kept, 2 * x / (1 - rate), 0.0))
        torch.testing.assert_close(found["value"], torch.where(kept, x * x / (1 - rate), 0.0).sum())


@pytest.mark.parametrize("power", [torch.tensor(1.5), torch.tensor([1.5, 0.5, -1.0, 2.0, 0.0])])
def test_powers_of_integers(power: Tensor) -> None:
    """ONNX's Pow gives the type of the base, which made an invalid model."""
    compare_gradients(Apply(lambda x: x * (POSITIONS + 1) ** power.to(x.dtype)), (torch.randn(2, 5),))


@pytest.mark.parametrize(
    "rolled",
    [
        lambda x: x.roll(x.shape[0] // 2, 0) * x,
        lambda x: x.roll((1 - x.shape[0], 2), (0, 1)) * x,
        lambda x: x.roll(2 * x.shape[0] + 1) * x,
        lambda x: torch.fft.fftshift(x) * x,
    ],
)
@pytest.mark.parametrize("size", [0, 1, 4, 7])
def test_rolls_by_a_dynamic_size(rolled: Callable[[Tensor], Tensor], size: int) -> None:
    fresh = torch.randn(size, 5, generator=torch.Generator().manual_seed(size))
    compare_gradients(Apply(rolled), (torch.randn(3, 5),), dynamic_shapes={"input": {0: "batch"}}, fresh=(fresh,))
