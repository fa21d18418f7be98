"""float16 and bfloat16 models: every layer's gradient, verified against float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg

from .gradient_modules import Apply


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


INDEX = torch.tensor([0, 2, 2, 1])
PLACES = torch.zeros(2, 4, 9, 8, dtype=torch.int64)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(8),
    "layer_norm-plane": lambda: nn.LayerNorm((9, 8)),
    "layer_norm-frozen": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "max_pool2d": lambda: nn.MaxPool2d(2),
    "max_pool2d-overlapping": lambda: nn.MaxPool2d(3, 2, 1),
    "adaptive_max_pool2d": lambda: nn.AdaptiveMaxPool2d(2),
    "gather": lambda: Apply(lambda x: x.gather(1, PLACES)),
    "index": lambda: Apply(lambda x: x[:, INDEX]),
    "index_add": lambda: Apply(lambda x: torch.zeros_like(x).index_add(1, INDEX, x)),
    "scatter_reduce": lambda: Apply(lambda x: torch.zeros_like(x).scatter_reduce(1, PLACES, x, "sum")),
    "grid_sample": lambda: Apply(
        lambda x: functional.grid_sample(x, x[:, :2].permute(0, 2, 3, 1) * 0.3, align_corners=False)
    ),
    "conv-pool": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    report = cg.export_gradient(
        LAYERS[name]().to(dtype),
        (data(2, 4, 9, 8).to(dtype),),
        wrt=["inputs", "parameters"],
        of=lambda output: output.float().square().mean(),
        samples=1,
    )
    assert report.verified


def test_transformer_in_float16() -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).half()
    report = cg.export_gradient(module, (data(2, 5, 8).half(),), wrt="parameters", of=lambda o: o.float().mean())
    assert report.verified


def test_inference_keeps_layer_normalization_in_float16() -> None:
    model = cg.export(nn.LayerNorm(8).half().eval(), (data(2, 8).half(),)).model
    assert [node.op_type for node in model.graph] == ["LayerNormalization"]


def test_training_in_bfloat16_is_refused() -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten()).bfloat16()
    with pytest.raises(cg.DTypeError, match=r"0\.weight, 0\.bias are bfloat16, expected float32"):
        cg.export_training_step(module, "cross_entropy", "sgd", (data(2, 4, 9, 8).bfloat16(), torch.tensor([0, 1])))


class Extreme(nn.Module):
    """Of computed values, which onnxruntime keeps in float32 on their way to the comparison."""

    def __init__(self, name: str, axes: tuple[int, ...], keepdim: bool) -> None:
        super().__init__()
        self.reduce, self.axes, self.keepdim = getattr(torch, name), axes, keepdim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduce(x / 3, self.axes, self.keepdim)


@pytest.mark.parametrize(("axes", "keepdim"), [((1,), False), ((2, 1), True)])
@pytest.mark.parametrize("name", ["amax", "amin"])
def test_an_element_is_the_extreme_in_float16(name: str, axes: tuple[int, ...], keepdim: bool) -> None:
    """None equalled the rounded extreme, and the gradient was NaN."""
    report = cg.export_gradient(Extreme(name, axes, keepdim), (data(4, 3, 6).half(),), wrt="inputs", of="sum")
    assert report.verified


def test_a_comparison_with_the_extremes_of_other_axes_stays(tmp_path: Path) -> None:
    """The maximum of each column with each row of a square."""
    module = Apply(lambda x: torch.where(x.amax(0).unsqueeze(1) == x, x * 2, x)).half()
    x = torch.arange(16.0).reshape(4, 4).flip(1).half()
    x[1, 2] = x.amax(0)[1]
    cg.export(module, (x,), tmp_path / "model.onnx", verify=False)
    (y,) = cg.GradientSession(tmp_path / "model.onnx").run({"input": x.numpy()}).values()
    assert torch.equal(torch.from_numpy(y), module(x))
    assert not torch.equal(module(x), x)
