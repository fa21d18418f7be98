"""Whole training steps on onnxruntime beside PyTorch: parity over real networks, speed and memory."""
