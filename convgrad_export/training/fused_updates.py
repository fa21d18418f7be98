"""Updates within the backward: a parameter is written over as soon as its gradient is there, which is then gone.

Gradients that wait for the second phase are all held when it starts, as PyTorch holds them: as much as the parameters
take. Chosen here are the updates that can run earlier; `fused_writer.py` puts them into the first phase's graph. Left
to the second phase is what depends on all gradients (their norm), is held twice, or is read by other updates.

Runs without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.graph_nodes import copied, put_nodes, reads, renamed, used_nodes
from ..tensor_names import GRADIENT_NORM, LEARNING_RATE, LOSS, MICRO_STEP, STEP, UPDATED
from .chunks import chunk_updates, fixed_shapes
from .phases import Phases, ancestors, readers_of

STOP = "convgrad.stop_on_non_finite"  # input: 1 or 0
BEGAN = "convgrad.updates_began"  # output: 0 once an update may have been written
AS_CHUNKS = ".chunks"  # put behind the name of a state tensor that a further input shows as chunks
_FLOAT_TYPES = (1, 11)  # float and double of a TensorProto: losses that onnxruntime's IsNaN takes
_COUNTERS = (STEP, MICRO_STEP)  # state that the second phase alone writes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FusedUpdate:
    """A Scan of the second phase that may run in the first.

    Attributes:
        scan: the onnx.NodeProto, over chunks of state tensors and of one gradient.
        state: names of the state tensors: parameters, moments, or memory that several of them share.
        gradient: name of the scan's input.
        parts: of the gradient, by the name of the first phase's tensor: first element and shape.
        shape: of the gradient as chunks.
        code: the gradient's element type, a TensorProto's.
    """

    scan: Any
    state: tuple[str, ...]
    gradient: str
    parts: Mapping[str, tuple[int, Shape]]
    shape: Shape
    code: int


@dataclass(frozen=True)
class FusedUpdates:
    """What the first phase's model is given.

    Attributes:
        updates: in no order.
        numbers: nodes of the second phase that make the numbers which the updates read, in order.
        constants: onnx.TensorProtos that those and the updates read.
        inputs: onnx.ValueInfoProtos of what they read besides: state as chunks, and numbers.
        outputs: of the updates.
        memory: by the name of an input, the state tensor that it shows as chunks.
        holds: by the name of a state tensor, those of the first phase's inputs that lie in its memory.
        gone: names of the first phase's outputs that nothing else needs.
        views: shapes of inputs and outputs that the memory bound to them does not have itself.
    """

    updates: Sequence[FusedUpdate]
    numbers: Sequence[Any]
    constants: Sequence[Any]
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    memory: Mapping[str, str]
    holds: Mapping[str, Collection[str]]
    gone: frozenset[str]
    views: Mapping[str, Shape]


def fuse_updates(phases: Phases, known: Iterable[Any]) -> Phases:
    """Take the updates that may run within the backward out of the second phase.

    Args:
        phases: their models are changed.
        known: onnx.ValueInfoProtos of the step's inner tensors; of gradients, those without one are left.
    """
    losses = [v.type.tensor_type.elem_type for v in phases.gradients.graph.output if v.name == LOSS]
    normed = any(value.name == GRADIENT_NORM for value in phases.gradients.graph.output)  # it may stop the update too
    if normed or not losses or losses[0] not in _FLOAT_TYPES:
        return phases
    inputs = phases.update.graph.input
    there = {value.name for value in inputs}
    inputs.extend(value for value in known if value.name in phases.carried and value.name not in there)
    shapes = fixed_shapes(inputs)
    views = chunk_updates(phases.update)
    chunked = dataclasses.replace(phases, views=views, shapes={n: shapes[n] for n in views if n in shapes})
    fused = _Choice(chunked).fused()
    return _without(chunked, fused) if fused else chunked


class _Choice:
    """The second phase's model while its Scans are looked at."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        graph = phases.update.graph
        self.nodes = list(graph.node)
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output}
        self.readers = readers_of(self.nodes)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.values = {value.name: value for value in (*graph.input, *graph.output)}
        self.flat = {tensor.name: tensor for tensor in phases.flat}
        first = phases.gradients.graph
        self.first = list(first.node)
        self.first_producer = {name: i for i, node in enumerate(self.first) for name in node.output if name}
        self.first_inputs = {value.name for value in first.input}

    def fused(self) -> FusedUpdates | None:
        updates: dict[int, FusedUpdate] = {}
        numbers: set[int] = set()
        for i in range(len(self.nodes)):
            update = self._update(i)
            behind = self._numbers(i) if update else None
            if update is not None and behind is not None:
                updates[i] = update
                numbers |= behind
        if not updates:
            return None
        moved = [copied(self.nodes[i]) for i in sorted(numbers)]
        read = {name for node in (*moved, *(u.scan for u in updates.values())) for name in reads(node)}
        state = [name for update in updates.values() for name in update.state]
        gradients = {name for update in updates.values() for name in update.parts}
        kept = {name for name, places in self.readers.items() if not updates.keys() >= set(places)}
        shown = {name: name + AS_CHUNKS for name in state}
        return FusedUpdates(
            list(updates.values()),
            moved,
            [self.constants[name] for name in sorted(read & self.constants.keys())],
            [
                *(renamed(self.values[name], shown[name]) for name in state),
                *(self.values[name] for name in sorted(read & self.values.keys()) if self._is_given(name)),
            ],
            [self.values[name + UPDATED] for name in state],
            {shown[name]: name for name in state},
            {name: tuple(self.flat[name].parts) if name in self.flat else (name,) for name in state},
            frozenset(name for name in gradients if name in self.phases.hidden and name not in kept),
            {
                bound: self.phases.views[name]
                for name in state
                if name in self.phases.views
                for bound in (shown[name], name + UPDATED)
            },
        )

    def _update(self, i: int) -> FusedUpdate | None:
        """A Scan that writes over state which nothing else reads, of one gradient."""
        scan = self.nodes[i]
        state = [name for name in scan.input if name + UPDATED in scan.output]
        others = [name for name in scan.input if name not in state]
        if scan.op_type != "Scan" or len(others) != 1 or len(state) != len(scan.output):
            return None
        in_place = all(name in self.flat or name in self.phases.in_place for name in state)
        alone = all(self.readers[name] == [i] for name in scan.input)
        if not in_place or not alone or any(name in self.readers for name in scan.output):
            return None
        gradient = others[0]
        if gradient in self.flat:
            parts = self.flat[gradient].parts
        elif gradient in self.phases.carried and gradient in self.phases.shapes:
            parts = {gradient: (0, self.phases.shapes[gradient])}
        else:
            return None
        code = self.values[gradient].type.tensor_type.elem_type
        return FusedUpdate(copied(scan), tuple(state), gradient, parts, self.phases.views[gradient], code)

    def _numbers(self, i: int) -> set[int] | None:
        """The nodes behind what a Scan reads from around it; None where a gradient or other state is behind them."""
        scan = self.nodes[i]
        around = (self.producer, self.values, self.constants)
        waiting = [n for n in reads(scan) if n not in scan.input and any(n in names for names in around)]
        if not waiting:
            return None  # nothing that could be made to wait
        behind: set[int] = set()
        while waiting:
            name = waiting.pop()
            if name in self.producer:
                if self.producer[name] not in behind:
                    behind.add(self.producer[name])
                    waiting.extend(reads(self.nodes[self.producer[name]]))
            elif name not in self.constants and not self._is_given(name) and not self._counts(name):
                return None
        return behind

    def _is_given(self, name: str) -> bool:
        """Whether it is a counter, or comes from the caller."""
        if name in (LEARNING_RATE, *_COUNTERS):
            return True
        made = name in self.phases.carried or name in self.flat or name + UPDATED in self.values
        return name in self.values and not made

    def _counts(self, name: str) -> bool:
        """Whether the first phase makes it of the counters alone."""
        if name not in self.first_producer:
            return False
        start = self.first_producer[name]
        behind = ancestors(self.first, self.first_producer, start) | {start}
        return {name for i in behind for name in reads(self.first[i])} & self.first_inputs <= {*_COUNTERS}


def _without(phases: Phases, fused: FusedUpdates) -> Phases:
    """The phases, the second one without the updates that the first computes."""
    graph = phases.update.graph
    gradients = {update.gradient for update in fused.updates}
    written = {value.name for value in fused.outputs}
    for values, gone in ((graph.output, written), (graph.input, gradients.union(fused.memory.values()))):
        kept = [copied(value) for value in values if value.name not in gone]
        del values[:]
        values.extend(kept)
    outputs = {value.name for value in graph.output}
    put_nodes(graph, used_nodes(list(graph.node), outputs), outputs)
    return dataclasses.replace(
        phases,
        carried=tuple(name for name in phases.carried if name not in fused.gone),
        hidden=(*phases.hidden, BEGAN),
        flat=tuple(tensor for tensor in phases.flat if tensor.name not in gradients),
        fused=fused,
    )
