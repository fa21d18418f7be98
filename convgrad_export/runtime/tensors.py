"""Between numpy arrays, torch tensors and onnxruntime: one pointer, one shape, one element type, and no copy.

torch is used only when the caller hands over a torch tensor, so it is never imported here.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArgumentTypeError, DeviceError, DTypeError

# onnxruntime's names in session metadata, TensorProto code, and numpy's name for the same type.
_TYPES = {
    "tensor(float)": (1, "float32"),
    "tensor(double)": (11, "float64"),
    "tensor(float16)": (10, "float16"),
    "tensor(bfloat16)": (16, "bfloat16"),
    "tensor(int64)": (7, "int64"),
    "tensor(int32)": (6, "int32"),
    "tensor(int16)": (5, "int16"),
    "tensor(int8)": (3, "int8"),
    "tensor(uint64)": (13, "uint64"),
    "tensor(uint32)": (12, "uint32"),
    "tensor(uint16)": (4, "uint16"),
    "tensor(uint8)": (2, "uint8"),
    "tensor(bool)": (9, "bool"),
}

CODES = {name: code for code, name in _TYPES.values()}  # by numpy's name of the type


class TensorView(NamedTuple):
    """A contiguous block of memory that onnxruntime may read; `owner` keeps it alive."""

    owner: Any
    shape: tuple[int, ...]
    dtype: str
    device_type: str
    device_index: int

    @property
    def pointer(self) -> int:
        return int(self.owner.data_ptr() if is_torch(self.owner) else self.owner.ctypes.data)

    @property
    def array(self) -> Any:
        """The same memory, which is the CPU's, as a numpy array."""
        return self.owner.numpy() if is_torch(self.owner) else self.owner


def is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_transformed(value: Any) -> bool:
    """Whether a torch tensor stands for another one inside torch.vmap, torch.func.grad and the like."""
    return bool(sys.modules["torch"]._C._functorch.is_functorch_wrapped_tensor(value))


def in_functionalize() -> bool:
    """Whether `torch.func.functionalize` is among the active transforms: it has no rule for autograd Functions."""
    functorch = sys.modules["torch"]._C._functorch
    return any(
        interpreter.key() == functorch.TransformType.Functionalize
        for interpreter in functorch.get_interpreter_stack() or ()
    )


def is_readable(value: Any) -> bool:
    """Whether a torch tensor's elements lie in its memory, and no tracer records what is done with them.

    The tensors of torch.export and FakeTensorMode are subclasses without data, those of torch's older vmap (behind
    `is_grads_batched` and `vectorize=True`) stand for several; make_fx and torch.jit.trace follow real ones.
    """
    torch = sys.modules["torch"]
    return (
        type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and not torch._is_functional_tensor(value)
        and not torch._C._functorch.is_legacy_batchedtensor(value)
        and torch._C._get_tracing_state() is None
        and not any(map(torch._C._get_dispatch_mode, _tracers()))
    )


@functools.cache
def _tracers() -> tuple[Any, ...]:
    return tuple(sys.modules["torch"]._C._TorchDispatchModeKey.__members__.values())


def check_dense(value: Any, name: str) -> None:
    """Refuse arrays and tensors that are more than their elements in memory.

    Raises:
        ArgumentTypeError: a masked array; a nested, sparse or quantized tensor.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise ArgumentTypeError(f"{name} is a masked array, expected a plain one: call .filled() first")
    if not is_torch(value):
        return
    if value.is_nested:
        raise ArgumentTypeError(f"{name} is a nested tensor, expected a dense one: call .to_padded_tensor() first")
    if value.is_quantized:
        raise ArgumentTypeError(f"{name} is a quantized tensor, expected a plain one: call .dequantize() first")
    if value.layout != sys.modules["torch"].strided:
        raise ArgumentTypeError(f"{name} is a {value.layout} tensor, expected a dense one: call .to_dense() first")


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic)


def type_name(value: Any) -> str:
    """numpy's name of the element type of an array or tensor."""
    return str(value.dtype).removeprefix("torch.") if is_torch(value) else _numpy_name(value.dtype)


@functools.cache  # numpy puts the name together at each call
def _numpy_name(dtype: np.dtype) -> str:
    return dtype.name


def view(value: Any, name: str) -> TensorView:
    """`value` as a TensorView; copied only if it is not contiguous.

    Raises:
        ArgumentTypeError: neither an array nor a tensor, one that `check_dense` refuses, or one that a transform of
            torch.func or a tracer put in a real one's place. DeviceError: not on the CPU or on CUDA.
    """
    check_dense(value, name)
    if is_torch(value):
        if is_transformed(value):
            raise ArgumentTypeError(
                f"{name} is a tensor inside a transform of torch.func (vmap, grad, jvp), expected a plain one: a "
                "session has no derivative; convgrad_export's conv*d_input, conv*d_weight and convolution_backward have"
            )
        if not is_readable(value):
            raise ArgumentTypeError(
                f"{name} is a tensor of a tracer (torch.export, make_fx, FakeTensorMode), or of a subclass that wraps "
                "others, expected a plain one: a session is no operator of PyTorch; convgrad_export's conv*d_input, "
                "conv*d_weight and convolution_backward can be traced"
            )
        if value.device.type not in ("cpu", "cuda"):
            raise DeviceError(f"{name} is on {value.device}, expected cpu or cuda: onnxruntime reads no other memory")
        # A tensor may be the negative of what its memory holds, to be computed when it is read, or zero without memory.
        dense = value.detach().resolve_neg().contiguous()
        if dense._is_zerotensor():
            dense = dense.clone()
        device = dense.device
        return TensorView(dense, tuple(dense.shape), type_name(dense), device.type, device.index or 0)
    if not is_array(value):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}, expected a numpy array or a torch tensor")
    # Contiguous and in this machine's byte order: onnxruntime sees the memory, not numpy's description of it.
    array = np.ascontiguousarray(value, value.dtype.newbyteorder("=")).reshape(value.shape)
    return TensorView(array, array.shape, _numpy_name(array.dtype), "cpu", 0)


def onnx_type(ort_type: str) -> tuple[int, str]:
    """TensorProto code and numpy name for a type string of onnxruntime's session metadata.

    Raises:
        DTypeError: a sequence, map, string, or another type that is no dense numeric tensor.
    """
    if ort_type not in _TYPES:
        raise DTypeError(f"the model has a {ort_type}, expected one of {', '.join(_TYPES)}")
    return _TYPES[ort_type]


def to_torch(value: Any) -> Any:
    """A torch tensor over the memory of an OrtValue."""
    return sys.modules["torch"].from_dlpack(value)


def to_numpy(value: Any) -> np.ndarray:
    """A numpy array with a copy of an OrtValue that lies on the CPU."""
    if value.element_type() != _TYPES["tensor(bfloat16)"][0]:
        return np.asarray(value.numpy())
    import ml_dtypes  # numpy has no bfloat16, so onnxruntime hands out none

    shape = tuple(value.shape())
    array = np.empty(shape, ml_dtypes.bfloat16)
    ctypes.memmove(array.ctypes.data, value.data_ptr(), 2 * math.prod(shape))
    return array


def wait_for_torch(device_index: int) -> None:
    """Finish what torch has queued on the current CUDA stream: onnxruntime reads the tensors on a stream of its own."""
    sys.modules["torch"].cuda.current_stream(device_index).synchronize()
