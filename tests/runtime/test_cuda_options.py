"""Options of the CUDA provider: checked here, because onnxruntime answers a mistake with a session on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convgrad_export as cg
from convgrad_export.runtime import providers


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that says it was built with CUDA."""

    class Build:
        @staticmethod
        def get_available_providers() -> list[str]:
            return [providers.CUDA, providers.CPU]

    monkeypatch.setattr(providers, "onnxruntime", Build)


def test_defaults_are_written_out() -> None:
    assert cg.CudaOptions().provider_options() == {
        "device_id": "0",
        "use_tf32": "1",
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "1",
        "prefer_nhwc": "0",
        "enable_cuda_graph": "0",
        "arena_extend_strategy": "kNextPowerOfTwo",
    }


@pytest.mark.parametrize(
    "given",
    [
        cg.CudaOptions(use_tf32=False, gpu_mem_limit=2**30, other={"fuse_conv_bias": True}),
        ("cuda", {"use_tf32": False, "gpu_mem_limit": 2**30, "fuse_conv_bias": True}),
        ("CUDAExecutionProvider", {"use_tf32": "0", "gpu_mem_limit": "1073741824", "fuse_conv_bias": "1"}),
        [cg.CudaOptions(use_tf32=False, gpu_mem_limit=2**30, other={"fuse_conv_bias": True}), "cpu"],
    ],
)
@pytest.mark.usefixtures("with_cuda")
def test_every_form_gives_the_same_provider_options(given: Any) -> None:
    (name, options), last = providers.resolve(given)
    assert (name, last) == (providers.CUDA, (providers.CPU, {}))
    assert (options["use_tf32"], options["gpu_mem_limit"], options["fuse_conv_bias"]) == ("0", "1073741824", "1")
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"


@pytest.mark.usefixtures("with_cuda")
def test_the_bare_name_has_the_defaults() -> None:
    assert providers.resolve("cuda")[0] == (providers.CUDA, cg.CudaOptions().provider_options())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"cudnn_conv_algo_search": "FAST"},
            cg.ProviderError,
            r"'FAST', expected one of HEURISTIC, DEFAULT, EXHAUSTIVE",
        ),
        ({"arena_extend_strategy": "big"}, cg.ProviderError, "kSameAsRequested"),
        ({"use_tf23": True}, cg.ProviderError, "no option 'use_tf23'; did you mean use_tf32"),
        ({"nonsense": 1}, cg.ProviderError, "expected one of .*prefer_nhwc"),
        ({"use_tf32": "maybe"}, cg.ArgumentTypeError, "use_tf32 is 'maybe', expected True or False"),
        ({"device_id": -1}, cg.ProviderError, "device_id is -1, expected 0 or more"),
        ({"cudnn_conv_algo_search": np.ones(2)}, cg.ArgumentTypeError, "cudnn_conv_algo_search is array"),
        ({"arena_extend_strategy": 3}, cg.ArgumentTypeError, "arena_extend_strategy is 3"),
        ({"device_id": True}, cg.ArgumentTypeError, "device_id is True, expected an integer"),
        ({"gpu_mem_limit": "much"}, cg.ArgumentTypeError, "gpu_mem_limit is 'much', expected an integer"),
        ({"gpu_mem_limit": 0}, cg.ProviderError, "expected 1 or more"),
    ],
)
@pytest.mark.usefixtures("with_cuda")
def test_a_mistake_is_an_error_that_says_what_was_expected(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        providers.resolve(("cuda", options))


def test_without_the_gpu_build_the_error_says_what_to_install() -> None:
    if providers.CUDA in providers.onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(cg.ProviderError, match="onnxruntime-gpu in place of onnxruntime: uninstall both first"):
        providers.resolve(cg.CudaOptions())


@pytest.mark.peer
@pytest.mark.parametrize("given", ["cuda", cg.CudaOptions(), ("cuda", {"use_tf32": False})])
def test_without_a_gpu_the_gpu_build_gives_an_error_and_no_session_on_the_cpu(given: Any) -> None:
    if providers.CUDA not in providers.onnxruntime().get_available_providers():
        pytest.skip("needs onnxruntime-gpu in place of onnxruntime")
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    model = cg.build_model("conv2d_input", input_shape=(2, 3, 8, 8), weight_shape=(4, 3, 3, 3), padding=1)
    with pytest.raises(cg.ProviderError, match="could not start and onnxruntime fell back to CPUExecutionProvider"):
        cg.GradientSession(model, given)
    weight, grad = np.ones((4, 3, 3, 3), np.float32), np.ones((2, 4, 8, 8), np.float32)
    with pytest.raises(cg.ProviderError, match="could not start"):
        cg.conv2d_input((2, 3, 8, 8), weight, grad, padding=1, providers=given)
