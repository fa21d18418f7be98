"""The execution providers that the package knows by name, as onnxruntime calls them and for short."""

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
SHORT_NAMES = {"cpu": CPU, "cuda": CUDA}
