"""Export a module's gradients, run them on onnxruntime, and compare with float64 autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from convgrad_export.integrations.capture import capture_gradients
from convgrad_export.integrations.decompositions import onnx_decompositions
from convgrad_export.integrations.finishing import finish
from convgrad_export.integrations.translation import translate


def session(proto: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compare_gradients(
    module: nn.Module,
    args: Sequence[Any],
    *,
    value: Callable[..., torch.Tensor] | None = None,
    value_args: Sequence[torch.Tensor] = (),
    dynamic_shapes: Any = None,
    fresh: Sequence[torch.Tensor] | None = None,
    tolerance: float = 2e-5,
    opset: int = 18,
) -> Any:
    """Every input's and parameter's gradient and every updated buffer, against float64 eager.

    `tolerance` bounds the error relative to the largest magnitude of each result: float32 rounding over sums of up to a
    few thousand products, measured at 1e-7 to 2e-6 on these cases. A wrong formula is off by far more.
    """
    value = value or _weighted_squares
    floats = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    module64 = copy.deepcopy(module).double()
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    program = capture_gradients(
        module,
        args,
        wrt=[*_input_names(module, floats), *names],
        value=value,
        value_args=value_args,
        dynamic_shapes=dynamic_shapes,
        decompositions=onnx_decompositions(opset),
        unused="zeros",
    )
    proto = ir.to_proto(finish(translate(program, opset=opset).model, opset=opset))
    args = list(fresh if fresh is not None else args)
    inputs = [a for a in (*args, *value_args) if isinstance(a, torch.Tensor)]
    feed = {i.name: t.numpy() for i, t in zip(session(proto).get_inputs(), inputs, strict=True)}
    outputs = session(proto).run(None, feed)
    actual = {o.name: v for o, v in zip(proto.graph.output, outputs, strict=True)}

    args64 = [a.double().requires_grad_() if i in floats else a for i, a in enumerate(args)]
    labels = [v.double() if v.is_floating_point() else v for v in value_args]
    parameters = {n: p for n, p in module64.named_parameters() if p.requires_grad}
    with torch.backends.mkldnn.flags(enabled=False):
        scalar = value(module64(*args64), *labels)
        wanted = [*(args64[i] for i in floats), *parameters.values()]
        grads = torch.autograd.grad(scalar, wanted, allow_unused=True)
    expected = {next(s.name for s in program.outputs if s.kind == "value"): scalar.detach()}
    for name, leaf, grad in zip([*_input_names(module, floats), *parameters], wanted, grads, strict=True):
        expected[f"{name}.grad"] = torch.zeros_like(leaf) if grad is None else grad
    buffers = dict(module64.named_buffers())
    expected.update({s.name: buffers[str(s.target)] for s in program.outputs if s.kind == "buffer"})
    assert set(expected) == set(actual)
    for name, tensor in expected.items():
        reference = tensor.detach().numpy()
        assert actual[name].shape == reference.shape, name
        scale = max(float(np.abs(reference).max(initial=0.0)), 1e-6)
        error = float(np.abs(actual[name].astype(np.float64) - reference).max(initial=0.0)) / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
    return proto


def _weighted_squares(out: torch.Tensor) -> torch.Tensor:
    """A scalar without cancellation whose gradient differs for every element."""
    weighted = out * out
    for axis, size in enumerate(out.shape):
        shape = [1] * out.dim()
        shape[axis] = -1
        weighted = weighted * (1.5 + torch.cos(torch.arange(size).to(out.dtype) + axis)).reshape(shape)
    return weighted.sum()


def _input_names(module: nn.Module, floats: Sequence[int]) -> list[str]:
    import inspect

    names = list(inspect.signature(module.forward).parameters)
    taken = {n for n, _ in module.named_parameters()}
    return [f"{names[i]}_input" if names[i] in taken else names[i] for i in floats]
