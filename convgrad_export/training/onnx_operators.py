"""The ONNX operators that `OnnxModule` runs, as torch functions of a node's name, its attributes and its inputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UnsupportedOperatorError
from ..torch_convolution import last_axis_first

Attributes = Mapping[str, Any]
_FUNCTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _pads(a: Attributes, rank: int, node: str) -> tuple[list[int], list[int]]:
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UnsupportedOperatorError(f"{node} has auto_pad={a['auto_pad'].decode()}: export it with explicit pads")
    pads = list(a.get("pads", [0] * 2 * rank))
    return pads[:rank], pads[rank:]


def _padded(x: Tensor, begin: list[int], end: list[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """`x` padded where the two sides differ, and what is left for the operator itself."""
    if begin == end:
        return x, begin
    amounts = last_axis_first(zip(begin, end, strict=True))
    return functional.pad(x, amounts, value=value), [0] * len(begin)


def _conv(node: str, a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = w.dim() - 2
    x, padding = _padded(x, *_pads(a, rank, node))
    ones = [1] * rank
    return _FUNCTIONS[rank](x, w, b, a.get("strides", ones), padding, a.get("dilations", ones), a.get("group", 1))


def _conv_transpose(node: str, a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = w.dim() - 2
    begin, end = _pads(a, rank, node)
    if begin != end or "output_shape" in a:
        raise UnsupportedOperatorError(f"{node}: ConvTranspose with uneven pads or output_shape is not supported")
    ones = [1] * rank
    extra = a.get("output_padding", [0] * rank)
    strides, dilations = a.get("strides", ones), a.get("dilations", ones)
    return _TRANSPOSED[rank](x, w, b, strides, begin, extra, a.get("group", 1), dilations)


def _max_pool(node: str, a: Attributes, x: Tensor) -> Tensor:
    rank = x.dim() - 2
    kernel = a["kernel_shape"]
    x, padding = _padded(x, *_pads(a, rank, node), value=-torch.inf)
    ones = [1] * rank
    return _MAX[rank](
        x, kernel, a.get("strides", ones), padding, a.get("dilations", ones), ceil_mode=bool(a.get("ceil_mode", 0))
    )


def _average_pool(node: str, a: Attributes, x: Tensor) -> Tensor:
    rank = x.dim() - 2
    begin, end = _pads(a, rank, node)
    if begin != end or any(d != 1 for d in a.get("dilations", ())):
        raise UnsupportedOperatorError(f"{node}: AveragePool with uneven pads or dilations is not supported")
    return _AVERAGE[rank](
        x,
        a["kernel_shape"],
        a.get("strides", [1] * rank),
        begin,
        ceil_mode=bool(a.get("ceil_mode", 0)),
        count_include_pad=bool(a.get("count_include_pad", 0)),
    )


def _gemm(node: str, a: Attributes, x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
    x = x.t() if a.get("transA", 0) else x
    w = w.t() if a.get("transB", 0) else w
    y = torch.matmul(x, w)
    y = y * a["alpha"] if a.get("alpha", 1.0) != 1.0 else y
    if c is None:
        return y
    return y + (c * a["beta"] if a.get("beta", 1.0) != 1.0 else c)


def _integers(value: Any) -> list[int]:
    return [int(v) for v in np.asarray(value).reshape(-1)]


def _reshape(node: str, a: Attributes, x: Any, shape: Any) -> Any:
    if isinstance(x, list):
        return x  # sizes are a list already
    wanted = shape if isinstance(shape, list) else _integers(shape)
    keep = not a.get("allowzero", 0)
    sizes = [x.shape[axis] if keep and isinstance(n, int) and n == 0 else n for axis, n in enumerate(wanted)]
    return x.reshape(sizes)


def _shape(node: str, a: Attributes, x: Tensor) -> list[Any]:
    """Sizes stay a list, so that symbolic ones are not turned into numbers."""
    return list(x.shape)[a.get("start", 0) : a.get("end", None)]


def _concat(node: str, a: Attributes, *inputs: Any) -> Any:
    if not any(isinstance(value, Tensor) for value in inputs):
        return [size for value in inputs for size in (value if isinstance(value, list) else _integers(value))]
    return torch.cat([torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in inputs], a["axis"])


def _gather(node: str, a: Attributes, x: Any, index: Tensor) -> Any:
    if isinstance(x, list):
        return [x[i] for i in _integers(index)]
    if isinstance(index, np.ndarray) and index.ndim == 0:
        return x.select(a.get("axis", 0), int(index))
    raise UnsupportedOperatorError(f"{node}: Gather with several indices is not supported")


def _flatten(node: str, a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.flatten(axis) if axis == 1 else x.reshape([math.prod(x.shape[:axis]), -1])


def _reduce_mean(node: str, a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _integers(axes) if axes is not None else list(a.get("axes", ()))
    if not chosen and a.get("noop_with_empty_axes", 0):
        return x
    return x.mean(chosen, keepdim=bool(a.get("keepdims", 1)))


def _clip(node: str, a: Attributes, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    low, high = a.get("min", low), a.get("max", high)  # attributes below opset 11
    return torch.clamp(x, None if low is None else float(low), None if high is None else float(high))


def _softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def normalized(node: str, a: Attributes, x: Tensor) -> Tensor:
        if a["opset"] >= 13:
            return function(x, a.get("axis", -1))
        axis = a.get("axis", 1) % x.dim()  # over this axis and all that follow
        return function(x.flatten(axis), -1).reshape(x.shape)

    return normalized


def constant(node: str, a: Attributes) -> np.ndarray:
    if "value" in a:
        return np.array(onnx.numpy_helper.to_array(a["value"]))
    for key, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        for name in (key, f"{key}s"):
            if name in a:
                return np.array(a[name], dtype)
    raise UnsupportedOperatorError(f"{node} holds no dense numbers")


def _squeeze(node: str, a: Attributes, x: Any, axes: Tensor | None = None) -> Any:
    if isinstance(x, list):
        return x  # a list of one size stands for the size
    chosen = _integers(axes) if axes is not None else list(a.get("axes", ()))
    if isinstance(x, np.ndarray):
        return np.squeeze(x, tuple(chosen) or None)
    return x.squeeze(chosen) if chosen else x.squeeze()


def _unsqueeze(node: str, a: Attributes, x: Any, axes: Tensor | None = None) -> Any:
    if isinstance(x, list):
        return x  # a size that becomes a list of one
    chosen = _integers(axes) if axes is not None else list(a["axes"])
    if isinstance(x, np.ndarray):  # a constant, or one of the numbers that torch.onnx makes a view's sizes of
        return np.expand_dims(x, tuple(chosen))
    rank = x.dim() + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _slice(
    node: str, a: Attributes, x: Any, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> Any:
    first, last = (_sizes(a[name] if given is None else given) for name, given in (("starts", starts), ("ends", ends)))
    axes = a.get("axes") if axes is None else axes  # attributes below opset 10
    chosen = list(range(len(first))) if axes is None else _integers(axes)
    step = [1] * len(first) if steps is None else _integers(steps)
    if any(n < 1 for n in step):
        raise UnsupportedOperatorError(f"{node}: Slice from the end to the beginning is not supported")
    parts = [slice(None)] * (1 if isinstance(x, list) else x.ndim)
    for axis, *limits in zip(chosen, first, last, step, strict=True):
        parts[axis] = slice(*limits)
    return x[parts[0]] if isinstance(x, list) else x[tuple(parts)]


def _split(node: str, a: Attributes, x: Tensor, sizes: Any = None) -> list[Tensor]:
    axis = a.get("axis", 0)
    given = a.get("split") if sizes is None else sizes  # an attribute below opset 13
    if given is not None:
        return list(x.split(_sizes(given), axis))
    count = a.get("num_outputs", a["outputs"])
    part = (x.shape[axis] + count - 1) // count  # the last one may be smaller
    return list(x.split([*[part] * (count - 1), x.shape[axis] - part * (count - 1)], axis))


def _cast(node: str, a: Attributes, x: Any) -> Any:
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(a["to"]))
    if isinstance(x, list):  # sizes: symbolic ones stay what they are
        return [torch.sym_float(n) if dtype.kind == "f" else n for n in x]
    return x.astype(dtype) if isinstance(x, np.ndarray) else x.to(torch.from_numpy(np.zeros(0, dtype)).dtype)


def _arithmetic(function: Callable[[Any, Any], Any], of_numbers: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Of tensors, or of sizes, which stay lists of numbers."""

    def combined(node: str, a: Attributes, x: Any, y: Any) -> Any:
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            if not isinstance(x, list) and not isinstance(y, list):
                return np.asarray(of_numbers(x, y))
            left, right = _sizes(x), _sizes(y)
            count = max(len(left), len(right))
            left, right = (side * count if len(side) == 1 else side for side in (left, right))
            return [of_numbers(m, n) for m, n in zip(left, right, strict=True)]
        x, y = (_operand(node, value) for value in (x, y))
        return function(x, y)

    return combined


def _operand(node: str, value: Any) -> Any:
    """What meets a tensor: a tensor, or a size as the number that it is."""
    if isinstance(value, list):
        if len(value) != 1:
            raise UnsupportedOperatorError(f"{node}: a tensor and a list of sizes are not supported together")
        return value[0]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _sizes(value: Any) -> list[Any]:
    """A list of sizes as it is, constants as numbers."""
    return value if isinstance(value, list) else np.asarray(value).reshape(-1).tolist()


def _divided(x: Any, y: Any) -> Any:
    """Of integers the quotient without its remainder, as in ONNX; sizes are not negative."""
    if isinstance(x, np.ndarray) and x.dtype.kind not in "iu":
        return x / y
    return x / y if isinstance(x, (float, torch.SymFloat)) or isinstance(y, (float, torch.SymFloat)) else x // y


def _quotient(x: Any, y: Any) -> Tensor:
    whole = not any(v.is_floating_point() if isinstance(v, Tensor) else isinstance(v, float) for v in (x, y))
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda node, a, *inputs: function(*inputs)


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _plain(torch.matmul),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda node, a, x: x.mean(list(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda node, a, x: x.amax(list(range(2, x.dim())), keepdim=True),
    "Relu": _plain(torch.relu),
    "LeakyRelu": lambda node, a, x: functional.leaky_relu(x, a.get("alpha", 0.01)),
    "Elu": lambda node, a, x: functional.elu(x, a.get("alpha", 1.0)),
    "PRelu": lambda node, a, x, slope: torch.where(x < 0, x * slope, x),
    "Sigmoid": _plain(torch.sigmoid),
    "Tanh": _plain(torch.tanh),
    "Softplus": _plain(functional.softplus),
    "HardSigmoid": lambda node, a, x: torch.clamp(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0.0, 1.0),
    "HardSwish": _plain(functional.hardswish),
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Clip": _clip,
    "Add": _arithmetic(operator.add, operator.add),
    "Sub": _arithmetic(operator.sub, operator.sub),
    "Mul": _arithmetic(operator.mul, operator.mul),
    "Div": _arithmetic(_quotient, _divided),
    "Pow": _plain(torch.pow),
    "Sqrt": _plain(torch.sqrt),
    "Neg": _plain(torch.neg),
    "Exp": _plain(torch.exp),
    "Identity": _plain(lambda x: x),
    "Cast": _cast,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Shape": _shape,
    "Gather": _gather,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": lambda node, a, x: x.permute(a["perm"]) if "perm" in a else x.permute(*reversed(range(x.dim()))),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "ReduceMean": _reduce_mean,
}

# These take sizes and axes as Python numbers, and constants as arrays.
TAKES_SIZES = (
    *("Reshape", "Squeeze", "Unsqueeze", "ReduceMean", "Gather", "Concat", "Clip", "Slice", "Split", "Cast"),
    *("Add", "Sub", "Mul", "Div"),
)
