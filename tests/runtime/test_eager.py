"""The eager drop-ins against torch.nn.grad and aten::convolution_backward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import convgrad_export as cg
from convgrad_export import dtypes
from convgrad_export.accuracy import compare
from convgrad_export.runtime import blocked, eager, session_cache
from convgrad_export.runtime.blocked_writer import BlockedWriter
from convgrad_export.runtime.convolution_entries import ConvolutionEntry

from ..cases import CASES, ConvCase

TORCH_DTYPES = {name: getattr(torch, name) for name in dtypes.NAMES}
DROP_INS = [case for case in CASES if not case.transposed]


def tensors(case: ConvCase, dtype: str = "float32", *, integers: bool = True) -> dict[str, torch.Tensor]:
    operands = case.operands(dtype, integers=integers)
    return {name: torch.from_numpy(array).to(TORCH_DTYPES[dtype]) for name, array in operands.items()}


def call(case: ConvCase, gradient: str, values: dict, **options):
    geometry = case.geometry
    attributes = (case.stride, case.padding, case.dilation, case.groups)
    if gradient == "input":
        function = getattr(cg, f"conv{geometry.rank}d_input")
        return function(geometry.input_shape, values["weight"], values["grad_output"], *attributes, **options)
    function = getattr(cg, f"conv{geometry.rank}d_weight")
    return function(values["input"], geometry.weight_shape, values["grad_output"], *attributes, **options)


@pytest.mark.parametrize("gradient", ["input", "weight"])
@pytest.mark.parametrize("case", DROP_INS, ids=lambda case: case.name)
def test_drop_ins_agree_with_autograd_in_every_dtype_and_for_numpy(case: ConvCase, gradient: str) -> None:
    for dtype in dtypes.NAMES:
        for integers in (True, False):
            operands = case.operands(dtype, integers=integers)
            reference, bound = case.expected(operands, dtype)[gradient]
            result = call(case, gradient, tensors(case, dtype, integers=integers))
            assert result.dtype == TORCH_DTYPES[dtype]
            assert compare(result.double().numpy(), reference, bound).within
            arrays = {name: array.astype(dtypes.numpy_dtype(dtype)) for name, array in operands.items()}
            from_numpy = call(case, gradient, arrays)
            assert isinstance(from_numpy, np.ndarray)
            assert np.array_equal(from_numpy.astype(np.float64), result.double().numpy())


def layer(batch: int, groups: int) -> ConvCase:
    return ConvCase("layer", batch, 32, 32, (16, 16), (3, 3), padding=1, groups=groups)


@pytest.mark.skipif(blocked.block_size() is None, reason="this machine's onnxruntime has no blocked layout")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("gradient", ["input", "weight"])
def test_sessions_take_the_blocked_layout(
    gradient: str, groups: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any batch size; of a weight gradient, whose samples the layout counts, there is a session for each."""
    written: list[str] = []

    def counted(self: BlockedWriter, entry: ConvolutionEntry) -> list:
        written.append(entry.kind)
        return nodes_of(self, entry)

    nodes_of = BlockedWriter.nodes_of
    # The choice depends on it, and torch's own differs with what ran before.
    for module in (eager, session_cache):
        monkeypatch.setattr(module, "thread_count", lambda: threads)
    monkeypatch.setattr(BlockedWriter, "nodes_of", counted)
    session_cache.clear_sessions()
    for batch in (8, 8, 5, 0):
        case = layer(batch, groups)
        reference, _ = case.expected(case.operands("float32", integers=True), "float32")[gradient]
        assert np.array_equal(call(case, gradient, tensors(case)).numpy(), reference)
    assert written == ["weight", "weight"] if gradient == "weight" else ["input"]
    if gradient == "weight":
        assert session_cache.session_count() == 3
    named = "input.flipped_conv" if gradient == "input" else "weight.matmul_taps"
    call(layer(8, groups), gradient, tensors(layer(8, groups)), lowering=named)
    call(layer(8, groups), gradient, tensors(layer(8, groups), "float64"))
    assert len(written) == (2 if gradient == "weight" else 1)
    session_cache.clear_sessions()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_convolution_backward_gives_all_three_gradients(case: ConvCase) -> None:
    geometry, values = case.geometry, tensors(case)
    reference = case.expected(case.operands("float32", integers=True), "float32")
    for mask in ([True, True, True], [True, False, False], [False, True, True], [False, False, False]):
        results = cg.convolution_backward(
            values["grad_output"],
            values["input"],
            values["weight"],
            [geometry.out_channels],
            case.stride,
            case.padding,
            case.dilation,
            case.transposed,
            case.output_padding,
            case.groups,
            mask,
        )
        for wanted, result, name in zip(mask, results, ("input", "weight", "bias"), strict=True):
            assert (result is not None) is wanted
            if wanted:
                assert np.array_equal(result.double().numpy(), reference[name][0])


def test_every_layout_gives_the_same_gradient() -> None:
    case = next(case for case in CASES if case.name == "mixed2d")
    values = tensors(case)
    expected = {gradient: call(case, gradient, values) for gradient in ("input", "weight")}
    layouts = {
        "channels_last": {name: value.contiguous(memory_format=torch.channels_last) for name, value in values.items()},
        "not_contiguous": {name: value.transpose(0, 1).clone().transpose(0, 1) for name, value in values.items()},
        "offset": {name: torch.cat([value, value])[value.shape[0] :] for name, value in values.items()},
    }
    for layout, moved in layouts.items():
        for gradient, reference in expected.items():
            assert torch.equal(call(case, gradient, moved), reference), layout
    expanded = values | {"grad_output": torch.ones(1, 1, 1, 1).expand(case.geometry.output_shape)}
    dense = values | {"grad_output": torch.ones(case.geometry.output_shape)}
    assert torch.equal(call(case, "input", expanded), call(case, "input", dense))
    arrays = {name: np.asfortranarray(value.numpy()) for name, value in values.items()}
    assert np.array_equal(call(case, "weight", arrays), expected["weight"].numpy())


def test_inputs_are_left_unchanged_and_results_do_not_share_memory_between_calls() -> None:
    case = next(case for case in CASES if case.name == "plain2d")
    values = tensors(case)
    before = {name: value.clone() for name, value in values.items()}
    first = call(case, "input", values)
    kept = first.clone()
    call(case, "input", values | {"grad_output": values["grad_output"] * 3})
    assert torch.equal(first, kept)
    assert all(torch.equal(values[name], before[name]) for name in values)


def test_a_named_lowering_is_used_and_a_wrong_one_refused() -> None:
    case = next(case for case in CASES if case.name == "mixed2d")
    values = tensors(case)
    assert torch.equal(call(case, "weight", values, lowering="weight.im2col"), call(case, "weight", values))
    with pytest.raises(cg.UnsupportedLoweringError, match="stride is"):
        call(case, "input", values, lowering="input.flipped_conv")
    with pytest.raises(cg.UnsupportedLoweringError, match="no such lowering"):
        call(case, "input", values, lowering="fastest")


def test_second_derivatives_agree_with_finite_differences_and_with_torch() -> None:
    geometry = ((1, 4, 5, 3), (4, 2, 3, 2), (2, 1), (1, 0), 1, 2)
    shape, kernel, *attributes = geometry
    make = lambda *size: torch.randn(*size, dtype=torch.float64, requires_grad=True)  # noqa: E731
    input, weight = make(*shape), make(*kernel)
    grad_output = make(*torch.conv2d(input, weight, None, *attributes).shape)
    assert torch.autograd.gradcheck(lambda w, g: cg.conv2d_input(shape, w, g, *attributes), (weight, grad_output))
    assert torch.autograd.gradcheck(lambda x, g: cg.conv2d_weight(x, kernel, g, *attributes), (input, grad_output))

    def ours(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cg.convolution_backward(g, x, w, [4], (2, 1), (1, 0), 1, False, 0, 2, [True, True, True])

    assert torch.autograd.gradcheck(ours, (input, weight, grad_output))
    assert torch.autograd.gradgradcheck(ours, (input, weight, grad_output), fast_mode=True)


@pytest.mark.parametrize(
    ("stride", "padding", "output_padding"),
    [(2, [(0, 1), (1, 2)], 1), (1, [(0, 2), (2, 0)], 0), (1, [(1, 2), (2, 1)], 0), (2, [(1, 0), (0, 0)], 1)],
)
def test_second_derivatives_of_a_transposed_convolution_with_uneven_padding(
    stride: int, padding: list[tuple[int, int]], output_padding: int
) -> None:
    input = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    ends = [amount for lo, hi in reversed(padding) for amount in (-lo, output_padding - hi)]
    full = torch.nn.functional.conv_transpose2d(input, weight, None, stride)
    grad_output = torch.randn_like(torch.nn.functional.pad(full, ends)).requires_grad_()

    def ours(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask = [True, True, False]
        return cg.convolution_backward(g, x, w, None, stride, padding, 1, True, output_padding, 1, mask)[:2]

    expected = torch.autograd.grad(torch.nn.functional.pad(full, ends), (input, weight), grad_output, create_graph=True)
    for found, wanted in zip(ours(input, weight, grad_output), expected, strict=True):
        torch.testing.assert_close(found, wanted)
        operands = (input, weight, grad_output)
        second = [
            torch.autograd.grad(v.square().sum(), operands, retain_graph=True, materialize_grads=True)
            for v in (found, wanted)
        ]
        torch.testing.assert_close(*second)


def test_a_gradient_that_nothing_depends_on_has_no_part_in_second_derivatives() -> None:
    """An infinity in the input is in the weight's gradient; the input's does not know of it."""
    x, w, g = torch.randn(1, 2, 6), torch.randn(3, 2, 3, requires_grad=True), torch.randn(1, 3, 4, requires_grad=True)
    x[0, 0, 0] = torch.inf
    grad_input, _, _ = cg.convolution_backward(g, x, w, [3], 1, 0, 1, False, 0, 1, [True, True, True])
    for found in torch.autograd.grad(grad_input.square().sum(), (w, g)):
        assert found.isfinite().all()


def derivatives_of(f: Callable[..., torch.Tensor], x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """Of a function that is linear in both: along ones in forward mode, by torch.func, and for each sample."""
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(value, torch.ones_like(value)) for value in (x, g)]
        tangents = [forward_ad.unpack_dual(f(*pair)).tangent for pair in ((dual[0], g), (x, dual[1]), dual)]
    ones = torch.ones_like(x), torch.ones_like(g)
    return [
        *tangents,
        torch.func.jvp(f, (x, g), ones)[1],
        *torch.func.grad(lambda *a: f(*a).square().sum(), argnums=(0, 1))(x, g),
        torch.func.vmap(f)(torch.stack([x, 2 * x, -x]), torch.stack([g, g, 3 * g])),
        torch.func.vmap(f, in_dims=(None, 1))(x, torch.stack([g, 2 * g], 1)),
        torch.func.vmap(torch.func.grad(lambda *a: f(*a).square().sum()))(
            torch.stack([x, 2 * x]), torch.stack([g, -g])
        ),
    ]


def test_forward_mode_and_torch_func_agree_with_torch() -> None:
    torch.manual_seed(0)
    x, w, g = (torch.randn(*s, dtype=torch.float64) for s in ((2, 4, 5, 6), (6, 2, 3, 2), (2, 6, 3, 4)))
    attributes = ((2, 1), (1, 0), 1, 2)
    g = torch.randn_like(torch.conv2d(x, w, None, *attributes))
    pairs = [
        (w, cg.conv2d_input, torch.nn.grad.conv2d_input, lambda f: lambda w, g: f(x.shape, w, g, *attributes)),
        (x, cg.conv2d_weight, torch.nn.grad.conv2d_weight, lambda f: lambda x, g: f(x, w.shape, g, *attributes)),
    ]
    for operand, ours, theirs, call_of in pairs:
        for found, wanted in zip(
            derivatives_of(call_of(ours), operand, g), derivatives_of(call_of(theirs), operand, g), strict=True
        ):
            torch.testing.assert_close(found, wanted)

    def all_three(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cg.convolution_backward(g, x, w, [6], *attributes[:3], False, 0, 2, [True, True, True])

    operands = tuple(value.requires_grad_() for value in (x, w, g))
    assert torch.autograd.gradcheck(all_three, operands, check_forward_ad=True)
    with forward_ad.dual_level():  # a gradient without a tangent among others with one
        dual = forward_ad.make_dual(w.detach(), torch.ones_like(w))
        tangents = [forward_ad.unpack_dual(value).tangent for value in all_three(x.detach(), dual, g.detach())]
    assert tangents[0] is not None
    assert all(value is None or not value.any() for value in tangents[1:])


def test_vmap_over_no_samples_gives_no_gradients() -> None:
    x, w, g = torch.randn(2, 4, 6), torch.randn(0, 6, 2, 3), torch.randn(2, 6, 4)
    every = torch.func.vmap(
        lambda w: cg.convolution_backward(g, x, w, [6], 1, 0, 1, False, 0, 2, [True, True, True]), out_dims=(0, 0, 0)
    )(w)
    assert [value.shape for value in every] == [(0, 2, 4, 6), (0, 6, 2, 3), (0, 6)]
    along = torch.func.vmap(lambda w: torch.func.jvp(lambda w: cg.conv1d_input((2, 4, 6), w, g, groups=2), (w,), (w,)))
    assert [value.shape for value in along(w)] == [(0, 2, 4, 6)] * 2


def test_a_session_refuses_a_tensor_of_a_transform() -> None:
    session = cg.GradientSession(cg.build_model("conv1d_input", input_shape=(1, 1, 6), weight_shape=(1, 1, 2)))
    run = lambda w: session.run({"weight": w, "grad_output": torch.ones(1, 1, 5)})["grad_input"].sum()  # noqa: E731
    with pytest.raises(cg.ArgumentTypeError, match=r"weight is a tensor inside a transform of torch\.func"):
        torch.func.grad(run)(torch.ones(1, 1, 2))


def test_a_tensor_that_is_negated_when_it_is_read() -> None:
    weight, grad = torch.randn(4, 3, 3, 3), torch.randn(2, 4, 6, 6)
    lazy = torch._neg_view(weight)
    assert lazy.is_neg()
    found = cg.conv2d_input((2, 3, 8, 8), lazy, grad)
    assert torch.equal(found, -cg.conv2d_input((2, 3, 8, 8), weight, grad))


def test_the_session_cache_is_bounded_and_serves_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_cache, "MAX_SESSIONS", 3)
    session_cache.clear_sessions()
    weight = torch.ones(1, 1, 2)
    for batch in (2, 3, 5):  # one sample may have another lowering
        cg.conv1d_input((batch, 1, 6), weight, torch.ones(batch, 1, 5))
    assert session_cache.session_count() == 1
    for size in range(4, 12):
        cg.conv1d_input((1, 1, size), weight, torch.ones(1, 1, size - 1))
    assert session_cache.session_count() == 3
    session_cache.clear_sessions()
    assert session_cache.session_count() == 0


WEIGHT, GRAD = torch.ones(4, 3, 3, 3), torch.ones(2, 4, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((2, 3, 9, 8), WEIGHT, GRAD), cg.GeometryError, r"axis 0 is 6, expected 7"),
        (((2, 5, 8, 8), WEIGHT, GRAD), cg.GeometryError, r"input_size has 5 channels, expected 3"),
        (((3, 8, 8), WEIGHT, GRAD), cg.GeometryError, r"input_size has 3 dimensions"),
        (((1, 3, 8, 8), WEIGHT, GRAD), cg.GeometryError, r"grad_output batch is 2, expected 1"),
        (((2, 3, 8.0, 8), WEIGHT, GRAD), cg.ArgumentTypeError, r"input_size dimension 2 is 8\.0"),
        (
            (torch.Size((2, 3, 8, 8)), WEIGHT.double(), GRAD),
            cg.DTypeError,
            r"weight is float64, grad_output is float32",
        ),
        (((2, 3, 8, 8), WEIGHT.int(), GRAD.int()), cg.DTypeError, r"weight is int32, expected one of float32"),
        (((2, 3, 8, 8), WEIGHT.cfloat(), GRAD.cfloat()), cg.DTypeError, r"weight is complex64"),
        (((2, 3, 8, 8), WEIGHT.numpy(), GRAD), cg.ArgumentTypeError, r"expected all torch tensors or all numpy"),
        (((2, 3, 8, 8), [[1.0]], GRAD), cg.ArgumentTypeError, r"weight is a list"),
        (((2, 3, 8, 8), WEIGHT.to("meta"), GRAD), cg.DeviceError, r"weight is on meta, grad_output is on cpu"),
        (((2, 3, 8, 8), WEIGHT.to("meta"), GRAD.to("meta")), cg.DeviceError, r"tensors are on meta"),
        (((2, 3, 8, 8), WEIGHT, GRAD, 1, 0, 1, 1.5), cg.ArgumentTypeError, r"groups is 1\.5"),
        (((2, 3, 8, 8), WEIGHT, GRAD, 1, 0, 1, True), cg.ArgumentTypeError, r"groups is True \(bool\)"),
        (((2, 3, 8, 8), WEIGHT, GRAD, 0), cg.GeometryError, r"stride is 0, expected at least 1"),
        (((2, 3, 8, 8), WEIGHT, GRAD, -1), cg.GeometryError, r"stride is -1"),
        (((2, 3, 8, 8), WEIGHT, GRAD, 1, 0, 0), cg.GeometryError, r"dilation is 0"),
        (((2, 3, 8, 8), WEIGHT, GRAD[:, :, :1, :1], 2**63), cg.GeometryError, r"stride is \d+, expected at most \d+"),
        (((2, 3, 8, 8), WEIGHT.to_sparse(), GRAD), cg.ArgumentTypeError, r"weight is a torch\.sparse_coo tensor"),
        (((2, 3, 8, 8), np.ma.masked_array(WEIGHT.numpy()), GRAD.numpy()), cg.ArgumentTypeError, "masked array"),
        (((2, 3, 8, 8), torch.nested.nested_tensor([GRAD[0], GRAD[0]]), GRAD), cg.ArgumentTypeError, "nested tensor"),
    ],
)
def test_bad_calls_get_one_clear_error(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cg.conv2d_input(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lowering": None}, cg.ArgumentTypeError, r"lowering is None"),
        ({"lowering": "weight.im2col"}, cg.UnsupportedLoweringError, r"computes the weight gradient"),
        ({"providers": 3}, cg.ArgumentTypeError, r"providers is 3"),
    ],
)
def test_bad_options_get_one_clear_error(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cg.conv2d_input((2, 3, 8, 8), WEIGHT, GRAD, **options)


def test_bias_sizes_and_masks_are_checked() -> None:
    operands = (GRAD, torch.ones(2, 3, 8, 8), WEIGHT)
    attributes = (1, 0, 1, False, 0, 1)
    with pytest.raises(cg.GeometryError, match=r"bias_sizes is \(3,\), expected \(4,\)"):
        cg.convolution_backward(*operands, [3], *attributes, [True, True, True])
    with pytest.raises(cg.ArgumentTypeError, match="bias_sizes is 4"):
        cg.convolution_backward(*operands, 4, *attributes, [True, True, False])
    with pytest.raises(cg.GeometryError, match="three booleans"):
        cg.convolution_backward(*operands, None, *attributes, [True, True])
    with pytest.raises(cg.ArgumentTypeError, match="output_mask is None"):
        cg.convolution_backward(*operands, None, *attributes, None)
    _, _, bias = cg.convolution_backward(*operands, None, *attributes, [False, False, True])
    assert torch.equal(bias, torch.full((4,), 72.0))


def test_float_arrays_of_the_other_byte_order_and_0_d_are_handled() -> None:
    big_endian = WEIGHT.numpy().astype(">f4")
    result = cg.conv2d_input((2, 3, 8, 8), big_endian, GRAD.numpy())
    assert np.array_equal(result, cg.conv2d_input((2, 3, 8, 8), WEIGHT.numpy(), GRAD.numpy()))
    with pytest.raises(cg.GeometryError):
        cg.conv2d_input((2, 3, 8, 8), np.float32(1.0), GRAD.numpy())


def test_providers_are_obeyed_or_refused() -> None:
    arguments = ((2, 3, 8, 8), WEIGHT, GRAD)
    assert torch.equal(cg.conv2d_input(*arguments, providers="cpu"), cg.conv2d_input(*arguments))
    with pytest.raises(cg.ProviderError, match="NoSuchProvider"):
        cg.conv2d_input(*arguments, providers=["NoSuchProvider"])
