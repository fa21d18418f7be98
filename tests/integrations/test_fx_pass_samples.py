"""PyTorch's own OpInfo samples for convolutions through the pass: string paddings, unbatched inputs, groups."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import convgrad_export as cg

pytest.importorskip("expecttest", reason="torch.testing._internal needs it; the test extra installs it")
from torch.testing._internal.common_methods_invocations import op_db

NAMES = [f"nn.functional.conv{rank}d" for rank in (1, 2, 3)]
NAMES += [f"nn.functional.conv_transpose{rank}d" for rank in (1, 2, 3)]


@pytest.mark.parametrize("lowering", ["auto", "portable"])
@pytest.mark.parametrize("name", NAMES)
def test_samples_agree_with_eager_float64(name, lowering):
    (op,) = [op for op in op_db if op.name == name]
    torch.manual_seed(0)
    ran = 0
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        tensors = [value for value in (sample.input, *sample.args) if isinstance(value, torch.Tensor)]
        rest = [value for value in sample.args if not isinstance(value, torch.Tensor)]
        differentiable = [value.detach().requires_grad_() for value in tensors]

        def gradients(*values, sample=sample, rest=rest):
            y = op(*values, *rest, **sample.kwargs)
            return torch.autograd.grad(y, values, torch.cos(torch.arange(y.numel())).double().reshape(y.shape))

        graph = make_fx(gradients)(*differentiable)
        assert cg.rewrite_convolution_backward(graph, lowering=lowering).rewritten == 1
        for ours, expected in zip(graph(*differentiable), gradients(*differentiable), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
        ran += 1
    assert ran >= 3
