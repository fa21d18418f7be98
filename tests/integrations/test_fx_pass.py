"""Graphs without convolution_backward: from every tracer, for every kind of call, and refused when inconsistent."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import convgrad_export as cg
from tests.emit.conv_cases import CASES, reference

TARGET = torch.ops.aten.convolution_backward.default


def count(module: torch.nn.Module) -> int:
    graphs = [m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    return sum(len(graph.find_nodes(op="call_function", target=TARGET)) for graph in graphs)


def traced_call(arguments: list, mode: str = "fake") -> torch.fx.GraphModule:
    def call(grad_output, x, weight):
        results = TARGET(grad_output, x, weight, *arguments[3:])
        return [result for result in results if result is not None]

    return make_fx(call, tracing_mode=mode)(*arguments[:3])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_graph_of_one_call_is_exact_on_integers(case, mode):
    arguments = case.arguments(torch.float64)
    graph = traced_call(arguments, mode)
    result = cg.rewrite_convolution_backward(graph)
    assert (result.graph_module, result.modified, result.rewritten) == (graph, True, 1)
    assert count(graph) == 0
    for ours, expected in zip(graph(*arguments[:3]), reference(arguments), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("mask", [(True, True, True), (False, True, True), (True, True, False), (False, True, False)])
def test_masks_and_unused_outputs(mask):
    arguments = CASES[3].arguments(torch.float64)
    arguments[10] = list(mask)
    graph = traced_call(arguments)
    names = cg.rewrite_convolution_backward(graph).rewrites[0].lowerings
    assert set(names) == {name for name, wanted in zip(("input", "weight", "bias"), mask, strict=True) if wanted}
    expected = [value for value, wanted in zip(reference(arguments), mask, strict=True) if wanted]
    for ours, value in zip(graph(*arguments[:3]), expected, strict=True):
        assert torch.equal(ours, value)


def test_gradients_that_nothing_reads_are_not_computed():
    arguments = CASES[3].arguments(torch.float64)
    graph = make_fx(lambda g, x, w: TARGET(g, x, w, *arguments[3:])[1], tracing_mode="fake")(*arguments[:3])
    assert set(cg.rewrite_convolution_backward(graph).rewrites[0].lowerings) == {"weight"}
    assert torch.equal(graph(*arguments[:3]), reference(arguments)[1])


def test_bias_sizes_none_with_a_bias_mask_and_lists_of_length_one():
    """torch.nn.grad passes such calls."""
    arguments = CASES[4].arguments(torch.float64)
    expected = reference(arguments)
    arguments[3:9] = [None, [1], [1], [1], False, [0]]
    graph = traced_call(arguments, "real")  # PyTorch's fake kernel refuses bias_sizes=None
    cg.rewrite_convolution_backward(graph)
    for ours, value in zip(graph(*arguments[:3]), expected, strict=True):
        assert torch.equal(ours, value)


def test_torch_nn_grad_passes_dummies_that_are_never_read():
    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    grad_output = torch.randn(2, 4, 6, 6)

    def gradients(x, w, grad_output):
        return (
            nn.grad.conv2d_input(x.shape, w, grad_output, padding=1),
            nn.grad.conv2d_weight(x, w.shape, grad_output, padding=1),
        )

    graph = make_fx(gradients)(x, w, grad_output)
    assert cg.rewrite_convolution_backward(graph).rewritten == 2
    for ours, expected in zip(graph(x, w, grad_output), gradients(x, w, grad_output), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_node_used_whole_and_a_masked_output_passed_on():
    arguments = CASES[4].arguments(torch.float64)
    arguments[10] = [False, True, True]
    graph = make_fx(lambda g, x, w: TARGET(g, x, w, *arguments[3:]), tracing_mode="fake")(*arguments[:3])
    (node,) = graph.graph.find_nodes(op="call_function", target=TARGET)
    graph.graph.output_node().args = (node,)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    cg.rewrite_convolution_backward(graph)
    nothing, weight, bias = graph(*arguments[:3])
    assert nothing is None
    assert torch.equal(weight, reference(arguments)[1])
    assert torch.equal(bias, reference(arguments)[2])


def test_a_rewritten_graph_stays_as_it_is_and_other_nodes_are_untouched():
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, groups=1))
    graph = make_fx(lambda x, *p: torch.autograd.grad(call(net, p, x).square().sum(), p))(x, *net.parameters())
    others = [(n.name, n.target) for n in graph.graph.nodes if n.target not in (TARGET, operator.getitem)]
    assert cg.rewrite_convolution_backward(graph).rewritten == 2
    remaining = {n.name: n.target for n in graph.graph.nodes}
    assert all(remaining[name] == target for name, target in others)
    code = graph.code
    again = cg.rewrite_convolution_backward(graph)
    assert (again.modified, again.rewritten) == (False, 0)
    assert graph.code == code


def call(net: nn.Module, parameters: tuple, *inputs):
    named = dict(zip((name for name, _ in net.named_parameters()), parameters, strict=True))
    return torch.func.functional_call(net, named, inputs)


def test_meta_is_kept():
    def gradient(x, w):
        y = F.conv2d(x, w, padding=1)
        return torch.autograd.grad(y.square().sum(), w)[0]

    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
    graph = make_fx(gradient)(x, w)
    (node,) = graph.graph.find_nodes(op="call_function", target=TARGET)
    node.meta["nn_module_stack"] = {"0": ("layer.conv", nn.Conv2d)}
    node.meta["custom"] = {"tag": 1}
    trace = node.meta["stack_trace"] = '  File "model.py", line 7, in forward\n    y = self.conv(x)'
    before = {n.name for n in graph.graph.nodes}
    expected = {user.name: user.meta["val"] for user in node.users if user.users}
    cg.rewrite_convolution_backward(graph)
    added = [n for n in graph.graph.nodes if n.name not in before]
    assert added
    for n in added:
        assert n.meta["stack_trace"] == trace
        assert n.meta["nn_module_stack"] == {"0": ("layer.conv", nn.Conv2d)}
        assert n.meta["custom"] == {"tag": 1}
        assert "val" in n.meta
    results = {n.name: n.meta["val"] for n in graph.graph.nodes if n.name in expected}
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert (results[name].shape, results[name].dtype) == (value.shape, value.dtype)
        assert results[name].stride() == value.stride()


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "hessian_vector"])
def test_torch_func_transforms(transform):
    x, w = torch.randn(1, 2, 5, 5, dtype=torch.float64), torch.randn(2, 2, 3, 3, dtype=torch.float64)

    def loss(w):
        return F.conv2d(x, w, padding=1).tanh().square().sum()

    functions = {
        "grad": torch.func.grad(loss),
        "vjp": lambda w: torch.func.vjp(lambda w: F.conv2d(x, w, stride=2), w)[1](torch.ones(1, 2, 2, 2).double())[0],
        "jacrev": torch.func.jacrev(lambda w: F.conv2d(x, w, padding=1).sum((0, 2, 3))),
        "hessian_vector": lambda w: torch.func.vjp(torch.func.grad(loss), w)[1](torch.cos(w))[0],
    }
    graph = make_fx(functions[transform])(w)
    assert count(graph) > 0
    cg.rewrite_convolution_backward(graph)
    assert count(graph) == 0
    torch.testing.assert_close(graph(w), functions[transform](w), rtol=1e-12, atol=1e-12)


class Differentiated(nn.Module):
    """A forward that returns a gradient in the form that torch.export traces: the backward calls themselves."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2)
        self.second = nn.ConvTranspose2d(4, 2, 3, groups=2)

    def forward(self, x):
        hidden = self.first(x)
        y = self.second(hidden)
        grad, grad_weight, _ = TARGET(
            y, hidden, self.second.weight, [2], [1, 1], [0, 0], [1, 1], True, [0, 0], 2, [True, True, False]
        )
        return TARGET(
            grad, x, self.first.weight, [4], [2, 2], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True]
        ), grad_weight


@pytest.mark.parametrize("dynamic", [{0: "batch"}, {0: "batch", 2: "height"}], ids=["batch", "batch_and_height"])
def test_exported_program_with_dynamic_sizes(dynamic):
    module = Differentiated().double()
    x = torch.randn(3, 3, 11, 9, dtype=torch.float64)
    shapes = {"x": dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC)}
    program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False)
    assert count(program.graph_module) == 2
    cg.rewrite_convolution_backward(program.graph_module)
    assert count(program.graph_module) == 0
    program.validate()
    decomposed = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False).run_decompositions(
        cg.decomposition_table()
    )
    assert count(decomposed.graph_module) == 0
    for size in ((3, 11), (5, 15 if len(dynamic) > 1 else 11)):
        other = torch.randn(size[0], 3, size[1], 9, dtype=torch.float64)
        expected = module(other)
        torch.testing.assert_close(program.module()(other), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(decomposed.module()(other), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["rewrite", "decompositions"])
def test_aot_autograd_joint_and_partitioned_graphs(how):
    from functorch.compile import aot_function

    seen = []

    def compiler(graph, _inputs):
        if how == "rewrite":
            cg.rewrite_convolution_backward(graph)
        seen.append(count(graph))
        return graph

    def partition(joint, inputs, **kwargs):
        from functorch.compile import default_partition

        if how == "rewrite":
            assert cg.rewrite_convolution_backward(joint).rewritten == 2
        seen.append(count(joint))
        return default_partition(joint, inputs, **kwargs)

    net = nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.Tanh(), nn.Conv1d(3, 2, 2, stride=2)).double()
    x = torch.randn(2, 2, 12, dtype=torch.float64)
    parameters = tuple(p.detach().clone().requires_grad_() for p in net.parameters())
    table = cg.decomposition_table() if how == "decompositions" else None
    compiled = aot_function(
        lambda x, *p: call(net, p, x), compiler, compiler, partition_fn=partition, decompositions=table
    )
    gradients = torch.autograd.grad(compiled(x, *parameters).square().sum(), parameters)
    expected = torch.autograd.grad(call(net, parameters, x).square().sum(), parameters)
    assert seen == [0, 0, 0]
    for ours, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)


def test_inconsistent_call_names_the_node_and_its_line_and_changes_nothing():
    graph = traced_call(CASES[4].arguments(torch.float32))
    (node,) = graph.graph.find_nodes(op="call_function", target=TARGET)
    node.meta["stack_trace"] = '  File "model.py", line 7, in forward\n    y = self.conv(x)'
    node.args = (*node.args[:4], [3, 3], *node.args[5:])
    code = graph.code
    with pytest.raises(cg.GeometryError, match=r"(?s)^node convolution_backward.*grad_output.*\n.*model\.py.*line 7"):
        cg.rewrite_convolution_backward(graph)
    assert graph.code == code


def test_unsupported_dtype_is_refused_and_changes_nothing():
    x, w = torch.randn(1, 2, 5, 5, dtype=torch.complex64), torch.randn(3, 2, 3, 3, dtype=torch.complex64)
    graph = traced_call([torch.randn(1, 3, 3, 3, dtype=torch.complex64), x, w, None, *CASES[6].attributes, [1, 1, 0]])
    code = graph.code
    with pytest.raises(cg.DTypeError, match="complex64"):
        cg.rewrite_convolution_backward(graph)
    assert graph.code == code


def test_tensors_on_two_devices_are_refused():
    graph = traced_call(CASES[4].arguments(torch.float32))
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    placeholders[2].meta["val"] = torch.empty(4, 3, 3, 3, device="meta")
    with pytest.raises(cg.DeviceError, match="weight is meta"):
        cg.rewrite_convolution_backward(graph)


def test_the_pass_refuses_what_is_no_graph():
    with pytest.raises(cg.ArgumentTypeError, match="graph is a NoneType"):
        cg.RewriteConvolutionBackwardPass()(None)


def test_a_graph_without_example_values_is_refused():
    graph = traced_call(CASES[4].arguments(torch.float32))
    for node in graph.graph.nodes:
        node.meta.clear()
    with pytest.raises(cg.ArgumentTypeError, match="FakeTensorProp"):
        cg.rewrite_convolution_backward(graph)


@pytest.mark.parametrize("bad", ["fastest", "no.such", 3])
def test_unknown_lowering_is_refused(bad):
    graph = traced_call(CASES[4].arguments(torch.float32))
    with pytest.raises(cg.ConvGradError, match="lowering"):
        cg.rewrite_convolution_backward(graph, lowering=bad)
    assert count(graph) == 1


def rewritten(lowering: str):
    return cg.rewrite_convolution_backward(traced_call(CASES[4].arguments(torch.float32)), lowering=lowering)


@pytest.mark.parametrize("make", [cg.decomposition_table, rewritten])
def test_what_may_keep_the_kernel_is_neither_taken_nor_offered(make):
    with pytest.raises(cg.ArgumentTypeError, match="'fastest', which may keep PyTorch's kernel"):
        make(lowering="fastest")
    with pytest.raises(cg.UnsupportedLoweringError, match="expected one of: auto, portable, input"):
        make(lowering="no.such")


def test_what_is_no_graph_module_is_refused():
    with pytest.raises(cg.ArgumentTypeError, match="Conv2d"):
        cg.rewrite_convolution_backward(nn.Conv2d(1, 1, 1))


def test_named_lowering_is_taken_and_reported():
    graph = traced_call(CASES[4].arguments(torch.float64))
    result = cg.rewrite_convolution_backward(graph, lowering="input.flipped_conv")
    assert result.rewrites[0].lowerings["input"] == "input.flipped_conv"
    assert "input.flipped_conv 1x" in result.summary()


def test_uuid_covers_the_policy():
    first, second = cg.RewriteConvolutionBackwardPass(), cg.RewriteConvolutionBackwardPass("portable")
    assert first.uuid() == cg.RewriteConvolutionBackwardPass().uuid()
    assert first.uuid() != second.uuid()


def test_uuid_covers_the_sources(tmp_path, monkeypatch):
    import shutil
    from pathlib import Path

    from convgrad_export.integrations import source_hash

    package = tmp_path / "convgrad_export"
    shutil.copytree(Path(cg.__file__).parent, package)
    monkeypatch.setattr(source_hash, "__file__", str(package / "integrations" / "source_hash.py"))
    original = source_hash.source_hash.__wrapped__()
    assert original == source_hash.source_hash()
    policy = package / "selection" / "aten_policy.py"
    policy.write_text(policy.read_text() + "\n# another rule\n")
    assert source_hash.source_hash.__wrapped__() != original
