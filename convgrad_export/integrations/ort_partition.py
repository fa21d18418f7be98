"""Which nodes of a partition go to onnxruntime, and in which groups.

A node gets a level: the number of times a path from the inputs changes sides. Nodes of one side and level form a group,
so groups never wait for each other in a circle, and a graph that onnxruntime runs whole is one group.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..lowering import CPU
from .program import is_getitem, is_random
from .torchlib import translations

logger = logging.getLogger(__name__)
aten = torch.ops.aten
Side = Literal["onnxruntime", "torch", "size"]

_DTYPES = {
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}
_TRANSLATED_HERE = {aten.convolution_backward.default, torch.ops.prims.prod.default}
_FLOAT32_ONLY = {aten.convolution.default, aten.grid_sampler_2d.default}
_named: set[str] = set()


@dataclass(frozen=True)
class Assignment:
    """Where one node is computed.

    Attributes:
        side: who computes it; "size" for numbers, which are computed from sizes of inputs and of PyTorch's results.
        level: groups of one side and level run together. That of a number is 0, or of the node that it depends on.
    """

    side: Side
    level: int


@functools.cache
def _is_translated(target: Any) -> bool:
    return target in _TRANSLATED_HERE or bool(translations().is_registered(target))


def why_not_onnxruntime(node: torch.fx.Node, provider: str = CPU) -> str | None:
    """Why onnxruntime cannot run the node, as a phrase; None when it can."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return "it is no ATen operator"
    if not _is_translated(node.target):
        return "it has no ONNX translation"
    values = [node.meta.get("val"), *(argument.meta.get("val") for argument in node.all_input_nodes)]
    tensors = [item for value in values for item in (value if isinstance(value, (tuple, list)) else [value])]
    dtypes = {value.dtype for value in tensors if isinstance(value, torch.Tensor)}
    if strange := dtypes - _DTYPES:
        return f"onnxruntime has no {', '.join(sorted(str(dtype) for dtype in strange))} tensors"
    if provider == CPU and torch.float64 in dtypes and node.target in _FLOAT32_ONLY:
        return f"onnxruntime's {provider} has no float64 kernel for it"
    return None


def is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def symbols_in(value: Any) -> set[Any]:
    """The symbols that a number, or the sizes of one tensor or of several, are made of."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return set(value.node.expr.free_symbols)
    if isinstance(value, (tuple, list)):
        return {symbol for item in value for symbol in symbols_in(item)}
    return symbols_in(tuple(value.shape)) if isinstance(value, torch.Tensor) else set()


def read_from_values(graph: torch.fx.Graph) -> dict[torch.fx.Node, set[Any]]:
    """Nodes whose result has a size, or is a number, that follows from a tensor's values; and the symbols for it."""
    known: set[Any] = set()
    found = {}
    for node in graph.nodes:
        symbols = symbols_in(node.meta.get("val")) - known
        if symbols and node.op == "call_function":
            found[node] = symbols
        known |= symbols
    return found


def assign(graph: torch.fx.Graph, refused: Mapping[torch.fx.Node, str]) -> dict[torch.fx.Node, Assignment]:
    """Side and level of every call; nodes in `refused` go to PyTorch, as do random ones, for its generator and seeds.

    So do those whose values decide on sizes: onnxruntime writes into memory of a known size.
    """
    assignments: dict[torch.fx.Node, Assignment] = {}
    readers = read_from_values(graph)
    levels: dict[Any, int] = {}  # of the symbols in `readers`
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if is_size(node) and node not in readers:
            needed = symbols_in(node.meta["val"])
            assignments[node] = Assignment("size", max((levels.get(symbol, 0) for symbol in needed), default=0))
            continue
        if is_getitem(node) and node.args[0] in assignments:
            assignments[node] = assignments[node.args[0]]
            continue
        side: Side = "torch" if node in refused or node in readers or is_random(node) else "onnxruntime"
        level = 0 if side == "onnxruntime" else 1
        for argument in node.all_input_nodes:
            before = assignments.get(argument)
            if before is not None and before.side != "size":
                level = max(level, before.level + (before.side != side))
            elif before is not None and before.level:  # PyTorch made what it depends on
                level = max(level, before.level + (side != "torch"))
        assignments[node] = Assignment(side, level)
        levels.update(dict.fromkeys(readers.get(node, ()), level))
    return assignments


def name_once(node: torch.fx.Node, reason: str) -> None:
    """Warn that an operator runs in eager PyTorch, once per operator and process."""
    target = str(node.target)
    if target in _named:
        return
    _named.add(target)
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    where = f" (called by {modules[-1]})" if modules else ""
    warnings.warn(
        f"convgrad_ort: {target}{where} runs in eager PyTorch, because {reason}", RuntimeWarning, stacklevel=2
    )
