"""Single gradient models in Node.js: native onnxruntime-node, and the WebAssembly build of onnxruntime-web."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import convgrad_export as cg

from .node_runner import needs_node, needs_web, run_model, run_script

pytestmark = pytest.mark.browser

RUNTIMES = [pytest.param("node", marks=needs_node), pytest.param("web", marks=needs_web)]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["conv2d_input", "conv2d_weight"])
def test_a_gradient_of_integers_is_exact_in_node(runtime: str, name: str, tmp_path: Path) -> None:
    model = cg.build_model(name, input_shape=(2, 4, 10, 8), weight_shape=(6, 2, 3, 2), stride=(2, 3), groups=2)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    rng = np.random.default_rng(0)
    shapes = {"input": (5, 4, 10, 8), "weight": (6, 2, 3, 2), "grad_output": (5, 6, 4, 3)}
    session = cg.GradientSession(model)
    feeds = {n: rng.integers(-8, 9, shapes[n]).astype(np.float32) for n in session.input_names}
    expected, got = session.run(feeds), run_model(tmp_path / "model.onnx", feeds, tmp_path, runtime=runtime)
    assert set(got) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(got[key], value)


@needs_node
def test_a_script_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "fails.mjs").write_text("throw new Error('on purpose')")
    with pytest.raises(AssertionError, match="on purpose"):
        run_script(tmp_path / "fails.mjs")
