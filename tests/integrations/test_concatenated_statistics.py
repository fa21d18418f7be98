"""Batch statistics of concatenations put together from those of the parts: graphs before and after, a dense block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import convgrad_export as cg
from convgrad_export.integrations.concatenated_statistics import concatenated_statistics
from convgrad_export.integrations.normalization_decompositions import batch_norm_functional

aten = torch.ops.aten


def normalized(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Of x, shape [N, C, *], as exports decompose batch normalization in training; any dtype, no affine map."""
    return batch_norm_functional(x, None, None, None, None, True, 0.1, eps)[0]


def means(graph: torch.fx.Graph) -> int:
    return sum(node.target is aten.mean.dim for node in graph.nodes)


def rewritten(function, *examples: torch.Tensor) -> tuple[int, int]:
    """How many means the graph takes before and after; the results of both are compared in float64."""
    mode = FakeTensorMode()
    with mode:
        before = make_fx(function)(*[mode.from_tensor(x) for x in examples])
    after = copy.deepcopy(before)
    concatenated_statistics(after.graph)
    after.graph.lint()
    after.recompile()
    for expected, found in zip(before(*examples), after(*examples), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for node in after.graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.meta["val"], torch.Tensor)
    return means(before.graph), means(after.graph)


def parts(*widths: int, space: tuple[int, ...] = (3, 2)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, width, *space, generator=generator, dtype=torch.float64) * 3 + 5 for width in widths]


@pytest.mark.parametrize("space", [(), (7,), (3, 2), (2, 3, 2)], ids=["0-D", "1-D", "2-D", "3-D"])
def test_each_part_has_its_statistics_taken_once(space: tuple[int, ...]):
    """Three normalizations of 1, 2 and 3 parts: two means of each part instead of two of each normalization's."""

    def block(a, b, c):
        return (
            normalized(torch.cat([a], 1)),
            normalized(torch.cat([a, b], 1)),
            normalized(torch.cat([c, a, b], 1)),
            normalized(torch.cat([b, c], 1 - a.dim())),
        )

    assert rewritten(block, *parts(3, 2, 1, space=space)) == (8, 6)


def test_a_part_that_is_normalized_by_itself():
    assert rewritten(lambda a, b: (normalized(a), normalized(torch.cat([a, b], 1))), *parts(3, 2)) == (4, 6)


def test_concatenations_of_concatenations():
    def block(a, b, c):
        inner = torch.cat([a, b], 1)
        return normalized(inner), normalized(torch.cat([inner, c], 1)), normalized(torch.cat([c, inner, a], 1))

    assert rewritten(block, *parts(3, 2, 1)) == (6, 6)


def test_what_the_gradient_reads_is_put_together_beside_its_reader():
    """The centred concatenation is not held from the forward pass on: its parts are."""

    def step(a, b, grad):
        c = torch.cat([a, b], 1)
        y, mean, *_ = batch_norm_functional(c, *[torch.ones_like(c[0, :, 0, 0])] * 2, None, None, True, 0.1, 1e-5)
        return normalized(a), y, (grad * (c - mean.reshape(1, -1, 1, 1))).sum((0, 2, 3))

    examples = parts(3, 2, 5)
    mode, singles = FakeTensorMode(), [x.float() for x in examples]
    with mode:
        traced = make_fx(step)(*[mode.from_tensor(x) for x in singles])
    concatenated_statistics(traced.graph)
    nodes = list(traced.graph.nodes)
    (product,) = [node for node in nodes if node.target is aten.mul.Tensor and node.args[0] is nodes[2]]
    centred = product.args[1]
    assert centred.target is aten.cat.default
    assert list(centred.users) == [product]
    assert nodes[nodes.index(product) - 1] is centred
    assert all(part.target is aten.sub.Tensor for part in centred.args[0])
    rewritten(step, *examples)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda a, b: (normalized(torch.cat([a, b], 1)),), id="nothing shared"),
        pytest.param(lambda a, b: (normalized(torch.cat([b, b, a], 1)), normalized(b)), id="the smaller part shared"),
        pytest.param(lambda a, b: (normalized(torch.cat([a, a], 0)), normalized(a)), id="along the batch"),
        pytest.param(lambda a, b: (normalized(torch.cat([a, a], 2)), normalized(a)), id="along an image's axis"),
        pytest.param(lambda a, b: (torch.cat([a, b], 1).mean((0, 2, 3)), normalized(a)), id="a mean alone"),
        pytest.param(lambda a, b: (torch.cat([a, b], 1).var((0, 2)), normalized(a), normalized(b)), id="other axes"),
    ],
)
def test_other_statistics_stay(function):
    before, after = rewritten(function, *parts(5, 1))
    assert before == after


class DenseBlock(torch.nn.Module):
    """DenseNet's: each layer normalizes all features before it."""

    def __init__(self, layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 3, dtype=dtype)
        widths = [4 + 2 * index for index in range(layers)]
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(width, dtype=dtype) for width in widths)
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(width, 2, 3, padding=1, dtype=dtype) for width in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.first(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(torch.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1).mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dense_block_trains_as_in_pytorch(dtype: torch.dtype, tmp_path):
    """Parameters and running statistics after two steps, for batches of other sizes than the example's."""
    torch.manual_seed(3)
    module, loss = DenseBlock(4, dtype), torch.nn.functional.cross_entropy
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    sizes = ({0: "batch"}, {0: "batch"})
    example = (torch.randn(4, 3, 8, 8, dtype=dtype), torch.randint(0, 10, (4,)))
    report = cg.export_training_step(module, loss, optimizer, example, tmp_path / "s.onnx", dynamic_shapes=sizes)
    # two a normalized part (of four), and the last features' over their images
    assert report.operators["ReduceMean"] == 9
    session = cg.TrainingSession(tmp_path / "s.onnx")
    for batch in (5, 2):
        x, y = torch.randn(batch, 3, 8, 8, dtype=dtype), torch.randint(0, 10, (batch,))
        optimizer.zero_grad()
        expected = loss(module(x), y)
        expected.backward()
        optimizer.step()
        assert session.step(x.numpy(), y.numpy())["loss"] == pytest.approx(expected.item(), rel=1e-5)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    found = session.state_dict()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(torch.as_tensor(found[name]), value, rtol=tolerance, atol=tolerance)
