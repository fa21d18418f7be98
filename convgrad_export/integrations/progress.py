"""The step at work, shown on the terminal and timed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def steps(progress: bool | None, seconds: dict[str, float]) -> Iterator[Callable[[str], None]]:
    """Times each step, and names it on the terminal while it runs."""
    from rich.console import Console

    console = Console(stderr=True, quiet=not (sys.stderr.isatty() if progress is None else progress))
    current: list[tuple[str, float]] = []

    def finish_current() -> None:
        if current:
            name, start = current.pop()
            seconds[name] = time.perf_counter() - start
            console.print(f"  {name} {seconds[name]:.1f} s", style="dim")

    with console.status("export") as status:

        def step(name: str) -> None:
            finish_current()
            status.update(f"{name} ...")
            current.append((name, time.perf_counter()))

        yield step
        finish_current()
