"""An ONNX forward model as a torch module, for the operators that convolutional classifiers and U-Nets are made of.

onnxruntime-training took forward models in this form. Weights, biases and scales become parameters, the statistics of
BatchNormalization buffers; every other initializer is a constant.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelFileError, UnsupportedOperatorError
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
    return torch.cat(inputs, a["axis"])


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


def _constant(node: str, a: Attributes) -> np.ndarray:
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
    return x.squeeze(chosen) if chosen else x.squeeze()


def _unsqueeze(node: str, a: Attributes, x: Any, axes: Tensor | None = None) -> Any:
    if isinstance(x, list):
        return x  # a size that becomes a list of one
    chosen = _integers(axes) if axes is not None else list(a["axes"])
    rank = x.dim() + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


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
    "HardSwish": _plain(functional.hardswish),
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Clip": _clip,
    "Add": _plain(torch.add),
    "Sub": _plain(torch.sub),
    "Mul": _plain(torch.mul),
    "Div": _plain(torch.div),
    "Pow": _plain(torch.pow),
    "Sqrt": _plain(torch.sqrt),
    "Neg": _plain(torch.neg),
    "Exp": _plain(torch.exp),
    "Identity": _plain(lambda x: x),
    "Concat": _concat,
    "Shape": _shape,
    "Gather": _gather,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": lambda node, a, x: x.permute(a["perm"]) if "perm" in a else x.permute(*reversed(range(x.dim()))),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "ReduceMean": _reduce_mean,
}
_STATISTICS = ("BatchNormalization",)
_STANDARD = ("", "ai.onnx")
_OLDEST_OPSET = 7  # before, operators broadcast by attributes
_TAKES_SIZES = ("Reshape", "Squeeze", "Unsqueeze", "ReduceMean", "Gather", "Concat", "Clip")


def _weights(node: Any) -> list[str]:
    """Inputs of a node that training changes."""
    if node.op_type in ("Conv", "ConvTranspose", "PRelu"):
        return list(node.input[1:])
    if node.op_type == "BatchNormalization":
        return list(node.input[1:3])
    return list(node.input) if node.op_type in ("Gemm", "MatMul", "Add", "Mul") else []


class OnnxModule(nn.Module):
    """Runs an ONNX graph with torch operators.

    Args:
        model: a model, or the path of one; external data has to lie in its folder.

    Raises:
        ModelFileError: unreadable. UnsupportedOperatorError: operators outside `OPERATORS`, all of them.
    """

    def __init__(self, model: onnx.ModelProto | str | os.PathLike[str]) -> None:
        super().__init__()
        if not isinstance(model, onnx.ModelProto):
            from ..runtime.model_source import model_source

            path = Path(model)
            model_source(path)  # external data outside the folder is refused there
            try:
                model = onnx.load(path)
            except Exception as error:  # protobuf has errors of several modules
                raise ModelFileError(f"{path} cannot be read as an ONNX model: {error}") from error
        known = {*OPERATORS, "BatchNormalization", "Dropout", "Constant"}
        missing = {
            f"{n.domain}{'::' if n.domain else ''}{n.op_type} (node {n.name or n.output[0]})"
            for n in model.graph.node
            if n.op_type not in known or n.domain not in _STANDARD
        }
        if missing:
            raise UnsupportedOperatorError(
                f"the ONNX model has operators that cannot be trained from this form: {', '.join(sorted(missing))}. "
                f"Known: {', '.join(sorted(known))}. Give the torch module itself instead"
            )
        self._opset = max((o.version for o in model.opset_import if o.domain in _STANDARD), default=0)
        if self._opset < _OLDEST_OPSET:
            raise UnsupportedOperatorError(
                f"the ONNX model is of opset {self._opset}, expected {_OLDEST_OPSET} or later: export it again"
            )
        _check_values(model.graph)
        self._graph = model.graph
        self._where: dict[str, str] = {}
        # Constants stay outside of the module: what is a buffer would be traced, and sizes have to be numbers.
        self._constants: dict[str, np.ndarray] = {}
        statistics = {n for node in model.graph.node if node.op_type in _STATISTICS for n in node.input[3:5]}
        weights = {n for node in model.graph.node for n in _weights(node)}
        for initializer in model.graph.initializer:
            array = np.array(onnx.numpy_helper.to_array(initializer))
            name = initializer.name
            if array.ndim and array.dtype.kind == "f" and name in weights | statistics:
                self._register(name, torch.from_numpy(array), name not in statistics)
            else:
                self._constants[name] = array
        held = {*self._where, *self._constants}
        self._inputs = [value for value in model.graph.input if value.name not in held]
        self._outputs = [value.name for value in model.graph.output]
        # forward(*inputs) named after the graph's inputs: the exported step's inputs get these names
        self.forward = _named_forward(self, [value.name for value in self._inputs])

    def _register(self, name: str, value: Tensor, trainable: bool) -> None:
        """Under its own name, dots included: submodules hold the parts."""
        *parents, leaf = name.split(".")
        place: nn.Module = self
        for part in parents:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        leaf = leaf if not hasattr(place, leaf) else f"{leaf}_"
        if trainable:
            place.register_parameter(leaf, nn.Parameter(value))
        else:
            place.register_buffer(leaf, value)
        self._where[name] = ".".join([*parents, leaf])

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Random inputs of the declared shapes; 2 for a symbolic size.

        Raises:
            ModelFileError: an input without a shape.
        """
        result = []
        for value in self._inputs:
            kind = value.type.tensor_type
            if not kind.HasField("shape"):
                raise ModelFileError(f"input {value.name} of the ONNX model has no shape: give args")
            shape = [dim.dim_value or 2 for dim in kind.shape.dim]
            dtype = torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))).dtype
            result.append(torch.randn(shape).to(dtype))
        return tuple(result)

    def run(self, *inputs: Tensor) -> dict[str, Any]:
        """The graph's outputs by name."""
        values: dict[str, Any] = {"": None, **self._constants}
        values.update(zip((value.name for value in self._inputs), inputs, strict=True))
        for name, where in self._where.items():
            place, _, leaf = where.rpartition(".")
            values[name] = getattr(self.get_submodule(place), leaf)
        for node in self._graph.node:
            attributes = {"opset": self._opset} | {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            arguments = [values[name] for name in node.input]
            values[node.output[0]] = self._node(node, attributes, arguments)
        return {name: values[name] for name in self._outputs}

    def _node(self, node: Any, a: Attributes, inputs: list[Any]) -> Any:
        where = f"{node.op_type} {node.name}".strip()
        if node.op_type == "Constant":
            return _constant(where, a)
        if node.op_type == "Dropout":
            ratio = float(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else float(a.get("ratio", 0.5))
            return functional.dropout(inputs[0], ratio, self.training)
        if node.op_type == "BatchNormalization":
            x, scale, bias, mean, variance = inputs[:5]
            momentum = 1.0 - a.get("momentum", 0.9)  # ONNX weighs the old value, PyTorch the new one
            return functional.batch_norm(
                x, mean, variance, scale, bias, self.training, momentum, a.get("epsilon", 1e-5)
            )
        if node.op_type not in _TAKES_SIZES:
            inputs = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in inputs]
        return OPERATORS[node.op_type](where, a, *inputs)


def _check_values(graph: Any) -> None:
    """Refuse a graph that reads more of a node than its first output (a mask, new statistics).

    Raises:
        UnsupportedOperatorError: with the values' names.
    """
    made = {"", *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    made |= {node.output[0] for node in graph.node}
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    if read - made:
        raise UnsupportedOperatorError(
            f"the ONNX model reads {', '.join(sorted(read - made))}, which is no node's first output: it cannot be "
            "trained from this form. Give the torch module itself instead"
        )


def _named_forward(module: OnnxModule, names: list[str]) -> Callable[..., Any]:
    """`module.run` with the signature (names...), which the capture reads."""
    import inspect

    def forward(*inputs: Tensor) -> Any:
        return module.run(*inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    valid = [name if name.isidentifier() else f"input_{index}" for index, name in enumerate(names)]
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in valid])  # type: ignore[attr-defined]
    return forward
