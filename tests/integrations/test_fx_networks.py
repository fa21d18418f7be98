"""Public networks through the FX pass: every gradient of a joint graph against eager float64."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import convgrad_export as cg
from convgrad_export.integrations.fx_pass import TARGET

from ..networks import NETWORKS, Network, mean_square

QUICK = ("resnet18", "mobilenet_v3_small", "r3d_18")
SLOW = ("densenet121", "convnext_tiny", "mobilenetv4_conv_small", "resnest14d", "unet_resnet18", "monai_unet3d")
CASES = [
    pytest.param(network, id=network.name, marks=[pytest.mark.slow] if network.name in SLOW else [])
    for network in NETWORKS
    if network.name in (*QUICK, *SLOW)
]


def gradients_of(module: nn.Module):
    """Function of (parameters, arguments) that gives the gradients of both, in eager autograd."""
    buffers = dict(module.named_buffers())

    def gradients(parameters: dict[str, Tensor], arguments: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in (*parameters.values(), *arguments)]
        own = dict(zip(parameters, leaves, strict=False))
        copies = {name: value.clone() for name, value in buffers.items()}  # BatchNorm writes to them
        output = torch.func.functional_call(module, {**own, **copies}, tuple(leaves[len(own) :]))
        found = torch.autograd.grad(mean_square(output), leaves, allow_unused=True, materialize_grads=True)
        return list(found)

    return gradients


@pytest.mark.peer
@pytest.mark.parametrize("network", CASES)
def test_every_gradient_of_a_network_agrees_with_eager_float64(network: Network) -> None:
    if importlib.util.find_spec(network.package) is None:
        pytest.skip(f"{network.package} is not installed")
    torch.manual_seed(0)
    module = network.build().double().train()
    for part in module.modules():
        if isinstance(part, nn.Dropout) or type(part).__name__ in ("StochasticDepth", "DropPath"):
            part.eval()
    arguments = tuple(value.double() for value in network.inputs())
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    function = gradients_of(module)
    with torch.backends.mkldnn.flags(enabled=False):
        expected = function(parameters, arguments)
        traced = make_fx(function)(parameters, arguments)
        for lowering in ("auto", "portable"):
            graph = copy.deepcopy(traced)
            found = len(graph.graph.find_nodes(op="call_function", target=TARGET))
            result = cg.rewrite_convolution_backward(graph, lowering=lowering)
            assert result.rewritten == found > 0
            assert not graph.graph.find_nodes(op="call_function", target=TARGET)
            for name, got, want in zip([*parameters, "input"], graph(parameters, arguments), expected, strict=True):
                scale = want.abs().max().item() or 1.0
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * scale, msg=lambda m, n=name: f"{n}: {m}")
