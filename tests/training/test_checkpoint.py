"""The checkpoint file itself; what a session does with it is in test_session.py."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load

import convgrad_export as cg
from convgrad_export.training.checkpoint import read_checkpoint, save_checkpoint


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    state = {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.steps": np.array(3, np.int64)}
    metadata = {f"key{index}": "x" * index for index in range(12)}
    files = [save_checkpoint(tmp_path / f"{index}.safetensors", state, metadata=metadata) for index in range(5)]
    assert len({file.read_bytes() for file in files}) == 1
    arrays, header = read_checkpoint(files[0])
    assert header == metadata
    for name, array in state.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)
        np.testing.assert_array_equal(load(files[0].read_bytes())[name], array, strict=True)


def test_tensors_stay_aligned_behind_the_header(tmp_path: Path) -> None:
    for length in range(9):
        file = save_checkpoint(tmp_path / f"{length}.safetensors", {"w": np.ones(2)}, metadata={"text": "é" * length})
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        np.testing.assert_array_equal(read_checkpoint(file)[0]["w"], np.ones(2))


def test_a_tensor_that_the_system_reads_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux gives less than 2 GiB for one call."""

    class Reluctant(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:100])

    file = save_checkpoint(tmp_path / "w.safetensors", {"w": np.arange(1000.0)})
    monkeypatch.setattr(Path, "open", lambda self, *_, **__: Reluctant(self))
    np.testing.assert_array_equal(read_checkpoint(file)[0]["w"], np.arange(1000.0))


def test_any_byte_order_is_taken(tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "w.safetensors", {"w": np.arange(3, dtype=">f4")})
    np.testing.assert_array_equal(read_checkpoint(file)[0]["w"], np.arange(3, dtype=np.float32), strict=True)


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.complex64), np.array(["a"]), np.array([object()])])
def test_what_could_not_be_read_again_is_not_written(value: Any, tmp_path: Path) -> None:
    with pytest.raises(cg.DTypeError, match=r"w is .* which a checkpoint does not hold"):
        save_checkpoint(tmp_path / "w.safetensors", {"w": value})
    assert not list(tmp_path.iterdir())
