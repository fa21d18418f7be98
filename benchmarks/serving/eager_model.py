"""Triton's Python backend running Grad-CAM in PyTorch eager: the other side of the load test."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as triton


class TritonPythonModel:
    """Merges what the server hands over, as the handler for onnxruntime does."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        torch.set_num_threads(int(parameters["intra_op_thread_count"]["string_value"]))
        sys.path.insert(0, parameters["root"]["string_value"])
        from benchmarks.serving.network import grad_cam

        self.module = grad_cam(parameters["layer"]["string_value"])
        self.module(torch.zeros(1, 3, 96, 96))

    def execute(self, requests: list[Any]) -> list[Any]:
        arrays = [triton.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        merged = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        result = self.module(torch.from_numpy(merged)).numpy()
        pieces = np.split(result, np.cumsum([len(array) for array in arrays])[:-1])
        return [triton.InferenceResponse([triton.Tensor("output", piece)]) for piece in pieces]
