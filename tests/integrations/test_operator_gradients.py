"""Every layer and loss by itself: its gradients through ONNX against float64 autograd.

A loss curve hides a factor N, so each operator that a training graph can hold has its own case here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.errors import UnsupportedOperatorError

from .gradient_modules import Apply
from .onnx_check import compare_gradients


def data(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIGNAL, IMAGE, VOLUME = (2, 4, 17), (2, 4, 9, 8), (2, 3, 7, 6, 8)
Case = tuple[str, tuple[int, ...], Callable[[], nn.Module]]

CONVOLUTION: list[Case] = [
    ("conv1d", SIGNAL, lambda: nn.Conv1d(4, 6, 3, 2)),
    ("conv2d-grouped-dilated", IMAGE, lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), 2, 2)),
    ("conv2d-depthwise", IMAGE, lambda: nn.Conv2d(4, 8, 3, 1, 1, groups=4, bias=False)),
    ("conv2d-pointwise", IMAGE, lambda: nn.Conv2d(4, 3, 1, 2)),
    ("conv2d-same-reflect", IMAGE, lambda: nn.Conv2d(4, 3, 3, padding="same", padding_mode="reflect")),
    ("conv3d", VOLUME, lambda: nn.Conv3d(3, 2, (3, 2, 1), 2, 1)),
    ("conv_transpose1d", SIGNAL, lambda: nn.ConvTranspose1d(4, 6, 4, 3)),
    ("conv_transpose2d", IMAGE, lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2)),
    ("conv_transpose2d-far", IMAGE, lambda: nn.ConvTranspose2d(4, 6, 3, output_padding=1, dilation=2)),
    ("conv_transpose2d-far-padded", IMAGE, lambda: nn.ConvTranspose2d(4, 6, 3, 1, (2, 1), (1, 2), 2, dilation=3)),
    ("conv_transpose3d", VOLUME, lambda: nn.ConvTranspose3d(3, 2, 2, 2)),
]
NORMALIZATION: list[Case] = [
    ("batch_norm1d", SIGNAL, lambda: nn.BatchNorm1d(4)),
    ("batch_norm2d", IMAGE, lambda: nn.BatchNorm2d(4)),
    ("batch_norm2d-eval", IMAGE, lambda: nn.BatchNorm2d(4).eval()),
    ("batch_norm2d-untracked", IMAGE, lambda: nn.BatchNorm2d(4, track_running_stats=False)),
    ("batch_norm2d-not-affine", IMAGE, lambda: nn.BatchNorm2d(4, affine=False)),
    ("batch_norm3d", VOLUME, lambda: nn.BatchNorm3d(3)),
    ("group_norm", IMAGE, lambda: nn.GroupNorm(2, 4)),
    ("instance_norm", IMAGE, lambda: nn.InstanceNorm2d(4, affine=True)),
    ("instance_norm-tracked", IMAGE, lambda: nn.InstanceNorm2d(4, track_running_stats=True)),
    ("layer_norm", IMAGE, lambda: nn.LayerNorm(8)),
    ("rms_norm", IMAGE, lambda: nn.RMSNorm(8)),
    ("local_response_norm", IMAGE, lambda: nn.LocalResponseNorm(3)),
    ("local_response_norm-3d", VOLUME, lambda: nn.LocalResponseNorm(2)),
    ("weight_norm", IMAGE, lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))),
    ("spectral_norm", IMAGE, lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 6, 3))),
    ("spectral_norm-eval", IMAGE, lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)).eval()),
]
POOLING: list[Case] = [
    ("avg_pool1d", SIGNAL, lambda: nn.AvgPool1d(3, 2, 1)),
    ("avg_pool2d", IMAGE, lambda: nn.AvgPool2d(3, 2, 1)),
    ("avg_pool2d-tiles", IMAGE, lambda: nn.AvgPool2d(2)),
    ("avg_pool2d-dense", IMAGE, lambda: nn.AvgPool2d(3, 1, 1)),
    ("avg_pool2d-dense-inside", IMAGE, lambda: nn.AvgPool2d((5, 3), 1, (2, 1), count_include_pad=False)),
    ("avg_pool2d-dense-even", IMAGE, lambda: nn.AvgPool2d(2, 1, 1, divisor_override=3)),
    ("avg_pool2d-dense-valid", IMAGE, lambda: nn.AvgPool2d((3, 2), 1)),
    ("avg_pool2d-gaps", IMAGE, lambda: nn.AvgPool2d(2, 4)),
    ("avg_pool2d-uneven", IMAGE, lambda: nn.AvgPool2d((3, 2), (2, 3), (1, 0), ceil_mode=True)),
    ("avg_pool2d-ceil", IMAGE, lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    ("avg_pool2d-inside", IMAGE, lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    ("avg_pool2d-inside-ceil", IMAGE, lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)),
    ("avg_pool2d-divisor", IMAGE, lambda: nn.AvgPool2d(3, 2, 1, divisor_override=5)),
    ("avg_pool3d", VOLUME, lambda: nn.AvgPool3d(3, 2, 1)),
    ("avg_pool3d-ceil", VOLUME, lambda: nn.AvgPool3d(2, 3, 1, ceil_mode=True, count_include_pad=False)),
    ("max_pool1d", SIGNAL, lambda: nn.MaxPool1d(3, 2, 1)),
    ("max_pool2d", IMAGE, lambda: nn.MaxPool2d(3, 2, 1)),
    ("max_pool2d-side-by-side", IMAGE, lambda: nn.MaxPool2d(2)),
    ("max_pool2d-side-by-side-oblong", IMAGE, lambda: nn.MaxPool2d((3, 2))),
    ("max_pool2d-side-by-side-wide", IMAGE, lambda: nn.MaxPool2d((1, 3))),
    ("max_pool2d-dilated", IMAGE, lambda: nn.MaxPool2d(2, 2, 0, 2)),
    ("max_pool2d-ceil", IMAGE, lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    ("max_pool3d", VOLUME, lambda: nn.MaxPool3d(3, 2, 1)),
    ("max_pool3d-dilated-ceil", VOLUME, lambda: nn.MaxPool3d(2, 1, 0, 2, ceil_mode=True)),
    ("adaptive_avg_pool1d", SIGNAL, lambda: nn.AdaptiveAvgPool1d(5)),
    ("adaptive_avg_pool2d", IMAGE, lambda: nn.AdaptiveAvgPool2d((4, 3))),
    ("adaptive_avg_pool2d-one", IMAGE, lambda: nn.AdaptiveAvgPool2d(1)),
    ("adaptive_avg_pool3d", VOLUME, lambda: nn.AdaptiveAvgPool3d((3, 2, 5))),
    ("adaptive_max_pool1d", SIGNAL, lambda: nn.AdaptiveMaxPool1d(5)),
    ("adaptive_max_pool2d", IMAGE, lambda: nn.AdaptiveMaxPool2d((4, 3))),
    ("adaptive_max_pool2d-one", IMAGE, lambda: nn.AdaptiveMaxPool2d(1)),
    ("adaptive_max_pool3d", VOLUME, lambda: nn.AdaptiveMaxPool3d((3, 2, 5))),
]
PADDING_AND_SAMPLING: list[Case] = [
    ("replication_pad1d", SIGNAL, lambda: nn.ReplicationPad1d((2, 1))),
    ("replication_pad2d", IMAGE, lambda: nn.ReplicationPad2d((2, 1, 0, 3))),
    ("replication_pad2d-negative", IMAGE, lambda: nn.ReplicationPad2d((2, -1, 0, 3))),
    ("replication_pad3d", VOLUME, lambda: nn.ReplicationPad3d((2, 1, 0, 3, 1, 1))),
    ("reflection_pad1d", SIGNAL, lambda: nn.ReflectionPad1d((2, 1))),
    ("reflection_pad2d", IMAGE, lambda: nn.ReflectionPad2d((2, 1, 0, 3))),
    ("reflection_pad3d", VOLUME, lambda: nn.ReflectionPad3d((2, 1, 0, 3, 1, 1))),
    ("replication_pad1d-of-cropped", SIGNAL, lambda: nn.ReplicationPad1d((2, -18))),
    ("replication_pad2d-of-cropped", IMAGE, lambda: nn.ReplicationPad2d((-8, 3, 1, -9))),
    ("replication_pad3d-of-cropped", VOLUME, lambda: nn.ReplicationPad3d((-8, 2, -1, -1, 2, -7))),
    ("reflection_pad1d-of-cropped", SIGNAL, lambda: nn.ReflectionPad1d((-15, 16))),
    ("reflection_pad2d-of-cropped", IMAGE, lambda: nn.ReflectionPad2d((7, -6, -7, 5))),
    ("reflection_pad3d-of-cropped", VOLUME, lambda: nn.ReflectionPad3d((4, -6, -1, -2, -5, 6))),
    ("zero_pad2d-negative", IMAGE, lambda: nn.ZeroPad2d((2, -1, 0, 3))),
    ("circular_pad2d", IMAGE, lambda: nn.CircularPad2d((2, 1, 0, 3))),
    ("nearest", IMAGE, lambda: nn.Upsample(scale_factor=2)),
    ("nearest-size", IMAGE, lambda: nn.Upsample(size=(13, 11))),
    ("nearest-exact", IMAGE, lambda: nn.Upsample(scale_factor=1.5, mode="nearest-exact")),
    ("linear", SIGNAL, lambda: nn.Upsample(scale_factor=2, mode="linear")),
    ("bilinear", IMAGE, lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    ("bilinear-corners", IMAGE, lambda: nn.Upsample(size=(13, 11), mode="bilinear", align_corners=True)),
    ("bicubic", IMAGE, lambda: nn.Upsample(scale_factor=2, mode="bicubic")),
    ("trilinear", VOLUME, lambda: nn.Upsample(scale_factor=2, mode="trilinear")),
    ("linear-size", SIGNAL, lambda: nn.Upsample(size=29, mode="linear", align_corners=True)),
    ("bilinear-smaller", IMAGE, lambda: nn.Upsample(size=(5, 3), mode="bilinear")),
    ("bilinear-one", IMAGE, lambda: nn.Upsample(size=(1, 5), mode="bilinear", align_corners=True)),
    ("bilinear-fraction", IMAGE, lambda: nn.Upsample(scale_factor=(1.7, 2.3), mode="bilinear")),
    ("bicubic-corners", IMAGE, lambda: nn.Upsample(size=(13, 5), mode="bicubic", align_corners=True)),
    ("trilinear-size", VOLUME, lambda: nn.Upsample(size=(9, 5, 13), mode="trilinear", align_corners=True)),
    ("nearest-1d-fraction", SIGNAL, lambda: nn.Upsample(scale_factor=1.7)),
    ("nearest-3d", VOLUME, lambda: nn.Upsample(scale_factor=(2, 1, 3))),
    ("nearest-exact-3d", VOLUME, lambda: nn.Upsample(size=(10, 5, 8), mode="nearest-exact")),
    (
        "bilinear-recomputed",
        IMAGE,
        lambda: Apply(
            lambda x: functional.interpolate(x, scale_factor=1.6, mode="bilinear", recompute_scale_factor=True)
        ),
    ),
    *[
        (
            f"antialiased-{mode}-{name}",
            IMAGE,
            lambda mode=mode, options=options: Apply(  # type: ignore[misc]
                lambda x: functional.interpolate(x, mode=mode, antialias=True, **options)
            ),
        )
        for mode in ("bilinear", "bicubic")
        for name, options in {
            "size": {"size": (5, 13)},
            "factor": {"scale_factor": (0.37, 1.6)},
            "corners": {"size": (1, 3), "align_corners": True},
        }.items()
    ],
    ("area", IMAGE, lambda: Apply(lambda x: functional.interpolate(x, (4, 5), mode="area"))),
    ("pixel_shuffle", IMAGE, lambda: nn.PixelShuffle(2)),
    ("pixel_unshuffle", (2, 3, 6, 8), lambda: nn.PixelUnshuffle(2)),
    ("unfold", IMAGE, lambda: nn.Unfold(3, stride=2, padding=1)),
    ("unfold of one sample", (3, 9, 8), lambda: nn.Unfold(3, stride=2, padding=1)),
    ("fold of one sample", (18, 72), lambda: nn.Fold((9, 8), 3, stride=1, padding=1)),
    ("fold", (2, 18, 72), lambda: nn.Fold((9, 8), 3, stride=1, padding=1)),
    ("affine_grid", IMAGE, lambda: Apply(lambda x: functional.affine_grid(x[:, 0, :2, :3], [2, 3, 5, 4], False))),
    (
        "affine_grid-corners",
        IMAGE,
        lambda: Apply(lambda x: functional.affine_grid(x[:, 1, :2, :3], [2, 3, 2, 4], True)),
    ),
    (
        "affine_grid-volume",
        VOLUME,
        lambda: Apply(lambda x: functional.affine_grid(x[:, 0, 1, :3, :4], [2, 1, 3, 5, 4], False)),
    ),
    ("grid_sample", IMAGE, lambda: Apply(lambda x: functional.grid_sample(x, _grid(x), align_corners=False))),
]
ACTIVATION: list[Case] = [
    (name, IMAGE, lambda name=name: getattr(nn, name)())  # type: ignore[misc]
    for name in (
        *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid"),
        *("Mish", "PReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softmax2d", "Softplus", "Softshrink"),
        *("Softsign", "Tanh", "Tanhshrink"),
    )
] + [
    ("GLU", IMAGE, lambda: nn.GLU(1)),
    ("RReLU-eval", IMAGE, lambda: nn.RReLU().eval()),
    ("Threshold", IMAGE, lambda: nn.Threshold(0.5, 0.2)),
]
_ROWS, _COLUMNS = torch.tensor([0, 1, 1]), torch.tensor([2, 3, 3], dtype=torch.int32)
TENSOR_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "index-int32": lambda x: x[:, _COLUMNS] * x[:, _ROWS[:, None], _COLUMNS].sum(2, keepdim=True),
    "index_put-int32": lambda x: torch.index_put(x * 1, (_ROWS, _COLUMNS), x[0, :3], accumulate=True),
    "index_select-int32": lambda x: x.index_select(1, _COLUMNS),
    "copy-broadcast": lambda x: torch.zeros(2, 4, 9, 8, dtype=x.dtype).copy_(x[:1]) * x,
    "in-place-slice": lambda x: _assigned(x),
    "as_strided": lambda x: torch.as_strided(x.contiguous(), (3, 4), (20, 2), 5) * 2,
    "unfold-windows": lambda x: x.unfold(2, 3, 2),
    "diagonal": lambda x: torch.diagonal(x, 1, 2, 3) * 3,
    "diagonal-below": lambda x: torch.diagonal(x, -2, 3, 1) * 3,
    "diagonal-written": lambda x: _with_diagonal(x) * 2,
    "amax-all": lambda x: x * x.amax(),
    "amin-all": lambda x: x * torch.amin(x, (), True) + x.sum().amin(),
    "squeeze-one": lambda x: x[:, :1].squeeze(1) * x[:, 1].squeeze(1),
    "squeeze-several": lambda x: x[:, 2:3].squeeze((1, -1)) * x[:, 3].squeeze((0, 1)),
    "median": lambda x: x.median(-1)[0],
    "prod": lambda x: x.prod(3),
    "cdist": lambda x: torch.cdist(x[:, :, 0], x[:, :, 1] * 2),
    "cumsum": lambda x: x.cumsum(2) * x,
    "sort": lambda x: x.sort(-1)[0],
    "topk": lambda x: x.topk(3)[0],
    "logsumexp": lambda x: x.logsumexp((2, 3)),
    "std": lambda x: x.std((2, 3)),
    "normalize": lambda x: functional.normalize(x, dim=1),
    "roll": lambda x: x.roll((1, 2), (2, 3)) * x,
    "flip": lambda x: x.flip(2) * x,
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x.sin()),
    "gather": lambda x: x.gather(3, torch.zeros(2, 4, 9, 3, dtype=torch.long) + 2),
    "index": lambda x: x[:, [0, 2, 2]] * 2,
    "max-dim": lambda x: x.max(1)[0],
    "amax": lambda x: x.amax((2, 3)),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "tril": lambda x: x.tril() * x,
    "where": lambda x: torch.where(x > 0, x, x * x),
    "stack": lambda x: torch.stack(x.unbind(1), -1) * 2,
    "power": lambda x: x.abs().pow(1.7),
    "clamp-kinks": lambda x: x.round().clamp(-1.0, 1.0) * x.clamp(-1.0, 1.0),
    "hardswish-kinks": lambda x: functional.hardswish(_multiples_of_three(x)) * x,
    "hardsigmoid-kinks": lambda x: functional.hardsigmoid(_multiples_of_three(x)) * x,
    "abs-kinks": lambda x: (x * (x > 0)).abs() * x + (x * (x > 1)).abs(),
    "maximum-ties": lambda x: torch.maximum(x, x.relu()) * torch.minimum(x, x.relu()),
    "max-pool-ties": lambda x: functional.max_pool2d((x * (x > 1)), 3, 2, 1) * 2,
    "max-pool-ties-side-by-side": lambda x: functional.max_pool2d((x * (x > 1)), 2) * x[:, :, :4, :4],
    "max-pool-ties-everywhere": lambda x: functional.max_pool2d(x.round().clamp(0, 1), (3, 4)) * x[:, :, :3, :2],
    "max-pool-unbatched": lambda x: functional.max_pool2d(x[0], 2) * x[1, :, :4, :4],
    "amax-ties": lambda x: (x * (x > 1)).amax(3),
    "channel-shuffle": lambda x: functional.channel_shuffle(x, 2) * x,
    "matmul-batched": lambda x: torch.bmm(x[:, 0], x[:, 1].transpose(1, 2)),
    "index-tensors": lambda x: x[torch.tensor([1, 0]), torch.tensor([3, 2])] * 2,
    "index-repeated": lambda x: x.index_select(2, torch.tensor([4, 4, 0])) * x[:, :, :3],
    "index-add": lambda x: x.index_add(2, torch.tensor([1, 1, 5]), x[:, :, :3].sin()),
    "scatter": lambda x: x.scatter(3, torch.zeros(2, 4, 9, 1, dtype=torch.long) + 2, x[..., :1].cos()),
    "scatter-add": lambda x: (x * 2).scatter_add(3, torch.ones(2, 4, 9, 8, dtype=torch.long), x.sin()),
    "masked-fill": lambda x: x.masked_fill(x > 0.3, 2.0) * x,
    "repeat": lambda x: x.repeat(1, 2, 1, 1) * 2,
    "repeat-interleave": lambda x: x.repeat_interleave(2, 3),
    "expand": lambda x: x[:, :1].expand(2, 5, 9, 8) * 2,
    "pad-constant": lambda x: functional.pad(x, (1, 2, -1, 3), value=0.5),
    "chunk-cat": lambda x: torch.cat([part * i for i, part in enumerate(x.chunk(4, 1))], 2),
    "cumprod": lambda x: (x.abs() + 0.5).cumprod(3),
    "var-mean": lambda x: torch.var_mean(x, (0, 2, 3))[0] + torch.var_mean(x, (0, 2, 3))[1],
    "softmax-log": lambda x: torch.log_softmax(x, 1) + torch.softmax(x, 3),
    "softmax-inner": lambda x: torch.softmax(x * 3, -2) * x + torch.softmax(x, 0) * torch.log_softmax(x * 2, -1),
    "softmax-large": lambda x: torch.log_softmax(x * 200, 2) + torch.softmax(x * 200 - 1000, 1) * x,
    "norm": lambda x: torch.linalg.vector_norm(x, dim=(2, 3)),
    "frobenius": lambda x: torch.linalg.matrix_norm(x),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x.sin(), x.cos()),
    "attention-causal": lambda x: functional.scaled_dot_product_attention(x, x.sin(), x.cos(), is_causal=True),
    "addcmul": lambda x: torch.addcmul(x, x, x.sin(), value=0.3) + torch.addcdiv(x, x, x.abs() + 1),
    "atan2": lambda x: torch.atan2(x, x.abs() + 1) + torch.hypot(x, x + 3),
    "lerp": lambda x: torch.lerp(x, x.sin(), x.sigmoid()),
    "meshgrid": lambda x: x * torch.stack(torch.meshgrid(x[0, 0, :, 0], x[0, 0, 0], indexing="ij")).sum(0),
    "outer": lambda x: torch.outer(x[0, 0, 0], x[0, 1, 0]) + torch.kron(x[0, 0, :2, :2], x[0, 1, :4, :4]),
    "bilinear-form": lambda x: functional.bilinear(x[0, 0], x[0, 1], x[1, :3, :8].reshape(3, 8, 8)),
    "bool-sum": lambda x: x * (x > 0).sum(),
    "integer-mean": lambda x: x * (torch.arange(8) * 0.5),
}


def _grid(x: Tensor) -> Tensor:
    return 0.9 * torch.sin(torch.arange(2 * 5 * 6 * 2).to(x.dtype).view(2, 5, 6, 2))


def _multiples_of_three(x: Tensor) -> Tensor:
    """Values at the kinks of hardswish and hardsigmoid, with the gradient of 3 * x."""
    return 3 * (x.detach().round() + (x - x.detach()))


def _assigned(x: Tensor) -> Tensor:
    result = x.clone() * x
    result[:, 0] = x[:, 1] * 2
    return result


def _with_diagonal(x: Tensor) -> Tensor:
    result = x * x
    result.diagonal(1, 2, 3).copy_(x[..., :7].sum(2))
    return result


def _check(case: Case, **options: Any) -> None:
    torch.manual_seed(5)
    _, shape, build = case
    compare_gradients(build(), (data(*shape),), **options)


@pytest.mark.parametrize("case", CONVOLUTION + NORMALIZATION, ids=lambda case: case[0])
def test_convolution_and_normalization(case: Case) -> None:
    _check(case)


@pytest.mark.parametrize("case", POOLING + PADDING_AND_SAMPLING, ids=lambda case: case[0])
def test_pooling_padding_and_sampling(case: Case) -> None:
    _check(case)


@pytest.mark.parametrize("case", ACTIVATION, ids=lambda case: case[0])
def test_activations(case: Case) -> None:
    _check(case)


@pytest.mark.parametrize("case", ACTIVATION, ids=lambda case: case[0])
def test_activations_exactly_at_their_kinks(case: Case) -> None:
    """Zeros are common (a convolution over zeros), and so are clamps: which side the derivative takes is part of it."""
    torch.manual_seed(5)
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.0, 0.1, 0.5, 1.0, 3.0, 6.0, 20.0, 21.0])
    compare_gradients(case[2](), (values.repeat(4, 2).reshape(2, 4, 3, 4),))


@pytest.mark.parametrize("name", TENSOR_FUNCTIONS)
def test_tensor_functions(name: str) -> None:
    _check((name, IMAGE, lambda: Apply(TENSOR_FUNCTIONS[name])))


FULLY_DYNAMIC = [
    *(case for case in CONVOLUTION if case[1] == IMAGE and "reflect" not in case[0]),
    *(case for case in NORMALIZATION if case[0] in ("batch_norm2d", "batch_norm2d-eval", "group_norm")),
    *(case for case in POOLING if case[1] == IMAGE),
    *(case for case in PADDING_AND_SAMPLING if case[0] in ("replication_pad2d", "reflection_pad2d", "nearest")),
    *(
        case
        for case in PADDING_AND_SAMPLING
        if case[0] in ("replication_pad2d-negative", "reflection_pad2d-of-cropped")
    ),
    *(
        case
        for case in PADDING_AND_SAMPLING
        if case[1] == IMAGE and case[0].startswith(("bilinear", "bicubic", "antialiased"))
    ),
]


@pytest.mark.parametrize("case", FULLY_DYNAMIC, ids=lambda case: case[0])
def test_dynamic_batch_height_and_width(case: Case) -> None:
    shapes = ({0: "batch", 2: "height", 3: "width"},)
    _check(case, dynamic_shapes=shapes, fresh=(data(3, 4, 12, 11, seed=4),))


@pytest.mark.parametrize("opset", [13, 15, 17, 23])
@pytest.mark.parametrize(
    "name",
    [
        *("conv2d-grouped-dilated", "batch_norm2d", "max_pool2d", "max_pool3d", "layer_norm", "avg_pool2d-ceil"),
        *("adaptive_avg_pool2d", "replication_pad2d", "bilinear", "nearest-size", "group_norm"),
    ],
)
def test_other_opsets(name: str, opset: int) -> None:
    (case,) = [c for c in CONVOLUTION + NORMALIZATION + POOLING + PADDING_AND_SAMPLING if c[0] == name]
    _check(case, opset=opset)


class Attention(nn.MultiheadAttention):
    def forward(self, query: Tensor, key: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(query, key, memory)[0]


class Recurrent(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)[0]


SEQUENCE_LAYERS: list[tuple[str, Callable[[], nn.Module], int]] = [
    ("linear", lambda: nn.Linear(8, 5), 1),
    ("gru", lambda: Recurrent(nn.GRU(8, 5, batch_first=True)), 1),
    ("lstm", lambda: Recurrent(nn.LSTM(8, 5, 2, batch_first=True, bidirectional=True)), 1),
    ("multihead_attention", lambda: Attention(8, 2, batch_first=True), 3),
    ("transformer_encoder", lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1),
]


@pytest.mark.parametrize(("name", "build", "inputs"), SEQUENCE_LAYERS, ids=lambda v: v if isinstance(v, str) else "")
def test_sequence_layers(name: str, build: Callable[[], nn.Module], inputs: int) -> None:
    torch.manual_seed(5)
    compare_gradients(build(), tuple(data(2, 5, 8, seed=i) for i in range(inputs)))


@pytest.mark.parametrize("opset", [13, 18])
def test_embedding(opset: int) -> None:
    torch.manual_seed(5)
    compare_gradients(nn.Embedding(10, 4, padding_idx=1), (torch.tensor([[1, 2, 2], [9, 0, 1]]),), opset=opset)


class Scale(nn.Module):
    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


SCORES, PIXELS = data(4, 7), data(2, 5, 4, 3)
LABELS, IGNORED = torch.tensor([1, 0, 6, 3]), torch.tensor([1, -100, 6, 3])
PIXEL_LABELS = torch.randint(0, 5, (2, 4, 3), generator=torch.Generator().manual_seed(1))
PIXEL_IGNORED = PIXEL_LABELS.masked_fill(torch.eye(4, 3, dtype=torch.bool), -100)
SOFT = torch.softmax(data(4, 7, seed=8), 1)
SIGNS = (SOFT > 0.1).float() * 2 - 1


def weights(like: Tensor, count: int = 7) -> Tensor:
    return torch.linspace(0.5, 1.5, count, dtype=like.dtype)


LOSSES: dict[str, tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "cross_entropy": (SCORES, LABELS, functional.cross_entropy),
    "cross_entropy-sum": (SCORES, LABELS, lambda o, t: functional.cross_entropy(o, t, reduction="sum")),
    "cross_entropy-none": (SCORES, LABELS, lambda o, t: functional.cross_entropy(o, t, reduction="none").pow(2).sum()),
    "cross_entropy-weighted": (SCORES, LABELS, lambda o, t: functional.cross_entropy(o, t, weight=weights(o))),
    "cross_entropy-ignored": (SCORES, IGNORED, functional.cross_entropy),
    "cross_entropy-ignored-class": (SCORES, LABELS, lambda o, t: functional.cross_entropy(o, t, ignore_index=6)),
    "cross_entropy-smoothed": (SCORES, LABELS, lambda o, t: functional.cross_entropy(o, t, label_smoothing=0.1)),
    "cross_entropy-everything": (
        SCORES,
        IGNORED,
        lambda o, t: functional.cross_entropy(o, t, weight=weights(o), label_smoothing=0.1),
    ),
    "cross_entropy-soft": (SCORES, SOFT, functional.cross_entropy),
    "cross_entropy-pixels": (PIXELS, PIXEL_LABELS, functional.cross_entropy),
    "cross_entropy-pixels-ignored": (PIXELS, PIXEL_IGNORED, functional.cross_entropy),
    "cross_entropy-pixels-everything": (
        PIXELS,
        PIXEL_IGNORED,
        lambda o, t: functional.cross_entropy(o, t, weight=weights(o, 5), label_smoothing=0.2),
    ),
    "nll": (SCORES, LABELS, lambda o, t: functional.nll_loss(torch.log_softmax(o, 1), t)),
    "nll-weighted": (SCORES, IGNORED, lambda o, t: functional.nll_loss(torch.log_softmax(o, 1), t, weight=weights(o))),
    "mse": (SCORES, SOFT, functional.mse_loss),
    "l1": (SCORES, SOFT, functional.l1_loss),
    "smooth_l1": (SCORES, SOFT, functional.smooth_l1_loss),
    "huber": (SCORES, SOFT, functional.huber_loss),
    "bce": (SCORES, SOFT, lambda o, t: functional.binary_cross_entropy(torch.sigmoid(o), t)),
    "bce-logits": (
        SCORES,
        SOFT,
        lambda o, t: functional.binary_cross_entropy_with_logits(o, t, pos_weight=weights(o)),
    ),
    "kl_div": (SCORES, SOFT, lambda o, t: functional.kl_div(torch.log_softmax(o, 1), t, reduction="batchmean")),
    "cosine_embedding": (
        SCORES,
        SOFT,
        lambda o, t: functional.cosine_embedding_loss(o, t, torch.ones(4, dtype=o.dtype)),
    ),
    "multi_margin": (SCORES, LABELS, functional.multi_margin_loss),
    "multi_margin-weighted": (
        SCORES,
        LABELS,
        lambda o, t: functional.multi_margin_loss(o, t, p=2, margin=0.7, weight=weights(o)),
    ),
    "multilabel_margin": (
        SCORES,
        torch.tensor([[3, 0, -1, 1, 0, 0, 0]] * 2 + [[6, 5, 4, 3, 2, 1, 0], [-1, 2, 3, 4, 5, 6, 0]]),
        functional.multilabel_margin_loss,
    ),
    "triplet_margin": (SCORES, SOFT, lambda o, t: functional.triplet_margin_loss(o, t, t.roll(1, 0))),
    "poisson_nll": (SCORES, SOFT, functional.poisson_nll_loss),
    "gaussian_nll": (SCORES, SOFT, lambda o, t: functional.gaussian_nll_loss(o, t, t + 0.1)),
    "hinge_embedding": (SCORES, SIGNS, functional.hinge_embedding_loss),
    "soft_margin": (SCORES, SIGNS, functional.soft_margin_loss),
    "multilabel_soft_margin": (SCORES, (SIGNS + 1) / 2, functional.multilabel_soft_margin_loss),
    "dice": (PIXELS, functional.one_hot(PIXEL_LABELS, 5).permute(0, 3, 1, 2).float(), lambda o, t: _dice(o, t)),
}


def _dice(output: Tensor, target: Tensor) -> Tensor:
    probability = torch.softmax(output, 1)
    overlap = (probability * target).sum((2, 3))
    return 1 - (2 * overlap / (probability.sum((2, 3)) + target.sum((2, 3)))).mean()


@pytest.mark.parametrize("name", ["l1", "smooth_l1", "huber", "multi_margin", "hinge_embedding"])
def test_losses_exactly_at_their_kinks(name: str) -> None:
    _, _, loss = LOSSES[name]
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.0, 1.0, 0.5]).repeat(4, 1)
    target = LABELS if name == "multi_margin" else torch.tensor([0.0, 0.0, 1.0, 1.0, -1.0, 1.0, 0.5]).repeat(4, 1)
    compare_gradients(Scale(scores.shape), (scores,), value=loss, value_args=(target,))


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    output, target, loss = LOSSES[name]
    compare_gradients(Scale(output.shape), (output,), value=loss, value_args=(target,))


def test_an_operator_without_translation_is_refused_with_its_module() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(x)

    model = nn.Sequential(nn.Conv2d(4, 3, 1), Spectrum())
    with pytest.raises(UnsupportedOperatorError, match=r"(?s)aten\._linalg_svd.*called by 1.*Nothing was written"):
        compare_gradients(model, (data(*IMAGE),))


BEHIND = {
    "sqrt": Tensor.sqrt,
    "log": Tensor.log,
    "reciprocal": Tensor.reciprocal,
    "rsqrt": Tensor.rsqrt,
    "root": lambda y: y**0.3,
}
IN_FRONT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": functional.relu6,
    "hardsigmoid": functional.hardsigmoid,
    "hardswish": lambda x: functional.hardswish(x).abs(),
    "max_pool": lambda x: functional.max_pool2d(torch.relu(x), 2),
}


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("in_front", IN_FRONT)
def test_an_infinite_gradient_meets_a_slope_of_zero(in_front: str, behind: str) -> None:
    """PyTorch's kernels give 0 there, and a product would give not-a-number."""
    module = Apply(lambda x: BEHIND[behind](IN_FRONT[in_front](x)))
    x = data(*IMAGE) * 4
    report = cg.export_gradient(module, (x,), verify=False)
    (gradient,) = [v for n, v in cg.GradientSession(report.model).run({"input": x}).items() if n.endswith(".grad")]
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(module(leaf).sum(), leaf)[0], rtol=1e-4, atol=1e-4)
    assert "Where" in report.operators


def test_gradients_of_convolutions_meet_a_slope_of_zero_in_a_product() -> None:
    """Where takes onnxruntime eleven times as long."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Hardswish())
    report = cg.export_gradient(nn.Sequential(net, nn.Conv2d(4, 2, 1)), (data(*IMAGE),), wrt="parameters")
    assert "Where" not in report.operators


def test_complex_gradients_without_translation_are_refused_by_operator_and_module() -> None:
    module = nn.Sequential(nn.Conv1d(2, 4, 3), Apply(lambda x: torch.fft.rfft(x).abs()))
    message = r"aten\.where\.self, called by 1, computes with complex numbers.*Nothing was written"
    with pytest.raises(UnsupportedOperatorError, match=message):
        cg.export_gradient(module, (torch.randn(3, 2, 20),))


def test_arguments_without_translation_are_refused_by_operator_and_module() -> None:
    module = nn.Sequential(nn.Identity(), Apply(lambda x: torch.histc(x)))
    with pytest.raises(
        UnsupportedOperatorError, match=r"aten\.histc\.default, called by 1, has no ONNX translation for"
    ):
        cg.export(module, (torch.randn(4, 4),))


def test_a_dynamic_size_as_a_number_of_groups_is_refused_by_argument() -> None:
    kernel = torch.randn(1, 1, 3, 3)
    module = Apply(lambda x: functional.conv2d(x, kernel.expand(x.shape[1], -1, -1, -1), groups=x.shape[1]))
    message = r"aten\.convolution\.default, .* takes a number that depends on a dynamic size .*\(groups\)"
    with pytest.raises(UnsupportedOperatorError, match=message):
        cg.export(module, (data(*IMAGE),), dynamic_shapes={"input": {1: "channels"}})


def test_an_operator_that_needs_its_data_is_refused_by_name_and_line() -> None:
    class Spoken(nn.Module):
        def forward(self, x: Tensor, target: Tensor, lengths: Tensor, sizes: Tensor) -> Tensor:
            return torch.ctc_loss(x.log_softmax(2), target, lengths, sizes)

    args = torch.randn(9, 2, 5), torch.ones(2, 3, dtype=torch.int64), torch.tensor([9, 9]), torch.tensor([3, 3])
    with pytest.raises(UnsupportedOperatorError, match=r"test_operator_gradients.*ctc_loss.*aten\._ctc_loss\.Tensor"):
        cg.export(Spoken(), args)
