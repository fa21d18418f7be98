"""How MLServer's side reads requests, against stand-ins for the classes that MLServer provides."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


class InferenceError(Exception):
    pass


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported beside a package `mlserver` that holds what it names."""
    for name, members in (
        ("mlserver", {"MLModel": object}),
        ("mlserver.errors", {"InferenceError": InferenceError}),
        ("mlserver.types", dict.fromkeys(("InferenceRequest", "InferenceResponse", "RequestInput", "ResponseOutput"))),
        ("mlserver.utils", {"get_model_uri": None}),
    ):
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    name = "convgrad_export.serving.mlserver_runtime"
    monkeypatch.delitem(sys.modules, name, raising=False)
    made = importlib.import_module(name).OnnxRuntime()
    made._limit = 8
    yield made
    sys.modules.pop(name, None)


def value(datatype: str, data: Any, shape: list[int]) -> SimpleNamespace:
    return SimpleNamespace(name="x", datatype=datatype, data=data, shape=shape)


@pytest.mark.parametrize(
    ("datatype", "data", "expected"),
    [
        ("FP32", [0, 1.5], np.array([0, 1.5], np.float32)),
        ("INT64", [2**62 + 1, -3], np.array([2**62 + 1, -3])),
        ("INT32", [2.0, -3.0], np.array([2, -3], np.int32)),
        ("UINT64", [2**64 - 1, 0], np.array([2**64 - 1, 0], np.uint64)),
        ("BOOL", [True, 0], np.array([True, False])),
        ("INT8", bytes([1, 255]), np.array([1, -1], np.int8)),
    ],
)
def test_values_become_arrays_of_their_type(runtime: Any, datatype: str, data: Any, expected: np.ndarray) -> None:
    got = runtime._array(value(datatype, data, [2]))
    assert got.dtype == expected.dtype
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("INT64", [1.5, 2.0]),
        ("UINT8", [0.9, 1.0]),
        ("BOOL", [0.5, 1.0]),
        ("BOOL", [2, 1]),
        ("UINT8", [256, 0]),
        ("UINT8", [-1, 0]),
        ("INT64", [float("nan"), 0.0]),
        ("FP32", ["a", "b"]),
        ("FP32", [1.0]),
        ("BYTES", ["a", "b"]),
    ],
)
def test_values_that_the_type_does_not_hold_are_a_wrong_request(runtime: Any, datatype: str, data: Any) -> None:
    """numpy drops fractions: the model would run on other numbers than those that were sent."""
    with pytest.raises(InferenceError, match="input x is"):
        runtime._array(value(datatype, data, [2]))
