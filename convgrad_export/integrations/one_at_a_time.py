"""What the process has one of: PyTorch's tracer and its switch of oneDNN, Python's warnings, onnxscript's evaluator.

An export changes them for a while: another thread's would be refused, or run with the other's switch, or find its
operators in the other's graph. So threads take turns, trace by trace, translation by translation and run by run.
Nothing in there is compiled by `torch.compile`, whose own lock could be held by a thread that waits for this one.
"""

from __future__ import annotations

import threading

ONE_AT_A_TIME = threading.RLock()
