"""`cg.export` and `cg.export_gradient`: files, names, verification, refusals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

import convgrad_export as cg
from convgrad_export.integrations import verification
from convgrad_export.runtime.convolution_entries import METADATA, from_text
from convgrad_export.runtime.formula import intact

from .gradient_modules import FORMS, AutogradGrad, FuncVjp, image
from .test_capture import CachedGradient


@pytest.mark.parametrize("opset", [13, 18, 23])
@pytest.mark.parametrize(("form", "args"), FORMS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_form_exports_verified(
    form: type[nn.Module], args: tuple[Tensor, ...], opset: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    report = cg.export(form(), args, tmp_path / "model.onnx", opset_version=opset)
    assert report.verified
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", opset)}
    assert not model.functions


def test_dynamic_sizes_are_verified_and_named() -> None:
    report = cg.export(AutogradGrad(), (image(),), dynamic_shapes={"x": {0: "batch", 2: "height", 3: "width"}})
    assert report.inputs == {"x": ["batch", 3, "height", "width"]}
    for name in ("batch", "height", "width"):
        assert len({sizes[name] for sizes in report.verified_sizes}) > 1
    session = cg.GradientSession(report.model)
    x = torch.randn(1, 3, 20, 21)
    assert session.run({"x": x})["output"].shape == x.shape


def test_names_initializers_and_files(tmp_path: Path) -> None:
    module = AutogradGrad()
    report = cg.export(module, (image(),), tmp_path / "m.onnx", input_names=["picture"], output_names=["force"])
    model = onnx.load(tmp_path / "m.onnx")
    assert [i.name for i in model.graph.input] == ["picture"]
    assert [o.name for o in model.graph.output] == ["force"]
    initializers = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    for name, parameter in module.named_parameters():
        np.testing.assert_array_equal(initializers[name], parameter.detach().numpy())
    assert report.sizes["files"] == os.path.getsize(tmp_path / "m.onnx")
    assert set(report.errors) == {"force"}


def test_external_data_and_overwriting(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    module = nn.Conv2d(3, 64, 5)
    report = cg.export_gradient(module, (image(),), path, external_data_above=1000)
    assert (tmp_path / "big.onnx.data").exists()
    session = cg.GradientSession(path)
    assert session.run({"input": image()})["input.grad"].shape == image().shape
    assert report.sizes["graph"] <= 20_000
    before = path.read_bytes()
    with pytest.raises(cg.OutputExistsError, match="overwrite=True"):
        cg.export_gradient(module, (image(),), path)
    assert path.read_bytes() == before
    cg.export_gradient(module, (image(),), path, overwrite=True)
    assert not (tmp_path / "big.onnx.data").exists()
    assert sorted(os.listdir(tmp_path)) == ["big.onnx"]


def test_an_overwriting_that_fails_leaves_the_old_model_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = nn.Conv2d(3, 4, 3), tmp_path / "m.onnx"
    cg.export_gradient(module, (image(),), path, external_data=True)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(cg.OutputPathError, match="no space left"):
            cg.export_gradient(module, (image(),), path, external_data=False, overwrite=True)
    assert cg.GradientSession(path).run({"input": image()})["input.grad"].shape == image().shape
    cg.export_gradient(module, (image(),), path, external_data=False, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_links_are_written_through_with_their_weights(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    link = tmp_path / "model.onnx"
    link.symlink_to(tmp_path / "store" / "v1.onnx")
    module = nn.Conv2d(3, 64, 5)
    with pytest.raises(cg.OutputExistsError, match="does not exist"):
        cg.export_gradient(module, (image(),), link)
    cg.export_gradient(module, (image(),), link, external_data_above=1000, overwrite=True)
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "store"]
    assert sorted(os.listdir(tmp_path / "store")) == ["v1.onnx", "v1.onnx.data"]
    for path in (link, link.resolve()):
        assert cg.GradientSession(path).run({"input": image()})["input.grad"].shape == image().shape


def test_a_model_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    for file, mode in ((path, 0o600), (data, 0o640)):
        file.touch()
        file.chmod(mode)
    cg.export_gradient(nn.Conv2d(3, 4, 3), (image(),), path, external_data=True, overwrite=True)
    assert [file.stat().st_mode & 0o777 for file in (path, data)] == [0o600, 0o640]
    data.unlink()
    cg.export_gradient(nn.Conv2d(3, 4, 3), (image(),), path, external_data=True, overwrite=True)
    assert data.stat().st_mode & 0o777 == 0o600  # its weights are no more public than it is


@pytest.mark.parametrize("external_data", [True, False])
def test_an_interruption_between_graph_and_weights_leaves_the_previous_pair(
    external_data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    cg.export_gradient(nn.Conv2d(3, 4, 3), (image(),), path, external_data=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {"m.onnx", "m.onnx.data"}
    rename, calls = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cg.export_gradient(nn.Conv2d(3, 4, 3), (image(),), path, external_data=external_data, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    cg.export_gradient(nn.Conv2d(3, 4, 3), (image(),), path, external_data=external_data, overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == ({"m.onnx", "m.onnx.data"} if external_data else {"m.onnx"})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(cg.OutputPathError, match="pipe"):
        cg.export(AutogradGrad(), (image(),), tmp_path / "pipe", overwrite=True)
    assert (tmp_path / "pipe").is_fifo()


def test_the_metadata_follows_new_names() -> None:
    class Depthwise(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, weight, padding=1, groups=16)

    inputs = torch.randn(2, 16, 6, 7), torch.randn(16, 1, 3, 3)
    plain = cg.export_gradient(Depthwise(), inputs)
    names = {"input_names": ["picture", "kernel"], "output_names": ["loss", "slope", "change"]}
    named = cg.export_gradient(Depthwise(), inputs, **names)
    before, after = (from_text(report.model.metadata_props[METADATA]) for report in (plain, named))
    assert [(entry.kind, entry.formula) for entry in after] == [(entry.kind, entry.formula) for entry in before]
    assert {"kernel", "picture", "slope", "change"} <= {n for e in after for n in (e.result, *e.operands)}
    assert intact(onnx_ir.to_proto(named.model), after) == after


def test_unwritable_places_are_found_first(tmp_path: Path) -> None:
    with pytest.raises(cg.OutputPathError, match="does not exist"):
        cg.export(AutogradGrad(), (image(),), tmp_path / "missing" / "m.onnx")
    with pytest.raises(cg.OutputPathError, match="is a folder"):
        cg.export(AutogradGrad(), (image(),), tmp_path)
    with pytest.raises(cg.ArgumentTypeError, match="13 to 23"):
        cg.export(AutogradGrad(), (image(),), opset_version=12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": lambda x: x}, "expected a torch.nn.Module instance"),
        ({"module": nn.Conv2d}, "expected a torch.nn.Module instance"),
        ({"args": None}, "args is a NoneType"),
        ({"args": (np.ones((1, 3, 9, 8), np.float32),)}, "numpy array"),
        ({"args": (image(), image())}, "too many positional"),
        ({"path": 3}, "path is 3"),
        ({"opset_version": "18"}, "13 to 23"),
        ({"samples": 0}, "samples is 0"),
        ({"overwrite": "no"}, "overwrite is 'no'"),
        ({"external_data": "no"}, "external_data is 'no'"),
        ({"external_data_above": "1 MB"}, "external_data_above is '1 MB'"),
        ({"external_data_above": -1}, "external_data_above is -1"),
        ({"verify": None}, "verify is None"),
        ({"hessian_vector": "no"}, "hessian_vector is 'no'"),
        ({"return_outputs": 2}, "return_outputs is 2"),
        ({"of_args": None}, "of_args is None"),
        ({"decompositions": 1.5}, "decompositions is 1.5"),
        ({"custom_translation_table": {torch.ops.aten.relu.default: 3}}, "custom_translation_table is"),
        ({"provider": "cuda"}, "CUDAExecutionProvider"),
        ({"lowering": "foo"}, "none of: auto"),
        ({"of": "best"}, "of is 'best'"),
        ({"of": 1.5}, "of is 1.5"),
        ({"of": lambda out: out}, "one element"),
        ({"of": "vjp", "of_args": (image(),)}, "of is 'vjp'"),
        ({"of_args": torch.ones(())}, "of is None"),
        ({"of": 1, "of_arg_names": ["labels"]}, "of is 1"),
        ({"wrt": ["layer4"]}, "layer4"),
        ({"input_names": ["a", "b"]}, "1 different names"),
        ({"dynamic_shapes": {"input": {7: "n"}}}, "dimension 7"),
        ({"dynamic_shapes": {"x": {0: "n"}}}, "names 'x'"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_arguments_are_named_and_nothing_is_written(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"module": nn.Conv2d(3, 4, 3), "args": (image(),), "path": tmp_path / "m.onnx", **change}
    with pytest.raises(cg.ConvGradError, match=message):
        cg.export_gradient(**given)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("provider", ["cuda", None, ["CPUExecutionProvider"]])
def test_a_translation_table_for_no_provider_is_refused(provider: Any) -> None:
    with pytest.raises(cg.ProviderError, match="provider is"):
        cg.translation_table(provider=provider)


@pytest.mark.parametrize("opset", ["18", None, 12, 18.0])
def test_a_translation_table_for_no_opset_is_refused(opset: Any) -> None:
    with pytest.raises(cg.ConvGradError, match="opset_version is"):
        cg.translation_table(opset_version=opset)


def test_steps_are_shown_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cg.export_gradient(nn.Conv2d(3, 4, 3), (image(),))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    cg.export_gradient(nn.Conv2d(3, 4, 3), (image(),))
    shown = capsys.readouterr()
    assert shown.out == ""
    for step in ("capture", "translate", "optimize", "check", "verify"):
        assert step in shown.err


def test_a_forward_without_gradients_says_so() -> None:
    class Frozen(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    with pytest.raises(cg.ConstantGradientError, match=r"torch\.no_grad"):
        cg.export_gradient(Frozen(3, 4, 3), (image(),))


def test_a_checkpointed_module_is_differentiated_with_its_own_parameters() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.part, x, use_reentrant=False)

    report = cg.export_gradient(Checkpointed(), (image(),), wrt=["inputs", "parameters"], of=lambda o: o.pow(2).sum())
    assert set(report.errors) == set(report.outputs)
    assert not any(name.startswith("constant") for name in report.model.graph.initializers if "weight" in name)


def test_a_gradient_penalty_and_its_parameter_gradients() -> None:
    """Gulrajani et al., arXiv:1704.00028: the norm of an input gradient, differentiated by the parameters."""

    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.critic = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3))

        def forward(self, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
            x = (mix * real + (1 - mix) * fake).requires_grad_()
            scores = self.critic(x)
            (gradient,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
            return ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()

    torch.manual_seed(0)
    args = (image(), image().flip(0), torch.tensor([0.3, 0.8])[:, None, None, None])
    report = cg.export_gradient(Penalty(), args, wrt="parameters")
    assert {"critic.0.weight.grad", "critic.2.weight.grad"} <= set(report.errors)


def test_a_constant_gradient_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(cg.ConstantGradientError):
        cg.export(CachedGradient(), (image(),), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_verification_catches_a_wrong_translation(tmp_path: Path) -> None:
    """The same sigmoid with one coefficient changed, as a translation of torch.sigmoid."""
    from onnxscript import opset18 as op

    def wrong(x: Any) -> Any:
        return op.Sigmoid(op.Mul(x, op.Constant(value_float=1.001)))

    table = {torch.ops.aten.sigmoid.default: wrong}
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid())
    with pytest.raises(cg.VerificationError, match=r"output 'input\.grad'.*wrong: relative error"):
        cg.export_gradient(module, (image(),), tmp_path / "m.onnx", custom_translation_table=table)
    assert os.listdir(tmp_path) == []
    assert not cg.export_gradient(module, (image(),), custom_translation_table=table, verify=False).verified


def test_verification_catches_one_wrong_element() -> None:
    module = nn.Conv2d(3, 4, 3)
    report = cg.export_gradient(module, (image(),))
    from convgrad_export.integrations.capture import capture_gradients

    program = capture_gradients(module, (image(),), wrt="inputs")

    class OneWrong:
        input_names = ("input",)

        def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = cg.GradientSession(report.model).run(feed)
            outputs["input.grad"] = outputs["input.grad"].copy()
            outputs["input.grad"][0, 0, -1, -1] *= 1.01
            return outputs

    with pytest.raises(cg.VerificationError, match=r"input\.grad"):
        verification.compare(OneWrong(), program, {"input": image()})


def test_random_models_say_that_they_were_not_verified() -> None:
    report = cg.export_gradient(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)), (image(),))
    assert not report.verified
    assert "random numbers" in report.notes[0]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.classify = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x).mean((2, 3)))


@pytest.fixture
def head() -> Head:
    torch.manual_seed(2)
    return Head().eval()


def run(report: cg.ExportReport, **inputs: Tensor) -> dict[str, Tensor]:
    result: dict[str, Tensor] = cg.GradientSession(report.model).run(inputs)
    return result


def test_class_score(head: Head) -> None:
    actual = run(cg.export_gradient(head, (image(),), of=3), x=image())
    x = image().requires_grad_()
    score = head(x)[:, 3].sum()
    score.backward()
    torch.testing.assert_close(actual["value"], score.detach())
    torch.testing.assert_close(actual["x.grad"], x.grad)
    with pytest.raises(cg.ArgumentTypeError, match="class 5"):
        cg.export_gradient(head, (image(),), of=5)


def test_named_activations_inputs_and_parameters(head: Head) -> None:
    report = cg.export_gradient(head, (image(),), wrt=["features.1", "x", "classify.weight"], of=0)
    assert list(report.outputs) == ["value", "features.1", "features.1.grad", "x.grad", "classify.weight.grad"]
    actual = run(report, x=image())
    x = image().requires_grad_()
    activation = head.features[1](head.features[0](x))
    score = head.classify(torch.relu(activation).mean((2, 3)))[:, 0].sum()
    grads = torch.autograd.grad(score, [activation, x, head.classify.weight])
    for name, wanted in zip(("features.1.grad", "x.grad", "classify.weight.grad"), grads, strict=True):
        torch.testing.assert_close(actual[name], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(actual["features.1"], activation.detach())


def test_user_function_with_labels(head: Head) -> None:
    labels = torch.tensor([1, 4])
    head.train()
    report = cg.export_gradient(
        head,
        (image(),),
        wrt="parameters",
        of=lambda output, labels: nn.functional.cross_entropy(output, labels),
        of_args=(labels,),
        dynamic_shapes={"x": {0: "batch"}},
        of_dynamic_shapes={"labels": {0: "batch"}},
    )
    assert list(report.inputs) == ["x", "labels"]
    assert {"features.1.running_mean.updated", "features.1.running_var.updated"} <= set(report.outputs)
    x, labels = torch.randn(5, 3, 9, 8), torch.tensor([0, 1, 2, 3, 4])
    actual = run(report, x=x, labels=labels)
    nn.functional.cross_entropy(head(x), labels).backward()
    for name, parameter in head.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(actual[f"{name}.grad"], parameter.grad, rtol=1e-3, atol=max(1e-4 * scale, 1e-7))


def test_vector_jacobian_product_with_a_cotangent(head: Head) -> None:
    report = cg.export_gradient(head, (image(),), of="vjp", dynamic_shapes={"x": {0: "batch", 2: "h", 3: "w"}})
    assert report.inputs["cotangent"] == ["batch", 5]
    x, cotangent = torch.randn(3, 3, 7, 10), torch.randn(3, 5)
    actual = run(report, x=x, cotangent=cotangent)
    expected = torch.func.vjp(head, x)[1](cotangent)[0]
    torch.testing.assert_close(actual["x.grad"], expected, rtol=1e-4, atol=1e-6)


def test_vjp_of_an_image_output_ties_the_cotangents_size_to_the_inputs() -> None:
    module = nn.Conv2d(3, 4, 3, stride=2)
    report = cg.export_gradient(module, (image(),), of="vjp", dynamic_shapes={"input": {2: "h"}})
    assert all(sizes["output_dim_2"] == (sizes["h"] - 3) // 2 + 1 for sizes in report.verified_sizes[1:])
    assert len(report.verified_sizes) > 1


def test_hessian_vector_product() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 2, 2))
    value = lambda out: out.pow(3).sum()  # noqa: E731
    report = cg.export_gradient(module, (image(),), wrt=["input", "0.weight"], of=value, hessian_vector=True)
    vectors = {"input.vector": torch.randn(2, 3, 9, 8), "0.weight.vector": torch.randn(4, 3, 3, 3)}
    actual = run(report, input=image(), **vectors)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        parameters = {**dict(module.named_parameters()), "0.weight": weight}
        return value(torch.func.functional_call(module, parameters, (x,)))

    point = (image(), module[0].weight.detach())
    _, expected = torch.autograd.functional.hvp(loss, point, tuple(vectors.values()))
    for name, wanted in zip(("input.hvp", "0.weight.hvp"), expected, strict=True):
        torch.testing.assert_close(actual[name], wanted, rtol=1e-3, atol=1e-4)


ABSOLUTE = {
    "linear": lambda: nn.Linear(3, 4),
    "group-norm": lambda: nn.GroupNorm(2, 4),
    "smooth": lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(4, 4, affine=False), nn.SiLU()).double(),
}


@pytest.mark.parametrize("name", ABSOLUTE)
def test_hessian_vector_products_of_an_absolute_value(name: str) -> None:
    """Autograd's derivative of a sign has no memory: on the device meta in a trace, and written to in verification.

    The product for a bias depends on nothing at all: it is zero.
    """
    torch.manual_seed(0)
    module = ABSOLUTE[name]()
    x = torch.randn(2, 4, 3, dtype=next(module.parameters()).dtype)
    report = cg.export_gradient(
        module, (x,), wrt=["inputs", "parameters"], of=lambda y: y.abs().sum(), hessian_vector=True
    )
    assert {f"{name}.hvp" for name, _ in module.named_parameters()} < set(report.errors)


def test_named_lowering_is_used_and_reported() -> None:
    module = nn.Conv2d(3, 4, 3)
    report = cg.export_gradient(module, (image(),), wrt="parameters", lowering="weight.swapped_conv")
    assert [c.lowering for c in report.lowerings if c.gradient == "weight"] == ["weight.swapped_conv"]
    assert report.to_dict()["lowerings"][0]["lowering"] == "weight.swapped_conv"
    with pytest.raises(cg.UnsupportedLoweringError, match="none of"):
        cg.export_gradient(module, (image(),), lowering="weight.magic")
    with pytest.raises(cg.UnsupportedLoweringError, match=r"winograd4.*Nothing was written"):
        cg.export_gradient(nn.Conv2d(3, 4, 3, 2), (image(),), lowering="input.winograd4")


def test_the_module_is_left_as_it_was(head: Head) -> None:
    head.train()
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    cg.export_gradient(head, (image(),), wrt="parameters")
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in head.parameters())


def test_files_do_not_hold_paths_of_this_machine(tmp_path: Path, head: Head) -> None:
    cg.export_gradient(head, (image(),), tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"site-packages" not in content
    assert os.path.dirname(__file__).encode() not in content


def test_the_same_export_twice_gives_the_same_bytes(tmp_path: Path, head: Head) -> None:
    for name in ("a.onnx", "b.onnx"):
        cg.export_gradient(head, (image(),), tmp_path / name, verify=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


class Functional(nn.Module):
    """Two calls of torch.nn.grad, for torch.onnx.export itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 3))

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        dx = nn.grad.conv2d_input(x.shape, self.weight, g, stride=2, padding=1, groups=2)
        return dx, nn.grad.conv2d_weight(x, self.weight.shape, g, stride=2, padding=1, groups=2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_translation_table_in_torch_onnx_export(dynamic: bool) -> None:
    x, g = torch.randn(2, 4, 9, 8), torch.randn(2, 6, 5, 4)
    shapes = ({0: "n", 2: "h", 3: "w"}, {0: "n", 2: "p", 3: "q"}) if dynamic else None
    module = Functional()
    program = torch.onnx.export(
        module,
        (x, g),
        dynamo=True,
        custom_translation_table=cg.translation_table(),
        dynamic_shapes=shapes,
        verbose=False,
        opset_version=18,
    )
    assert program is not None
    session = cg.GradientSession(program.model_proto)
    actual = list(session.run(dict(zip(session.input_names, (x.numpy(), g.numpy()), strict=True))).values())
    for value, wanted in zip(actual, module(x, g), strict=True):
        np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_vjp_form_of_the_forward_itself() -> None:
    args = (image(), image(2, 2, 3, 2))
    report = cg.export(FuncVjp(), args, dynamic_shapes=({0: "batch"}, {0: "batch"}))
    assert report.inputs == {"x": ["batch", 3, 9, 8], "cotangent": ["batch", 2, 3, 2]}


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(max=0.5)
        return x * self.weight


@pytest.mark.parametrize(
    ("module", "x", "name"),
    [(Clamped(), torch.ones(2, 3), "weight"), (nn.Embedding(5, 3, max_norm=1.0), torch.tensor([1, 4]), "weight")],
)
def test_parameters_that_the_forward_changes_are_refused_by_name(module: nn.Module, x: Tensor, name: str) -> None:
    for export in (cg.export, lambda *args: cg.export_gradient(*args, wrt="parameters")):
        with pytest.raises(cg.UnsupportedOperatorError, match=f"changes {name} in place"):
            export(module, (x,))
