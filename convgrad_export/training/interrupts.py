"""Holding back Ctrl-C while a step writes state, so that it ends between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interrupts_after() -> Iterator[None]:
    """Call the handlers of signals that arrive within the block, which may raise, once it is left.

    Python runs handlers in the main thread, between two of its own instructions: one that raises `KeyboardInterrupt`
    would do so after a session's run, before what has to follow. Elsewhere than in the main thread none are run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    own: dict[int, Any] = {}
    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):  # not the system's, which ends the process, nor another library's
                own[number] = handler
                signal.signal(number, lambda *arguments: arrived.append(arguments))
        yield
    finally:
        for replaced, handler in own.items():
            signal.signal(replaced, handler)
    for sent, frame in arrived:
        own[sent](sent, frame)
