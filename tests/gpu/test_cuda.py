"""On a GPU: results, placement, streams, graphs, and the torch.compile backends. Skipped where there is none."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch

import convgrad_export as cg
from convgrad_export import dtypes
from convgrad_export.emit.onnx import GradientRequest, emit_model
from convgrad_export.lowering import CUDA, GRADIENTS, LOWERINGS, preferred_opset
from convgrad_export.selection.policy import choose

from ..cases import CASES


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False"
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime-gpu is not installed"
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return "this onnxruntime was built without CUDA: install onnxruntime-gpu in its place"
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))]
STRICT = cg.CudaOptions(use_tf32=False)


def integers(shape: Any, dtype: str, seed: int) -> torch.Tensor:
    """Values -1, 0 and 1 on the GPU: sums of them are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, tuple(shape), generator=generator).to(getattr(torch, dtype)).cuda()


def operands(geometry: Any, dtype: str) -> dict[str, torch.Tensor]:
    shapes = {"grad_output": geometry.output_shape, "input": geometry.input_shape, "weight": geometry.weight_shape}
    return {name: integers(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("dtype", dtypes.NAMES)
@pytest.mark.parametrize("lowering", LOWERINGS.values(), ids=LOWERINGS)
def test_every_lowering_is_exact_on_integers_and_stays_on_cuda(lowering: Any, dtype: str) -> None:
    opset, ran = preferred_opset(dtype, CUDA), 0
    for case in CASES:
        if lowering.error_factor > 1 or lowering.why_not(case.geometry, dtype, CUDA, opset) is not None:
            continue
        if 0 in (*case.geometry.input_shape, *case.geometry.output_shape):
            continue
        request = GradientRequest(case.geometry, {lowering.gradient: lowering}, dtype, opset, CUDA)
        session = cg.GradientSession(emit_model(request, "gradient"), STRICT)
        assert session.placement().left == (), case.name
        values = operands(case.geometry, dtype)
        (result,) = session.run({name: values[name] for name in session.input_names}).values()
        on_cpu = {name: value.cpu().double() for name, value in values.items()}
        double = GradientRequest(
            case.geometry, {lowering.gradient: _double(lowering.gradient, case.geometry)}, "float64"
        )
        reference_session = cg.GradientSession(emit_model(double, "gradient"))
        (expected,) = reference_session.run({n: on_cpu[n] for n in reference_session.input_names}).values()
        assert torch.equal(result.cpu(), expected.to(result.dtype)), case.name
        ran += 1
    if ran == 0:
        pytest.skip("no case of the table applies on CUDA")


def _double(gradient: str, geometry: Any) -> Any:
    return choose(gradient, geometry, "float64")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_drop_ins_agree_with_torch_and_give_cuda_tensors(dtype: str) -> None:
    x, w, dy = (integers(s, dtype, i) for i, s in enumerate([(4, 16, 20, 20), (32, 16, 3, 3), (4, 32, 10, 10)]))
    mine = cg.conv2d_weight(x, tuple(w.shape), dy, stride=2, padding=1)
    theirs = torch.nn.grad.conv2d_weight(x.double(), tuple(w.shape), dy.double(), stride=2, padding=1)
    assert (mine.device, mine.dtype) == (x.device, x.dtype)
    assert torch.equal(mine, theirs.to(mine.dtype))


def test_a_session_follows_torchs_current_stream_without_a_synchronisation() -> None:
    session = cg.GradientSession(
        cg.build_model("conv2d_input", input_shape=(8, 64, 56, 56), weight_shape=(64, 64, 3, 3), padding=1), STRICT
    )
    weight = integers((64, 64, 3, 3), "float32", 0)
    grad = torch.zeros(8, 64, 56, 56, device="cuda")
    side = torch.cuda.Stream()
    expected = session.run({"weight": weight, "grad_output": torch.ones_like(grad)})["grad_input"].clone()
    torch.cuda.synchronize()
    for _ in range(10):
        grad.zero_()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # the session must not read before this and the next line
            grad.fill_(1.0)
            result = session.run({"weight": weight, "grad_output": grad})["grad_input"]
            total = (result - expected).abs().sum()
        torch.cuda.current_stream().wait_stream(side)
        assert float(total) == 0.0


def test_a_cuda_graph_replays_with_new_inputs_and_keeps_old_results() -> None:
    model = cg.build_model(
        "conv2d_input", input_shape=(4, 8, 16, 16), weight_shape=(8, 8, 3, 3), padding=1, dynamic=(), provider=CUDA
    )
    recorded = cg.GradientSession(model, cg.CudaOptions(use_tf32=False, enable_cuda_graph=True))
    plain = cg.GradientSession(model, STRICT)
    kept = []
    for seed in range(5):
        feeds = {
            "weight": integers((8, 8, 3, 3), "float32", seed),
            "grad_output": integers((4, 8, 16, 16), "float32", 99),
        }
        kept.append((recorded.run(feeds)["grad_input"], plain.run(feeds)["grad_input"]))
    assert all(torch.equal(ours, theirs) for ours, theirs in kept)


def test_a_node_that_leaves_cuda_is_named_in_a_warning() -> None:
    uneven = cg.build_model(
        "conv2d_input",
        input_shape=(2, 4, 8, 8),
        weight_shape=(4, 4, 3, 3),
        padding=((0, 1), (1, 1)),
        lowering="input.conv_transpose",
    )
    with pytest.warns(RuntimeWarning, match=r"1 of 1 nodes left CUDAExecutionProvider: ConvTranspose"):
        cg.GradientSession(uneven, "cuda")


@pytest.mark.parametrize("backend", ["convgrad", "convgrad_ort"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_steps_agree_with_eager(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU()),
        *(torch.nn.Conv2d(16, 16, 7, padding=3, groups=16), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 1)),
    ).to("cuda", dtype)
    x = torch.randn(4, 3, 32, 32, device="cuda", dtype=dtype)
    results = []
    for forward in (model, torch.compile(model, backend=backend)):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forward(x).float().square().mean().backward()
        results.append([parameter.grad.float() for parameter in model.parameters()])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=1e-3 if dtype == torch.float32 else 1e-2)


def test_all_gradients_at_once_stay_on_cuda_in_every_type() -> None:
    for dtype in dtypes.NAMES:
        case = next(case for case in CASES if case.geometry.rank == 2 and case.geometry.groups == 1)
        opset = preferred_opset(dtype, CUDA)
        lowerings = {g: choose(g, case.geometry, dtype, provider=CUDA, opset=opset) for g in GRADIENTS}
        model = emit_model(GradientRequest(case.geometry, lowerings, dtype, opset, CUDA), "backward")
        assert cg.GradientSession(model, "cuda").placement().left == ()
