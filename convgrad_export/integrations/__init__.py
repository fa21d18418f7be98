"""Where gradients meet PyTorch: FX, torch.compile, torch.onnx and TorchScript."""
