"""A tuning cache of each test's own, empty at first: none of these tests reads or writes the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from convgrad_export.selection import cache, tuned


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache would be written; warnings that were given once are given again."""
    path = tmp_path / "tuning.json"
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(path))
    monkeypatch.setattr(tuned, "_said", set())
    return path
