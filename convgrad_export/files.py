"""Writing files so that nothing is half-written and nothing is lost, and reading arrays."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArgumentTypeError, ModelFileError, OutputExistsError, OutputPathError


def as_path(value: Any, name: str) -> Path:
    """The name of a file or folder as a Path.

    Raises:
        ArgumentTypeError: neither text nor a path.
    """
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise ArgumentTypeError(f"{name} is {value!r:.80} ({type(value).__name__}), expected the name of a file or folder")


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The path as a Path, when a file may be written there; through a link, when the file that it names may.

    Raises:
        OutputExistsError: it exists, if only as a link to nothing, and `overwrite` is False.
        OutputPathError: a folder, a pipe, a device or the like, or its parent is no folder, or may not be looked at.
    """
    target = Path(path)
    if "\0" in str(target):
        raise OutputPathError(f"output is {str(target)!r}, expected a name without null characters")
    try:
        if target.is_dir():
            raise OutputPathError(f"output {target} is a folder, expected a file name")
        if target.exists() and not target.is_file():
            raise OutputPathError(f"output {target} is a pipe, a socket or a device, expected the name of a file")
        if os.path.lexists(target) and not overwrite:
            what = "exists already" if target.exists() else f"is a link to {os.readlink(target)}, which does not exist"
            raise OutputExistsError(
                f"output {target} {what}; give another name, or overwrite it (overwrite=True, --overwrite)"
            )
        folder = written_file(target).parent
        if not folder.is_dir():
            raise OutputPathError(f"output {target}: the folder {folder} does not exist")
    except (OutputPathError, OutputExistsError):
        raise
    except OSError as error:
        raise OutputPathError(f"output {target}: {error.strerror or error}") from error
    return target


def written_file(path: Path) -> Path:
    """The file that is written for a path: where a link leads, so that the link stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_atomically(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False) -> Path:
    """Write `data` to a temporary file beside `path`, then rename it: readers see the old file or the new one.

    A file that is replaced hands its permissions on.

    Raises:
        OutputExistsError, OutputPathError: as `check_output`, or the folder cannot be written or the disk is full; the
            previous file is still there then.
    """
    target = check_output(path, overwrite=overwrite)
    file = written_file(target)
    temporary = None
    try:
        _clear_up(file.parent)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=_prefix(), delete=False) as stream:
            temporary = Path(stream.name)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        hand_on_permissions(temporary, file)
        temporary.replace(file)
    except BaseException as error:  # Ctrl-C too
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OutputPathError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def check_folder(folder: Path) -> None:
    """Refuse what `make_folder` could not make, before any work is done.

    Raises:
        OutputPathError: a file stands in its place, or in that of a folder above it.
    """
    nearest = next(path for path in (folder, *folder.parents, Path()) if os.path.lexists(path))
    if not nearest.is_dir():
        raise OutputPathError(f"output {folder} cannot be made a folder: {nearest} is a file")


def make_folder(folder: Path) -> None:
    """Make the folder with its parents; an existing one is fine.

    Raises:
        OutputPathError: a file stands in its place, or it may not be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputPathError(f"output {folder} cannot be made a folder: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make the folder with its parents; those that are new and still empty go again where the body fails.

    Raises:
        OutputPathError: as `make_folder`.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):  # of what is not empty, or never came to be
            for path in new:
                path.rmdir()
        raise


def grant(path: Path, mode: int) -> None:
    """Give a temporary file or folder, which is its owner's alone, the permissions that the umask leaves of `mode`."""
    path.chmod(mode & ~_umask())


def _umask() -> int:
    """Read where the system shows it; elsewhere what it was at import, since only setting it tells."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return _UMASK


def _umask_by_setting() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask_by_setting()  # while the package is imported, when other threads are least likely


def hand_on_permissions(temporary: Path, file: Path) -> None:
    """Give a temporary file the permissions of the file that it will replace, those of any new file without one."""
    if file.exists():
        temporary.chmod(stat.S_IMODE(file.stat().st_mode))
    else:
        grant(temporary, 0o666)


def digest(root: Path, paths: Iterable[Path]) -> str:
    """Hexadecimal SHA-256 of files, by path relative to `root` and content."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.relative_to(root).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The ``.onnx`` files in a folder and in those below it.

    NAME/VERSION/model.onnx under a config.pbtxt is left out: a server's copy of any model, not only of one of ours.
    """
    found = (path for path in folder.rglob("*.onnx") if not path.is_dir())
    return sorted(file for file in found if not (file.parent.parent / "config.pbtxt").is_file())


@contextlib.contextmanager
def temporary_folder(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder inside `parent`, for what will be renamed into place; removed at the end.

    Raises:
        OutputPathError: it cannot be made, or an OSError of the body (a full disk, say).
    """
    target = Path(parent)
    _clear_up(target)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(), dir=target))
    except OSError as error:
        raise OutputPathError(f"cannot write to {target}: {error.strerror or error}") from error
    try:
        yield temporary
    except OSError as error:
        if isinstance(error, OutputPathError | OutputExistsError):
            if str(temporary) not in str(error):
                raise
            raise type(error)(str(error).replace(str(temporary), str(target))) from error
        file = f": {error.filename}" if error.filename else ""  # which may be one that is read
        raise OutputPathError(f"cannot write to {target}: {error.strerror or error}{file}") from error
    finally:
        _certainly(lambda: shutil.rmtree(temporary, ignore_errors=True))


def _clear_up(folder: Path) -> None:
    """Remove the temporary files of writers that were killed: of processes of this system that are no more.

    Previous files that `replace_together` had set aside stay: they are the user's.
    """
    if not (system := _system()):
        return
    name = re.compile(rf"\.convgrad-{system}-([1-9]\d{{0,8}})-\w+")
    try:
        found = [match for entry in os.listdir(folder) if (match := name.fullmatch(entry))]
    except OSError:  # whoever writes there next says why
        return
    for match in found:
        path = Path(folder, match[0])
        if not _is_gone(int(match[1])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def _prefix() -> str:
    """Of temporary names. It says whose they are, where that can be told."""
    system = _system()
    return f".convgrad-{system}-{os.getpid()}-" if system else ".convgrad-"


def _system() -> str:
    """What a process's number is unique in: one boot of a machine, one container; "" where it cannot be told.

    Several may write to a network folder or a mounted one, and each numbers its own processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        return hashlib.sha256(boot + os.readlink(b"/proc/self/ns/pid")).hexdigest()[:16]
    except OSError:
        return ""


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False


def _certainly(action: Callable[[], None]) -> None:
    """Do what may be done twice; when it is interrupted (Ctrl-C), once more to its end."""
    try:
        action()
    except BaseException:
        action()
        raise


@contextlib.contextmanager
def staged(
    folder: str | os.PathLike[str], *, outdated: Iterable[str] = (), elsewhere: Iterable[Path] = ()
) -> Iterator[Path]:
    """For files that belong together: a temporary folder whose files are renamed into `folder` when all are complete.

    Args:
        folder: where the files go.
        outdated: names of files that go with the old ones, unless they are among the new.
        elsewhere: paths of those among the new that go into another folder, under the same name.

    Raises:
        OutputPathError: one of them could not be written (a full disk, say); what `folder` held before is still there.
    """
    places = {path.name: path for path in elsewhere}
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(temporary_folder(folder))
        yield temporary
        moves = {}
        for path in sorted(path for path in temporary.iterdir() if path.is_file()):
            target = written_file(places.get(path.name, Path(folder) / path.name))
            if target.parent != Path(folder):  # perhaps on another disk, where a file cannot be renamed to
                near = stack.enter_context(temporary_folder(target.parent))
                path = Path(shutil.move(path, near / path.name))
            hand_on_permissions(path, target)
            moves[path] = target
        replace_together(moves, outdated=[Path(folder) / name for name in outdated])


def replace_together(moves: Mapping[Path, Path], *, outdated: Iterable[Path] = ()) -> None:
    """Rename temporary files over files that belong together, so that old and new ones are never mixed.

    One file is renamed over the other. Of several the old ones are set aside first, each in its folder: should the
    process be killed on the way, files are missing, which every reader notices, but none meets another's.

    Args:
        moves: the final name of each temporary file.
        outdated: files that belong to the old ones, which go unless they are among the new.

    Raises:
        OSError, KeyboardInterrupt: the old files are back then, and no new one is left.
    """
    old = [path for path in (*moves.values(), *outdated) if os.path.lexists(path)]
    if len(moves) == 1 and all(path in moves.values() for path in old):
        for source, target in moves.items():
            os.replace(source, target)
        return
    aside = {path: _free_name(path) for path in old}
    placed = {target: source.lstat().st_ino for source, target in moves.items()}

    def undo() -> None:
        for path, inode in placed.items():
            if os.path.lexists(path) and path.lstat().st_ino == inode:
                path.unlink()
        for path, name in aside.items():
            if os.path.lexists(name):
                os.replace(name, path)

    try:
        for path, name in aside.items():
            os.replace(path, name)
        for source, target in moves.items():
            os.replace(source, target)
    except BaseException:
        _certainly(undo)
        raise
    _certainly(lambda: _remove(aside.values()))


def _free_name(path: Path) -> Path:
    return path.with_name(f".convgrad-{secrets.token_hex(8)}")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file by name, in this machine's byte order; pickled objects are refused.

    Raises:
        ModelFileError: missing, no ``.npz``, damaged, or with pickled objects.
    """
    try:
        with open(path, "rb") as stream:
            if not zipfile.is_zipfile(stream):  # numpy would take it for a pickle
                raise ValueError("it is no zip archive as numpy.savez writes")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                return {name: _native(archive[name], name) for name in archive.files}
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, MemoryError, *_DAMAGED) as error:
        raise ModelFileError(f"{path} cannot be read as .npz without pickled objects: {error}") from error


_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError)  # the last from an encrypted archive


def _native(array: Any, name: str) -> np.ndarray:
    if not isinstance(array, np.ndarray):  # numpy gives the bytes of what is none
        raise ValueError(f"its entry {name!r} is no array")
    return array.astype(array.dtype.newbyteorder("="), copy=False)
