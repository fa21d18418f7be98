"""Modules under torch.compile, or with such parts: traced and compared as they are written."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """While active, what torch.compile made runs the Python code it was made from.

    A compiled function refuses to be traced, and would be compiled anew for verification's types and sizes.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:  # nothing was compiled; importing it takes a second
        yield
        return
    with (
        warnings.catch_warnings(),
        dynamo.config.patch(error_on_nested_fx_trace=False),
        torch.compiler.set_stance("force_eager"),
    ):
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
        yield
