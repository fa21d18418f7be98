"""Sums of slices become slices of sums, with the same bits: ATen graphs before and after, a dense block's export."""

from __future__ import annotations

import copy
import itertools
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import convgrad_export as cg
from convgrad_export.integrations.slice_sums import slice_sums

aten = torch.ops.aten


def traced(function, *examples: torch.Tensor) -> torch.fx.GraphModule:
    mode = FakeTensorMode()
    with mode:
        return make_fx(function)(*[mode.from_tensor(x) for x in examples])


def count(graph: torch.fx.Graph, target) -> int:
    return sum(node.target is target for node in graph.nodes)


def rewritten(function, *examples: torch.Tensor) -> tuple[torch.fx.Graph, torch.fx.Graph]:
    """The graphs before and after, compared on the examples bit for bit."""
    before = traced(function, *examples)
    after = copy.deepcopy(before)
    slice_sums(after.graph)
    after.graph.lint()
    after.recompile()
    for expected, found in zip(before(*examples), after(*examples), strict=True):
        assert torch.equal(expected, found)
        assert expected.dtype == found.dtype
    for node in after.graph.nodes:
        if node.op == "call_function":
            values = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in node.args]
            if node.target is not operator.getitem and not isinstance(values[0], (tuple, list)):
                assert node.meta["val"].shape == node.target(*values, **node.kwargs).shape
    return before.graph, after.graph


def test_slices_of_nested_concatenations_are_added_whole():
    """The gradients of three concatenations with 2, 3 and 4 parts: one addition a concatenation remains."""

    def gradients(c4, c3, c2):
        a, b, c, d = c4[:, :3], c4[:, 3:5], c4[:, 5:6], c4[:, 6:10]
        a, b, c = a + c3[:, :3], b + c3[:, 3:5], c + c3[:, 5:6]
        return a + c2[:, :3], b + c2[:, 3:5], c, d

    before, after = rewritten(gradients, torch.randn(2, 10, 4), torch.randn(2, 6, 4), torch.randn(2, 5, 4))
    assert count(before, aten.add.Tensor) == 5
    assert count(after, aten.add.Tensor) == 2
    # c4 and the first sum once each for the additions, and the four results
    assert count(after, aten.slice.Tensor) == 6


def test_a_sum_that_became_a_slice_is_sliced_again():
    """Concatenations inside concatenations: the parts of a part's gradient."""

    def gradients(x, y, z):
        a, b = x[:, :4] + y[:, :4], x[:, 4:6] + y[:, 4:6]
        return a[:, :1] + z[:, :1], a[:, 1:3] + z[:, 1:3], b

    before, after = rewritten(gradients, torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 4))
    assert count(before, aten.add.Tensor) == 4
    assert count(after, aten.add.Tensor) == 2


def test_a_shifted_arrangement_keeps_its_offset():
    def gradients(x, y):
        return x[:, 4:6] + y[:, 1:3], x[:, 6:9] + y[:, 3:6]

    _, after = rewritten(gradients, torch.randn(2, 9), torch.randn(2, 7))
    assert count(after, aten.add.Tensor) == 1


@pytest.mark.parametrize(
    ("function", "shapes", "dtypes"),
    [
        pytest.param(lambda x, y: (x[:, :2] + y[:, :2],), [(3, 4), (3, 4)], None, id="one sum"),
        pytest.param(
            lambda x, y: (x[:, :2] + y[:, :2], x[:, 3:4] + y[:, 3:4]), [(3, 4), (3, 4)], None, id="not neighbours"
        ),
        pytest.param(
            lambda x, y: (x[:, :2] + y[:, 2:4], x[:, 2:4] + y[:, :2]), [(3, 4), (3, 4)], None, id="another order"
        ),
        pytest.param(
            lambda x, y: (x[:, :2] + y[:, :2], x[:, 2:4] + y[:, 2:4]), [(3, 4), (1, 4)], None, id="broadcasting"
        ),
        pytest.param(
            lambda x, y: (x[:, :2] + y[:, :2], x[:, 2:4] + y[:, 2:4]),
            [(3, 4), (3, 4)],
            (torch.float32, torch.float64),
            id="promotion",
        ),
        pytest.param(
            lambda x, y: (torch.add(x[:, :2], y[:, :2], alpha=2), torch.add(x[:, 2:], y[:, 2:], alpha=2)),
            [(3, 4), (3, 4)],
            None,
            id="alpha",
        ),
        pytest.param(
            lambda x, y: (x[:, 0:4:2] + y[:, 0:4:2], x[:, 4:8:2] + y[:, 4:8:2]), [(3, 8), (3, 8)], None, id="steps of 2"
        ),
        pytest.param(lambda x, y: (x[:2] + y[:, :2], x[2:] + y[:, 2:]), [(4, 2), (2, 4)], None, id="another axis"),
        pytest.param(lambda x, y: (x[:, :2] + x[:, 2:4], x[:, 2:4] + x[:, 4:6]), [(3, 6), (1,)], None, id="one tensor"),
    ],
)
def test_other_sums_stay(function, shapes, dtypes):
    dtypes = dtypes or (torch.float32, torch.float32)
    examples = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    before, after = rewritten(function, *examples)
    assert [node.target for node in before.nodes] == [node.target for node in after.nodes]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), min_size=1, max_size=12),
    st.integers(0, 2**31),
)
def test_random_sums(widths: list[int], sums: list[tuple[int, int, bool]], seed: int):
    """Any program of sums of the parts of several tensors computes the same bits."""
    torch.manual_seed(seed)
    bounds = [sum(widths[:i]) for i in range(len(widths) + 1)]
    examples = [torch.randn(2, bounds[-1]) for _ in range(4)]

    def program(*tensors):
        parts = [[t[:, a:b] for a, b in itertools.pairwise(bounds)] for t in tensors]
        totals = list(parts[0])
        for which, place, swapped in sums:
            source, index = parts[which % 4], place % len(widths)
            a, b = totals[index], source[index]
            totals[index] = b + a if swapped else a + b
        return tuple(totals)

    rewritten(program, *examples)


class DenseBlock(torch.nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(torch.tanh(layer(torch.cat(features, 1))))
        return torch.cat(features, 1)


def test_a_dense_block_s_gradient_has_a_slice_a_layer_not_a_slice_a_pair_of_layers(tmp_path):
    """For any batch: its size is a symbol in the graph."""
    module = DenseBlock(8)
    report = cg.export_gradient(
        module, (torch.randn(2, 4, 5, 5),), tmp_path / "g.onnx", dynamic_shapes={"x": {0: "batch"}}, of="vjp"
    )
    # 9 concatenations' gradients: 8 additions; a slice of the sum before each, one for each layer's features, one for x
    assert report.operators["Slice"] <= 2 * 8 + 2
    x, cotangent = torch.randn(3, 4, 5, 5, requires_grad=True), torch.randn(3, 20, 5, 5)
    (expected,) = torch.autograd.grad(module(x), x, cotangent)
    found = cg.GradientSession(tmp_path / "g.onnx").run({"x": x.detach().numpy(), "cotangent": cotangent.numpy()})[
        "x.grad"
    ]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
