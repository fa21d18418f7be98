"""Cut a large file into parts that a size limit lets through, and join them again.

    python benchmarks/cuda/wheel_parts.py split FILE FOLDER [--megabytes 60]
    python benchmarks/cuda/wheel_parts.py join FOLDER TARGET_FOLDER

`split` writes ``NAME.000``, ``NAME.001``, ... and ``NAME.sha256``; `join` writes NAME, after its SHA-256 was right.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path


def split(file: Path, folder: Path, megabytes: int) -> list[Path]:
    """The parts, in order. `megabytes` of 2**20 bytes each but the last."""
    folder.mkdir(parents=True, exist_ok=True)
    digest, parts = hashlib.sha256(), []
    with file.open("rb") as source:
        while data := source.read(megabytes * 2**20):
            digest.update(data)
            part = folder / f"{file.name}.{len(parts):03d}"
            part.write_bytes(data)
            parts.append(part)
    (folder / f"{file.name}.sha256").write_text(f"{digest.hexdigest()}  {file.name}\n")
    return parts


def join(folder: Path, target: Path) -> Path:
    """The joined file in the folder `target`.

    Raises:
        ValueError: not exactly one ``.sha256`` file, or the parts do not give that sum; no file is left behind then.
    """
    sums = list(folder.glob("*.sha256"))
    if len(sums) != 1:
        raise ValueError(f"{folder} holds {len(sums)} .sha256 files, expected one")
    expected, name = sums[0].read_text().split()
    digest, unfinished = hashlib.sha256(), target / f".{name}.part"
    try:
        with unfinished.open("wb") as output:
            for part in sorted(folder.glob(f"{name}.[0-9][0-9][0-9]")):
                data = part.read_bytes()
                digest.update(data)
                output.write(data)
        if digest.hexdigest() != expected:
            raise ValueError(
                f"the parts of {name} in {folder} have the SHA-256 {digest.hexdigest()}, expected {expected}"
            )
        return unfinished.replace(target / name)
    finally:
        unfinished.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cut = commands.add_parser("split")
    cut.add_argument("file", type=Path)
    cut.add_argument("folder", type=Path)
    cut.add_argument("--megabytes", type=int, default=60)
    glue = commands.add_parser("join")
    glue.add_argument("folder", type=Path)
    glue.add_argument("target", type=Path)
    options = parser.parse_args(argv)
    try:
        if options.command == "split":
            print(f"{len(split(options.file, options.folder, options.megabytes))} parts in {options.folder}")
        else:
            print(join(options.folder, options.target))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
