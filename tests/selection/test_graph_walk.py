"""Sizes of intermediate tensors, read off the emitted graph."""

from __future__ import annotations

from functools import partial

import pytest

import convgrad_export as cg
from convgrad_export.geometry import ConvGeometry
from convgrad_export.lowering import candidates
from convgrad_export.selection.graph_walk import steps, workspace_bytes
from convgrad_export.selection.policy import choose
from tests.cases import CASES, ConvCase

DENSE = ConvGeometry.from_forward((8, 64, 28, 28), (64, 64, 3, 3), padding=1)


def test_im2cols_workspace_is_its_columns_and_what_they_are_made_from() -> None:
    columns = 4 * 64 * 9 * 8 * 28 * 28
    need = workspace_bytes("weight.im2col", DENSE)
    # while Concat runs, the nine slices and the columns are both alive
    assert need == 2 * columns
    assert workspace_bytes("weight.matmul_taps", DENSE) < columns / 2


def test_one_node_needs_what_its_kernel_allocates() -> None:
    assert workspace_bytes("input.conv_transpose", DENSE) == 4 * 64 * 9 * 28 * 28
    pointwise = ConvGeometry.from_forward((8, 64, 28, 28), (64, 64, 1, 1))
    assert workspace_bytes("input.flipped_conv", pointwise) == 4 * 64 * 64  # the exchanged weight


def test_workspace_grows_with_the_batch() -> None:
    one, eight = DENSE.with_batch(1), DENSE
    assert workspace_bytes("weight.im2col", eight) == 8 * workspace_bytes("weight.im2col", one)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_lowering_of_every_case_has_known_sizes(case: ConvCase) -> None:
    for gradient in ("input", "weight"):
        for lowering in candidates(gradient):
            if lowering.why_not(case.geometry) is None:
                calls = steps(lowering.name, case.geometry)
                assert calls
                assert workspace_bytes(lowering.name, case.geometry) >= 0
                shape = case.geometry.input_shape if gradient == "input" else case.geometry.weight_shape
                size = 1
                for length in shape:
                    size *= length
                assert calls[-1].output.size == size


def test_transposes_that_onnxruntime_folds_into_matmul_are_no_step() -> None:
    assert "Transpose" not in {s.op_type for s in steps("weight.matmul_taps", DENSE.with_batch(1))[-20:-2]}
    product = next(step for step in steps("weight.im2col", DENSE) if step.op_type == "MatMul")
    assert product.transposed == (False, True)


direct = partial(choose, max_error_factor=1.0)


def test_choose_obeys_the_limit_and_says_what_is_too_large() -> None:
    assert direct("weight", DENSE).name == "weight.channels_last_conv"
    need = workspace_bytes("weight.channels_last_conv", DENSE)
    assert need < workspace_bytes("weight.sample_matmul", DENSE) / 2
    assert direct("weight", DENSE, max_workspace=need).name == "weight.channels_last_conv"
    with pytest.raises(cg.UnsupportedLoweringError, match=rf"channels_last_conv: needs {need} bytes of workspace"):
        direct("weight", DENSE, max_workspace=need - 1)  # no form needs less
    wasteful = choose("weight", DENSE)
    assert wasteful.name == "weight.winograd4"
    smaller = choose("weight", DENSE, max_workspace=workspace_bytes(wasteful.name, DENSE) - 1)
    assert smaller.name == "weight.channels_last_conv"
    with pytest.raises(cg.UnsupportedLoweringError, match="bytes of workspace, max_workspace is 10"):
        direct("weight", DENSE, max_workspace=10)
    with pytest.raises(cg.UnsupportedLoweringError, match=r"weight\.im2col.*max_workspace is 10: raise the limit"):
        direct("weight", DENSE, lowering="weight.im2col", max_workspace=10)
    with pytest.raises(cg.GeometryError, match="give the largest batch"):
        direct("weight", DENSE.with_batch("batch"), max_workspace=10**9)


def test_build_model_takes_the_limit() -> None:
    arguments = {"input_shape": (8, 64, 28, 28), "weight_shape": (64, 64, 3, 3), "padding": 1}
    need = workspace_bytes("weight.sample_matmul", DENSE)
    model = cg.build_model("conv2d_weight", **arguments, max_error_factor=1, max_workspace=need - 1)
    name = next(item.value for item in model.metadata_props if item.key == "convgrad.lowering")
    assert workspace_bytes(name, DENSE) < need
    with pytest.raises(cg.UnsupportedLoweringError, match="no fixed size"):
        cg.build_model("conv2d_weight", dynamic=("batch", "channels", "space", "kernel"), max_workspace=1)
