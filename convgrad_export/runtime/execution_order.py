"""An order of a model's nodes that makes onnxruntime run them one after the other as they were written.

onnxruntime does not run a file's nodes in the file's order. `GraphViewer` (onnxruntime/core/graph/graph_viewer.cc,
1.19 to 1.32) searches backwards, depth first, from the nodes whose output nobody reads, the last one first, and among
the nodes that a node reads it follows the last one first; a node runs when the search leaves it. In a gradient that
brings forward what the file writes just before its use: the masks of all activations and the transposed weights of all
layers are computed before the first gradient, and held until the last one.

The search takes last what stands first. So the nodes are put in the order in which each comes as early as it can, of
several the one that was written last: what a gradient needs besides the gradient before it, which can be computed long
before, moves to the front, and onnxruntime computes it when it is needed.
"""

from __future__ import annotations

import heapq
from typing import Any

from .graph_nodes import reads


def put_execution_order(graph: Any) -> None:
    """Reorder the nodes of an onnx.GraphProto, which stays in topological order; its results do not change."""
    nodes = list(graph.node)
    producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    readers: list[list[int]] = [[] for _ in nodes]
    missing = []
    for i, node in enumerate(nodes):
        before = {producer[name] for name in reads(node) if name in producer}
        missing.append(len(before))
        for j in before:
            readers[j].append(i)
    ready = [-i for i, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    place: dict[int, int] = {}
    while ready:
        i = -heapq.heappop(ready)
        place[id(nodes[i])] = len(place)
        for reader in readers[i]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, -reader)
    if len(place) == len(nodes):  # else some wait for each other: onnxruntime says so
        graph.node.sort(key=lambda node: place[id(node)])
