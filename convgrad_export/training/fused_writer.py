"""Writing updates into the graph that computes the gradients, so that the state may change within the run.

- A new value is written over the old one after everything that reads that. These are edges of the graph, not an order
  that onnxruntime may choose: the update reads a number that comes after the shapes of the readers' results.
- Nothing is written where the loss is not finite. A Gather stops the run there, with an index that its data does not
  have, and every update comes after it.
- Whether updates have begun is an output, so that after a run that broke off it is known whether the state is whole.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..runtime.graph_nodes import VIEWS, copied, reads, rename, renamed, subgraphs
from ..tensor_names import LOSS
from .fused_updates import AS_CHUNKS, BEGAN, STOP, FusedUpdate, FusedUpdates
from .phases import readers_of

_OWN = ".update"  # put behind the names of constants: the optimized graph may have others of that name
_INT64 = 7  # of a TensorProto


def write_updates(graph: Any, fused: FusedUpdates) -> None:
    """Add the updates to the first phase's onnx.GraphProto, each where all that it waits for has run.

    Args:
        graph: its nodes are in the order in which they run, which stays, but for those that the updates wait for and
            no gradient does.
    """
    _Writer(graph, fused).write()


class _Writer:
    """The graph while updates are added: nodes by number, and of each the nodes whose results it reads."""

    def __init__(self, graph: Any, fused: FusedUpdates) -> None:
        self.graph, self.fused = graph, fused
        self.nodes = list(graph.node)
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.sources = [self._read(node) for node in self.nodes]
        self.held = set(range(len(self.nodes)))  # those that keep their place; the others come as early as they can

    def write(self) -> None:
        readers = self._readers_of_inputs()
        self._bring_forward()
        constants = {tensor.name: tensor.name + _OWN for tensor in self.fused.constants}
        self.graph.initializer.extend(renamed(tensor, constants[tensor.name]) for tensor in self.fused.constants)
        for node in self.fused.numbers:
            number = copied(node)
            rename(number, constants)
            _rename_around(number, constants)
            self._add(number)
        after = self._gate()
        for update in sorted(self.fused.updates, key=self._last_gradient):
            order = self._order(update, after, readers)
            scan = copied(update.scan)
            rename(scan, {name: name + AS_CHUNKS for name in update.state} | {update.gradient: self._gradient(update)})
            _rename_around(scan, constants)
            self._read_at(scan, order)
            if after != BEGAN:
                after = self._node("Identity", [order], BEGAN)  # all others come after the first one's
            self._add(scan)
        self._put()

    def _add(self, node: Any) -> str:
        self.producer.update(dict.fromkeys(node.output, len(self.nodes)))
        self.nodes.append(node)
        self.sources.append(self._read(node))
        return str(node.output[0])

    def _node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        return self._add(helper.make_node(operator, inputs, [output], name=output, **attributes))

    def _constant(self, name: str, value: Any, dtype: str = "int64") -> str:
        import numpy as np
        from onnx import numpy_helper

        name = f"convgrad.{name}{_OWN}"
        if not any(tensor.name == name for tensor in self.graph.initializer):
            self.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def _vector(self, name: str, output: str) -> str:
        return self._node("Reshape", [name, self._constant("vector", [-1])], output)

    def _read(self, node: Any) -> set[int]:
        return {self.producer[name] for name in reads(node) if name in self.producer}

    def _reach(self, start: Iterable[int], found: set[int]) -> None:
        """Add nodes and all that they depend on to those found before, of which all that they depend on is there."""
        waiting = [i for i in start if i not in found]
        found.update(waiting)
        while waiting:
            more = self.sources[waiting.pop()] - found
            found |= more
            waiting.extend(more)

    def _last_gradient(self, update: FusedUpdate) -> int:
        return max(self.producer.get(name, -1) for name in update.parts)

    def _readers_of_inputs(self) -> dict[str, set[int]]:
        """Of each input the nodes that read it or a view of it."""
        source = {value.name: value.name for value in self.graph.input}
        readers: dict[str, set[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in reads(node):
                if name in source:
                    readers.setdefault(source[name], set()).add(i)
                    if node.op_type in VIEWS:
                        source[node.output[0]] = source[name]
        return readers

    def _bring_forward(self) -> None:
        """Let what updates wait for come as early as it can: no gradient needs the loss, nor the number of the step."""
        readers = readers_of(self.nodes)
        outputs = {value.name for value in self.graph.output}
        alone = [self.producer[LOSS]] if LOSS in self.producer else []
        for i in alone:  # which grows while it is read
            for name in reads(self.nodes[i]):
                j = self.producer.get(name)
                if j is not None and name not in outputs and {*alone}.issuperset(readers[name]):
                    alone.append(j)
        numbers: set[int] = set()
        gradients = {name for update in self.fused.updates for name in (update.gradient, *update.parts)}
        for node in (*self.fused.numbers, *(update.scan for update in self.fused.updates)):
            self._reach((self.producer[n] for n in reads(node) if n in self.producer and n not in gradients), numbers)
        self.held.difference_update(alone, numbers)

    def _gate(self) -> str:
        """A vector of one zero that is there if the loss is finite, or need not be."""
        name = "convgrad.gate"
        nothing = self._node("Sub", [LOSS, LOSS], f"{name}.difference")  # not a number, of a loss that is not finite
        lost = self._node("Cast", [self._node("IsNaN", [nothing], f"{name}.lost")], f"{name}.number", to=_INT64)
        index = self._vector(self._node("Mul", [lost, STOP], f"{name}.stopped"), f"{name}.index")
        return self._node("Gather", [self._constant("zero", [0]), index], name)

    def _order(self, update: FusedUpdate, after: str, readers: Mapping[str, Collection[int]]) -> str:
        """A vector of one zero that is there when `after` is, and all that reads the update's state has run."""
        reading = {i for name in update.state for held in self.fused.holds[name] for i in readers.get(held, ())}
        before: set[int] = set()  # the gradient's sources run before the update as it is
        self._reach((self.producer[name] for name in update.parts if name in self.producer), before)
        name = f"{update.gradient}.order"
        shapes: list[str] = []
        for i in sorted(reading, reverse=True):  # the last ones depend on most of the others
            if i not in before:
                self._reach([i], before)
                result = next(output for output in self.nodes[i].output if output)
                shapes.append(self._node("Shape", [result], f"{name}.{len(shapes)}"))
        numbers = self._node("Concat", [after, *shapes], f"{name}.numbers", axis=0)
        return self._node("Gather", [numbers, self._constant("zero", [0])], name)

    def _gradient(self, update: FusedUpdate) -> str:
        """The update's gradient as chunks, its parts at their places."""
        from onnx import helper

        name, dtype = update.gradient + AS_CHUNKS, helper.tensor_dtype_to_np_dtype(update.code).name
        vectors: list[str] = []
        end = 0
        places = sorted(update.parts.items(), key=lambda part: part[1][0])
        for part, (start, shape) in [*places, ("", (math.prod(update.shape), ()))]:
            if gap := start - end:
                vectors.append(self._constant(f"zeros.{dtype}.{gap}", [0] * gap, dtype))
            if part:
                vectors.append(part if len(shape) == 1 else self._vector(part, f"{part}.vector"))
            end = start + math.prod(shape)
        whole = self._node("Concat", vectors, f"{name}.vector", axis=0) if len(vectors) > 1 else vectors[0]
        return self._node("Reshape", [whole, self._constant(f"{name}.shape", update.shape)], name)

    def _read_at(self, scan: Any, order: str) -> None:
        """Let a Scan read one of its numbers at the place that `order` gives."""
        inner = {
            name
            for body in subgraphs(scan)
            for names in (*(node.output for node in body.node), (value.name for value in body.input))
            for name in names
        }
        number = min(name for name in reads(scan) if name not in inner and name not in scan.input)
        read = self._node("Gather", [self._vector(number, f"{order}.all"), order], f"{order}.one")
        _rename_around(scan, {number: self._node("Squeeze", [read], f"{order}.number")})

    def _put(self) -> None:
        """Put nodes, inputs and outputs into the graph."""
        from onnx import helper

        place: list[tuple[int, int, int]] = []
        for i, sources in enumerate(self.sources):
            last = max((place[j][0] for j in sources), default=0)
            place.append((i, 0, i) if i in self.held else (last, 1, i))
        ordered = [copied(self.nodes[i]) for *_, i in sorted(place)]
        outputs = [copied(value) for value in self.graph.output if value.name not in self.fused.gone]
        there = {value.name for value in self.graph.input}
        self.graph.ClearField("node")
        self.graph.node.extend(ordered)
        self.graph.ClearField("output")
        self.graph.output.extend([*outputs, *self.fused.outputs, helper.make_tensor_value_info(BEGAN, _INT64, [1])])
        self.graph.input.extend(value for value in self.fused.inputs if value.name not in there)
        self.graph.input.append(helper.make_tensor_value_info(STOP, _INT64, []))


def _rename_around(node: Any, names: Mapping[str, str]) -> None:
    """Give what the nodes within a Scan, say, read from around it other names."""
    for body in subgraphs(node):
        for inner in body.node:
            rename(inner, names)
