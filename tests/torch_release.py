"""Tests of what PyTorch itself does only from a release on."""

from __future__ import annotations

import pytest
import torch


def needs_torch(release: str, before: str) -> pytest.MarkDecorator:
    """Skip with an older PyTorch, of which `before` says what it does instead."""
    return pytest.mark.skipif(torch.__version__ < release, reason=f"PyTorch {torch.__version__} {before}")


no_projections = needs_torch("2.13", "cannot trace an LSTM with proj_size: its decomposition miscounts the weights")
