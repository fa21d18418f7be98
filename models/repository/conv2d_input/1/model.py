"""Triton's Python backend, running the model.onnx beside this file on onnxruntime.

Written by `convgrad serve-repo --backend python`. Needs numpy and onnxruntime in the server's Python, nothing else.
"""

from __future__ import annotations

import ctypes
import json
import os
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton  # the server provides it

# ModelConfig's optimization.graph.level, as Triton's own onnxruntime backend reads it
LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
BFLOAT16 = "tensor(bfloat16)"  # numpy has none: it travels by DLPack


class TritonPythonModel:
    """One instance of the model: a session, fed with one request at a time or with several merged along the batch."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        if args["model_instance_kind"] != "GPU":
            # A backward has the shapes of its forward: buffers kept for them are three times what a run needs.
            options.enable_mem_pattern = False
            options.enable_mem_reuse = False
        parameters = config.get("parameters", {})
        if "intra_op_thread_count" in parameters:
            options.intra_op_num_threads = int(parameters["intra_op_thread_count"]["string_value"])
        level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
        if level in LEVELS:
            options.graph_optimization_level = LEVELS[level]
        providers: list[Any] = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"]}))
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.scalars = {value.name for value in self.session.get_inputs() if value.shape == []}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.by_dlpack = any(
            value.type == BFLOAT16 for value in (*self.session.get_inputs(), *self.session.get_outputs())
        )
        self.max_batch_size = int(config["max_batch_size"])

    def execute(self, requests: list[Any]) -> list[Any]:
        if len(requests) > 1 and self.max_batch_size and not self.by_dlpack:
            try:
                return self._run_merged(requests)
            except Exception:  # one request must not spoil the others: each alone says what is wrong with it
                pass
        return [self._run_alone(request) for request in requests]

    def _run_merged(self, requests: list[Any]) -> list[Any]:
        feeds = {}
        for name in self.inputs:
            arrays = [triton.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            feeds[name] = np.concatenate(arrays)
        rows = [triton.get_input_tensor_by_name(request, self.inputs[0]).shape()[0] for request in requests]
        ends = np.cumsum(rows)[:-1]
        pieces = [np.split(result, ends) for result in self.session.run(self.outputs, feeds)]
        return [self._response(request, [split[index] for split in pieces]) for index, request in enumerate(requests)]

    def _run_alone(self, request: Any) -> Any:
        try:
            if self.by_dlpack:
                return self._run_by_dlpack(request)
            feeds = {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            if not self.max_batch_size:  # with a batch Triton takes the one dimension off itself
                feeds |= {name: feeds[name].reshape(()) for name in self.scalars}
            return self._response(request, self.session.run(self.outputs, feeds))
        except Exception as error:
            # The graph is fixed, so what fails in it are a request's sizes or values; the rest is the server's fault.
            code = triton.TritonError.INTERNAL
            if type(error).__module__.startswith("onnxruntime"):
                code = triton.TritonError.INVALID_ARG
            return triton.InferenceResponse(error=triton.TritonError(f"{type(error).__name__}: {error}", code))

    def _response(self, request: Any, arrays: list[np.ndarray]) -> Any:
        wanted = set(request.requested_output_names())
        named = zip(self.outputs, arrays, strict=True)
        # the protocol has no scalars: they are one element
        kept = [triton.Tensor(name, np.atleast_1d(array)) for name, array in named if name in wanted]
        return triton.InferenceResponse(kept)

    def _run_by_dlpack(self, request: Any) -> Any:
        binding = self.session.io_binding()
        values = []
        for name in self.inputs:
            tensor = triton.get_input_tensor_by_name(request, name)
            value = onnxruntime.OrtValue.from_dlpack(tensor)
            values.append(value)
            if name in self.scalars and not self.max_batch_size:  # one element, as in _run_alone
                binding.bind_input(name, value.device_name(), 0, value.element_type(), [], value.data_ptr())
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        wanted = set(request.requested_output_names())
        named = zip(self.outputs, map(_at_least_1d, binding.get_outputs()), strict=True)
        tensors = [triton.Tensor.from_dlpack(name, value) for name, value in named if name in wanted]
        return triton.InferenceResponse(tensors)


def _at_least_1d(value: Any) -> Any:
    """np.atleast_1d of an OrtValue in the CPU's memory, of types that numpy lacks too."""
    if value.shape():
        return value
    result = onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], value.element_type())
    ctypes.memmove(result.data_ptr(), value.data_ptr(), value.tensor_size_in_bytes())
    return result
