"""Which node ran on which execution provider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# onnxruntime records the assignment only when this is set before the session is created.
RECORD_ASSIGNMENT = ("session.record_ep_graph_assignment_info", "1")


@dataclass(frozen=True)
class NodePlacement:
    """One node of the optimised graph and the provider that runs it."""

    name: str
    op_type: str
    provider: str


@dataclass(frozen=True)
class PlacementReport:
    """Where a session's nodes run.

    Attributes:
        requested: the provider that was asked for.
        nodes: every node of the graph as onnxruntime optimised it.
    """

    requested: str
    nodes: tuple[NodePlacement, ...]

    @property
    def left(self) -> tuple[NodePlacement, ...]:
        """Nodes that are not on the requested provider: each costs a copy to another device and back."""
        return tuple(node for node in self.nodes if node.provider != self.requested)

    def __str__(self) -> str:
        if not self.left:
            return f"all {len(self.nodes)} nodes run on {self.requested}"
        listed = ", ".join(f"{node.op_type} {node.name!r} on {node.provider}" for node in self.left)
        return f"{len(self.left)} of {len(self.nodes)} nodes left {self.requested}: {listed}"


def read_placement(session: Any, requested: str) -> PlacementReport:
    """The placement of an InferenceSession that was created with `RECORD_ASSIGNMENT`."""
    nodes = [
        NodePlacement(node.name, node.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    return PlacementReport(requested, tuple(nodes))
