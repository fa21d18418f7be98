"""The eager drop-ins where PyTorch follows a program instead of running it, and what a session says there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import convgrad_export as cg

X, W = torch.randn(2, 4, 7, 8), torch.randn(6, 2, 3, 3)
ATTRIBUTES: tuple[Any, ...] = ((2, 1), ((0, 1), (2, 1)), 1, 2)  # stride, padding, dilation, groups
UNEVEN = torch.nn.functional.pad(X, (2, 1, 0, 1))
GRAD = torch.randn_like(torch.conv2d(UNEVEN, W, None, (2, 1), 0, 1, 2))


def input_gradient(w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return cg.conv2d_input(X.shape, w, g, *ATTRIBUTES) * 2


def weight_gradient(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return cg.conv2d_weight(x, W.shape, g, *ATTRIBUTES) * 2


def transposed(g: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return cg.convolution_backward(g, x, w, [3], 2, ((0, 1), (2, 0)), 1, True, 1, 1, [True, True, True])


TRANSPOSED = (torch.randn(1, 3, 9, 8), torch.randn(1, 2, 4, 4), torch.randn(2, 3, 3, 3))
CASES = [(input_gradient, (W, GRAD)), (weight_gradient, (X, GRAD)), (transposed, TRANSPOSED)]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize(("function", "operands"), CASES)
def test_a_trace_computes_and_holds_no_constant(
    function: Callable[..., Any], operands: tuple[torch.Tensor, ...], mode: str
) -> None:
    traced = make_fx(function, tracing_mode=mode)(*operands)
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"]
    others = tuple(torch.randn_like(value) for value in operands)
    torch.testing.assert_close(traced(*others), function(*others), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("function", "operands"), CASES)
def test_tensors_without_data_have_a_gradients_shape(
    function: Callable[..., Any], operands: tuple[torch.Tensor, ...]
) -> None:
    with FakeTensorMode() as mode:
        found = function(*map(mode.from_tensor, operands))
    every, wanted = ((v if isinstance(v, tuple) else (v,)) for v in (found, function(*operands)))
    assert [(v.shape, v.dtype) for v in every] == [(v.shape, v.dtype) for v in wanted]


class Gradient(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(W)

    def forward(self, grad_output: torch.Tensor) -> torch.Tensor:
        return input_gradient(self.weight, grad_output)


def test_a_module_that_calls_a_drop_in_is_exported(tmp_path: Path) -> None:
    module, other = Gradient(), torch.randn_like(GRAD)
    program = torch.export.export(module, (GRAD,))
    torch.testing.assert_close(program.module()(other), module(other), rtol=1e-4, atol=1e-4)
    report = cg.export(module, (GRAD,), tmp_path / "gradient.onnx")
    assert report.verified
    (found,) = cg.GradientSession(tmp_path / "gradient.onnx").run({"grad_output": other}).values()
    torch.testing.assert_close(found, module(other).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_batched_derivatives_of_torchs_older_vmap(strategy: str) -> None:
    def loss(function: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda w: function((1, 2, 5), w, torch.ones(1, 2, 4, dtype=torch.float64)).pow(3).sum()

    w = torch.randn(2, 2, 2, dtype=torch.float64)
    found, wanted = (
        torch.autograd.functional.hessian(loss(f), w, vectorize=True, outer_jacobian_strategy=strategy)
        for f in (cg.conv1d_input, torch.nn.grad.conv1d_input)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("function", "operands"), CASES)
def test_functionalize_records_the_operator_too(
    function: Callable[..., Any], operands: tuple[torch.Tensor, ...]
) -> None:
    def loss(*values: torch.Tensor) -> torch.Tensor:
        results = function(*values)
        return sum(value.square().sum() for value in (results if isinstance(results, tuple) else (results,)))

    others = tuple(torch.randn_like(value) for value in operands)
    for wrapped in (function, loss, torch.func.grad(loss)):
        found = torch.func.functionalize(wrapped)
        torch.testing.assert_close(found(*others), wrapped(*others), rtol=1e-4, atol=1e-4)
        traced = make_fx(found)(*operands)
        targets = [node.target for node in traced.graph.nodes]
        assert torch.ops.aten.convolution_backward.default in targets
        torch.testing.assert_close(traced(*others), wrapped(*others), rtol=1e-4, atol=1e-4)
    outer = torch.func.grad(lambda first: torch.func.functionalize(loss)(first, *others[1:]))
    torch.testing.assert_close(outer(others[0]), torch.func.grad(loss)(*others), rtol=1e-4, atol=1e-4)
    parameter = others[0].clone().requires_grad_()  # closed over: not one of the transform's own tensors
    found = torch.func.functionalize(lambda *rest: function(parameter, *rest))(*others[1:])
    torch.testing.assert_close(found, function(*others), rtol=1e-4, atol=1e-4)


def test_a_session_refuses_tensors_that_it_cannot_read() -> None:
    session = cg.GradientSession(cg.build_model("conv1d_input", input_shape=(1, 1, 6), weight_shape=(1, 1, 2)))
    weight, grad = torch.ones(1, 1, 2), torch.ones(1, 1, 5)
    with FakeTensorMode() as mode, pytest.raises(cg.ArgumentTypeError, match="weight is a tensor of a tracer"):
        session.run({"weight": mode.from_tensor(weight), "grad_output": mode.from_tensor(grad)})
    with pytest.raises(cg.ArgumentTypeError, match="weight is a tensor of a tracer"):
        make_fx(lambda w, g: session.run({"weight": w, "grad_output": g})["grad_input"])(weight, grad)
    with pytest.raises(cg.DeviceError, match="weight is on meta, expected cpu or cuda"):
        session.run({"weight": weight.to("meta"), "grad_output": grad})
    with pytest.raises(cg.ArgumentTypeError, match="weight is a nested tensor"):
        session.run({"weight": torch.nested.nested_tensor([weight[0]]), "grad_output": grad})
    with pytest.raises(cg.ArgumentTypeError, match="weight is a masked array"):
        session.run({"weight": np.ma.masked_array(weight.numpy(), True), "grad_output": grad.numpy()})


@pytest.mark.parametrize(("function", "operands"), CASES)
def test_a_compiler_records_the_operator_too(function: Callable[..., Any], operands: tuple[torch.Tensor, ...]) -> None:
    class Calling(torch.nn.Module):
        def forward(self, *values: torch.Tensor) -> Any:
            return function(*values)

    program = torch.export.export(Calling(), operands, strict=True)
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.aten.convolution_backward.default in targets
    others = tuple(torch.randn_like(value) for value in operands)
    torch.testing.assert_close(program.module()(*others), function(*others), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*others), function(*others), rtol=1e-4, atol=1e-4)
