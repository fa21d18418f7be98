"""Running gradient models on stock onnxruntime, with numpy arrays or torch tensors."""
