"""Real servers, Triton and MLServer: parity with eager, batches, many clients, wrong requests, restarts.

Each server lives in an environment of its own; CONVGRAD_TRITON_PYTHON and CONVGRAD_MLSERVER_PYTHON name their Pythons
(the README says how to make them). The servers listen on free loopback ports and are stopped at the end.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto

import convgrad_export as cg
from convgrad_export.cli import main
from convgrad_export.serving import launch
from convgrad_export.serving.options import ServingOptions
from convgrad_export.serving.repository import add_model

from ..test_model_repository import REPOSITORY, generator
from . import models

pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed (extra serving)")
pytest.importorskip("tritonclient.grpc", reason="grpcio is not installed (extra serving)")

from tritonclient.utils import InferenceServerException

from .clients import Client, post, post_cut_off

pytestmark = pytest.mark.peer

CAM = "digits_gradcam"
INFER = f"/v2/models/{CAM}/infer"


@dataclass
class Server:
    """A running server and what is particular about it."""

    name: str
    address: launch.Address
    process: Popen[bytes]

    @property
    def binary(self) -> bool:
        return self.name == "triton"

    def client(self, protocol: str) -> Client:
        return Client(protocol, self.address, binary=self.binary)


def environment(name: str) -> str:
    try:
        return launch.server_python(name)
    except cg.ServerError as error:
        pytest.skip(f"no {name}: {error}")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed repository, with models of the edges added."""
    folder = tmp_path_factory.mktemp("serving")
    root = folder / "repository"
    shutil.copytree(REPOSITORY, root)
    python = ServingOptions(backend="python", threads=1, dynamic_batching=False)
    add_model(models.classifier(folder / "classifier.onnx"), root, python)
    add_model(models.external(folder / "external.onnx"), root, python)
    add_model(models.mean_model(folder / "mean.onnx"), root, python)
    np.savez(folder / "warm.npz", x=np.ones((2, 5), np.float16))
    half = ServingOptions(backend="python", threads=1, dynamic_batching=False, warmup=folder / "warm.npz")
    add_model(models.typed_model(folder / "half.onnx", TensorProto.FLOAT16), root, half)
    return root


@pytest.fixture(scope="module", params=["triton", "mlserver"])
def server(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    python = environment(request.param)
    log = tmp_path_factory.mktemp("log") / f"{request.param}.log"
    with launch.running(request.param, repository, python=python, log=log) as (address, process):
        yield Server(request.param, address, process)


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    client = server.client(request.param)
    yield client
    client.close()


def digits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 1, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def eager() -> torch.nn.Module:
    return generator().ExplainedDigits().eval()


def explain(eager: torch.nn.Module, x: np.ndarray) -> dict[str, np.ndarray]:
    scores, cam = eager(torch.from_numpy(x))
    return {"scores": scores.detach().numpy(), "cam": cam.detach().numpy()}


def assert_explained(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(got["scores"], expected["scores"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["cam"], expected["cam"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_grad_cam_agrees_with_eager_for_any_batch(client: Client, eager: torch.nn.Module, rows: int) -> None:
    x = digits(rows, seed=rows)
    assert_explained(client.infer(CAM, {"x": x}, ["scores", "cam"]), explain(eager, x))


def test_one_output_alone(client: Client, eager: torch.nn.Module) -> None:
    x = digits(2)
    got = client.infer(CAM, {"x": x}, ["cam"])
    np.testing.assert_allclose(got["cam"], explain(eager, x)["cam"], rtol=1e-4, atol=1e-6)


def test_the_functions_are_exact_on_integers(client: Client) -> None:
    rng = np.random.default_rng(0)
    x, weight, grad = (rng.integers(-3, 4, s).astype(np.float32) for s in ((2, 3, 7, 6), (4, 3, 3, 2), (2, 4, 5, 5)))
    sizes = {"input_size": np.array(x.shape), "weight_size": np.array(weight.shape)}
    got = client.infer(
        "conv2d_input", {"input_size": sizes["input_size"], "weight": weight, "grad_output": grad}, ["grad_input"]
    )
    tensors = [torch.from_numpy(value) for value in (x, weight, grad)]
    expected = torch.nn.grad.conv2d_input(x.shape, tensors[1], tensors[2])
    assert np.array_equal(got["grad_input"], expected.numpy())
    got = client.infer(
        "conv2d_weight", {"input": x, "weight_size": sizes["weight_size"], "grad_output": grad}, ["grad_weight"]
    )
    expected = torch.nn.grad.conv2d_weight(tensors[0], weight.shape, tensors[2])
    assert np.array_equal(got["grad_weight"], expected.numpy())


def test_external_weights_and_rows_that_see_one_another(client: Client) -> None:
    x = np.random.default_rng(0).random((4, 2, 6), dtype=np.float32)
    got = client.infer("external", {"x": x}, ["y"])["y"]
    weight = torch.arange(1.0, 7.0).reshape(2, 1, 3)
    reference = torch.nn.functional.conv_transpose1d(torch.from_numpy(x), weight, groups=2)
    np.testing.assert_allclose(got, reference.numpy(), rtol=1e-5)
    x = np.array([[1, 2, 3], [3, 2, 1]], np.float32)
    assert np.array_equal(client.infer("mean", {"x": x}, ["y"])["y"], x - x.mean(0, keepdims=True))


def test_float16(client: Client) -> None:
    x = np.array([[1.5, -2.25, 1000.0]], np.float16)
    got = client.infer("half", {"x": x}, ["y"])["y"]
    assert got.dtype == np.float16
    assert np.array_equal(got, x)


def test_concurrent_clients_get_their_own_answers(server: Server, eager: torch.nn.Module) -> None:
    """Eight clients, twelve requests each, of different batches: Triton merges them, each gets its own rows."""

    def work(index: int) -> None:
        client = server.client("http" if index % 2 else "grpc")
        try:
            for step in range(12):
                x = digits(1 + (index + step) % 4, seed=100 * index + step)
                assert_explained(client.infer(CAM, {"x": x}, ["scores", "cam"]), expected[index, step])
        finally:
            client.close()

    expected = {(i, s): explain(eager, digits(1 + (i + s) % 4, seed=100 * i + s)) for i in range(8) for s in range(12)}
    before = executions(server)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    if server.name == "triton":
        requests, runs = (after - then for after, then in zip(executions(server), before, strict=True))
        assert requests == 96
        assert runs < requests


def executions(server: Server) -> tuple[int, int]:
    """Requests answered by the Grad-CAM model, and runs of it, as Triton counts them."""
    if server.name != "triton":
        return 0, 0
    client = server.client("http")
    (stats,) = client.client.get_inference_statistics(CAM)["model_stats"]
    client.close()
    return stats["inference_stats"]["success"]["count"], stats["execution_count"]


WRONG = {
    "shape": {"x": np.ones((1, 1, 8, 9), np.float32)},
    "rank": {"x": np.ones((8, 8), np.float32)},
    "dtype": {"x": np.ones((1, 1, 8, 8))},
    "name": {"z": np.ones((1, 1, 8, 8), np.float32)},
    "one too many": {"x": np.ones((1, 1, 8, 8), np.float32), "z": np.ones(1, np.float32)},
    "batch too large": {"x": np.ones((33, 1, 8, 8), np.float32)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_request_is_the_clients_fault_and_the_server_lives_on(
    server: Server, client: Client, eager: torch.nn.Module, wrong: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(CAM, WRONG[wrong])
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert_alive(server, client, eager)


def test_operands_that_fit_no_convolution(server: Server, client: Client, eager: torch.nn.Module) -> None:
    """Every dimension is dynamic, so only onnxruntime finds out; that too is the client's fault."""
    operands = {"input_size": np.array([1, 3, 8, 8]), "weight": np.ones((4, 3, 3, 3), np.float32)}
    with pytest.raises(InferenceServerException) as caught:
        client.infer("conv2d_input", {**operands, "grad_output": np.ones((1, 5, 6, 6), np.float32)})
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert_alive(server, client, eager)


def test_unknown_models(client: Client) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("nothing", {"x": digits(1)})
    assert caught.value.status() in ("404", "StatusCode.NOT_FOUND")


def request(shape: list[int], data: list) -> bytes:
    return json.dumps({"inputs": [{"name": "x", "shape": shape, "datatype": "FP32", "data": data}]}).encode()


# body -> the status of each server. Triton 2.51's own front end calls JSON that it cannot parse an internal error
# (500); it is answered before a model is asked, and nothing of ours can change it.
BODIES: dict[str, tuple[bytes, int, int]] = {
    "cut off": (request([1, 1, 8, 8], [1.0] * 64)[:-20], 500, 422),
    "no JSON": (b"\xff\x00" * 50, 500, 422),
    "too little data": (request([1, 1, 8, 8], [1.0] * 3), 500, 400),
    "text for numbers": (request([1, 1, 8, 8], ["a"] * 64), 500, 400),
    "negative size": (request([-1, 1, 8, 8], [1.0] * 64), 500, 400),
    "sizes that overflow": (request([2**40, 2**40, 8, 8], [1.0] * 64), 400, 400),
    "no inputs": (b'{"inputs": []}', 400, 400),
    "80 MiB": (b"\0" * (80 << 20), 500, 422),
}


@pytest.mark.parametrize("name", BODIES)
def test_malformed_bodies(server: Server, eager: torch.nn.Module, name: str) -> None:
    body, by_triton, by_mlserver = BODIES[name]
    status, answer = post(server.address, INFER, body)
    assert status == (by_triton if server.name == "triton" else by_mlserver), answer[:300]
    assert json.loads(answer)  # an explanation, not an empty page
    check = server.client("grpc")
    assert_alive(server, check, eager)
    check.close()


def test_binary_tensors_that_are_cut_off(server: Server, eager: torch.nn.Module) -> None:
    tensor = {"name": "x", "shape": [1, 1, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": 256}}
    head = json.dumps({"inputs": [tensor]}).encode()
    for body, length in ((head + b"\0" * 100, len(head)), (head, len(head)), (head + b"\0" * 256, 99999)):
        status, _ = post(server.address, INFER, body, {"Inference-Header-Content-Length": str(length)})
        assert 400 <= status < 500
    post_cut_off(server.address, INFER, head, announced=100_000)
    check = server.client("http")
    assert_alive(server, check, eager)
    check.close()


def assert_alive(server: Server, client: Client, eager: torch.nn.Module) -> None:
    assert server.process.poll() is None
    assert_explained(client.infer(CAM, {"x": digits(2)}, ["scores", "cam"]), explain(eager, digits(2)))


def test_metadata_is_what_the_configuration_says(server: Server) -> None:
    client = server.client("http")
    metadata = client.client.get_model_metadata(CAM)
    client.close()
    assert [(t["name"], t["datatype"], t["shape"]) for t in metadata["inputs"]] == [("x", "FP32", [-1, 1, 8, 8])]
    assert [t["name"] for t in metadata["outputs"]] == ["scores", "cam"]


def test_triton_gives_class_names_scalars_and_bfloat16(
    repository: Path, eager: torch.nn.Module, tmp_path: Path
) -> None:
    """What only Triton has: labels, outputs without a dimension of their own, and a type that JSON has no form for."""
    python = environment("triton")
    root = tmp_path / "repository"
    shutil.copytree(repository, root)
    brain = ServingOptions(backend="python", threads=1, dynamic_batching=False)
    add_model(models.bfloat16_model(tmp_path / "brain.onnx"), root, brain)
    add_model(models.scalar_model(tmp_path / "scalar.onnx"), root, ServingOptions(backend="python", threads=1))
    add_model(models.scalar_model(tmp_path / "brain_scalar.onnx", TensorProto.BFLOAT16), root, brain)
    with launch.running("triton", root, python=python, log=tmp_path / "log") as (address, _):
        client = Client("grpc", address)
        wanted = client.library.InferRequestedOutput("scores", class_count=2)
        value = client.library.InferInput("x", [1, 1, 8, 8], "FP32")
        value.set_data_from_numpy(digits(1))
        best = client.client.infer(CAM, [value], outputs=[wanted]).as_numpy("scores")
        order = np.argsort(explain(eager, digits(1))["scores"][0])
        assert [text.decode().split(":")[1:] for text in best[0]] == [[str(c), str(c)] for c in order[:-3:-1]]
        x = np.array([[1, 5, 3], [9, 2, 4]], np.float32)
        assert np.array_equal(client.infer("classifier", {"x": x})["best"], [[5], [9]])
        scaled = client.infer("scalar", {"x": x, "factor": np.array([2], np.float32)})
        assert np.array_equal(scaled["y"], 2 * x)
        assert np.array_equal(scaled["total"], [24])
        values = [client.library.InferInput(*tensor, "BF16") for tensor in (("x", x.shape), ("factor", [1]))]
        for value, array in zip(values, (x, np.array([2], np.float32)), strict=True):
            value.set_data_from_numpy(array)
        result = client.client.infer("brain_scalar", values)
        assert np.array_equal(result.as_numpy("y"), 2 * x)
        assert np.array_equal(result.as_numpy("total"), [24])  # of the shape that the configuration says
        assert result.as_numpy("total").shape == (1,)
        brain_input = client.library.InferInput("x", [1, 3], "BF16")
        brain_input.set_data_from_numpy(x[:1])
        result = client.client.infer("brain", [brain_input])
        got = np.frombuffer(result.get_response().raw_output_contents[0], ml_dtypes.bfloat16)
        assert np.array_equal(got.astype(np.float32), 2 * x[0])
        client.close()


@pytest.mark.parametrize("name", ["triton", "mlserver"])
def test_a_restart_loses_nothing_and_finds_what_was_added(name: str, tmp_path: Path) -> None:
    python = environment(name)
    root = tmp_path / "repository"
    model = models.gradient_model(tmp_path / "grad.onnx")
    options = ["--backend", "python", "--threads", "1"]
    x = np.random.default_rng(0).random((2, 2, 6), dtype=np.float32)
    answers = []
    for scale in (1.0, 1.0, 3.0):
        if not answers or scale != 1.0:
            models.gradient_model(model, scale=scale)
            assert main(["serve-repo", str(model), "-o", str(root), *options]) == 0
        with launch.running(name, root, python=python, log=tmp_path / "log") as (address, process):
            client = Client("grpc", address)
            answers.append(client.infer("grad", {"x": x})["y"])
            client.close()
        assert process.returncode == 0
    assert np.array_equal(answers[0], answers[1])
    np.testing.assert_allclose(answers[2], 3 * answers[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["triton", "mlserver"])
def test_the_command_serves_until_it_is_told_to_stop(name: str, eager: torch.nn.Module) -> None:
    http_port, grpc_port = launch.free_ports(2)
    line = [sys.executable, "-m", "convgrad_export", "serve", str(REPOSITORY), "--server", name]
    line += ["--python", environment(name), "--http-port", str(http_port), "--grpc-port", str(grpc_port)]
    address = launch.Address("127.0.0.1", http_port, grpc_port)
    with Popen(line, stdout=DEVNULL, stderr=DEVNULL) as process:
        try:
            deadline = time.monotonic() + 90
            while not launch.is_ready(address):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
            client = Client("http", address, binary=name == "triton")
            assert_explained(client.infer(CAM, {"x": digits(2)}, ["scores", "cam"]), explain(eager, digits(2)))
            client.close()
            process.terminate()
            assert process.wait(60) == 0
        finally:
            launch.stop(process)
    assert not launch.is_ready(address)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    python = environment("triton")
    root = tmp_path / "repository"
    add_model(models.gradient_model(tmp_path / "grad.onnx"), root, ServingOptions(backend="python"))
    (root / "grad" / "1" / "model.onnx").write_bytes(b"not a model")
    with (
        pytest.raises(cg.ServerError, match=r"grad(.|\n)*InvalidProtobuf"),
        launch.running("triton", root, python=python, log=tmp_path / "log"),
    ):
        pass
