"""The CUDA stream of a session, ordered after and before torch's current stream on the device.

The session gets a stream of its own, made by torch: onnxruntime takes stream 0, torch's default, for "no stream given".
"""

from __future__ import annotations

import sys
from typing import Any


class TorchStream:
    """A stream made by torch for one session on one device. `pointer` goes into the provider's options."""

    def __init__(self, device_index: int) -> None:
        torch = sys.modules["torch"]
        self.device_index = device_index
        self._cuda = torch.cuda
        self.stream: Any = torch.cuda.Stream(device_index)

    @property
    def pointer(self) -> int:
        return int(self.stream.cuda_stream)

    def before_run(self) -> None:
        """What torch has queued on its current stream comes before what the session queues from now on."""
        self.stream.wait_stream(self._cuda.current_stream(self.device_index))

    def after_run(self) -> None:
        """What the session has queued comes before what torch queues on its current stream from now on."""
        self._cuda.current_stream(self.device_index).wait_stream(self.stream)

    def hold(self, tensor: Any) -> None:
        """Keep torch from giving the tensor's memory away before the session's queued work is done with it."""
        tensor.record_stream(self.stream)


def torch_stream(device_index: int) -> TorchStream | None:
    """A stream for a session on this device; None where torch is not loaded or sees no such device."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or device_index >= torch.cuda.device_count():
        return None
    return TorchStream(device_index)
