"""Which node ran on which execution provider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..provider_names import CPU, CUDA

# onnxruntime records the assignment only when this is set before the session is created.
RECORD_ASSIGNMENT = ("session.record_ep_graph_assignment_info", "1")

# The CUDA provider leaves integers that only become shapes to the CPU, where they are needed. These operators have a
# CUDA kernel for every float type, so one of them on the CPU can only be of that kind.
_SHAPE_ARITHMETIC = frozenset(
    {
        *("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Expand", "Gather", "Identity", "Max", "Min", "Mod"),
        *("Mul", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Unsqueeze", "Where"),
    }
)


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
        """Nodes that are not on the requested provider: each costs a copy to another device and back.

        Without `shape_arithmetic`.
        """
        elsewhere = (node for node in self.nodes if node.provider != self.requested)
        return tuple(node for node in elsewhere if node not in self.shape_arithmetic)

    @property
    def shape_arithmetic(self) -> tuple[NodePlacement, ...]:
        """Computations of sizes that the CUDA provider leaves to the CPU on purpose; no tensor is copied for them."""
        if self.requested != CUDA:
            return ()
        return tuple(n for n in self.nodes if n.provider == CPU and n.op_type in _SHAPE_ARITHMETIC)

    def __str__(self) -> str:
        shapes = self.shape_arithmetic
        if not self.left:
            but = f" but {len(shapes)} that compute sizes on the CPU" if shapes else ""
            return f"all {len(self.nodes)} nodes run on {self.requested}{but}"
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
