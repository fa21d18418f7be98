"""Long sums in steps, in single operators and in exports."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import convgrad_export as cg
from convgrad_export.emit.long_sums import Step, split_long_sums, steps


@pytest.mark.parametrize(
    ("sizes", "axes", "expected"),
    [
        ((8, 64, 56, 56), (0, 2, 3), []),
        ((8, 64, 112, 112), (0, 2, 3), [Step((3,))]),
        ((None, 64, None, None), (0, 2, 3), [Step((3,))]),
        ((8, 1, 512, 512), (0, 2, 3), [Step((3,)), Step((2,))]),
        ((None, 1, 512, 512), (0, 2, 3), [Step((3,)), Step((2,))]),
        ((20, 30, 21, 3), (0, 1, 2), [Step((2,))]),
        ((8, 512, 512, 2), (1, 2, 3), [Step((2, 3))]),
        ((4096, 16), (0,), [Step((0,), 64)]),
        ((None, 4, 48000), (0, 2), [Step((2,), 200)]),
        ((5000, None), (0,), [Step((0,), 50)]),
        ((5000, None, None), (0,), []),  # no Reshape can name both
        ((20011, 3), (0,), []),  # a prime
        ((None, 3), (0,), []),
        ((0, 1, 512, 512), (0, 2, 3), []),
        ((2000, 8), (0, 1), [Step((0,), 40)]),
    ],
)
def test_steps(sizes: tuple[int | None, ...], axes: tuple[int, ...], expected: list[Step]) -> None:
    assert steps(sizes, axes) == expected


@pytest.mark.parametrize("operator", ["ReduceSum", "ReduceMean"])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize(
    ("declared", "shape", "axes"),
    [
        (("n", 1, 40, 60), (3, 1, 40, 60), [0, 2, 3]),
        (("n", 2, "h", "w"), (3, 2, 40, 60), [0, -1, -2]),
        (("n", 2, "h", "w"), (0, 2, 40, 60), [0, 2, 3]),
        ((3, 4, 4096), (3, 4, 4096), None),
        (("n", 3, 9000), (2, 3, 9000), [2]),
        ((9000, "m"), (9000, 3), [0]),
        ((2, 9000, "m"), (2, 9000, 0), [1]),
    ],
)
def test_a_split_sum_is_the_sum(
    operator: str, keepdims: int, declared: tuple[int | str, ...], shape: tuple[int, ...], axes: list[int] | None
) -> None:
    inputs, constants = ["x"], []
    rank = len(shape) if keepdims else len(shape) - len(axes or shape)
    if axes is not None:
        inputs.append("axes")
        constants.append(numpy_helper.from_array(np.array(axes, np.int64), "axes"))
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["y"], keepdims=keepdims)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, declared)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        constants,
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    split_long_sums(model.graph)
    assert len(model.graph) > 1
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    x = np.random.default_rng(0).integers(-3, 4, shape).astype(np.float32)
    found = cg.GradientSession(proto).run({"x": x})["y"]
    along = tuple(axes) if axes is not None else None
    with np.errstate(invalid="ignore"):
        total = x.sum(along, keepdims=bool(keepdims), dtype=np.float64)
        expected = total if operator == "ReduceSum" else total / (x.size / max(total.size, 1))
    if operator == "ReduceMean" and 0 in shape:
        assert found.shape == expected.shape
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dynamic", [(), ("batch",)])
def test_the_bias_gradient_of_alike_terms(dynamic: tuple[str, ...]) -> None:
    """One chain of additions was 1.7% off."""
    model = cg.build_model(
        "convolution_backward",
        input_shape=(8, 1, 512, 512),
        weight_shape=(1, 1, 1, 1),
        output_mask=(False, False, True),
        dynamic=dynamic,
    )
    found = cg.GradientSession(model).run({"grad_output": np.full((8, 1, 512, 512), 0.1, np.float32)})["grad_bias"]
    np.testing.assert_allclose(found, 8 * 512 * 512 * np.float64(np.float32(0.1)), rtol=2e-6)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)), (1, 1, 300, 300)),
        (torch.nn.Sequential(torch.nn.Conv1d(1, 4, 5), torch.nn.ReLU(), torch.nn.Conv1d(4, 1, 1)), (1, 1, 40004)),
        (torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)), (65536, 8)),
    ],
    ids=["images", "rows", "linear"],
)
def test_exports_with_long_sums_are_right(net: torch.nn.Sequential, shape: tuple[int, ...]) -> None:
    """Verification refused them: alike gradients at every position were added up into one float32 number."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.uniform_(parameter)
    assert cg.export_gradient(net, (torch.rand(shape),), wrt="parameters", of="sum").verified
