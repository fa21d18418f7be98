"""torch.compile with the backends convgrad and convgrad_ort, against eager PyTorch."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import checkpoint

import convgrad_export as cg
from convgrad_export.integrations import ort_partition
from convgrad_export.integrations.compile_backend import convgrad, convgrad_ort
from convgrad_export.integrations.fx_pass import in_order
from convgrad_export.integrations.ort_graph import OrtGraph

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = {"convgrad": convgrad, "convgrad_ort": convgrad_ort}
both = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """Every OrtGraph that a test makes."""
    made = []
    original = OrtGraph.__init__

    def recording(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(OrtGraph, "__init__", recording)
    return made


class Mixed(nn.Module):
    """Strided, grouped, depthwise, dilated and transposed convolutions, BatchNorm, and a counting buffer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.up = nn.ConvTranspose2d(12, 4, 3, stride=2, output_padding=1)
        self.head = nn.Linear(4, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        x = F.relu(self.norm(self.stem(x)))
        x = F.gelu(self.grouped(self.depthwise(x)))
        return self.head(self.up(x).mean((2, 3)))


def gradients(module, x, target):
    module.zero_grad()
    loss = F.cross_entropy(module(x), target)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in module.named_parameters()}}


def batch(n=4, dtype=torch.float32, size=13):
    return torch.randn(n, 3, size, size, dtype=dtype), torch.randint(0, 5, (n,))


def close(ours, expected, relative):
    """Largest difference over the largest expected magnitude, tensor by tensor."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        error = (ours[name].double() - value.double()).abs().max() / scale
        assert error <= relative, (name, error.item())


@both
def test_training_follows_eager_through_optimizer_steps(backend):
    """Parameters are read anew in each call, buffers are written back."""
    reference = Mixed()
    model = copy.deepcopy(reference)
    reference.double()
    compiled = torch.compile(model, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (reference, model)]
    for _ in range(3):
        x, target = batch()
        expected = gradients(reference, x.double(), target)
        model.zero_grad()
        loss = F.cross_entropy(compiled(x), target)
        loss.backward()
        ours = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
        close(ours, expected, 2e-5)
        for optimizer in optimizers:
            optimizer.step()
    assert model.calls == reference.calls == 3
    assert model.norm.num_batches_tracked == 3
    close({"mean": model.norm.running_mean}, {"mean": reference.norm.running_mean}, 1e-6)
    close({"var": model.norm.running_var}, {"var": reference.norm.running_var}, 1e-6)


@both
def test_float64_agrees_to_float64(backend):
    model = Mixed().double()
    x, target = batch(dtype=torch.float64)
    expected = {name: value.clone() for name, value in gradients(copy.deepcopy(model), x, target).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # convolutions in float64 stay with PyTorch
        ours = gradients(torch.compile(model, backend=backend), x, target)
    close({name.removeprefix("_orig_mod."): value for name, value in ours.items()}, expected, 1e-12)


def test_portable_option_leaves_no_convolution_backward(monkeypatch):
    from convgrad_export.integrations.fx_pass import RewriteConvolutionBackwardPass

    seen = []
    original = RewriteConvolutionBackwardPass.__call__

    def recording(self, graph):
        original(self, graph)
        seen.append(len(graph.find_nodes(op="call_function", target=torch.ops.aten.convolution_backward.default)))

    monkeypatch.setattr(RewriteConvolutionBackwardPass, "__call__", recording)
    # Two convolutions: each tap of each weight gradient is code that the C++ compiler takes its time over.
    model = nn.Sequential(nn.Conv2d(2, 4, (2, 3), stride=2, groups=2), nn.ConvTranspose2d(4, 2, 2, bias=False))
    x = torch.randn(2, 2, 8, 9)
    exact = copy.deepcopy(model).double()
    expected = torch.autograd.grad(exact(x.double()).square().sum(), list(exact.parameters()))
    caches = {"fx_graph_cache": False, "fx_graph_remote_cache": False}  # a graph from the cache has no pass to record
    with torch._inductor.config.patch(caches), torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = torch.compile(model, backend=convgrad, options={"lowering": "portable"})
        ours = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    assert seen
    assert not any(seen)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5 * want.abs().max().item())


class CountingPass(CustomGraphPass):
    """How many convolution gradients each graph holds when it is run."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append(len(graph.find_nodes(op="call_function", target=torch.ops.aten.convolution_backward.default)))

    def uuid(self) -> None:
        return None  # nothing of it is cached, so that every compilation calls it


@pytest.mark.parametrize("several", [True, False], ids=["as-torch", "one-pass-only"])
def test_the_users_own_passes_run_before_the_rewrite(several, monkeypatch):
    """torch 2.11 takes a single pass where later ones take a list."""
    if not several:
        monkeypatch.delattr(custom_graph_pass, "get_custom_graph_passes", raising=False)
    own, model = CountingPass(), nn.Conv2d(2, 4, 2, stride=2)
    x = torch.randn(2, 2, 4, 4)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    options = {"lowering": "portable", "post_grad_custom_pre_pass": own}
    caches = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    with torch._inductor.config.patch(caches), torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = torch.compile(model, backend=convgrad, options=options)
        ours = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    assert own.seen == [0, 1]  # forward, backward
    torch.testing.assert_close(ours, expected)


def test_passes_in_order_are_cached_only_if_all_are(monkeypatch):
    monkeypatch.delattr(custom_graph_pass, "get_custom_graph_passes", raising=False)
    rewrite = cg.RewriteConvolutionBackwardPass()
    assert in_order([rewrite]) is rewrite
    assert in_order([rewrite, rewrite]).uuid() == [rewrite.uuid()] * 2
    assert in_order([CountingPass(), rewrite]).uuid() is None
    assert in_order([lambda graph: None, rewrite]).uuid() is None


def test_dynamic_batch_is_compiled_once(graphs):
    model = Mixed()
    compiled = torch.compile(model, backend=convgrad_ort, dynamic=True)
    for n in (4, 3, 7, 5):
        x, target = batch(n)
        expected = gradients(copy.deepcopy(model).double(), x.double(), target)
        model.zero_grad()
        loss = F.cross_entropy(compiled(x), target)
        loss.backward()
        ours = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
        close(ours, expected, 2e-5)
    assert len(graphs) == 2  # forward and backward


def test_both_partitions_run_whole_on_onnxruntime(graphs):
    model = Mixed()
    gradients(torch.compile(model, backend=convgrad_ort), *batch())
    assert [len(graph.segments) for graph in graphs] == [1, 1]
    assert all(len(graph._steps) == 1 for graph in graphs)
    operators = {node.op_type for node in graphs[1].segments[0].model.graph.node}
    assert "Conv" in operators or "MatMul" in operators
    assert {item.domain for graph in graphs for item in graph.segments[0].model.opset_import} == {""}


def test_threads_may_need_a_backward_graph_at_once(graphs):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    compiled, x = torch.compile(model, backend="convgrad_ort"), torch.randn(2, 3, 6, 6)
    losses = [compiled(x).sum() for _ in range(4)]  # the backward graph is compiled by the first backward
    start, found = threading.Barrier(4), []

    def backward(loss):
        start.wait()
        found.append(torch.autograd.grad(loss, list(model.parameters())))

    threads = [threading.Thread(target=backward, args=(loss,)) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert len(found) == 4
    for gradients_of_one in found:
        torch.testing.assert_close(gradients_of_one, expected)
    assert all(len(graph.segments) == len(graph._steps) == 1 for graph in graphs)  # nothing is left to PyTorch


def test_inputs_and_results_are_not_copied(graphs, monkeypatch):
    """onnxruntime reads the parameters' memory and writes into the tensors that the caller gets."""
    model = nn.Conv2d(3, 4, 3)
    compiled = torch.compile(model, backend=convgrad_ort)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        compiled(x)
    bound = []

    class Recording:
        def __init__(self, binding):
            self._binding = binding

        def bind_input(self, name, device, index, code, shape, pointer):
            bound.append(pointer)
            self._binding.bind_input(name, device, index, code, shape, pointer)

        def bind_output(self, name, device, index, code, shape, pointer):
            bound.append(pointer)
            self._binding.bind_output(name, device, index, code, shape, pointer)

    session = graphs[0].segments[0]._session
    io_binding, run = session.io_binding, session.run_with_iobinding
    monkeypatch.setattr(session, "io_binding", lambda: Recording(io_binding()))
    monkeypatch.setattr(session, "run_with_iobinding", lambda recording: run(recording._binding))
    with torch.no_grad():
        y = compiled(x)
    assert sorted(bound) == sorted(t.data_ptr() for t in (x, model.weight, model.bias, y))


@torch.library.custom_op("convgrad_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


scaled.register_fake(lambda x, factor: torch.empty_like(x))
scaled.register_autograd(
    lambda ctx, grad: (grad * ctx.factor, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
)


class WithForeignOperator(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 3)

    def forward(self, x):
        return self.second(torch.relu(scaled(self.first(x), 0.5)))


def test_what_cannot_be_translated_runs_in_eager_and_is_named_once(graphs, monkeypatch):
    monkeypatch.setattr(ort_partition, "_named", set())
    model = WithForeignOperator()
    x = torch.randn(2, 2, 9)
    reference = copy.deepcopy(model)
    expected = torch.autograd.grad(reference(x).square().sum(), list(reference.parameters()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = torch.compile(model, backend=convgrad_ort)(x)
        ours = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        torch._dynamo.reset()
        torch.compile(WithForeignOperator(), backend=convgrad_ort)(x)
    (named,) = [str(warning.message) for warning in caught if "convgrad_tests" in str(warning.message)]
    assert "convgrad_tests.scaled.default" in named
    assert "no ONNX translation" in named
    assert len(graphs[0].segments) == 2
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@both
def test_no_grad_and_evaluation_mode(backend):
    model = Mixed().eval()
    x, _ = batch()
    with torch.no_grad():
        ours = torch.compile(model, backend=backend)(x)
    close({"y": ours}, {"y": copy.deepcopy(model).double()(x.double()).detach()}, 1e-5)
    assert not ours.requires_grad


@both
def test_gradients_accumulate(backend):
    model = Mixed().eval()  # no batch statistics: two half batches add up to one
    x, target = batch(6)
    compiled = torch.compile(model, backend=backend)
    model.zero_grad()
    for part in (slice(0, 3), slice(3, 6)):
        (F.cross_entropy(compiled(x[part]), target[part]) / 2).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    expected = gradients(copy.deepcopy(model).double(), x.double(), target)
    del expected["loss"]
    close(ours, expected, 2e-5)


@both
def test_autocast(backend):
    """bfloat16 rounds each layer's result: six layers deep, the error stays within 6 roundings of 2**-8, twice over."""
    model = Mixed()
    x, target = batch()
    expected = gradients(copy.deepcopy(model).double(), x.double(), target)
    compiled = torch.compile(model, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(compiled(x), target)
    loss.backward()
    ours = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    close(ours, expected, 12 * 2.0**-8)


class Checkpointed(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.scale, self.p = nn.Parameter(torch.tensor(1.5)), p
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def block(self, x):
        return F.dropout(self.scale * x, self.p, training=True)

    def forward(self, x):
        return checkpoint(self.block, self.conv(x), use_reentrant=False)


@both
def test_activation_checkpointing_draws_the_same_dropout_again(backend):
    """The output is linear in `scale`, so its gradient is the output's sum over `scale`: with the same mask only."""
    model = Checkpointed(0.5)
    total = torch.compile(model, backend=backend)(torch.randn(2, 3, 8, 8)).sum()
    total.backward()
    torch.testing.assert_close(model.scale.grad, total.detach() / model.scale.detach(), rtol=1e-4, atol=1e-4)


@both
def test_activation_checkpointing_of_convolutions(backend):
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3))
    reference = copy.deepcopy(block).double()
    x = torch.randn(2, 3, 9, 9)
    compiled = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), backend=backend)
    compiled(x).square().mean().backward()
    reference(x.double()).square().mean().backward()
    ours, expected = ({n: p.grad for n, p in m.named_parameters()} for m in (block, reference))
    del ours["0.bias"], expected["0.bias"]  # in front of BatchNorm: zero, but for rounding
    close(ours, expected, 2e-5)


@both
def test_double_backward_through_torch_func(backend):
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    v = torch.randn_like(w)

    def loss(w):
        return F.conv2d(x, w, padding=1).tanh().square().sum()

    def hessian_vector(w, v):
        return torch.func.vjp(torch.func.grad(loss), w)[1](v)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        ours = torch.compile(hessian_vector, backend=backend)(w, v)
    torch.testing.assert_close(ours, hessian_vector(w, v), rtol=1e-11, atol=1e-11)


@both
def test_channels_last_strides_are_eagers(backend):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    reference = copy.deepcopy(model)
    expected = reference(x)
    expected.square().sum().backward()
    expected_grad, x.grad = x.grad, None
    y = torch.compile(model, backend=backend)(x)
    y.square().sum().backward()
    assert y.stride() == expected.stride()
    assert x.grad.stride() == expected_grad.stride()
    torch.testing.assert_close(x.grad, expected_grad, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert ours.grad.stride() == theirs.grad.stride()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_rounded_halves_on_onnxruntime_match_eager_bfloat16_values(graphs):
    """A bfloat16 model: exact on small integers, where no rounding happens."""
    conv = nn.Conv2d(2, 3, 3, bias=False).bfloat16()
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-2, 3, conv.weight.shape))
    x = torch.randint(-2, 3, (1, 2, 5, 5)).bfloat16().requires_grad_()
    y = torch.compile(conv, backend=convgrad_ort)(x)
    y.sum().backward()
    ours = (y.detach(), x.grad.clone(), conv.weight.grad.clone())
    x.grad, conv.weight.grad = None, None
    expected = conv(x)
    expected.sum().backward()
    assert len(graphs[0].segments) == len(graphs[1].segments) == 1
    for a, b in zip(ours, (expected, x.grad, conv.weight.grad), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("backend", "settings", "error"),
    [
        (convgrad_ort, {"options": {"lowring": "auto"}}, "lowring"),
        (convgrad_ort, {"mode": "max-autotune"}, "max-autotune"),
        (convgrad_ort, {"options": {"lowering": "no.such"}}, "no.such"),
        (convgrad, {"options": {"lowering": "no.such"}}, "no.such"),
        (convgrad, {"options": {"lowring": "auto"}}, "Unexpected optimization option lowring"),
        (convgrad, {"options": {"max_autotune": "yes"}}, "max_autotune, got str should be bool"),
        (convgrad, {"mode": "no-such"}, "mode is 'no-such', .*max-autotune"),
        (convgrad, {"options": "portable"}, "options is 'portable', expected a dict"),
        (convgrad_ort, {"options": "portable"}, "options is 'portable', expected a dict"),
    ],
)
def test_unknown_settings_are_refused(backend, settings, error):
    with pytest.raises(Exception, match=error) as caught:
        torch.compile(nn.Conv1d(1, 1, 1), backend=backend, **settings)(torch.randn(1, 1, 3))
    causes = [caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None)]
    assert any(isinstance(cause, cg.ConvGradError) for cause in causes)


def test_inductors_options_may_be_written_with_dashes(monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda _m, _x, config_patches: config_patches)
    patches = convgrad(None, [], options={"epilogue-fusion": False, "lowering": "portable"})
    assert patches.pop("post_grad_custom_pre_pass").lowering == "portable"
    assert patches == {"epilogue_fusion": False}


PROGRAM = """
import sys, torch
assert not any(name.startswith("convgrad_export") for name in sys.modules)
print(sorted(name for name in torch.compiler.list_backends() if name.startswith("convgrad")))
net = torch.nn.Conv2d(2, 3, 3)
for name in ("convgrad", "convgrad_ort"):
    torch.compile(net, backend=name)(torch.ones(1, 2, 4, 4)).sum().backward()
    print(name, float(net.bias.grad.sum()))
    net.zero_grad()
    torch._dynamo.reset()
"""


def test_entry_points_work_without_an_import(tmp_path):
    """An installed distribution, as its metadata looks on disk, in a process that imports torch alone."""
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"convgrad_export-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: convgrad-export\nVersion: {project['version']}\n")
    lines = [f"{name} = {target}" for name, target in project["entry-points"]["torch_dynamo_backends"].items()]
    (info / "entry_points.txt").write_text("[torch_dynamo_backends]\n" + "\n".join(lines) + "\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of compiler processes for two small kernels
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['convgrad', 'convgrad_ort']", "convgrad 12.0", "convgrad_ort 12.0"]


class Channels(nn.Module):
    """Indexes with a list, which the trace holds as a constant tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x)[:, [0, 2]] * torch.tensor([0.5])


@pytest.mark.parametrize(
    "make",
    [
        Channels,
        lambda: nn.ConvTranspose2d(3, 4, 3, output_padding=1, dilation=2),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 1, 1), nn.AdaptiveMaxPool2d((3, 2))),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.AvgPool2d(2)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.MaxPool1d(4), nn.AvgPool1d(3)),
    ],
)
@pytest.mark.parametrize(
    ("size", "dtype"), [(0, torch.float32), (0, torch.bfloat16), (1, torch.float32), (4, torch.float32)]
)
def test_ort_runs_what_eager_runs(make, size, dtype):
    """Constants in the graph, an empty batch, an output padding that is not smaller than the stride."""
    module = make().to(dtype)
    x = torch.randn(size, 3, 6, 6, dtype=dtype)
    results = []
    for run in (torch.compile(module, backend=convgrad_ort), copy.deepcopy(module)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *run.parameters()])))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_ort_takes_factors_of_dynamic_sizes_in_float64():
    """The gradient of a variance multiplies by 2 / (n - 1), a number that PyTorch computes between the sessions."""

    def function(x):
        return (x.std(0) * x.var((0, 2))[0]).square().sum()

    compiled = torch.compile(function, backend=convgrad_ort, dynamic=True)
    for n in (4, 5):
        x = torch.randn(n, 3, 6, dtype=torch.float64, requires_grad=True)
        (ours,), (expected,) = (torch.autograd.grad(f(x), x) for f in (compiled, function))
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def sized_by_a_number(x, n):
    k = n.item()
    torch._check(k >= 0)
    torch._check(k <= x.shape[0])
    return x[:k].sum(0) * k + x.mean().item()


@pytest.mark.parametrize(
    "function",
    [
        sized_by_a_number,
        lambda x, n: (x + 1).relu() * (x * 2).sum().item() * n.item(),
        lambda x, n: F.conv1d(x[x[:, 0, 0] > 0].exp(), torch.ones(1, 2, 3)).sum() + n,
        lambda x, n: torch.ones(n.item() + 1, 5).sum(1) * x.sum(),
    ],
)
def test_ort_takes_numbers_and_sizes_that_follow_from_values(function):
    """PyTorch reads them between two sessions, and the sizes of what follows are made of them."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, backend=convgrad_ort, fullgraph=True)
        for n in (2, 3):
            x = torch.randn(6, 2, 7, requires_grad=True)
            ours, expected = compiled(x, torch.tensor(n)), function(x, torch.tensor(n))
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
            (ours,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (ours, expected))
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_convolutions_of_sizes_that_follow_from_values_keep_the_kernel():
    """The pass of Inductor has no example of such a size, and PyTorch's kernel takes any."""

    def function(x):
        return F.conv1d(x[x[:, 0, 0] > 0].exp(), torch.ones(1, 2, 3)).sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        x = torch.randn(6, 2, 7, requires_grad=True)
        gradients = [
            torch.autograd.grad(f(x), x)[0]
            for f in (torch.compile(function, backend=convgrad, fullgraph=True), function)
        ]
    torch.testing.assert_close(*gradients)


def test_ort_reads_negative_views_with_their_sign():
    x = torch._neg_view(torch.randn(4))
    torch.testing.assert_close(torch.compile(lambda x: x * 2, backend=convgrad_ort)(x), x * 2)


def test_ort_gives_zero_for_what_comes_from_outside_times_a_slope_of_zero():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    y = torch.compile(torch.relu, backend=convgrad_ort)(x)
    (gradient,) = torch.autograd.grad(y, x, torch.tensor([float("inf"), float("nan"), 3.0]))
    assert gradient.tolist() == [0.0, 0.0, 3.0]


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean(),
        lambda x: x.mean(0),
        lambda x: x.mean(1),
        lambda x: x.std(0, unbiased=False),
        lambda x: F.l1_loss(x, 2 * x),
        lambda x: F.mse_loss(x, 2 * x),
    ],
    ids=["mean", "mean over rows", "mean of no rows", "std", "loss", "squares"],
)
def test_ort_has_no_mean_of_nothing(function):
    """onnxruntime's is 0, a loss that looks perfect."""
    x = torch.zeros(0, 5)
    torch.testing.assert_close(torch.compile(function, backend="convgrad_ort")(x), function(x), equal_nan=True)
