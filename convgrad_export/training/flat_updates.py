"""Parameters that are updated alike, updated as one: they and their state lie one behind the other in one memory.

A network has hundreds of parameters, and an update is a dozen nodes for each: nodes that take longer to start than a
small parameter takes to compute, and memory of their own. The updates are elementwise, so that one over the memory of
many parameters has the same bits. Of DenseNet-121's 2,300 nodes some 40 are left.

In a step's file biases and other short vectors are concatenated, updated together and sliced (`update.py`); here the
concatenation is the memory that they lie in.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..runtime.graph_nodes import VIEWS, put_nodes, reads, rename, shown_by_views, used_nodes
from ..tensor_names import UPDATED
from .chunks import CHUNK, Update, fixed_shapes, updates_of
from .flat_memory import FlatTensor
from .formulas import Formulas
from .phases import Phases, may_overwrite, readers_of

_SMALL = 1 << 19  # elements up to which a parameter is joined with others; the gradients joined are held all the time
_LINE = 16  # elements: a parameter starts at a line of the cache
_GRADIENT = "gradient"
_DTYPES = {1: "float32", 7: "int64", 10: "float16", 11: "float64"}  # of a TensorProto, in numpy's words

Shape = tuple[int, ...]
_Member = tuple[Update, dict[str, str]]  # the update of a parameter, and its tensors by what they are to it


def flatten_updates(
    phases: Phases,
    trained: Collection[str],
    shapes: Mapping[str, Shape],
    *,
    small: int = _SMALL,
    largest: int | None = None,
) -> Phases:
    """The phases with small parameters updated together where the same is computed of them.

    Args:
        phases: their models are changed.
        trained: names of the parameters that the optimizer updates.
        shapes: of the first phase's tensors, those that are known and fixed.
        small: largest number of elements of a parameter that is joined with others.
        largest: number of elements up to which parameters are joined, in the order in which their gradients come.
    """
    join = _Join(phases, trained)
    join.vectors()
    join.counters()
    join.alike(small, largest)
    return join.result(shapes)


class _Join:
    """The second phase's model while tensors of it are joined.

    Attributes:
        graph: the model's.
        trained: names of the parameters.
        gradients: names of the tensors that come from the first phase and are not returned.
        shapes, types: of the inputs, and of the gradients as far as they are known.
        in_place: names of the inputs whose new value is written over the old one.
        flat: the joined tensors by name.
    """

    def __init__(self, phases: Phases, trained: Collection[str]) -> None:
        self.phases = phases
        self.graph = phases.update.graph
        self.trained = trained
        self.gradients = frozenset(phases.hidden)
        known = [*self.graph.input, *(v for v in phases.gradients.graph.output if v.name in self.gradients)]
        self.shapes = fixed_shapes(known)
        self.types = {value.name: value.type.tensor_type.elem_type for value in known}
        self.in_place = set(phases.in_place)
        self.flat: dict[str, FlatTensor] = {}

    def vectors(self) -> None:
        """Make one state tensor of vectors that are concatenated, and whose new values are slices of one tensor."""
        nodes = list(self.graph.node)
        producer = {name: i for i, node in enumerate(nodes) for name in node.output}
        readers = readers_of(nodes)
        bounds = _integers(self.graph)
        removed: set[int] = set()
        for i, node in enumerate(nodes):
            parts = list(node.input)
            if node.op_type != "Concat" or any(n not in self.in_place or readers[n] != [i] for n in parts):
                continue
            if any(len(self.shapes.get(n, ())) != 1 or self.types[n] not in _DTYPES for n in parts):
                continue
            whole = node.output[0]
            starts = list(itertools.accumulate((self.shapes[name][0] for name in parts), initial=0))
            slices = [producer[name + UPDATED] for name in parts]
            new = _sliced([nodes[j] for j in slices], starts, bounds)
            if new is None or new not in producer or not may_overwrite(nodes, producer, readers, whole, new):
                continue
            removed.update((i, *slices))
            for j in {producer[new], *readers[new]} - removed:
                rename(nodes[j], {new: whole + UPDATED})
            producer[whole + UPDATED], readers[whole + UPDATED] = producer[new], readers[new]
            places = {n: (start, self.shapes[n]) for n, start in zip(parts, starts, strict=False)}
            self._put(FlatTensor(whole, _DTYPES[self.types[parts[0]]], (starts[-1],), places), parts)
        if removed:
            self._keep(node for i, node in enumerate(nodes) if i not in removed)

    def counters(self) -> None:
        """Join integers that grow by the same constant: BatchNorm counts its batches."""
        nodes = list(self.graph.node)
        readers = readers_of(nodes)
        steps = _integers(self.graph)
        groups: dict[int, list[int]] = defaultdict(list)
        for i, node in enumerate(nodes):
            names = [name for name in node.input if name in self.in_place and name + UPDATED in node.output]
            if node.op_type != "Add" or len(names) != 1 or readers[names[0]] != [i] or node.output[0] in readers:
                continue
            step = [steps[name] for name in node.input if name in steps]
            if self.shapes.get(names[0]) == () and _DTYPES.get(self.types[names[0]]) == "int64" and step:
                groups[step[0]].append(i)
        removed: set[int] = set()
        for first, *others in groups.values():
            if others:
                names = [nodes[i].output[0].removesuffix(UPDATED) for i in (first, *others)]
                places = {name: (k, ()) for k, name in enumerate(names)}
                joined = FlatTensor(self._name(names[0]), "int64", (len(names),), places)
                self._put(joined, names)
                rename(nodes[first], {names[0]: joined.name, names[0] + UPDATED: joined.name + UPDATED})
                removed.update(others)
        if removed:
            self._keep(node for i, node in enumerate(nodes) if i not in removed)

    def alike(self, small: int, largest: int | None) -> None:
        """Join the state, and the gradients, of parameters for which the graph computes the same."""
        shown = shown_by_views(self.phases.gradients.graph.node)
        formulas = Formulas(self.graph, self.shapes, self.types, shown)
        groups: dict[Any, list[_Member]] = defaultdict(list)
        for update in updates_of(self.graph, self.shapes, 2):
            roles = self._roles(update) if math.prod(update.shape) <= small else None
            formula = formulas.of(update, roles) if roles else None
            if roles and formula is not None:
                groups[formula].append((update, roles))
        removed: set[int] = set()
        place = {name: i for i, node in enumerate(self.phases.gradients.graph.node) for name in node.output}
        for alike in groups.values():
            for group in _divided(alike, place, largest) if largest else (alike,):
                if len(group) > 1:
                    removed |= self._merge(group)
        if removed:
            self._keep(node for node in self.graph.node if id(node) not in removed)

    def result(self, shapes: Mapping[str, Shape]) -> Phases:
        if not self.flat:
            return self.phases
        own = {name for tensor in self.flat.values() for name in tensor.parts if name in self.gradients}
        sources = _give_sources(self.phases.gradients.graph, own, shapes)
        flat = []
        for tensor in self.flat.values():
            places = tensor.parts.items()
            parts = {sources.get(n, n): (start, shapes.get(sources.get(n, ""), shape)) for n, (start, shape) in places}
            flat.append(dataclasses.replace(tensor, parts=parts))
        written = [tensor.name + UPDATED for tensor in flat]
        return dataclasses.replace(
            self.phases,
            carried=tuple(name for name in self.phases.carried if name not in own),
            hidden=(*self.phases.hidden, *sources.values(), *written),
            flat=tuple(flat),
        )

    def _roles(self, update: Update) -> dict[str, str] | None:
        """What an update reads, by what it is to it; None where the update does more than overwrite its state."""
        written = {value.name for value in self.graph.output} & update.values
        roles: dict[str, str] = {}
        for name in (name for name in self.shapes if name in update.values):
            if name in self.in_place and name + UPDATED in written:
                written.discard(name + UPDATED)
                role = self._role(name)
            elif name in self.gradients:
                role = _GRADIENT
            else:
                return None
            if role in roles or self.types[name] not in _DTYPES:
                return None
            roles[role] = name
        return None if written else roles

    def _role(self, name: str) -> str:
        """`exp_avg` of the parameter's `weight.exp_avg`, by the first part of a joined tensor."""
        name = next(iter(self.flat[name].parts)) if name in self.flat else name
        return "parameter" if name in self.trained else name.rpartition(".")[2]

    def _name(self, first: str) -> str:
        name = f"{first}.joined"
        while name in self.types:
            name += "_"
        return name

    def _merge(self, group: Sequence[_Member]) -> set[int]:
        """Let one update of the group take all; the ids of the others' nodes."""
        starts = list(itertools.accumulate((_lines(math.prod(u.shape)) for u, _ in group), initial=0))
        kept, own = max(group, key=lambda member: len(member[0].shape))  # its numbers have the rank of its tensors
        shape = (*(1,) * (len(kept.shape) - 1), _divisible(starts[-1]))
        names = {}
        for role in own:
            members = [roles[role] for _, roles in group]
            parts: dict[str, tuple[int, Shape]] = {}
            for name, start in zip(members, starts, strict=False):
                whole = self.flat.pop(name, None)
                places = whole.parts if whole else {name: (0, self.shapes[name])}
                parts.update((part, (start + at, size)) for part, (at, size) in places.items())
            joined = FlatTensor(self._name(own[role]), _DTYPES[self.types[own[role]]], shape, parts)
            names[own[role]] = joined.name
            if role != _GRADIENT:
                names[own[role] + UPDATED] = joined.name + UPDATED
            self._put(joined, members)
        for node in kept.nodes:
            rename(node, names)
        return {id(node) for update, _ in group if update is not kept for node in update.nodes}

    def _put(self, joined: FlatTensor, members: Collection[str]) -> None:
        """Declare a joined tensor, in place of those that it is made of."""
        from onnx import helper

        code = self.types[next(iter(members))]
        updated = {name + UPDATED for name in members}
        graph, name = self.graph, joined.name
        gradient = self.gradients.issuperset(members)
        for values, gone in ((graph.input, set(members)), (graph.output, updated)):
            kept = [value for value in values if value.name not in gone]
            del values[:]
            values.extend(kept)
        graph.input.append(helper.make_tensor_value_info(name, code, joined.shape))
        if not gradient:
            graph.output.append(helper.make_tensor_value_info(name + UPDATED, code, joined.shape))
            self.in_place.add(name)
        self.flat[name], self.shapes[name], self.types[name] = joined, joined.shape, code
        for member in members:
            self.shapes.pop(member)

    def _keep(self, nodes: Iterable[Any]) -> None:
        outputs = {value.name for value in self.graph.output}
        put_nodes(self.graph, used_nodes(list(nodes), outputs), outputs)


def _lines(elements: int) -> int:
    return -(-elements // _LINE) * _LINE


def _divisible(elements: int) -> int:
    """So many elements or a few more, which chunks of equal size hold."""
    chunks = -(-elements // CHUNK)
    return chunks * _lines(-(-elements // chunks))


def _integers(graph: Any) -> dict[str, int]:
    """The integers among a graph's constants, as numbers and as vectors of one element."""
    from onnx import TensorProto, numpy_helper

    found = (t for t in graph.initializer if t.data_type == TensorProto.INT64 and list(t.dims) in ([], [1]))
    return {tensor.name: int(numpy_helper.to_array(tensor).item()) for tensor in found}


def _sliced(slices: Sequence[Any], starts: Sequence[int], bounds: Mapping[str, int]) -> str | None:
    """The vector that these nodes cut in parts with these starts, the last of which is its end."""
    sources = {node.input[0] for node in slices}
    for node, (start, end) in zip(slices, itertools.pairwise(starts), strict=True):
        numbers = [bounds.get(name) for name in node.input[1:]]
        if node.op_type != "Slice" or numbers not in ([start, end], [start, end, 0], [start, end, 0, 1]):
            return None
    return sources.pop() if len(sources) == 1 else None


def _give_sources(graph: Any, names: Collection[str], shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Let a graph give what its outputs are views of, where nothing else needs the view: writing one would be a copy.

    Returns:
        Name of each output that it gives no more to the one that it gives instead.
    """
    from onnx import helper

    producer = {name: node for node in graph.node for name in node.output}
    read = {name for node in graph.node for name in reads(node)}
    taken = {value.name for value in graph.output}
    sources: dict[str, str] = {}
    for value in graph.output:
        node, source = producer.get(value.name), value.name
        while value.name in names and value.name not in read and node is not None and node.op_type in VIEWS:
            source = node.input[0]
            node = producer.get(source)
        if source == value.name or node is None or source in taken or source not in shapes:
            continue
        sources[value.name] = source
        taken.add(source)
        code = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(source, code, shapes[source]))
    outputs = {value.name for value in graph.output}
    put_nodes(graph, used_nodes(list(graph.node), outputs), outputs)
    return sources


def _divided(group: Sequence[_Member], place: Mapping[str, int], largest: int) -> list[list[_Member]]:
    """The group in parts of about so many elements; the last takes what is not worth a part of its own.

    Args:
        place: of the nodes that make the gradients, by the gradients' names.
    """
    parts: list[list[_Member]] = [[]]
    size = 0
    for update, roles in sorted(group, key=lambda member: place.get(member[1].get(_GRADIENT, ""), -1)):
        elements = math.prod(update.shape)
        if parts[-1] and size + elements > largest:
            parts.append([])
            size = 0
        parts[-1].append((update, roles))
        size += elements
    if len(parts) > 1 and size < largest // 2:
        parts[-2].extend(parts.pop())
    return parts
