"""Forward convolutions that stand for Conv, run by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional

from convgrad_export.emit.onnx import GraphOps
from convgrad_export.geometry import ConvGeometry
from convgrad_export.runtime.session import GradientSession
from convgrad_export.torch_convolution import last_axis_first

from ..cases import ConvCase

_TYPES = {"float32": ir.DataType.FLOAT, "float64": ir.DataType.DOUBLE}


def forward_model(g: ConvGeometry, body: Callable[..., Any], dtype: str = "float32") -> ir.Model:
    """`body` as a model of any batch."""
    ops, tensor = GraphOps(), ir.TensorType(_TYPES[dtype])
    shapes = {"input": ("batch", *g.input_shape[1:]), "weight": g.weight_shape}
    inputs = {n: ir.Value(name=n, type=tensor, shape=ir.Shape(s)) for n, s in shapes.items()}
    output = body(ops, g.with_batch("batch"), inputs["input"], inputs["weight"])
    output.name, output.type, output.shape = "output", tensor, ir.Shape(("batch", *g.output_shape[1:]))
    graph = ir.Graph(
        list(inputs.values()),
        [output],
        nodes=ops.nodes,
        initializers=ops.initializers,
        opset_imports={"": 13},
        name="forward",
    )
    return ir.Model(graph, ir_version=7)


def convolved(g: ConvGeometry, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """PyTorch's result, whatever the padding."""
    padded = functional.pad(x, last_axis_first(g.pads))
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[g.rank - 1]
    return convolution(padded, w, None, g.stride, 0, g.dilation, g.groups)


def assert_forward_is_exact(case: ConvCase, body: Callable[..., Any], dtypes: Sequence[str]) -> None:
    g = case.geometry
    operands = case.operands("float64", integers=True)
    x, w = torch.from_numpy(operands["input"]), torch.from_numpy(operands["weight"])
    expected = convolved(g, x, w).numpy()
    for dtype in dtypes:
        session = GradientSession(ir.to_proto(forward_model(g, body, dtype)), threads=1)
        (result,) = session.run({n: operands[n].astype(dtype) for n in ("input", "weight")}).values()
        assert result.dtype == dtype
        assert np.array_equal(result, expected)
