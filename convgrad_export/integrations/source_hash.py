"""A digest of the package's own sources: compiled graphs are cached under it."""

from __future__ import annotations

import functools
from pathlib import Path

from ..files import digest

# Everything that decides what a rewritten graph looks like.
_FOLDERS = ("emit", "functions", "integrations", "lowering", "selection")
_FILES = ("arguments.py", "dtypes.py", "geometry.py")


@functools.cache
def source_hash() -> str:
    """Hexadecimal SHA-256 of the sources, by relative path and content; the same on every machine."""
    root = Path(__file__).resolve().parent.parent
    paths = [root / name for name in _FILES]
    for folder in _FOLDERS:
        paths += sorted((root / folder).rglob("*.py"))
    return digest(root, paths)
