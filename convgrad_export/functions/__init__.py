"""The six gradient functions of torch/nn/grad.py as onnxscript functions: ONNX domain ``convgrad``, version 1.

Everything is dynamic: batch, channels, spatial sizes and kernel sizes come from the tensors at run time, so one
function serves every convolution. Bodies hold standard opset-18 operators only.

Inputs and attributes are torch.nn.grad's own:

- ``convNd_input(input_size, weight, grad_output)`` with ``input_size`` INT64 of length N+2;
- ``convNd_weight(input, weight_size, grad_output)`` with ``weight_size`` INT64 of length N+2;
- attributes ``stride``, ``padding``, ``dilation`` (one integer per spatial axis) and ``groups``.

The element type is any that the runtime's ConvTranspose and Conv accept; onnxruntime's CPU provider takes float32, and
float16 through Casts of its own. For float64 and bfloat16 there, use `convgrad_export.build_model`, which chooses a
lowering that the provider can run.
"""

from __future__ import annotations

from onnxscript import OnnxFunction

from ._domain import DOMAIN, OPSET_VERSION
from .input_grad import conv1d_input, conv2d_input, conv3d_input
from .weight_grad import conv1d_weight, conv2d_weight, conv3d_weight

FUNCTIONS: dict[str, OnnxFunction] = {
    "conv1d_input": conv1d_input,
    "conv2d_input": conv2d_input,
    "conv3d_input": conv3d_input,
    "conv1d_weight": conv1d_weight,
    "conv2d_weight": conv2d_weight,
    "conv3d_weight": conv3d_weight,
}

__all__ = ["DOMAIN", "FUNCTIONS", "OPSET_VERSION", *FUNCTIONS]
