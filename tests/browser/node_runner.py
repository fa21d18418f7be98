"""Running exported models in Node.js: on onnxruntime-node, and on the WebAssembly build that browsers run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "examples" / "browser"
NODE = shutil.which("node")
_PACKAGES = {"node": HERE / "node_modules" / "onnxruntime-node", "web": PAGE / "node_modules" / "onnxruntime-web"}


def skip_without(runtime: str) -> pytest.MarkDecorator:
    """Skips a test where Node.js or the runtime's package is missing, and says what to install."""
    package = _PACKAGES[runtime]
    folder = package.parents[1].relative_to(HERE.parents[1])
    return pytest.mark.skipif(
        NODE is None or not package.is_dir(),
        reason=f"needs Node.js and {package.name}: npm ci --prefix {folder}",
    )


needs_node = skip_without("node")
needs_web = skip_without("web")


def run_script(script: Path, *arguments: object, timeout: float = 120, flags: Sequence[str] = ()) -> str:
    """Standard output of a script of ours.

    Args:
        flags: of Node.js itself.

    Raises:
        AssertionError: it failed; the message is its standard error.
    """
    assert NODE is not None
    done = subprocess.run(
        [NODE, *flags, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "NODE_NO_WARNINGS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_model(
    model: Path, feeds: Mapping[str, np.ndarray], folder: Path, *, runtime: str = "node"
) -> dict[str, np.ndarray]:
    """The outputs of a model, by name.

    Args:
        model: the ONNX file. feeds: arrays by input name. folder: for the tensors on their way.
        runtime: ``"node"`` for onnxruntime-node, ``"web"`` for onnxruntime-web's WebAssembly build, in Node.js.
    """
    save_file({name: np.ascontiguousarray(array) for name, array in feeds.items()}, folder / "inputs.safetensors")
    outputs = folder / "outputs.safetensors"
    run_script(HERE / "run_model.mjs", runtime, model, folder / "inputs.safetensors", outputs)
    return load_file(outputs)
