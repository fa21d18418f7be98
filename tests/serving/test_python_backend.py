"""The model.py that goes into repositories, against a stand-in for the module that Triton provides."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto

import convgrad_export.serving.templates as templates

from . import models

TEMPLATE = Path(next(iter(templates.__path__))) / "model.py"


@dataclass
class Tensor:
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array

    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @staticmethod
    def from_dlpack(name: str, value: Any) -> Tensor:
        tensor = torch.from_dlpack(value)
        assert tensor.dtype == torch.bfloat16
        return Tensor(name, tensor.float().numpy())


@dataclass
class TritonError:
    message: str
    code: int

    INTERNAL = 1
    INVALID_ARG = 3


@dataclass
class Response:
    tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def named(self) -> dict[str, np.ndarray]:
        return {tensor.name: tensor.array for tensor in self.tensors}


@dataclass
class Request:
    feeds: dict[str, np.ndarray]
    outputs: tuple[str, ...] = ("y",)

    def requested_output_names(self) -> list[str]:
        return list(self.outputs)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, Response
    module.get_input_tensor_by_name = lambda request, name: Tensor(name, request.feeds[name])
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)


def start(model: Path, *, max_batch_size: int = 8, **config: Any) -> Any:
    """The class of model.py, beside `model` as in a repository, initialized as Triton does."""
    shutil.copyfile(TEMPLATE, model.parent / "model.py")
    model.rename(model.parent / "model.onnx")
    spec = importlib.util.spec_from_file_location("served_model", model.parent / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    served = module.TritonPythonModel()
    text = json.dumps({"max_batch_size": max_batch_size, "parameters": {}, **config})
    served.initialize({"model_config": text, "model_instance_kind": "CPU", "model_instance_device_id": "0"})
    return served


def count_runs(served: Any) -> list[int]:
    """Rows of each run of the session, as they happen."""
    rows: list[int] = []
    session = served.session

    class Counted:
        def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            rows.append(len(next(iter(feeds.values()))))
            return session.run(names, feeds)

    served.session = Counted()
    return rows


@pytest.mark.usefixtures("backend")
def test_merged_requests_are_one_run_and_each_gets_its_rows(tmp_path: Path) -> None:
    served = start(models.gradient_model(tmp_path / "m.onnx"))
    rng = np.random.default_rng(0)
    batches = [rng.random((rows, 2, 6), dtype=np.float32) for rows in (1, 3, 2)]
    alone = [served.execute([Request({"x": batch})])[0].named()["y"] for batch in batches]
    rows = count_runs(served)
    merged = [response.named()["y"] for response in served.execute([Request({"x": batch}) for batch in batches])]
    assert rows == [6]
    assert [m.shape for m in merged] == [(1, 2, 8), (3, 2, 8), (2, 2, 8)]
    for first, second in zip(merged, alone, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-6)


@pytest.mark.usefixtures("backend")
def test_one_bad_request_does_not_spoil_the_others(tmp_path: Path) -> None:
    served = start(models.gradient_model(tmp_path / "m.onnx"))
    good, bad = np.ones((1, 2, 6), np.float32), np.ones((1, 2, 7), np.float32)
    first, second, third = served.execute([Request({"x": good}), Request({"x": bad}), Request({"x": good})])
    assert first.error is None
    assert third.error is None
    assert np.array_equal(first.named()["y"], third.named()["y"])
    assert second.error.code == TritonError.INVALID_ARG
    assert "x" in second.error.message
    assert served.execute([Request({})])[0].error.code == TritonError.INTERNAL  # not onnxruntime's complaint


@pytest.mark.usefixtures("backend")
def test_without_a_batch_dimension_nothing_is_merged(tmp_path: Path) -> None:
    served = start(models.weight_gradient(tmp_path / "m.onnx"), max_batch_size=0)
    rows = count_runs(served)
    feeds = {"input": np.ones((2, 3, 8), np.float32), "grad_output": np.ones((2, 4, 6), np.float32)}
    responses = served.execute([Request(feeds, ("grad_weight",))] * 2)
    assert rows == [2, 2]
    assert [response.named()["grad_weight"].shape for response in responses] == [(4, 3, 3)] * 2


@pytest.mark.usefixtures("backend")
def test_scalars_are_one_element_where_there_is_no_batch(tmp_path: Path) -> None:
    served = start(models.scalar_model(tmp_path / "m.onnx"), max_batch_size=0)
    feeds = {"x": np.ones((2, 3), np.float32), "factor": np.array([3], np.float32)}
    (response,) = served.execute([Request(feeds, ("y", "total"))])
    assert response.error is None
    results = response.named()
    assert np.array_equal(results["y"], 3 * feeds["x"])
    assert np.array_equal(results["total"], np.array([6], np.float32))
    assert results["total"].shape == (1,)


@pytest.mark.usefixtures("backend")
def test_bfloat16_scalars_are_one_element_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = start(models.scalar_model(tmp_path / "m.onnx", TensorProto.BFLOAT16), max_batch_size=0)
    feeds = {"x": torch.ones(2, 3).bfloat16(), "factor": torch.tensor([3.0]).bfloat16()}
    triton = sys.modules["triton_python_backend_utils"]
    monkeypatch.setattr(triton, "get_input_tensor_by_name", lambda request, name: request.feeds[name])
    (response,) = served.execute([Request(feeds, ("y", "total"))])
    assert response.error is None
    results = response.named()
    assert np.array_equal(results["y"], np.full((2, 3), 3, np.float32))
    assert np.array_equal(results["total"], np.array([6], np.float32))
    assert results["total"].shape == (1,)


@pytest.mark.usefixtures("backend")
def test_only_the_outputs_asked_for_are_returned(tmp_path: Path) -> None:
    served = start(models.classifier(tmp_path / "m.onnx"))
    request = Request({"x": np.ones((2, 3), np.float32)}, ("best",))
    assert list(served.execute([request])[0].named()) == ["best"]
    assert [list(response.named()) for response in served.execute([request, request])] == [["best"], ["best"]]


@pytest.mark.usefixtures("backend")
def test_the_configuration_reaches_onnxruntime(tmp_path: Path) -> None:
    parameters = {"intra_op_thread_count": {"string_value": "3"}}
    served = start(
        models.typed_model(tmp_path / "m.onnx", TensorProto.FLOAT),
        parameters=parameters,
        optimization={"graph": {"level": "1"}},
    )
    options = served.session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.graph_optimization_level.name == "ORT_ENABLE_EXTENDED"
