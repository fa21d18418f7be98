"""Captured graphs compute what eager PyTorch computes, by name, at sizes they were not captured at."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import convgrad_export as cg
from convgrad_export.errors import ArgumentTypeError, CaptureError, ConstantGradientError, DynamicShapeError
from convgrad_export.integrations.capture import capture, capture_gradients
from convgrad_export.integrations.program import CapturedProgram

from .gradient_modules import FORMS, AutogradGrad, FuncVjp, image


def assert_same(program: CapturedProgram, inputs: Sequence[torch.Tensor], expected: object) -> None:
    actual = program.run(*inputs)
    flat = pytree.tree_leaves(expected)
    names = [spec.name for spec in program.outputs if spec.kind == "output"]
    assert len(names) == len(flat)
    for name, value in zip(names, flat, strict=True):
        # The same kernels in the same order: what may differ is the summation order inside one kernel.
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("form", "args"), FORMS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_form_is_captured_without_baked_in_values(form: type[nn.Module], args: tuple[torch.Tensor, ...]) -> None:
    torch.manual_seed(0)
    module = form().double()
    args = tuple(a.double() for a in args)
    program = capture(module, args)
    fresh = tuple(torch.randn_like(a) for a in args)
    assert_same(program, fresh, module(*fresh))
    assert [s.name for s in program.inputs if s.kind == "parameter"] == [n for n, _ in module.named_parameters()]
    assert all(s.kind != "constant" for s in program.inputs)


@pytest.mark.parametrize("sizes", [(1, 9, 8), (5, 12, 17)], ids=str)
def test_dynamic_batch_and_image_size(sizes: tuple[int, int, int]) -> None:
    module = AutogradGrad().double()
    program = capture(module, (image().double(),), dynamic_shapes={"x": {0: "batch", 2: "height", 3: "width"}})
    n, h, w = sizes
    fresh = torch.randn(n, 3, h, w, dtype=torch.float64)
    assert_same(program, (fresh,), module(fresh))
    assert set(program.dimensions) == {"batch", "height", "width"}


def test_one_name_is_one_size_over_two_inputs() -> None:
    module = FuncVjp().double()
    args = (image().double(), image(2, 2, 3, 2).double())
    program = capture(module, args, dynamic_shapes=({0: "batch"}, {0: "batch"}))
    assert list(program.dimensions) == ["batch"]
    fresh = (torch.randn(4, 3, 9, 8, dtype=torch.float64), torch.randn(4, 2, 3, 2, dtype=torch.float64))
    assert_same(program, fresh, module(*fresh))
    with pytest.raises(DynamicShapeError, match="one name is one size"):
        capture(module, (args[0], args[1][:1].repeat(3, 1, 1, 1)), dynamic_shapes=({0: "batch"}, {0: "batch"}))


def test_a_dimension_that_the_forward_fixes_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 3, 72) * 2

    with pytest.raises(DynamicShapeError, match="declared dynamic"):
        capture(Fixed(), (image(),), dynamic_shapes={"x": {0: "batch"}})


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu_(self.norm(self.conv(x))).mean((2, 3)))


def test_loss_gradients_and_updated_buffers_by_name() -> None:
    torch.manual_seed(1)
    module = Classifier().double()
    labels = torch.tensor([1, 4])
    program = capture_gradients(
        module,
        (image().double(),),
        value=lambda output, labels: nn.functional.cross_entropy(output, labels),
        value_args=(labels,),
        dynamic_shapes={"x": {0: "batch"}},
        value_dynamic_shapes={"labels": {0: "batch"}},
    )
    assert [s.name for s in program.inputs if s.kind == "user"] == ["x", "labels"]
    x, labels = torch.randn(3, 3, 9, 8, dtype=torch.float64), torch.tensor([0, 2, 2])
    actual = program.run(x, labels)
    loss = nn.functional.cross_entropy(module(x), labels)
    loss.backward()
    torch.testing.assert_close(actual["value"], loss.detach())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(actual[f"{name}.grad"], parameter.grad)
    buffers = dict(module.named_buffers())
    updated = [s for s in program.outputs if s.kind == "buffer"]
    assert {s.target for s in updated} == set(buffers)
    for spec in updated:
        torch.testing.assert_close(actual[spec.name], buffers[str(spec.target)])


def test_capture_leaves_the_module_as_it_was() -> None:
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    identities = {name: id(p) for name, p in module.named_parameters()}
    capture_gradients(module, (image(),))
    assert {name: id(p) for name, p in module.named_parameters()} == identities
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in module.parameters())


def test_evaluation_mode_updates_no_buffer() -> None:
    program = capture_gradients(Classifier().eval(), (image(),))
    assert [s for s in program.outputs if s.kind == "buffer"] == []


def test_tied_weights_are_one_input_with_one_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(4, 4, bias=False)
            self.decode = nn.Linear(4, 4, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decode(torch.tanh(self.encode(x)))

    module = Tied().double()
    program = capture_gradients(module, (torch.ones(2, 4).double(),))
    (weight,) = [s for s in program.inputs if s.kind == "parameter"]
    assert (weight.name, weight.aliases) == ("encode.weight", ("decode.weight",))
    x = torch.randn(2, 4, dtype=torch.float64)
    module(x).sum().backward()
    torch.testing.assert_close(program.run(x)["encode.weight.grad"], module.encode.weight.grad)


def test_gradient_of_an_activation_before_an_in_place_relu() -> None:
    module = Classifier().double().eval()
    program = capture_gradients(module, (image().double(),), wrt=["norm", "x"], value=lambda out: out[:, 1].sum())
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    activation = module.norm(module.conv(x))
    score = module.head(torch.relu(activation).mean((2, 3)))[:, 1].sum()
    expected = torch.autograd.grad(score, [activation, x])
    actual = program.run(x.detach())
    torch.testing.assert_close(actual["norm"], activation.detach())
    torch.testing.assert_close(actual["norm.grad"], expected[0])
    torch.testing.assert_close(actual["x.grad"], expected[1])


class Mapped(nn.Module):
    """Outputs under names that the graph has already."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        scores = self.head(x)
        return {"value": scores.mean(), "hidden": None, "x": 2 * scores, "logits": scores}


def test_outputs_have_names_of_their_own() -> None:
    module, x = Mapped(), torch.randn(2, 4)
    program = capture_gradients(module, (x,), value=lambda out: out["logits"].square().sum(), return_outputs=True)
    actual, expected = program.run(x), module(x)
    torch.testing.assert_close(actual["value"], expected["logits"].square().sum().detach())
    torch.testing.assert_close(actual["output.value"], expected["value"].detach())
    torch.testing.assert_close(actual["output.x"], expected["x"].detach())
    assert [o.name for o in program.outputs if o.kind == "output"] == ["output.value", "output.x", "logits"]
    report = cg.export(module, (x,))
    assert report.verified
    assert list(report.outputs) == ["value", "output.x", "logits"]


def test_dropout_keeps_one_mask_for_forward_and_backward() -> None:
    module = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Dropout(0.5))
    program = capture_gradients(module, (torch.ones(1, 64),), wrt=["input"], return_outputs=True)
    assert len(program.random_nodes) == 1
    first, second = program.run(torch.ones(1, 64)), program.run(torch.ones(1, 64))
    assert not torch.equal(first["output"], second["output"])
    kept = first["output"] != 0
    expected = (kept.float() * 2) @ module[0].weight.detach()
    torch.testing.assert_close(first["input.grad"], expected)


def test_a_closed_over_parameter_becomes_a_named_constant() -> None:
    scale = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))

    class Closed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.func.grad(lambda v: (v.pow(2) * scale[:, None, None]).sum())(x)

    program = capture(Closed(), (image(),))
    (constant,) = [s for s in program.inputs if s.kind == "constant"]
    assert torch.equal(constant.value, scale.detach())
    fresh = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(program.run(fresh)["output"], Closed()(fresh).detach())


class Products(nn.Module):
    """Of two arguments, a buffer and a tensor that is neither."""

    def __init__(self, reference: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("reference", reference)
        self.plain = [reference]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sin() * y + (self.reference - x) * self.plain[0]


def test_one_tensor_given_twice_and_held_by_the_module_is_two_inputs_and_a_constant() -> None:
    x = torch.randn(2, 3, 4, 5)
    module = Products(x)
    program = capture_gradients(module, (x, x), wrt="inputs")
    assert [s.name for s in program.inputs if s.kind == "user"] == ["x", "y"]
    first, second = torch.randn_like(x).requires_grad_(), torch.randn_like(x).requires_grad_()
    module(first, second).sum().backward()
    results = program.run(first.detach(), second.detach())
    torch.testing.assert_close(results["x.grad"], first.grad)
    torch.testing.assert_close(results["y.grad"], second.grad)


def test_one_tensor_given_twice_may_have_dynamic_sizes() -> None:
    class Outer(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x[:, None] * y[None].sin()

    x = torch.randn(3, 4)
    program = capture(Outer(), (x, x), dynamic_shapes={"x": {0: "rows", 1: "n"}, "y": {0: "columns", 1: "n"}})
    assert set(program.dimensions) == {"rows", "columns", "n"}
    first, second = torch.randn(2, 7), torch.randn(5, 7)
    torch.testing.assert_close(program.run(first, second)["output"], Outer()(first, second))


class CachedGradient(nn.Module):
    """pytorch#89675 in its usual shape: the gradient is computed once, outside, and kept."""

    def __init__(self) -> None:
        super().__init__()
        x = torch.ones(1, 3, 4, 4, requires_grad=True)
        (self.cached,) = torch.autograd.grad(x.pow(3).sum(), x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cached * 2.0


def test_a_constant_gradient_is_refused_with_its_place() -> None:
    with pytest.raises(ConstantGradientError, match=r"output.*89675.*test_capture\.py"):
        capture(CachedGradient(), (image(),))


class ReadsValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(x.pow(2).sum(), x)
        doubled = gradient.numpy() * 2
        return torch.from_numpy(doubled) + x


def test_reading_a_gradients_values_is_refused_with_its_place() -> None:
    place = r"test_capture\.py:\d+, in forward \(doubled = gradient.numpy\(\) \* 2\)"
    with pytest.raises(ConstantGradientError, match=place):
        capture(ReadsValues(), (image().requires_grad_(),))


def test_item_stays_a_value_of_the_graph() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.max().item()

    fresh = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(capture(Scaled(), (image(),)).run(fresh)["output"], fresh * fresh.max())


def test_a_python_decision_on_values_is_refused_with_its_place() -> None:
    class Decides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return x
            return -x

    place = r"test_capture\.py:\d+, in forward \(if x\.sum\(\) > 0:\).*torch\.where"
    with pytest.raises(CaptureError, match=place):
        capture(Decides(), (image(),))


class Queue(nn.Module):
    """Puts each output into a ring of the latest six, at a position that is a buffer."""

    def __init__(self, *, one_axis: bool) -> None:
        super().__init__()
        self.one_axis = one_axis
        self.register_buffer("queue", torch.zeros(6, 3))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = x.mean((0, 2, 3))
        if self.one_axis:
            self.queue[self.position.reshape(1)] = value
        else:
            self.queue[self.position] = value
        self.position += 1
        return self.queue @ value


def test_an_index_that_is_a_tensor_without_axes_is_refused_with_what_to_write() -> None:
    place = r"test_capture\.py:\d+, in forward \(self\.queue\[self\.position\] = value\).*x\[i\.reshape\(1\)\]"
    with pytest.raises(CaptureError, match=place):
        capture(Queue(one_axis=False), (image(),))
    captured = capture(Queue(one_axis=True), (image(),))
    state = {"queue": torch.zeros(6, 3), "position": torch.tensor(4)}
    found = captured.run(image(), **state)
    assert torch.equal(found["queue.updated"][4], image().mean((0, 2, 3)))
    assert found["position.updated"] == 5


def test_an_argument_changed_in_place_is_a_copy() -> None:
    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return torch.func.grad(lambda v: v.pow(3).sum())(x)

    x = image()
    program = capture(Doubles(), (x,))
    assert torch.equal(x, image())
    torch.testing.assert_close(program.run(image())["output"], 12 * image() ** 2)


class ChangesItsArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.25)
        return torch.relu_(self.head(x.sigmoid_()))


@pytest.mark.parametrize("wrt", ["inputs", "parameters"])
@pytest.mark.parametrize("asks", [False, True])
def test_gradients_past_an_argument_changed_in_place(wrt: str, asks: bool) -> None:
    module, x = ChangesItsArgument(), torch.rand(2, 4).requires_grad_(asks)
    report = cg.export_gradient(module, (x,), wrt=wrt)
    assert report.verified
    leaf = torch.rand(2, 4).requires_grad_()
    module(leaf.clone()).sum().backward()
    expected = {"x.grad": leaf.grad} if wrt == "inputs" else {"head.weight.grad": module.head.weight.grad}
    actual = cg.GradientSession(report.model).run({"x": leaf.detach()})
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


class Remembers(nn.Module):
    """Keeps a table for the next call, its last activation, and a list and a dict of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.seen, self.by_size = nn.Conv1d(3, 4, 3), None, [], {}

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.shape[0] < x.shape[-1]:
            self.table = torch.arange(x.shape[-1], dtype=x.dtype).cos()
        if x.shape[1] not in self.by_size:
            self.by_size[x.shape[1]] = torch.ones(x.shape[1], 1, dtype=x.dtype)
        self.last = self.conv(x * self.table[: x.shape[-1]] * self.by_size[x.shape[1]])
        self.seen.append(self.last)
        return self.last


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("export", [cg.export, cg.export_gradient])
def test_what_a_forward_keeps_is_neither_the_traces_nor_the_verifications(export: Any, verify: bool) -> None:
    module, x = Remembers(), torch.randn(1, 3, 8)
    export(module, (x,), verify=verify)
    assert (module.table, module.seen, module.by_size, hasattr(module, "last")) == (None, [], {}, False)
    expected = module(x)
    table = module.table
    assert export(module, (x,), verify=verify).verified is verify
    assert module.table is table
    assert [id(value) for value in module.seen] == [id(expected)]
    assert module.last is expected


def test_nested_outputs_are_named_by_their_path() -> None:
    class Nested(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"y": x * 2, "more": {"a": x + 1, "b": [x - 1, None, x * 3]}}

    program = capture(Nested(), (image(),))
    assert [s.name for s in program.outputs] == ["y", "more_a", "more_b_0", "more_b_2"]

    class Tuples(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[object, ...]:
            return x * 2, (x + 1, {"k": x})

    assert [s.name for s in capture(Tuples(), (image(),)).outputs] == ["output_0", "output_1_0", "output_1_1_k"]


def test_outputs_of_a_registered_type_that_does_not_tell_its_keys() -> None:
    class Outcome(dict):  # type: ignore[type-arg]
        """As transformers registers its outputs: flattened to values, without paths."""

    pytree.register_pytree_node(
        Outcome, lambda o: (list(o.values()), list(o)), lambda values, keys: Outcome(zip(keys, values, strict=True))
    )

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Outcome:
            return Outcome(logits=x * 2, hidden=x + 1)

    assert [s.name for s in capture(Model(), (image(),)).outputs] == ["logits", "hidden"]


def test_a_forward_without_a_tensor_in_its_result_is_refused() -> None:
    class Text(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "nothing"

    with pytest.raises(ArgumentTypeError, match="returns a str"):
        capture(Text(), (image(),))


def test_an_error_of_the_forward_names_its_line() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.ones(5, 5)

    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+, in forward"):
        capture(Broken(), (image(),))


def test_unused_parameters_are_listed_or_refused() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.spare = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    program = capture_gradients(Half(), (torch.ones(1, 4),))
    assert program.unused == ("spare.weight", "spare.bias")
    with pytest.raises(ConstantGradientError, match=r"spare\.weight, spare\.bias"):
        capture_gradients(Half(), (torch.ones(1, 4),), unused="error")
    zeros = capture_gradients(Half(), (torch.ones(1, 4),), unused="zeros").run(torch.ones(1, 4))
    assert torch.equal(zeros["spare.weight.grad"], torch.zeros(4, 4))


def test_unknown_names_are_refused_before_tracing() -> None:
    with pytest.raises(ArgumentTypeError, match="no floating-point input, parameter or submodule"):
        capture_gradients(Classifier(), (image(),), wrt=["layer4"])
    with pytest.raises(ArgumentTypeError, match="dynamic_shapes names 'y'"):
        capture(Classifier(), (image(),), dynamic_shapes={"y": {0: "batch"}})


def test_an_input_that_shares_a_parameters_name_is_renamed() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * self.weight

    program = capture_gradients(Scale(), (torch.ones(3),), wrt=["weight_input", "weight"])
    assert [s.name for s in program.inputs] == ["weight", "weight_input"]
    actual = program.run(torch.tensor([1.0, 2.0, 3.0]))
    assert actual["weight.grad"].tolist() == [1.0, 2.0, 3.0]
    assert actual["weight_input.grad"].tolist() == [1.0, 1.0, 1.0]


def test_every_node_knows_its_module() -> None:
    program = capture_gradients(Classifier(), (image(),))
    by_target = {str(n.target): n.meta["nn_module_path"] for n in program.graph_module.graph.nodes}
    assert by_target["aten.convolution.default"] == "conv"
    assert by_target["aten.convolution_backward.default"] == "conv"
    assert by_target["aten.native_batch_norm_backward.default"] == "norm"


class Constants(nn.Module):
    """Parameters with the names that lifted constants get; two of them equal."""

    def __init__(self) -> None:
        super().__init__()
        self.constant_0, self.constant_1 = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, constant_2: Tensor) -> Tensor:
        return constant_2 * self.constant_0 + self.constant_1 * CLOSED_OVER * constant_2.sin()


CLOSED_OVER = torch.tensor([1.0, 2.0, 5.0])


def test_parameters_that_are_called_constant_stay_themselves() -> None:
    report = cg.export(Constants(), (torch.randn(2, 3),))
    assert report.verified
    assert {"constant_0", "constant_1"} <= set(report.model.graph.initializers)
    assert list(report.inputs) == ["constant_2"]


def test_tensors_and_modules_made_in_inference_mode_are_differentiated() -> None:
    with torch.inference_mode():
        module, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), image()
        assert cg.export_gradient(module, (x,), wrt=["inputs", "parameters"]).verified
    assert cg.export_gradient(module, (x,), wrt=["inputs", "parameters"]).verified


def test_another_threads_modules_run_on_during_a_trace() -> None:
    started, traced, failures = threading.Event(), threading.Event(), []

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            started.set()
            traced.wait(30)
            return x

    def serve() -> None:
        try:
            nn.Sequential(Waits(), nn.Identity())(torch.ones(2))
        except BaseException as error:  # the test's own thread reports it
            failures.append(error)

    class Meanwhile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            traced.set()
            thread.join(30)
            return x * 2

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(30)
    capture(Meanwhile(), (image(),))
    assert failures == []


def test_exports_of_several_threads_take_turns() -> None:
    """PyTorch's tracer and default type are the process's: the exports were refused."""
    start, found = threading.Barrier(4), {}

    def export(number: int) -> None:
        module = nn.Sequential(nn.Conv2d(3, 2 + number, 3), nn.BatchNorm2d(2 + number), nn.SiLU())
        start.wait(30)
        try:
            found[number] = cg.export_gradient(module, (image(),), wrt="parameters", of=lambda y: (y * 0.3).sum())
        except BaseException as error:  # the test's own thread reports it
            found[number] = error

    threads = [threading.Thread(target=export, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [getattr(found[number], "verified", found[number]) for number in range(4)] == [True] * 4
    assert [found[number].outputs["0.weight.grad"][0] for number in range(4)] == [2, 3, 4, 5]
    assert torch.get_default_dtype() == torch.float32


def test_a_compiled_module_or_part_is_exported_as_it_is_written() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())
    plain = cg.export_gradient(module, (image(),), wrt="parameters")
    compiled = cg.export_gradient(torch.compile(module), (image(),), wrt="parameters")
    module[0] = torch.compile(module[0])
    part = cg.export_gradient(module, (image(),), wrt="parameters")
    assert compiled.operators == part.operators == plain.operators
    assert "0._orig_mod.weight.grad" in part.outputs  # as in module.named_parameters()


def _sampled(y: Tensor) -> Tensor:
    rows, columns = torch.meshgrid(torch.linspace(-1, 0.9, 4), torch.linspace(-0.8, 1, 5), indexing="ij")
    grid = torch.stack([rows, columns], -1).expand(y.shape[0], 4, 5, 2)
    return functional.grid_sample(y.tanh(), grid, align_corners=False)


def _hooked(y: Tensor) -> Tensor:
    y = y * 2
    y.register_hook(lambda gradient: gradient * 3)
    return y.tanh()


@pytest.mark.parametrize("part", [_sampled, _hooked, lambda y: torch.cdist(y[:, 0], y[:, 1])])
@pytest.mark.parametrize("wrt", [["inputs", "parameters"], ["conv"]])
def test_a_checkpointed_part_is_called_again_as_it_was(part: Any, wrt: list[str]) -> None:
    """What stands in for a fused operator in the first call does so in the second, which the backward pass makes."""

    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: part(self.conv(x)), x, use_reentrant=False).square()

    assert cg.export_gradient(Recomputing(), (torch.randn(2, 2, 6, 6),), wrt=wrt).verified


@pytest.mark.parametrize("export", [capture, capture_gradients])
def test_parameters_without_data_are_refused_by_name(export: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, device="meta"))
    with pytest.raises(cg.DeviceError, match=r"^1\.weight, 1\.bias: on the device 'meta'.*to_empty"):
        export(module, (torch.randn(2, 3),))
    with pytest.raises(cg.DeviceError, match=r"^input: on the device 'meta'"):
        export(nn.Linear(3, 4), (torch.randn(2, 3, device="meta"),))


def test_a_step_of_parameters_without_data_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, device="meta"))
    batch = torch.randn(2, 3), torch.randn(2, 2)
    with pytest.raises(cg.DeviceError, match=r"^1\.weight, 1\.bias"):
        cg.export_training_step(module, "mse", "adam", batch)
