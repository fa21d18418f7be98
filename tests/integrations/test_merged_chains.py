"""Reshapes and Transposes in a row become one, or none, with the same results, where nothing reads what is between."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import parser

import convgrad_export as cg
from convgrad_export.integrations.finishing import finish

from .onnx_check import session

HEAD = '<ir_version: 9, opset_import: ["" : 18]>\nagraph (float[N, 3, 4] x) => ({outputs})\n<{constants}> {{ {body} }}'
SHAPES = "int64[2] constant_pair = {-1, 12}, int64[3] constant_triple = {-1, 2, 6}, int64[3] constant_zero = {0, 2, 6}"


def finished(body: str, outputs: str) -> collections.Counter[str]:
    """Operators after finishing; results are compared with the graph before it, at batches 2 and 0."""
    text = HEAD.format(outputs=outputs, constants=SHAPES, body=body)
    before = parser.parse_model(text)
    after = ir.to_proto(finish(ir.from_proto(parser.parse_model(text))))
    for batch in (2, 0):
        x = np.arange(batch * 12, dtype=np.float32).reshape(batch, 3, 4)
        for expected, found in zip(
            session(before).run(None, {"x": x}), session(after).run(None, {"x": x}), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
            assert found.shape == expected.shape
    return collections.Counter(node.op_type for node in after.graph.node)


@pytest.mark.parametrize(
    ("body", "outputs", "expected"),
    [
        pytest.param(
            "a = Reshape(x, constant_pair) y = Reshape(a, constant_triple)",
            "float[N, 2, 6] y",
            {"Reshape": 1},
            id="two reshapes",
        ),
        pytest.param(
            "a = Reshape(x, constant_pair) b = Reshape(a, constant_triple) c = Reshape(b, constant_pair) y = Neg(c)",
            "float[N, 12] y",
            {"Reshape": 1, "Neg": 1},
            id="three reshapes",
        ),
        pytest.param(
            "a = Reshape(x, constant_pair) b = Reshape(a, constant_zero) y = Neg(b)",
            "float[N, 2, 6] y",
            {"Reshape": 2, "Neg": 1},
            id="a size of the tensor between",
        ),
        pytest.param(
            "a = Reshape(x, constant_pair) y = Reshape(a, constant_triple) z = Neg(a)",
            "float[N, 2, 6] y, float[N, 12] z",
            {"Reshape": 2, "Neg": 1},
            id="another reader",
        ),
        pytest.param(
            "a = Reshape(x, constant_pair) y = Reshape(a, constant_triple)",
            "float[N, 2, 6] y, float[N, 12] a",
            {"Reshape": 2},
            id="an output between",
        ),
        pytest.param(
            "a = Transpose <perm = [1, 2, 0]> (x) y = Transpose <perm = [1, 0, 2]> (a)",
            "float[4, 3, N] y",
            {"Transpose": 1},
            id="two transposes",
        ),
        pytest.param(
            "a = Transpose <perm = [1, 2, 0]> (x) b = Transpose <perm = [2, 0, 1]> (a) y = Neg(b)",
            "float[N, 3, 4] y",
            {"Neg": 1},
            id="there and back",
        ),
        pytest.param(
            "a = Neg(x) b = Transpose <perm = [1, 2, 0]> (a) y = Transpose <perm = [2, 0, 1]> (b)",
            "float[N, 3, 4] y",
            {"Neg": 1, "Transpose": 1},
            id="there and back at an output",
        ),
    ],
)
def test_chains(body: str, outputs: str, expected: dict[str, int]) -> None:
    assert finished(body, outputs) == expected


def test_operands_of_convolutions_stay_named_in_the_metadata() -> None:
    """A session replaces a formula between the tensors that its entry names: no reshape before it may move inside."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.reshape(2, 8, 8, 8)).tanh().reshape(2, 512)

    report = cg.export_gradient(Module(), (torch.randn(2, 512),), of="sum", wrt=["x", "conv.weight"])
    from convgrad_export.runtime.convolution_entries import METADATA, from_text

    entries = from_text(report.model.metadata_props[METADATA])
    names = {value.name for node in report.model.graph for value in node.outputs}
    names |= {value.name for value in (*report.model.graph.inputs, *report.model.graph.initializers.values())}
    assert [entry.kind for entry in entries] == ["input", "weight"]
    assert all(name in names for entry in entries for name in (entry.result, *entry.operands))
