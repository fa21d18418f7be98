"""An ONNX forward model as a torch module, for the operators that convolutional classifiers and U-Nets are made of.

onnxruntime-training took forward models in this form. Weights, biases and scales become parameters, and whatever else
the caller wants to train; the statistics of BatchNormalization are buffers, every other initializer is a constant.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ArgumentTypeError, ConvGradError, ModelFileError, UnsupportedOperatorError
from .dropped_parameters import refuse_dropped
from .onnx_operators import OPERATORS, TAKES_SIZES, Attributes, constant

_STATISTICS = ("BatchNormalization",)
_STANDARD = ("", "ai.onnx")
_OLDEST_OPSET = 7  # before, operators broadcast by attributes
_OTHER_FORM = ("Transpose", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_SIZES = (32, 64, 128, 256)  # tried for sizes that a model leaves open: most networks divide an image by up to 32


def _weights(graph: Any) -> set[str]:
    """Values that training changes: weights of nodes, read as they are or in another form (a transposed Linear)."""
    found = {name for node in graph.node for name in _own_weights(node)}
    for node in reversed(graph.node):
        if node.op_type in _OTHER_FORM and node.output[0] in found:
            found.add(node.input[0])
    return found


def _own_weights(node: Any) -> list[str]:
    if node.op_type in ("Conv", "ConvTranspose", "PRelu"):
        return list(node.input[1:])
    if node.op_type == "BatchNormalization":
        return list(node.input[1:3])
    return list(node.input) if node.op_type in ("Gemm", "MatMul", "Add", "Mul") else []


class OnnxModule(nn.Module):
    """Runs an ONNX graph with torch operators.

    Args:
        model: a model, or the path of one; external data has to lie in its folder.
        trainable: names of floating-point initializers that are parameters whatever reads them.

    Raises:
        ModelFileError: unreadable. UnsupportedOperatorError: operators outside `OPERATORS`, all of them.
    """

    def __init__(self, model: onnx.ModelProto | str | os.PathLike[str], trainable: Sequence[str] = ()) -> None:
        super().__init__()
        if not isinstance(model, onnx.ModelProto):
            from ..runtime.model_source import model_source

            path = Path(model)
            source, _ = model_source(path)  # external data outside the folder is refused there
            assert isinstance(source, Path)
            try:
                model = onnx.load(source, format="protobuf")
            except Exception as error:  # protobuf has errors of several modules
                raise ModelFileError(f"{path} cannot be read as an ONNX model: {error}") from error
        known = {*OPERATORS, "BatchNormalization", "Dropout", "Constant"}
        missing: dict[str, list[str]] = {}
        for n in model.graph.node:
            if n.op_type not in known or n.domain not in _STANDARD:
                missing.setdefault(f"{n.domain}{'::' if n.domain else ''}{n.op_type}", []).append(n.name or n.output[0])
        if missing:
            named = (
                f"{kind} (node {nodes[0]}{f' and {len(nodes) - 1} more' if nodes[1:] else ''})"
                for kind, nodes in sorted(missing.items())
            )
            raise UnsupportedOperatorError(
                f"the ONNX model has operators that cannot be trained from this form: {', '.join(named)}. "
                f"Known: {', '.join(sorted(known))}. Give the torch module itself instead"
            )
        self._opset = max((o.version for o in model.opset_import if o.domain in _STANDARD), default=0)
        if self._opset < _OLDEST_OPSET:
            raise UnsupportedOperatorError(
                f"the ONNX model is of opset {self._opset}, expected {_OLDEST_OPSET} or later: export it again"
            )
        _check_values(model.graph)
        _check_statistics(model.graph)
        _check_biases(model.graph, trainable)
        self._graph = model.graph
        self._where: dict[str, str] = {}
        # Constants stay outside of the module: what is a buffer would be traced, and sizes have to be numbers.
        self._constants: dict[str, np.ndarray] = {}
        statistics = {n for node in model.graph.node if node.op_type in _STATISTICS for n in node.input[3:5]}
        weights = _weights(model.graph)
        for initializer in model.graph.initializer:
            array = np.array(onnx.numpy_helper.to_array(initializer))
            name = initializer.name
            changes = array.ndim > 0 and name in weights | statistics
            if array.dtype.kind == "f" and (changes or name in trainable):
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
        for index, part in enumerate(parents):
            while hasattr(place, part) and part not in place._modules:
                part = f"{part}_"  # a method's name, or a weight's
            if part not in place._modules:
                place.add_module(part, nn.Module())
            parents[index], place = part, place.get_submodule(part)
        leaf = leaf if not hasattr(place, leaf) else f"{leaf}_"
        if trainable:
            place.register_parameter(leaf, nn.Parameter(value))
        else:
            place.register_buffer(leaf, value)
        self._where[name] = ".".join([*parents, leaf])

    @property
    def initializers(self) -> set[str]:
        """Names of the graph's weights, statistics and constants."""
        return {*self._where, *self._constants}

    def refuse_dropped(self, trained: Collection[str]) -> None:
        """Refuse a graph without some parameters of the layers that are trained.

        Raises:
            UnsupportedOperatorError: as `dropped_parameters.refuse_dropped`.
        """
        refuse_dropped(self._graph, [name for name, where in self._where.items() if where in trained])

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Random inputs of the declared shapes; for open sizes a batch of 2, and else the first that the graph takes.

        Raises:
            ModelFileError: an input without a shape. ArgumentTypeError: no inputs made up here run.
        """
        for value in self._inputs:
            if not value.type.tensor_type.HasField("shape"):
                raise ModelFileError(f"input {value.name} of the ONNX model has no shape: give args")
        is_open = any(set(open_axes(value)) - {0} for value in self._inputs)
        for size in _SIZES if is_open else _SIZES[:1]:
            inputs = tuple(_example(value, size) for value in self._inputs)
            if (refusal := self.refusal(inputs)) is None:
                return inputs
        raise ArgumentTypeError(f"the ONNX model does not run on inputs made up from its shapes, give args: {refusal}")

    def refusal(self, inputs: Sequence[Tensor]) -> Exception | None:
        """What the graph says against these inputs; its statistics do not move."""
        training = self.training
        try:
            with torch.no_grad():
                self.eval()(*inputs)
        except ConvGradError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:  # torch's words on shapes
            return error
        finally:
            self.train(training)
        return None

    def dynamic_shapes(self, batch: Sequence[Tensor], loss_output: str | None) -> tuple[dict[int, str], ...]:
        """Axes that vary of the inputs and the targets: the batch, if the graph takes another, and all declared open.

        Args:
            batch: inputs, then targets.
            loss_output: the output that the targets are like; None for the only one.
        """
        inputs, targets = batch[: len(self._inputs)], batch[len(self._inputs) :]
        larger = [torch.cat([x, x[:1]]) if x.dim() and len(x) else x for x in inputs]
        first = {0: "batch"} if self.refusal(larger) is None else {}
        shapes = [
            {axis: name for axis, name in open_axes(value).items() if 0 < axis < x.dim()} | (first if x.dim() else {})
            for value, x in zip(self._inputs, inputs, strict=True)
        ]
        output = next(value for value in self._graph.output if loss_output in (None, value.name))
        for number, target in enumerate(targets):
            axes = list(open_axes(output))
            if target.dim() < len(output.type.tensor_type.shape.dim):  # class indices, which have no axis of classes
                axes = [axis - 1 for axis in axes if axis > 1]
            # Names of their own: exporters give an output's axis the name of the input's, whatever its size.
            own = {axis: f"target_{number}_{axis}" for axis in axes if 0 < axis < target.dim()}
            shapes.append(own | (first if target.dim() else {}))
        return tuple(shapes)

    def run(self, *inputs: Tensor) -> dict[str, Any]:
        """The graph's outputs by name."""
        values: dict[str, Any] = {"": None, **self._constants}
        values.update(zip((value.name for value in self._inputs), inputs, strict=True))
        for name, where in self._where.items():
            place, _, leaf = where.rpartition(".")
            values[name] = getattr(self.get_submodule(place), leaf)
        for node in self._graph.node:
            attributes = {"opset": self._opset, "outputs": len(node.output)}
            attributes |= {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            arguments = [values[name] for name in node.input]
            result = self._node(node, attributes, arguments)
            parts = result if node.op_type == "Split" else [result]
            values.update(zip(node.output, parts, strict=False))  # of the other operators the first output
        return {name: values[name] for name in self._outputs}

    def _node(self, node: Any, a: Attributes, inputs: list[Any]) -> Any:
        where = f"{node.op_type} {node.name}".strip()
        if node.op_type == "Constant":
            return constant(where, a)
        if node.op_type == "Dropout":
            ratio = float(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else float(a.get("ratio", 0.5))
            return functional.dropout(inputs[0], ratio, self.training)
        if node.op_type == "BatchNormalization":
            x, scale, bias, mean, variance = inputs[:5]
            momentum = 1.0 - a.get("momentum", 0.9)  # ONNX weighs the old value, PyTorch the new one
            return functional.batch_norm(
                x, mean, variance, scale, bias, self.training, momentum, a.get("epsilon", 1e-5)
            )
        if node.op_type not in TAKES_SIZES:
            inputs = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in inputs]
        return OPERATORS[node.op_type](where, a, *inputs)


def open_axes(value: Any) -> dict[int, str]:
    """The axes of a graph's input or output that its declared shape leaves open, with their names."""
    dims = enumerate(value.type.tensor_type.shape.dim)
    return {axis: dim.dim_param or f"{value.name}_{axis}" for axis, dim in dims if not dim.HasField("dim_value")}


def _example(value: Any, size: int) -> Tensor:
    kind = value.type.tensor_type
    dims = enumerate(kind.shape.dim)
    shape = [dim.dim_value if dim.HasField("dim_value") else size if axis else 2 for axis, dim in dims]
    dtype = torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))).dtype
    return torch.randn(shape).to(dtype)


def _check_values(graph: Any) -> None:
    """Refuse a graph that reads more of a node than its first output (a mask, new statistics), parts of a Split aside.

    Raises:
        UnsupportedOperatorError: with the values' names.
    """
    made = {"", *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    made |= {name for node in graph.node for name in (node.output if node.op_type == "Split" else node.output[:1])}
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    if read - made:
        raise UnsupportedOperatorError(
            f"the ONNX model reads {', '.join(sorted(read - made))}, which is no node's first output: it cannot be "
            "trained from this form. Give the torch module itself instead"
        )


def _check_statistics(graph: Any) -> None:
    """Refuse a BatchNormalization whose statistics are something else's too, or are computed.

    Exporters that merge equal initializers make one of the scale and the variance of a new network, which are both 1:
    training would take the one for the other.

    Raises:
        UnsupportedOperatorError: with the nodes and the statistics.
    """
    initializers = {tensor.name for tensor in graph.initializer}
    weights = _weights(graph)
    wrong = [
        f"{node.name or node.output[0]}: {name}"
        for node in graph.node
        if node.op_type in _STATISTICS
        for name in node.input[3:5]
        if name not in initializers or name in weights
    ]
    if wrong:
        raise UnsupportedOperatorError(
            "the ONNX model has no running statistics of their own for BatchNormalization, only what a weight or "
            f"another node holds: {', '.join(wrong)}. Export it for training (torch.onnx.export(..., dynamo=False, "
            "training=torch.onnx.TrainingMode.TRAINING, do_constant_folding=False)), or give the torch module itself"
        )


def _check_biases(graph: Any, trainable: Sequence[str]) -> None:
    """Refuse one bias of several layers that have weights of their own, where exporters may have merged it.

    A new network's biases are all 0, and torch.jit's exporter makes one initializer of those of one shape unless the
    model is in training mode: they would be trained as one. Layers that are the same have the same weight, too.

    Args:
        trainable: names of those that are trained; without any all.

    Raises:
        UnsupportedOperatorError: with the biases and the layers.
    """
    made = {node.output[0]: node for node in graph.node}
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    same = {name for name, array in arrays.items() if array.ndim and array.size and np.all(array == array.flat[0])}
    layers: dict[str, dict[str, str]] = {}
    for node in graph.node:
        weight, bias = _layer(node, made)
        if weight in arrays and bias in same and (not trainable or bias in trainable):
            layers.setdefault(bias, {})[weight] = node.name or node.output[0]
    if merged := [f"{name} ({', '.join(of.values())})" for name, of in layers.items() if len(of) > 1]:
        raise UnsupportedOperatorError(
            f"layers of the ONNX model share a bias of equal values, to be trained as one: {'; '.join(merged)}. "
            "Export it for training (torch.onnx.export(..., dynamo=False, training=torch.onnx.TrainingMode.TRAINING, "
            "do_constant_folding=False)), or give the torch module itself"
        )


def _layer(node: Any, made: dict[str, Any]) -> tuple[str, str]:
    """Names of a layer's weight and bias, empty where the node is none with both; a Linear may be two nodes."""

    def origin(name: str) -> str:
        while name in made and made[name].op_type in _OTHER_FORM:
            name = made[name].input[0]
        return name

    if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 2:
        return origin(node.input[1]), origin(node.input[2])
    if node.op_type == "Add":
        for product, bias in (node.input, reversed(node.input)):
            if product in made and made[product].op_type == "MatMul":
                return origin(made[product].input[1]), origin(bias)
    return "", ""


def _named_forward(module: OnnxModule, names: list[str]) -> Callable[..., Any]:
    """`module.run` with the signature (names...), which the capture reads."""
    import inspect

    def forward(*inputs: Tensor) -> Any:
        return module.run(*inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    valid = [name if name.isidentifier() else f"input_{index}" for index, name in enumerate(names)]
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in valid])  # type: ignore[attr-defined]
    return forward
