"""What may be written where, what is left when writing stops half-way, and damaged archives of arrays."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convgrad_export as cg
from convgrad_export import files


def test_a_pipe_is_no_file_to_replace(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for overwrite in (False, True):
        with pytest.raises(cg.OutputPathError, match="a pipe, a socket or a device"):
            files.write_atomically(pipe, b"new", overwrite=overwrite)
    assert pipe.is_fifo()
    with pytest.raises(cg.OutputPathError, match="a device"):
        files.check_output(os.devnull, overwrite=True)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_file_is_written(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    link.symlink_to(file)
    if exists:
        file.write_bytes(b"old")
    with pytest.raises(
        cg.OutputExistsError, match="exists already" if exists else "is a link to .*real, which does not"
    ):
        files.write_atomically(link, b"new")
    assert file.exists() == exists
    assert files.write_atomically(link, b"new", overwrite=True) == link
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    assert [path.name for path in file.parent.iterdir()] == ["real"]
    with files.staged(tmp_path) as folder:
        (folder / "link").write_bytes(b"newer")
    assert link.is_symlink()
    assert file.read_bytes() == b"newer"


def test_files_that_belong_together_may_lie_on_several_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "real").symlink_to(disk / "linked")
    rename = os.rename

    def within_a_disk(source: Path, target: Path) -> None:
        if (disk in Path(source).parents) != (disk in Path(target).parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    monkeypatch.setattr(os, "rename", within_a_disk)
    monkeypatch.setattr(os, "replace", within_a_disk)
    with files.staged(tmp_path, elsewhere=[disk / "checkpoint"]) as folder:
        for name in ("real", "other", "checkpoint"):
            (folder / name).write_text(name)
    assert sorted(os.listdir(tmp_path)) == ["disk", "other", "real"]
    assert (tmp_path / "real").is_symlink()
    assert {path.name: path.read_text() for path in disk.iterdir()} == {"linked": "real", "checkpoint": "checkpoint"}


def test_a_file_that_only_its_owner_reads_stays_so(tmp_path: Path) -> None:
    for name, mode in (("private", 0o600), ("shared", 0o664)):
        path = tmp_path / name
        path.write_bytes(b"old")
        path.chmod(mode)
        files.write_atomically(path, b"new", overwrite=True)
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", mode)
        with files.staged(tmp_path) as folder:
            (folder / name).write_bytes(b"newer")
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"newer", mode)


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lost").symlink_to(tmp_path / "no" / "file")
    with pytest.raises(cg.OutputPathError, match=r"the folder .*no does not exist"):
        files.check_output(tmp_path / "lost", overwrite=True)
    with pytest.raises(cg.OutputPathError, match="null"):
        files.check_output(tmp_path / "a\0b")
    with pytest.raises(cg.OutputPathError, match="too long"):
        files.check_output(tmp_path / ("a" * 300))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_an_interruption_leaves_the_previous_file_and_nothing_else(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"previous")

    def interrupted(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(error):
        files.write_atomically(path, b"new", overwrite=True)
    assert path.read_bytes() == b"previous"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existing", [(), ("a",), ("a", "b", "c")])
def test_files_that_belong_together_are_replaced_together(
    existing: tuple[str, ...], error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever renaming fails or is interrupted, before or after it took effect; "c" has no successor."""
    old = {name: f"old {name}" for name in existing}
    failing, seen = 0, set()
    rename = os.replace
    for failing in range(20):
        for name in ("a", "b", "c"):
            (tmp_path / name).unlink(missing_ok=True)
        for name, text in old.items():
            (tmp_path / name).write_text(text)
        calls = iter(range(10**6))

        def interrupted(source: Path, target: Path, calls: Any = calls, failing: int = failing) -> None:
            number = next(calls)
            if number == failing // 2 and failing % 2 == 0:
                raise error
            rename(source, target)
            if number == failing // 2:
                raise error

        monkeypatch.setattr(os, "replace", interrupted)
        try:
            with files.staged(tmp_path, outdated=["b", "c"]) as folder:
                (folder / "a").write_text("new a")
                (folder / "b").write_text("new b")
            finished = True
        except (KeyboardInterrupt, cg.OutputPathError):
            finished = False
        monkeypatch.undo()
        expected = {"a": "new a", "b": "new b"} if finished else old
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == expected
        seen.add(finished)
    assert seen == {True, False}


def test_files_are_missing_rather_than_mixed_while_they_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process leaves."""
    rename = os.replace
    states: list[set[str]] = []

    def watched(source: Path, target: Path) -> None:
        rename(source, target)
        states.append({path.read_text() for path in tmp_path.glob("[ab]")})

    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, "replace", watched)
    with files.staged(tmp_path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("new")
    assert len(states) == 4
    assert {"old", "new"} not in states


def test_a_temporary_folder_goes_though_its_removal_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = os.rmdir

    def interrupted(*args: Any, **keywords: Any) -> None:
        monkeypatch.setattr(os, "rmdir", remove)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rmdir", interrupted)
    with pytest.raises(KeyboardInterrupt), files.temporary_folder(tmp_path) as folder:
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, time
from convgrad_export import files

def hang(*_):
    print("writing", flush=True)
    time.sleep(600)

def whole():
    files.os.fsync = hang
    files.write_atomically(sys.argv[2], b"half")

def together():
    with files.staged(sys.argv[2].rpartition("/")[0]) as folder:
        (folder / "half").touch()
        hang()

globals()[sys.argv[1]]()
"""


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="the system does not tell whose a temporary file is")
@pytest.mark.parametrize("way", ["whole", "together"])
def test_the_next_writer_removes_what_a_killed_one_left(way: str, tmp_path: Path) -> None:
    def names() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    writer = [sys.executable, "-c", WRITER, way, str(tmp_path / "model.onnx")]
    with subprocess.Popen(writer, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        (left,) = names()
        with files.temporary_folder(tmp_path):
            assert left in names()
        files.write_atomically(tmp_path / "first", b"")
        assert names() == {left, "first"}  # its writer lives
        process.kill()
    _, system, number, rest = left.split("-")
    others = {
        f".convgrad-{'0' * len(system)}-{number}-{rest}",  # another machine's, or another container's
        f".convgrad-{system}-{os.getpid()}-{rest}",  # of this very process, perhaps another thread's
        ".convgrad-0123456789abcdef",  # what `replace_together` has set aside
        f".convgrad-{system}-notes",
    }
    for name in others:
        (tmp_path / name).touch()
    files.write_atomically(tmp_path / "second", b"")
    assert names() == {"first", "second"} | others


def test_an_error_within_a_temporary_folder_names_the_place_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(cg.OutputPathError) as caught, files.temporary_folder(tmp_path) as folder:
        files.write_atomically(folder / "missing" / "step.onnx", b"")
    assert str(tmp_path / "missing") in str(caught.value)
    assert str(folder) not in str(caught.value)


def archive(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def damaged() -> bytes:
    """The middle of the compressed data changed, the directory at the end as it was."""
    content = bytearray(archive(x=np.random.default_rng(0).standard_normal((64, 64))))
    for i in range(100, len(content) // 2, 3):
        content[i] ^= 0x55
    return bytes(content)


def with_text() -> bytes:
    stream = io.BytesIO(archive(x=np.zeros(3)))
    with zipfile.ZipFile(stream, "a") as opened:
        opened.writestr("README.txt", "no array")
    return stream.getvalue()


def single() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no zip archive"),
        (b"PK no archive", "no zip archive"),
        (single(), "no zip archive"),
        (damaged(), "cannot be read"),
        (archive(x=np.array([{}])), "pickle"),
        (archive(x=np.zeros(9))[:-30], "no zip archive"),
        (with_text(), "entry 'README.txt' is no array"),
        (None, "No such file"),
    ],
)
def test_archives_that_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(cg.ModelFileError, match=message) as found:
        files.read_arrays(path)
    assert str(path) in str(found.value)


def test_every_byte_of_a_small_archive_may_be_wrong(tmp_path: Path) -> None:
    path, content = tmp_path / "data.npz", archive(x=np.arange(4), y=np.arange(3.0))
    for place in range(len(content)):
        for value in (0, 1, 255):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            with contextlib.suppress(cg.ModelFileError):
                files.read_arrays(path)


@pytest.mark.parametrize("shown", [True, False])
def test_permissions_follow_the_umask_without_setting_it(
    shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Setting it, if only to read it, gives files that another thread makes meanwhile the wrong permissions."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail(f"the umask was set to {mask:o}"))
        if not shown:
            monkeypatch.setattr(files, "_UMASK", 0o027)
            monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name: python")
        elif not Path("/proc/self/status").exists():
            pytest.skip("the system does not show its umask")
        files.grant(path, 0o666)
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
