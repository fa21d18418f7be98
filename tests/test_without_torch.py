"""A saved model runs where torch, onnx and onnxscript are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx

import convgrad_export as cg

# Makes `import torch` and the others fail as they do where the package is missing.
BLOCK = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run(body: str, blocked: set[str]) -> subprocess.CompletedProcess[str]:
    code = BLOCK.format(blocked=sorted(blocked)) + body
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_a_saved_model_runs_with_onnxruntime_and_numpy_alone(tmp_path: Path) -> None:
    path = tmp_path / "gradient.onnx"
    onnx.save(cg.build_model("conv1d_input", input_shape=(1, 1, 4), weight_shape=(1, 1, 2)), path)
    body = f"""
import numpy as np
import convgrad_export as cg
session = cg.GradientSession({str(path)!r})
ones = lambda *shape: np.ones(shape, np.float32)
print(session.run({{"weight": ones(1, 1, 2), "grad_output": ones(3, 1, 3)}})["grad_input"].sum())
"""
    result = run(body, {"torch", "onnx", "onnxscript", "onnx_ir", "ml_dtypes"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["18.0"]


def test_numpy_gradients_and_building_need_no_torch() -> None:
    body = """
import numpy as np
import convgrad_export as cg
print(cg.conv1d_input((1, 1, 4), np.ones((1, 1, 2), np.float32), np.ones((1, 1, 3), np.float32)).sum())
print(len(cg.build_model("conv2d_weight", dynamic=("batch", "channels", "space", "kernel")).graph.node) > 3)
"""
    result = run(body, {"torch"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["6.0", "True"]


def test_importing_the_package_imports_none_of_the_large_libraries() -> None:
    body = """
import convgrad_export
print(sorted({"torch", "onnx", "onnxscript", "onnxruntime"} & set(sys.modules)))
"""
    result = run(body, set())
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_block_works() -> None:
    result = run("import torch", {"torch"})
    assert result.returncode != 0
    assert "No module named 'torch'" in result.stderr


def test_without_onnxruntime_the_error_names_the_extras() -> None:
    body = """
import numpy as np
import convgrad_export as cg
try:
    cg.conv1d_input((1, 1, 4), np.ones((1, 1, 2), np.float32), np.ones((1, 1, 3), np.float32))
except cg.MissingDependencyError as error:
    print(isinstance(error, ImportError), "onnxruntime-gpu" in str(error))
"""
    result = run(body, {"onnxruntime"})
    assert result.stdout.split() == ["True", "True"], result.stderr


def test_without_torch_the_error_names_the_extra() -> None:
    body = """
import convgrad_export as cg
from convgrad_export.cli import main
for name in ("export", "torchscript"):
    try:
        getattr(cg, name)
    except cg.MissingDependencyError as error:
        print(isinstance(error, ImportError), "convgrad-export[torch]" in str(error))
print(main(["export", "package:Name", "-o", "x.onnx"]))
"""
    result = run(body, {"torch"})
    assert result.stdout.split() == ["True", "True", "True", "True", "2"], result.stderr
    assert result.stderr.count("\n") == 1
