"""Gradients of convolutional networks as standard ONNX graphs."""
