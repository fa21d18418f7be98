"""MLServer's side: a model of a repository, run by `GradientSession`.

Imported by MLServer itself, by the name in model-settings.json; its environment needs mlserver and this package
with the extra `onnxruntime`, and no torch.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from mlserver import MLModel
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput, ResponseOutput
from mlserver.utils import get_model_uri

from ..errors import ConvGradError
from ..runtime.session import GradientSession

# The Open Inference Protocol's names. BF16 has no form in JSON, and MLServer's gRPC none either.
_NUMPY = {
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BOOL": "bool",
    **{f"INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
_PROTOCOL = {numpy_name: name for name, numpy_name in _NUMPY.items()}


class OnnxRuntime(MLModel):
    """One model of the repository. Wrong requests are answered with status 400 (INVALID_ARGUMENT in gRPC)."""

    async def load(self) -> bool:
        uri = await get_model_uri(self._settings)
        parameters = self._settings.parameters
        extra: dict[str, Any] = (parameters.extra if parameters else None) or {}
        self._limit = int(extra.get("max_batch_size") or 0)
        self._session = await asyncio.to_thread(GradientSession, uri, threads=extra.get("threads"))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        # onnxruntime releases the interpreter while it runs: a thread keeps the server answering meanwhile.
        return await asyncio.to_thread(self._predict, payload)

    def _predict(self, payload: InferenceRequest) -> InferenceResponse:
        wanted = [output.name for output in payload.outputs or []] or list(self._session.output_names)
        feeds = {value.name: self._array(value) for value in payload.inputs}
        try:
            results = self._session.run(wanted, feeds)
        except ConvGradError as error:  # the graph is fixed: what fails in it are this request's sizes or values
            raise InferenceError(str(error)) from error
        outputs = [_response(name, array) for name, array in zip(wanted, results, strict=True)]
        return InferenceResponse(model_name=self.name, model_version=self.version, id=payload.id, outputs=outputs)

    def _array(self, value: RequestInput) -> np.ndarray:
        kind = _NUMPY.get(str(value.datatype.value if hasattr(value.datatype, "value") else value.datatype))
        if kind is None:
            raise InferenceError(f"input {value.name} is {value.datatype}, expected one of {', '.join(_NUMPY)}")
        if self._limit and value.shape and value.shape[0] > self._limit:
            raise InferenceError(f"input {value.name} has {value.shape[0]} rows, expected at most {self._limit}")
        if any(size < 0 for size in value.shape):
            raise InferenceError(f"input {value.name} has shape {value.shape}, expected no negative size")
        data = value.data.root if hasattr(value.data, "root") else value.data
        try:
            array = np.frombuffer(data, kind) if isinstance(data, bytes) else _converted(data, kind)
            return array.reshape(value.shape)
        except (ValueError, TypeError, OverflowError) as error:
            raise InferenceError(
                f"input {value.name} is no {value.datatype} tensor of shape {value.shape}: {error}"
            ) from error


def _converted(data: Any, kind: str) -> np.ndarray:
    """JSON's numbers in an element type; numpy would drop fractions, and take any number for True."""
    array = np.asarray(data, kind)
    if array.dtype.kind in "iub" and np.any(np.asarray(data) != array):
        raise ValueError("not all values are of that type")
    return array


def _response(name: str, array: np.ndarray) -> ResponseOutput:
    datatype = _PROTOCOL.get(array.dtype.name)
    if datatype is None:
        raise InferenceError(f"output {name} is {array.dtype}, which MLServer's protocol cannot carry")
    return ResponseOutput(name=name, shape=list(array.shape), datatype=datatype, data=array.ravel().tolist())
