"""Outputs of one graph that share memory: views of one another, as `return y, y[0]` gives.

AOTAutograd expects of a compiled graph that outputs without a gradient still share it, so that a change of one in place
is a change of the other. onnxruntime gives every result memory of its own.
"""

from __future__ import annotations

from typing import Any

import torch


def returned_by_forward() -> int:
    """How many outputs of the forward graph that is being compiled the caller gets; the others are for the backward."""
    metadata: Any = torch._guards.TracingContext.get().fw_metadata
    return int(metadata.num_forward_returns)


def separate_views(graph: torch.fx.Graph, returned: int | None) -> set[torch.fx.Node]:
    """Give outputs of `graph` that are views of another output nodes of their own, for PyTorch to run.

    What else reads these views keeps the nodes that there are. Views of inputs are left alone: AOTAutograd takes them
    from the inputs themselves.

    Args:
        returned: how many outputs, the first ones, the caller gets; None for all.

    Returns:
        The new nodes.
    """
    output = graph.output_node()
    values: Any = output.args[0]
    taken = {_memory(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    shared: dict[int, list[torch.fx.Node]] = {}
    for node in dict.fromkeys(value for value in values[:returned] if isinstance(value, torch.fx.Node)):
        memory = _memory(node)
        if memory is not None and memory not in taken:
            shared.setdefault(memory, []).append(node)
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for nodes in shared.values():
        for node in nodes if len(nodes) > 1 else ():
            _copied(node, graph, copies)
    output.args = (tuple(copies.get(value, value) for value in values),)
    return set(copies.values())


def _copied(node: torch.fx.Node, graph: torch.fx.Graph, copies: dict[torch.fx.Node, torch.fx.Node]) -> torch.fx.Node:
    """`node` as a copy in front of the output, with the views that lead to it; the memory's first owner stays."""
    source = _viewed(node)
    if node in copies or source is None:
        return copies.get(node, node)
    before = _copied(source, graph, copies)
    with graph.inserting_before(graph.output_node()):
        copies[node] = graph.node_copy(node, lambda argument: before if argument is source else argument)
    return copies[node]


def _viewed(node: torch.fx.Node) -> torch.fx.Node | None:
    """What `node` is a view of. A view may be one of several that an operator gives: split, unbind."""
    source = next((a for a in node.all_input_nodes if _memory(a) is not None and _memory(a) == _memory(node)), None)
    if source is not None and not isinstance(source.meta["val"], torch.Tensor) and _viewed(source) is None:
        return None
    return source


def _memory(node: torch.fx.Node) -> int | None:
    """What stands for the memory of the trace's tensor, or of several tensors if they share one."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return None
    memories = {int(tensor.untyped_storage()._cdata) for tensor in tensors}
    return memories.pop() if len(memories) == 1 else None
