"""What surrounds the call of an export: autocast is for the forward and the loss, inference mode is for none of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

Autocast = Callable[[], "AbstractContextManager[object]"]


@contextlib.contextmanager
def apart() -> Iterator[Autocast]:
    """While active, the caller's `torch.autocast` and `torch.inference_mode` are off.

    Gradients and updates are computed outside of autocast, as PyTorch asks for: each backward operator has the type of
    its forward one already.

    Yields:
        the caller's autocast, to be entered for the forward and the loss.
    """
    autocast: Autocast = contextlib.nullcontext
    if torch.is_autocast_enabled("cpu"):
        dtype, cached = torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        autocast = lambda: torch.autocast("cpu", dtype=dtype, cache_enabled=cached)  # noqa: E731
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        yield autocast
