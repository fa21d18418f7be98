"""The committed table of operators says what onnxruntime-web does, for the operators that this package writes."""

from __future__ import annotations

import json

import onnx
import pytest
import torch

import convgrad_export as cg
from convgrad_export.training.digits import DigitsNetwork
from convgrad_export.web_target import ANY, check_web, measured

from .node_runner import PAGE, needs_web
from .web_operators import limits, questions, try_models, verdict

pytestmark = [pytest.mark.browser, needs_web]


@pytest.fixture(scope="module")
def adam_step() -> onnx.ModelProto:
    """A whole training step with Adam, whose bias corrections are in float64."""
    torch.manual_seed(0)
    module = DigitsNetwork().train()
    batch = (torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    return cg.export_training_step(module, "cross_entropy", "adam", batch, verify=False).model_proto


def test_the_table_is_of_the_installed_version() -> None:
    package = json.loads((PAGE / "node_modules" / "onnxruntime-web" / "package.json").read_text())
    assert measured()["version"] == package["version"]
    assert measured()["limits"] == limits()


@pytest.mark.parametrize("build", ["web", "webgpu"])
def test_the_table_says_what_loads(build: str, adam_step: onnx.ModelProto) -> None:
    written = {node.op_type for node in adam_step.graph.node} | {"ConvTranspose", "Col2Im", "Einsum", "If", "Loop"}
    asked = [(key, model) for key, model in questions(18) if key[0] in written]
    assert len(asked) > 300
    _, answers = try_models([model for _, model in asked], build)
    loading = {"web": ("both", "wasm"), "webgpu": ("both",)}[build]
    compared = 0
    for ((name, since, parameter, dtype), _), answer in zip(asked, answers, strict=True):
        entry = measured()["operators"][name][str(since)].get(parameter, {})
        kinds = [kind for kind, types in entry.items() if dtype in types]
        if kinds and verdict(answer) is not None:
            assert (kinds[0] in loading) == verdict(answer), (name, since, parameter, dtype, answer)
            compared += 1
    assert compared > 300
    assert any(dtype == ANY for (_, _, _, dtype), _ in asked)


def test_a_step_with_adam_loads_where_the_check_says(adam_step: onnx.ModelProto) -> None:
    report = check_web(adam_step)
    assert report.against("web") == []
    named = {problem.node for problem in report.against("webgpu")}
    (_, (wasm,)), (_, (webgpu,)) = try_models([adam_step], "web"), try_models([adam_step], "webgpu")
    assert wasm is None
    assert webgpu is not None
    assert any(f"'{name}'" in webgpu for name in named), webgpu
