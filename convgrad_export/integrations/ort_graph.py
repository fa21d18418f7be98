"""One partition of AOTAutograd (forward, backward, or inference) as a sequence of onnxruntime and PyTorch steps."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.fx.node import map_arg

from ..errors import ConvGradError
from ..lowering import CPU, CUDA
from ..selection.policy import AUTO
from .half_widening import has_bfloat16, widen_half
from .ort_partition import assign, is_size, name_once, read_from_values, why_not_onnxruntime
from .ort_segment import OrtSegment
from .output_views import separate_views
from .program import is_getitem, is_random


class OrtGraph:
    """Runs a functional ATen graph, onnxruntime first, eager PyTorch where it must.

    Sizes are evaluated from those of the inputs, and of results whose sizes follow from values (`nonzero`), so one
    instance serves every size that the graph was traced for.

    Args:
        graph_module: a graph from AOTAutograd, its nodes with fake tensors in ``meta["val"]``. Changed in place.
        lowering: "auto" or a catalogue name, for the convolution gradients.
        returned: how many outputs, the first ones, share memory where they are views of one another; None for all.
    """

    def __init__(
        self, graph_module: torch.fx.GraphModule, lowering: str = AUTO, *, returned: int | None = None
    ) -> None:
        self._module = graph_module
        graph_module.graph.eliminate_dead_code()
        device = _device_of(graph_module.graph)
        self._device = device or torch.device("cpu")
        self._provider = CUDA if self._device.type == "cuda" else CPU
        if self._provider == CPU or has_bfloat16(graph_module):
            widen_half(graph_module)  # torch.onnx writes opset 18, whose Conv and Pad have no bfloat16 on CUDA either
        self._sizes = _Sizes(graph_module.graph)
        views = separate_views(graph_module.graph, returned)
        refused = self._refused(device) | dict.fromkeys(views, "it is a view of another output")
        while True:
            failed = self._plan(refused, lowering)
            if not failed:
                break
            refused.update(failed)
        for node, reason in refused.items():
            if node.meta.get("val") is None or node in views:
                continue  # an assertion; or nothing is computed
            name_once(node, reason)

    @property
    def segments(self) -> list[OrtSegment]:
        """The onnxruntime sessions, in the order they run."""
        return [step.segment for step in self._steps if isinstance(step, _Session)]

    def run(self, arguments: list[Any]) -> list[Any]:
        """Results for the arguments in `arguments`, which is emptied so that memory can be freed early."""
        placeholders = [node for node in self._module.graph.nodes if node.op == "placeholder"]
        values: dict[torch.fx.Node, Any] = dict(zip(placeholders, arguments, strict=True))
        arguments.clear()
        sizes = self._sizes.bind(values)
        with torch.no_grad():
            for step, dead in zip(self._steps, self._dead, strict=True):
                step(values, sizes)
                for node in dead:
                    values.pop(node, None)
        output = self._module.graph.output_node().args[0]
        return [_read(value, values, sizes) for value in output]  # type: ignore[union-attr]

    def _refused(self, device: torch.device | None) -> dict[torch.fx.Node, str]:
        refused = dict.fromkeys(read_from_values(self._module.graph), "a size or a number follows from its values")
        for node in self._module.graph.nodes:
            if node.op != "call_function" or is_size(node) or is_random(node):
                continue
            if is_getitem(node):
                continue
            reason = why_not_onnxruntime(node, self._provider)
            if device is None and reason is None:
                reason = "its tensors are on more than one device, or on one that onnxruntime cannot read"
            if reason is not None:
                refused[node] = reason
        return refused

    def _plan(self, refused: dict[torch.fx.Node, str], lowering: str) -> dict[torch.fx.Node, str]:
        """Build the steps; on failure, the nodes that have to go to PyTorch and why."""
        graph = self._module.graph
        assignments = assign(graph, refused)
        groups: dict[int, list[torch.fx.Node]] = {}
        for node, assignment in assignments.items():
            if assignment.side != "size":
                groups.setdefault(assignment.level, []).append(node)
        self._steps: list[Any] = [_Attribute(node, self._module) for node in graph.nodes if node.op == "get_attr"]
        for level in sorted(groups):
            nodes = groups[level]
            if assignments[nodes[0]].side == "torch":
                self._steps += [_Call(node) for node in nodes]
                continue
            try:
                segment = OrtSegment(nodes, lowering, self._provider)
            except (ConvGradError, RuntimeError) as error:
                reason = f"its part of the graph was refused: {str(error).splitlines()[0][:200]}"
                return dict.fromkeys((node for node in nodes if not is_getitem(node)), reason)
            self._steps.append(_Session(segment, self._device))
        self._dead = _dead_after(self._steps, graph)
        return {}


class _Attribute:
    """Fetches a constant of the graph."""

    def __init__(self, node: torch.fx.Node, module: torch.fx.GraphModule) -> None:
        self.reads: list[torch.fx.Node] = []
        self._node, self._value = node, operator.attrgetter(str(node.target))(module)

    def __call__(self, values: dict[torch.fx.Node, Any], sizes: dict[Any, Any]) -> None:
        values[self._node] = self._value


class _Call:
    """One node in eager PyTorch."""

    def __init__(self, node: torch.fx.Node) -> None:
        self.reads = list(node.all_input_nodes)
        self._node = node

    def __call__(self, values: dict[torch.fx.Node, Any], sizes: dict[Any, Any]) -> None:
        node = self._node
        args = map_arg(node.args, lambda a: _read(a, values, sizes))
        kwargs = map_arg(node.kwargs, lambda a: _read(a, values, sizes))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        sizes.update(_bound(node.meta.get("val"), values[node]))


class _Session:
    """One group of nodes on onnxruntime."""

    def __init__(self, segment: OrtSegment, device: torch.device) -> None:
        self.reads = segment.inputs
        self.segment = segment
        self._device = device
        self._expected = [node.meta["val"] for node in segment.outputs]

    def __call__(self, values: dict[torch.fx.Node, Any], sizes: dict[Any, Any]) -> None:
        inputs = [_read(node, values, sizes) for node in self.segment.inputs]
        shapes = [tuple(_size(size, sizes) for size in value.shape) for value in self._expected]
        results = self.segment(inputs, shapes, self._device)
        for node, expected, result in zip(self.segment.outputs, self._expected, results, strict=True):
            values[node] = _restrided(result, expected, sizes)


def _restrided(result: torch.Tensor, expected: Any, sizes: dict[Any, Any]) -> torch.Tensor:
    """`result` in the strides of the trace: eager parts and the caller rely on them (channels_last)."""
    if result.dim() < 2 or result.numel() < 2:
        return result
    strides = tuple(_size(stride, sizes) for stride in expected.stride())
    if all(a == b or size == 1 for a, b, size in zip(strides, result.stride(), result.shape, strict=True)):
        return result
    if any(stride == 0 and size > 1 for stride, size in zip(strides, result.shape, strict=True)):
        return result  # an expanded tensor: there is no memory to write it to
    return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)


class _Sizes:
    """Values of the graph's integers, from the sizes of its inputs."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self._sources: dict[Any, tuple[torch.fx.Node, int | None]] = {}
        for node in graph.nodes:
            value = node.meta.get("val") if node.op == "placeholder" else None
            if isinstance(value, (torch.SymInt, torch.SymFloat)):
                self._add(value, node, None)
            elif isinstance(value, torch.Tensor):
                for axis, size in enumerate(value.shape):
                    self._add(size, node, axis)

    def _add(self, size: Any, node: torch.fx.Node, axis: int | None) -> None:
        if isinstance(size, (torch.SymInt, torch.SymFloat)) and size.node.expr.is_Symbol:
            self._sources.setdefault(size.node.expr, (node, axis))

    def bind(self, values: dict[torch.fx.Node, Any]) -> dict[Any, Any]:
        """Symbol to integer, for one call."""
        return {
            symbol: values[node] if axis is None else values[node].shape[axis]
            for symbol, (node, axis) in self._sources.items()
        }


def _bound(expected: Any, result: Any) -> Iterator[tuple[Any, Any]]:
    """The symbols of a node's value that its result gives a number to."""
    if isinstance(expected, (torch.SymInt, torch.SymFloat)) and expected.node.expr.is_Symbol:
        yield expected.node.expr, result
    elif isinstance(expected, torch.SymBool):
        for symbol in expected.node.expr.free_symbols:  # Eq(symbol, 1)
            yield symbol, int(result)
    elif isinstance(expected, torch.Tensor):
        yield from _bound(tuple(expected.shape), tuple(result.shape))
    elif isinstance(expected, (tuple, list)):
        for item, found in zip(expected, result, strict=True):
            yield from _bound(item, found)


def _size(size: Any, sizes: dict[Any, Any]) -> Any:
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    expression = size.node.expr
    value = sizes[expression] if expression in sizes else _evaluate(expression, tuple(sizes.items()))
    return float(value) if isinstance(size, torch.SymFloat) else value


@functools.lru_cache(maxsize=65536)
def _evaluate(expression: Any, sizes: tuple[tuple[Any, int | float], ...]) -> int | float | bool:
    value = expression.xreplace({symbol: sympy.sympify(number) for symbol, number in sizes})
    if getattr(value, "is_Boolean", False):
        return bool(value)
    return int(value) if value.is_integer else float(value)


def _read(value: Any, values: dict[torch.fx.Node, Any], sizes: dict[Any, Any]) -> Any:
    if not isinstance(value, torch.fx.Node):
        return value
    return values[value] if value in values else _size(value.meta["val"], sizes)


def _dead_after(steps: Sequence[Any], graph: torch.fx.Graph) -> list[list[torch.fx.Node]]:
    """For each step, the values that nothing after it reads."""
    kept = set(graph.output_node().all_input_nodes)
    last: dict[torch.fx.Node, int] = {}
    for index, step in enumerate(steps):
        for node in step.reads:
            last[node] = index
    dead: list[list[torch.fx.Node]] = [[] for _ in steps]
    for node, index in last.items():
        if node not in kept:
            dead[index].append(node)
    return dead


def _device_of(graph: torch.fx.Graph) -> torch.device | None:
    """The one device that every tensor is on, if it is a CPU or CUDA device."""
    values = [node.meta.get("val") for node in graph.nodes]
    devices = {value.device for value in values if isinstance(value, torch.Tensor)}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        return None
    return next(iter(devices))
