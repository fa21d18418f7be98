"""The checkpoint file itself; what a session does with it is in test_session.py."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save_file

import convgrad_export as cg
from convgrad_export.training.checkpoint import checkpoint_path, load_checkpoint, read_checkpoint, save_checkpoint


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


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "missing"])
def test_a_name_that_no_file_has_is_refused_when_it_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(cg.ModelFileError, match=r"cannot be read|does not exist"):
        load_checkpoint(tmp_path / name)


def test_a_flag_that_is_none_overwrites_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a.safetensors", {"a": np.zeros(2)})
    with pytest.raises(cg.ArgumentTypeError, match="overwrite is 'no'"):
        save_checkpoint(path, {"a": np.ones(2)}, overwrite="no")  # type: ignore[arg-type]
    assert not load_checkpoint(path)["a"].any()


def test_any_byte_order_is_taken(tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "w.safetensors", {"w": np.arange(3, dtype=">f4")})
    np.testing.assert_array_equal(read_checkpoint(file)[0]["w"], np.arange(3, dtype=np.float32), strict=True)


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.complex64), np.array(["a"]), np.array([object()])])
def test_what_could_not_be_read_again_is_not_written(value: Any, tmp_path: Path) -> None:
    with pytest.raises(cg.DTypeError, match=r"w is .* which a checkpoint does not hold"):
        save_checkpoint(tmp_path / "w.safetensors", {"w": value})
    assert not list(tmp_path.iterdir())


def changed_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The file with another header; the tensors stay."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": "100.0"},
        {"trained": "w"},
        {"property.epoch": "int:9"},
        {"more": ""},
        {"format": "convgrad_export.training 1"},
    ],
)
def test_a_changed_text_of_the_header_is_damage(change: dict[str, str], tmp_path: Path) -> None:
    texts = {"learning_rate": "0.1", "trained": "", "property.epoch": "int:3"}
    file = save_checkpoint(tmp_path / "w.safetensors", {"w": np.ones(2)}, metadata=texts)
    changed_header(file, lambda header: None)
    assert read_checkpoint(file)[1] == texts
    changed_header(file, lambda header: header["__metadata__"].update(change))
    with pytest.raises(cg.ModelFileError, match="do not match its checksum"):
        read_checkpoint(file)


def test_a_text_that_is_gone_is_damage(tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "w.safetensors", {"w": np.ones(2)}, metadata={"calls": "3"})
    changed_header(file, lambda header: header["__metadata__"].pop("calls"))
    with pytest.raises(cg.ModelFileError, match="do not match its checksum"):
        read_checkpoint(file)


def test_checkpoints_of_the_first_format_are_read(tmp_path: Path) -> None:
    """Their checksum is that of the tensors alone."""
    array = np.arange(3, dtype=np.float32)
    checksum = hashlib.sha256(json.dumps(["w", "float32", [3]]).encode() + array.tobytes()).hexdigest()
    header = {"format": "convgrad_export.training 1", "sha256": checksum, "calls": "3"}
    save_file({"w": array}, tmp_path / "w.safetensors", metadata=header)
    arrays, texts = read_checkpoint(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(arrays["w"], array)
    assert texts == {"calls": "3"}


def test_models_of_different_names_have_different_checkpoints() -> None:
    usual = {"step.onnx": "step", "x.v2.onnx": "x.v2", "folder.d/x.ONNX": "folder.d/x"}
    others = {"x.v2": "x.v2", "x.v3": "x.v3", "x": "x"}
    for model, stem in {**usual, **others}.items():
        assert checkpoint_path(model) == Path(f"{stem}.checkpoint.safetensors")
