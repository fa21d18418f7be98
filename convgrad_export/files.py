"""Writing files so that nothing is half-written and nothing is lost."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import OutputExistsError, OutputPathError


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The path as a Path, when a file may be written there.

    Raises:
        OutputExistsError: it exists and `overwrite` is False. OutputPathError: a folder, or its parent is no folder.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputPathError(f"output {target} is a folder, expected a file name")
    if target.exists() and not overwrite:
        raise OutputExistsError(f"output {target} exists already; give another name or allow overwriting it")
    if not target.parent.is_dir():
        raise OutputPathError(f"output {target}: the folder {target.parent} does not exist")
    return target


def write_atomically(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False) -> Path:
    """Write `data` to a temporary file beside `path`, then rename it: readers see the old file or the new one.

    Raises:
        OutputExistsError, OutputPathError: as `check_output`, or the folder cannot be written or the disk is full; the
            previous file is still there then.
    """
    target = check_output(path, overwrite=overwrite)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as stream:
            temporary = Path(stream.name)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        grant(temporary, 0o666)
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OutputPathError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def grant(path: Path, mode: int) -> None:
    """Give a temporary file or folder, which is its owner's alone, the permissions that the umask leaves of `mode`."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)


def digest(root: Path, paths: Iterable[Path]) -> str:
    """Hexadecimal SHA-256 of files, by path relative to `root` and content."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.relative_to(root).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()


@contextlib.contextmanager
def temporary_folder(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder inside `parent`, for what will be renamed into place; removed at the end.

    Raises:
        OutputPathError: it cannot be made, or an OSError of the body (a full disk, say).
    """
    target = Path(parent)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".convgrad-", dir=target))
    except OSError as error:
        raise OutputPathError(f"cannot write to {target}: {error.strerror or error}") from error
    try:
        yield temporary
    except OSError as error:
        if isinstance(error, OutputPathError | OutputExistsError):
            raise
        raise OutputPathError(f"cannot write to {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """For files that belong together: a temporary folder whose files are renamed into `folder` when all are complete.

    Raises:
        OutputPathError: one of them could not be written (a full disk, say); what `folder` held before is still there.
    """
    with temporary_folder(folder) as temporary:
        yield temporary
        for path in sorted(temporary.iterdir()):
            path.replace(Path(folder) / path.name)
