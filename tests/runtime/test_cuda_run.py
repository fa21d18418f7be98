"""What a session does on CUDA tensors: the order of device work, whose memory the results lie in, and CUDA graphs.

No GPU is used: a recording session and a recording stream stand for onnxruntime's and torch's, with tensors on the CPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from convgrad_export.errors import DynamicShapeError
from convgrad_export.runtime import cuda_run
from convgrad_export.runtime.tensors import TensorView


class Stream:
    """Stands for TorchStream."""

    device_index = 0
    pointer = 4096

    def __init__(self, log: list[str]) -> None:
        self.log, self.held = log, []

    def before_run(self) -> None:
        self.log.append("session waits for torch")

    def after_run(self) -> None:
        self.log.append("torch waits for session")

    def hold(self, tensor: Any) -> None:
        self.held.append(tensor)


class Session:
    """Doubles its input "x" of shape (batch, 3) into "y", through the pointers it is given."""

    def __init__(self, log: list[str], batch: Any, memory: dict[int, torch.Tensor]) -> None:
        self.log, self.memory = log, memory
        self.x = SimpleNamespace(name="x", shape=[batch, 3], type="tensor(float)")
        self.y = SimpleNamespace(name="y", shape=[batch, 3], type="tensor(float)")
        self.addresses: list[tuple[int, int]] = []

    def get_inputs(self) -> list[Any]:
        return [self.x]

    def get_outputs(self) -> list[Any]:
        return [self.y]

    def io_binding(self) -> Any:
        bound: dict[str, Any] = {}
        return SimpleNamespace(
            bound=bound,
            bind_input=lambda name, device, index, code, shape, pointer: bound.update(x=(tuple(shape), pointer)),
            bind_output=lambda name, device, index, code, shape, pointer: bound.update(y=(tuple(shape), pointer)),
        )

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        (shape, source), (result_shape, target) = binding.bound["x"], binding.bound["y"]
        assert shape == result_shape
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self.log.append("run")
        self.addresses.append((source, target))
        self.memory[target].copy_(2 * self.memory[source])


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    memory: dict[int, torch.Tensor] = {}

    def known(tensor: torch.Tensor) -> torch.Tensor:
        memory[tensor.data_ptr()] = tensor
        return tensor

    empty, clone = torch.empty, torch.Tensor.clone
    fake = SimpleNamespace(float32=torch.float32, empty=lambda shape, dtype, device: known(empty(shape, dtype=dtype)))
    monkeypatch.setattr(cuda_run, "sys", SimpleNamespace(modules={"torch": fake}))
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: known(clone(self)))

    def make(batch: Any, **settings: str) -> SimpleNamespace:
        log: list[str] = []
        session, stream = Session(log, batch, memory), Stream(log)
        run = cuda_run.CudaRun(session, stream, settings)  # type: ignore[arg-type]

        def call(x: torch.Tensor) -> torch.Tensor:
            view = TensorView(known(x), tuple(x.shape), "float32", "cuda", 0)
            assert run.takes([view])
            (result,) = run.run(["y"], {"x": view}, {"x": 1}, {"batch": x.shape[0]})
            return result

        return SimpleNamespace(call=call, log=log, session=session, stream=stream, run=run)

    return make


def test_results_lie_in_torchs_memory_and_streams_wait_for_each_other_on_the_device(harness: Any) -> None:
    made = harness("batch")
    x = torch.arange(6.0).reshape(2, 3)
    result = made.call(x)
    assert torch.equal(result, 2 * x)
    assert made.session.addresses == [(x.data_ptr(), result.data_ptr())]
    assert made.log == ["session waits for torch", "run", "torch waits for session"]
    assert [tensor.data_ptr() for tensor in made.stream.held] == [x.data_ptr(), result.data_ptr()]


def test_a_cuda_graph_always_sees_the_same_addresses_and_the_caller_its_own_results(harness: Any) -> None:
    made = harness(2, enable_cuda_graph="1")
    first, second = torch.ones(2, 3), torch.full((2, 3), 5.0)
    one, two = made.call(first), made.call(second)
    assert torch.equal(one, 2 * first)
    assert torch.equal(two, 2 * second)
    assert len(set(made.session.addresses)) == 1
    assert not {first.data_ptr(), second.data_ptr()} & {source for source, _ in made.session.addresses}
    assert made.log[0] == "torch waits for session"
    assert made.log[-1] == "session waits for torch"


def test_a_cuda_graph_of_a_model_with_a_free_size_is_refused(harness: Any) -> None:
    with pytest.raises(DynamicShapeError, match=r"x has the shape \('batch', 3\): build the model with dynamic=\(\)"):
        harness("batch", enable_cuda_graph="1")


def test_tensors_elsewhere_take_the_other_way(harness: Any) -> None:
    run = harness("batch").run
    on_host = TensorView(None, (2, 3), "float32", "cpu", 0)
    on_another = TensorView(None, (2, 3), "float32", "cuda", 1)
    assert not run.takes([on_host])
    assert not run.takes([on_another])
    assert not run.takes([])


def test_the_stream_goes_into_the_options_unless_they_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def stream(index: int) -> Stream:
        made.append(index)
        return Stream([])

    monkeypatch.setattr(cuda_run, "torch_stream", stream)
    settings = {"device_id": "3"}
    assert cuda_run.stream_for(settings) is not None
    assert (made, settings["user_compute_stream"]) == ([3], "4096")
    assert cuda_run.stream_for({"user_compute_stream": "77"}) is None


def test_without_a_device_there_is_no_stream() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    settings = {"device_id": "0"}
    assert cuda_run.stream_for(settings) is None
    assert settings == {"device_id": "0"}
