"""A training step in two phases: one that computes the gradients, and one that updates the state where it lies.

The step's model is one graph. Cut in two when it is loaded, the second phase starts after the first has ended, so every
reader of the old parameters has read them and their new values can be written over them: the state is held once. The
cut runs through as few tensors as possible, which are the gradients. Of those that are large or come together in large
groups, the first phase takes the updates back (`fused_updates.py`): else all gradients are held at once.

Runs without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..runtime.graph_nodes import reads
from ..tensor_names import LEARNING_RATE, LOSS, MICRO_STEP, STEP
from .chunks import ELEMENTWISE, VIEWS
from .flat_memory import FlatTensor

if TYPE_CHECKING:
    from .fused_updates import FusedUpdates

_COUNTERS = (STEP, MICRO_STEP)  # they also seed random numbers in the forward
# Operators whose output's elements depend on the inputs' elements at the same place, so that an input of the output's
# shape may be overwritten; onnxruntime's own planner reuses the inputs of the first row. Of more than two inputs Max
# and Min keep what they have found so far in the output.
_OVERWRITING = ("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Clip")
_OVERWRITING_OF_TWO = ("Max", "Min")


@dataclass(frozen=True)
class Phases:
    """A step's model, cut in two.

    Attributes:
        gradients: model of the first phase; its outputs are the step's that it computes, and `carried`.
        update: model of the second phase without the types of its `carried` inputs.
        carried: names of the tensors that go from one phase to the other.
        hidden: names of outputs that the step itself does not return.
        in_place: names of the state tensors whose new value may be written over the old one.
        flat: memory that state, and gradients in place of `carried` ones, share (`flat_updates.py`); the second phase
            reads and writes it as a whole.
        shapes, views: of the second phase's inputs and outputs that are declared as chunks, their own shape and the
            declared one.
        fused: updates that the first phase computes (`fused_updates.py`).
    """

    gradients: Any
    update: Any
    carried: tuple[str, ...]
    hidden: tuple[str, ...]
    in_place: frozenset[str]
    flat: tuple[FlatTensor, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    views: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fused: FusedUpdates | None = None

    def typed_update(self, outputs: Iterable[Any]) -> Any:
        """The second phase's model, once it has been given the types of its `carried` inputs.

        Args:
            outputs: the first phase's, as its session describes them.
        """
        import onnx

        from ..runtime.tensors import onnx_type

        known = {value.name for value in self.update.graph.input}
        for value in outputs:
            if value.name in self.carried and value.name not in known:
                info = onnx.helper.make_tensor_value_info(value.name, onnx_type(value.type)[0], list(value.shape))
                self.update.graph.input.append(info)
        return self.update


def split(model: Any, trained: Collection[str], state: Collection[str], updated: Mapping[str, str]) -> Phases | None:
    """Cut a step's model in two.

    Args:
        model: the onnx.ModelProto.
        trained: names of the parameters that the optimizer updates.
        state: names of all state inputs.
        updated: name of each state tensor that changes to the output with its new value.

    Returns:
        None where nothing could be updated in place: no state comes late enough, or a tensor is not in the model file.
    """
    graph = model.graph
    if any(tensor.external_data for tensor in graph.initializer):
        return None
    roots = {LEARNING_RATE} | {n for n in state if n not in _COUNTERS and n.rpartition(".")[0] in trained}
    late = _late_nodes(graph, roots)
    if not late:
        return None
    late |= _statistics(graph, updated)
    early = [node for i, node in enumerate(graph.node) if i not in late]
    update = [graph.node[i] for i in sorted(late)]
    made_late = {name: i for i, node in enumerate(update) for name in node.output}
    read_late = readers_of(update)
    outputs = [value.name for value in graph.output]
    if LOSS in made_late:
        return None  # a loss that is not finite would be seen when the state is gone
    in_place = frozenset(
        n for n, new in updated.items() if new in made_late and may_overwrite(update, made_late, read_late, n, new)
    )
    if not in_place:
        return None
    carried = tuple(name for node in early for name in node.output if name and name in read_late)
    first = [name for name in outputs if name not in made_late]
    hidden = tuple(name for name in carried if name not in first)
    # Read or not: the caller gives all of the batch, and state is what has an input (spectral norm writes a vector that
    # it does not read).
    batch = {value.name for value in graph.input}.difference(state, [LEARNING_RATE])
    written = {new: name for name, new in updated.items()}
    second = [name for name in outputs if name in made_late]
    return Phases(
        _part(model, early, [*first, *hidden], batch.union(written[name] for name in first if name in written)),
        _part(model, update, second, {written[name] for name in second if name in written}),
        carried,
        hidden,
        in_place,
    )


def _late_nodes(graph: Any, roots: Collection[str]) -> set[int]:
    """Places of the nodes that the roots reach, and of those before them that carry a second copy across the cut.

    These are elementwise nodes that nothing else reads (the gradient times one minus beta), and concatenations of
    parameters.
    """
    reached, late = set(roots), set()
    for i, node in enumerate(graph.node):
        if any(name in reached for name in reads(node)):
            late.add(i)
            reached.update(node.output)
    kept = {value.name for value in graph.output}
    given = {value.name for value in graph.input}
    if not late:
        return late
    readers = readers_of(graph.node)
    for i in range(len(graph.node) - 1, -1, -1):
        node = graph.node[i]
        copies = node.op_type in ELEMENTWISE or (node.op_type == "Concat" and given.issuperset(node.input))
        if i in late or not copies or any(name in kept for name in node.output):
            continue
        followers = [r for name in node.output for r in readers.get(name, [])]
        if followers and all(r in late for r in followers):
            late.add(i)
    return late


def _statistics(graph: Any, updated: Mapping[str, str]) -> set[int]:
    """Places of elementwise nodes that make a state's new value of the old one, and of no other state.

    These are BatchNorm's statistics and counters. Late, they are written in place, and all layers' at once.
    """
    readers = readers_of(graph.node)
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output}
    given = {value.name for value in graph.input}
    kept = {value.name for value in graph.output}
    found: set[int] = set()
    for old, new in updated.items():
        chain: set[int] = set()
        read: set[str] = set()
        waiting = [producer[new]] if new in producer else []
        while waiting:
            i = waiting.pop()
            node = graph.node[i]
            others = (j for name in node.output for j in readers.get(name, ()) if j not in chain)
            if node.op_type in ELEMENTWISE and next(others, None) is None and kept.intersection(node.output) <= {new}:
                chain.add(i)
                read.update(reads(node))
                waiting.extend(producer[name] for name in reads(node) if name in producer)
        if read & given <= {old}:
            found |= chain
    return found


def readers_of(nodes: Sequence[Any]) -> dict[str, list[int]]:
    """Places of the nodes that read a tensor, by its name."""
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for name in reads(node):
            readers.setdefault(name, []).append(i)
    return readers


def may_overwrite(
    nodes: Sequence[Any], producer: Mapping[str, int], readers: Mapping[str, list[int]], old: str, new: str
) -> bool:
    """Whether `new`'s producer comes after all readers of `old`, whatever order the nodes run in."""
    writer = producer[new]
    if nodes[writer].op_type in VIEWS:
        return False
    before = ancestors(nodes, producer, writer)
    names = [old]  # and views of it, which grow the list while it is read
    for name in names:
        names.extend(view for i in readers.get(name, ()) if nodes[i].op_type in VIEWS for view in nodes[i].output)
    for i in {i for name in names for i in readers.get(name, ())}:
        node = nodes[i]
        if i == writer:
            if not _overwrites(node) or list(node.input).count(old) != sum(n in names for n in reads(node)):
                return False
        elif i not in before:
            return False
    return True


def _overwrites(node: Any) -> bool:
    return node.op_type in _OVERWRITING or (node.op_type in _OVERWRITING_OF_TWO and len(node.input) == 2)


def ancestors(nodes: Sequence[Any], producer: Mapping[str, int], start: int) -> set[int]:
    """Places of the nodes that the one at `start` depends on."""
    found: set[int] = set()
    waiting = [start]
    while waiting:
        for name in reads(nodes[waiting.pop()]):
            if name in producer and producer[name] not in found:
                found.add(producer[name])
                waiting.append(producer[name])
    return found


def _part(model: Any, nodes: Sequence[Any], outputs: Sequence[str], inputs: Collection[str] = ()) -> Any:
    """The model with these nodes alone: these outputs, and of its own inputs and constants those that are read.

    Args:
        inputs: names of those that are there all the same.
    """
    import onnx

    read = {name for node in nodes for name in reads(node)}.union(outputs)
    known = {value.name: value for value in (*model.graph.output, *model.graph.value_info)}
    part = onnx.ModelProto(ir_version=model.ir_version)
    for entries in ("opset_import", "metadata_props", "functions"):
        getattr(part, entries).extend(getattr(model, entries))
    graph = part.graph
    graph.name = model.graph.name
    graph.node.extend(nodes)
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    graph.input.extend(value for value in model.graph.input if value.name in read or value.name in inputs)
    graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in outputs)
    return part
