"""Nested arguments: dynamic sizes by key, and tensors where nothing would find them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import convgrad_export as cg
from convgrad_export.errors import ArgumentTypeError
from convgrad_export.integrations.arguments import CallArguments
from convgrad_export.integrations.capture import capture


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Batch:
    image: Tensor
    scale: float = 2.0


@dataclasses.dataclass
class Registered:
    image: Tensor
    scale: float = 2.0


torch.export.register_dataclass(Registered)


class Sums(nn.Module):
    """Of every tensor in a nested argument, over all axes but the first two."""

    def forward(self, d: Any) -> list[Tensor]:
        return [leaf.sum(-1) for leaf in torch.utils._pytree.tree_leaves(d) if isinstance(leaf, Tensor)]


class OfBatch(nn.Module):
    def forward(self, batch: Any) -> Tensor:
        return batch.image * batch.scale


A, B = torch.ones(4, 3, 2), torch.ones(7, 3, 2)


@pytest.mark.parametrize(
    ("value", "shapes", "expected"),
    [
        ({"a": A, "b": B}, {"b": {0: "m"}, "a": None}, {"d_a": {}, "d_b": {0: "m"}}),
        ({"a": [A, 3], "b": B}, {"b": None, "a": [{0: "m"}, None]}, {"d_a_0": {0: "m"}, "d_b": {}}),
        ([A, {"c": B}], [None, {"c": {0: "m"}}], {"d_0": {}, "d_1_c": {0: "m"}}),
        (Pair(A, B), {"second": {0: "m"}, "first": None}, {"d_first": {}, "d_second": {0: "m"}}),
        (Pair(A, B), (None, {0: "m"}), {"d_first": {}, "d_second": {0: "m"}}),
        (Registered(A), {"image": {0: "m"}, "scale": None}, {"d_image": {0: "m"}}),
    ],
)
def test_nested_dynamic_shapes_go_by_key(value: Any, shapes: Any, expected: dict[str, dict[int, str]]) -> None:
    program = capture(Sums(), (value,), dynamic_shapes={"d": shapes})
    assert {s.name: dict(s.dynamic) for s in program.inputs} == expected


@pytest.mark.parametrize(
    ("value", "shapes", "message"),
    [
        ({"a": A, "b": B}, {"bogus": {0: "m"}, "nothing": None}, r"of d has the keys \['bogus'.*\['a', 'b'\]"),
        ({"a": A, "b": B}, {"b": {0: "m"}}, r"of d has the keys \['b'\].*\['a', 'b'\]"),
        ({"a": A, "b": B}, [None, {0: "m"}], r"of d is .*expected a dict with the keys \['a', 'b'\]"),
        ([A, [B, A]], [None, [{0: "m"}]], r"of d\['1'\] has 1 entries, the argument has 2"),
        ([A, 3], [None, {0: "m"}], r"of d\['1'\] is .*expected None"),
        ([A, B], 3, r"of d is 3, expected a sequence"),
    ],
)
def test_dynamic_shapes_of_another_structure_are_refused(value: Any, shapes: Any, message: str) -> None:
    with pytest.raises(ArgumentTypeError, match=message):
        capture(Sums(), (value,), dynamic_shapes={"d": shapes})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (Batch(A), r"batch holds a Batch with a tensor in it \(batch\.image\).*export\.register_dataclass\(Batch\)"),
        ([Batch(A)], r"batch holds a Batch.*export\.register_dataclass\(Batch\)"),
        (SimpleNamespace(image={"x": A}, scale=1), r"batch\.image\['x'\].*register_pytree_node"),
        (Batch(np.ones((2, 2))), r"\(batch\.image\)"),
        ([np.ones((2, 2))], r"argument batch is or holds a numpy array"),
    ],
)
def test_a_tensor_that_would_be_baked_in_unseen_is_refused(argument: Any, message: str) -> None:
    with pytest.raises(ArgumentTypeError, match=message):
        capture(OfBatch(), (argument,))


def test_a_registered_class_is_an_argument_and_a_plain_object_a_constant() -> None:
    program = capture(OfBatch(), (Registered(A),))
    assert [s.name for s in program.inputs] == ["batch_image"]
    torch.testing.assert_close(program.run(3 * A)["output"], 6 * A)

    class Scaled(nn.Module):
        def forward(self, x: Tensor, options: Any) -> Tensor:
            return x * options.scale

    assert [s.name for s in capture(Scaled(), (A, SimpleNamespace(scale=2.0))).inputs] == ["x"]


def test_a_lazy_module_that_has_not_run_is_refused() -> None:
    module, x = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), torch.randn(2, 4)
    with pytest.raises(ArgumentTypeError, match=r"1\.weight, 1\.bias of Sequential has no shape yet.*call the module"):
        cg.export(module, (x,))
    with pytest.raises(ArgumentTypeError, match=r"1\.weight, 1\.bias of Sequential has no shape yet"):
        cg.export_training_step(module, "cross_entropy", "sgd", (x, torch.tensor([0, 1])))
    module(x)
    assert cg.export(module, (x,)).verified


class TakesTarget(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.linear(x) + nn.functional.one_hot(target, 3)


@pytest.mark.parametrize("own", [{}, {"target_input": {0: "n"}}])
def test_a_steps_target_that_shares_its_name_with_an_argument_is_dynamic_by_name(own: dict[str, Any]) -> None:
    labels = torch.tensor([0, 1, 2, 0])
    shapes = {"x": {0: "n"}, "target": {0: "n"}, **own}
    batch = (torch.randn(4, 4), labels, labels.clone())
    report = cg.export_training_step(TakesTarget(), "cross_entropy", "sgd", batch, dynamic_shapes=shapes)
    assert [report.inputs[name][0] for name in ("x", "target", "target_input")] == ["n", "n", "n"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of_args": (np.array([0, 1]),)}, r"y is a ndarray, expected a torch tensor"),
        ({"of_dynamic_shapes": {"bogus": {0: "n"}}}, r"names 'bogus', expected some of: y"),
        ({"of_dynamic_shapes": ({0: "n"}, None)}, r"expected an entry for each of: y"),
        ({"dynamic_shapes": 5}, r"dynamic_shapes is 5, expected a dict by argument"),
        ({"dynamic_shapes": {"input": 5}}, r"dynamic_shapes of 'input' is 5, expected a dict from dimension"),
        ({"dynamic_shapes": {"input": "n"}}, r"dynamic_shapes of 'input' is 'n', expected a dict from dimension"),
        ({"of_args": ()}, r"of does not take .* the 0 tensor\(s\) of of_args: missing a required argument: 'y'"),
        ({"of": lambda output: output.sum()}, r"of does not take .* the 1 tensor\(s\) of of_args: too many"),
        ({"of": nn.CrossEntropyLoss(), "of_args": ()}, r"missing a required argument: 'target'"),
        ({"of": nn.CrossEntropyLoss}, r"of is the class CrossEntropyLoss"),
        ({"of": lambda output, y: None}, r"of returned a NoneType, expected a tensor with one element"),
        ({"of_arg_names": ["a", "b"]}, r"of_arg_names has 2 names for the 1 tensor"),
        ({"of_arg_names": "y"}, r"of_arg_names is 'y', expected a list"),
        ({"wrt": 3}, r"wrt is 3, expected 'inputs'"),
        ({"wrt": [torch.ones(2)]}, r"wrt is \[tensor.*expected 'inputs'"),
        ({"kwargs": [1]}, r"kwargs is a list, expected a dict"),
        ({"args": (torch.ones(2, 4).to_sparse(),)}, r"input has the layout torch.sparse_coo, expected a dense"),
    ],
)
def test_what_is_no_argument_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, y)

    labels = torch.tensor([0, 1])
    given: dict[str, Any] = {"args": (torch.ones(2, 4),), "of": loss, "of_args": (labels,), **options}
    with pytest.raises(ArgumentTypeError, match=message):
        cg.export_gradient(nn.Linear(4, 3), **given)


def fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(tensor)


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (fake, "is a tensor of FakeTensorMode"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "is a quantized tensor"),
        (lambda tensor: torch.nested.nested_tensor(list(tensor)), "is a nested tensor"),
        (lambda tensor: torch.nested.nested_tensor(list(tensor), layout=torch.jagged), "is a nested tensor"),
        (Tensor.to_sparse, "has the layout torch.sparse_coo"),
    ],
)
def test_tensors_without_numbers_of_their_own_are_refused_by_name(special: Any, message: str) -> None:
    net, x, y = nn.Linear(4, 3), torch.ones(2, 4), torch.ones(2, 3)
    with pytest.raises(ArgumentTypeError, match=f"input {message}"):
        cg.export_gradient(net, (special(x),), wrt="parameters")
    with pytest.raises(ArgumentTypeError, match=f"input {message}"):
        cg.export_training_step(net, "mse", "sgd", (special(x), y))
    with pytest.raises(ArgumentTypeError, match=f"target {message}"):
        cg.export_training_step(net, "mse", "sgd", (x, special(y)))


def test_one_tensor_may_stand_for_the_values_arguments_and_a_set_for_wrt() -> None:
    report = cg.export_gradient(
        nn.Linear(4, 3),
        torch.ones(2, 4),
        wrt={"weight"},
        of=lambda output, y: nn.functional.cross_entropy(output, y),
        of_args=torch.tensor([0, 1]),
    )
    assert list(report.inputs) == ["input", "y"]
    assert list(report.outputs) == ["value", "weight.grad"]


def test_a_loss_modules_arguments_have_the_names_of_its_forward() -> None:
    shapes: dict[str, Any] = {"dynamic_shapes": {"input": {0: "n"}}, "of_dynamic_shapes": {"target": {0: "n"}}}
    labels, x = torch.tensor([0, 1, 2]), torch.randn(3, 4)
    net, loss = nn.Linear(4, 3), nn.CrossEntropyLoss()
    report = cg.export_gradient(net, (x,), of=loss, of_args=(labels,), **shapes)
    assert report.inputs == {"input": ["n", 4], "target": ["n"]}
    value = cg.GradientSession(report.model).run({"input": x, "target": labels})["value"]
    torch.testing.assert_close(value, loss(net(x), labels).detach())


class Weighted(nn.Module):
    """A list beside an argument that is called as its element would be; `weight` is a parameter, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))

    def forward(self, x: Any, x_0: Tensor, weight: Tensor, weight_input: Tensor) -> Tensor:
        return x[0] * 2 + x_0 * 3 + weight * self.weight + weight_input * 5


def test_two_tensors_never_become_one_input() -> None:
    args = ([torch.randn(2)], torch.randn(2), torch.randn(2), torch.randn(2))
    shapes = ([{0: "n"}], {0: "n"}, None, None)
    module = Weighted()
    report = cg.export(module, args)
    assert list(report.inputs) == ["x_0_2", "x_0", "weight_input_2", "weight_input"]
    feed = dict(zip(report.inputs, (args[0][0], *args[1:]), strict=True))
    torch.testing.assert_close(cg.GradientSession(report.model).run(feed)["output"], module(*args).detach())
    specs = CallArguments(module, args, None).inputs((), shapes)
    assert [spec.dynamic for spec in specs] == [{0: "n"}, {0: "n"}, {}, {}]
    nested = CallArguments(nn.Identity(), ({"a_b": torch.ones(1), "a": {"b": torch.ones(2)}},), None)
    assert list(nested.examples) == ["input_a_b", "input_a_b_2"]


def test_a_tensor_in_a_slot_is_seen() -> None:
    class Slotted:
        __slots__ = ("kept",)

        def __init__(self) -> None:
            self.kept = torch.ones(2)

    with pytest.raises(ArgumentTypeError, match=r"input\.kept"):
        CallArguments(nn.Identity(), (Slotted(),), None)


def test_a_tensor_in_an_object_among_the_outputs_is_not_left_out() -> None:
    @dataclasses.dataclass
    class Outcome:
        auxiliary: Tensor

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Outcome]:
            return x * 2, Outcome(x + 1)

    with pytest.raises(ArgumentTypeError, match=r"returns a Outcome.*register_dataclass\(Outcome\)"):
        cg.export(Two(), (torch.ones(2),))


class Variadic(nn.Module):
    def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
        return xs[0] + xs[1] * named["k"]


@pytest.mark.parametrize(
    "shapes",
    [
        {"xs": ({0: "n"}, {0: "n"}), "named": {"k": {0: "n"}}},
        {"xs_0": {0: "n"}, "xs_1": {0: "n"}, "k": {0: "n"}},
        ({0: "n"}, {0: "n"}, {0: "n"}),
    ],
    ids=["torch.export's", "by name", "in order"],
)
def test_dynamic_shapes_of_variadic_arguments(shapes: Any) -> None:
    x = torch.randn(3)
    report = cg.export(Variadic(), (x, x), kwargs={"k": x}, dynamic_shapes=shapes)
    assert report.inputs == {"xs_0": ["n"], "xs_1": ["n"], "k": ["n"]}
    with pytest.raises(ArgumentTypeError, match="xs_2"):
        cg.export(Variadic(), (x, x), kwargs={"k": x}, dynamic_shapes={"xs": ({0: "n"},) * 3})


@pytest.mark.parametrize("name", ["of", "target", "progress"])
@pytest.mark.parametrize("given", [np.ones(2), torch.ones(2)], ids=["array", "tensor"])
def test_options_that_are_arrays_are_named(name: str, given: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=f"{name} is "):
        cg.export_gradient(nn.Linear(3, 2), (torch.randn(2, 3),), **{name: given})
