"""A missing package is one kind of error, wherever it is first needed."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import convgrad_export as cg
from convgrad_export.bench.report import write_plots
from convgrad_export.bench.results import Results
from convgrad_export.errors import raise_missing
from convgrad_export.files import write_atomically
from convgrad_export.lowering import CPU
from convgrad_export.runtime.providers import onnxruntime
from convgrad_export.selection.runner import onnxruntime_with
from convgrad_export.serving.config import model_config_pb2
from convgrad_export.training.checkpoint import read_checkpoint
from convgrad_export.training.digits import load_digits
from convgrad_export.training.plot import pyplot


@pytest.mark.parametrize(
    ("package", "use", "advice"),
    [
        ("onnxruntime", onnxruntime, "convgrad-export[onnxruntime-gpu]"),
        ("onnxruntime", lambda: onnxruntime_with(CPU), "convgrad-export[onnxruntime-gpu]"),
        ("matplotlib", lambda: write_plots(Results({}), Path(), "plots"), "convgrad-export[examples]"),
        ("matplotlib", pyplot, "convgrad-export[examples]"),
        ("sklearn", load_digits, "convgrad-export[examples]', or give --data"),
        ("tritonclient", model_config_pb2, "convgrad-export[serving]"),
        ("grpc", model_config_pb2, "convgrad-export[serving]"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, use: Callable[[], object], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, *(name for name in sys.modules if name.startswith(f"{package}."))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(cg.MissingDependencyError, match=f"^{package} is not installed, and this needs it: ") as caught:
        use()
    assert advice in str(caught.value)


def test_a_package_that_is_there_and_broken_is_not_called_missing() -> None:
    broken = ImportError("libonnx.so: cannot open shared object file", name="onnxruntime.capi")
    with pytest.raises(cg.MissingDependencyError, match=r"^onnxruntime cannot be imported \(libonnx\.so"):
        raise_missing(broken)


def test_a_package_of_the_callers_keeps_its_own_error() -> None:
    error = ModuleNotFoundError("No module named 'no_such_package'", name="no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as caught:
        raise_missing(error)
    assert caught.value is error


NAME = "no\nsuch\r\x1b[31m\u2028\udcff"


@pytest.mark.parametrize(
    "use",
    [
        lambda: cg.GradientSession(f"{NAME}.onnx"),
        lambda: cg.build_model(f"conv2d_{NAME}"),
        lambda: write_atomically(f"/{NAME}/model.onnx", b""),
        lambda: read_checkpoint(f"{NAME}.ckpt"),
    ],
)
def test_names_with_control_characters_make_an_error_of_one_line(use: Callable[[], object]) -> None:
    with pytest.raises(cg.ConvGradError) as caught:
        use()
    assert str(caught.value).isprintable()
    assert r"no\nsuch\r\x1b[31m\u2028\udcff" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_what_an_error_lists_stands_below_it() -> None:
    error = cg.UnsupportedOperatorError("two operators:", "  a\nb: called by c", "  d: called by e")
    assert str(error).splitlines() == ["two operators:", r"  a\nb: called by c", "  d: called by e"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
