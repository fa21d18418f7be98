"""The checkpoint file itself; what a session does with it is in test_session.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load

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
