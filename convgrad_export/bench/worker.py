"""The process that measures: `python -m convgrad_export.bench.worker [ort-training-python]`.

The parent draws the progress bar and writes files while this process waits, so that nothing but the contenders runs
during a measurement. Each line of standard input is a request; each is answered by one line. When standard input ends
the process does, in the midst of a measurement too: its parent may have been killed.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from ..errors import ConvGradError
from ..geometry import ConvGeometry
from .measure import measure
from .memory import measure_memory
from .peer import OrtTraining


def answer(request: dict[str, Any], peer: OrtTraining | None) -> dict[str, Any]:
    """What one request asks for: ``kind`` is ``"time"`` or ``"memory"``."""
    geometry = ConvGeometry.from_dict(request["geometry"])
    operation, threads = request["operation"], request["threads"]
    if request["kind"] == "memory":
        return {"memory": measure_memory(operation, geometry, threads)}
    return measure(
        operation,
        geometry,
        threads,
        rounds=request["rounds"],
        seconds=request["seconds"],
        peer=peer,
        foreign_cores=request["foreign_cores"],
    )


class Requests:
    """The lines of a stream, read by a thread that waits during a measurement and takes no time from it."""

    def __init__(self, stream: TextIO, peer: OrtTraining | None) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._busy = threading.Lock()
        self._peer = peer
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def __iter__(self) -> Iterator[str]:
        while (line := self._lines.get()) is not None:
            with self._busy:
                yield line

    def _read(self, stream: TextIO) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)
        if not self._busy.acquire(timeout=1):  # nobody is left to take the answer
            if self._peer is not None:
                self._peer.close()
            os._exit(1)


def main(arguments: list[str]) -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # kernels may print to standard output
    os.dup2(2, 1)
    peer = OrtTraining(arguments[0]) if arguments else None
    print(json.dumps({"ort_training": peer.version if peer else None}), file=answers)
    try:
        for line in Requests(sys.stdin, peer):
            try:
                result = answer(json.loads(line), peer)
            except Exception as error:  # a layer too large for the memory, say: it must not end the others'
                result = {
                    "error": str(error) if isinstance(error, ConvGradError) else f"{type(error).__name__}: {error}"
                }
            print(json.dumps(result), file=answers)
    finally:
        if peer is not None:
            peer.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConvGradError as error:
        sys.exit(f"convgrad bench: {error}")
