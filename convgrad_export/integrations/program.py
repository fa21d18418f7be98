"""The captured form of a model: a functional ATen graph whose inputs and outputs are known by name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

InputKind = Literal["parameter", "buffer", "user", "constant"]
OutputKind = Literal["output", "value", "gradient", "buffer"]
DynamicShapes = Mapping[str, Any] | Sequence[Any] | None
Decompositions = Mapping[Any, Callable[..., Any]]


@dataclass(frozen=True)
class GraphInput:
    """One placeholder of the captured graph.

    Attributes:
        name: Fully qualified name of a parameter or buffer ("layer1.0.conv1.weight"), or an input's argument name.
        kind: "parameter", "buffer", "user" (an argument), or "constant" (a tensor the forward closed over).
        value: The tensor itself; for a user input, the example.
        aliases: Further names of the same tensor (tied weights).
        dynamic: Dimension index to symbolic name, for user inputs.
    """

    name: str
    kind: InputKind
    value: torch.Tensor
    aliases: tuple[str, ...] = ()
    dynamic: Mapping[int, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """`name`, then the aliases."""
        return self.name, *self.aliases


@dataclass(frozen=True)
class GraphOutput:
    """One output of the captured graph; `target` names what a gradient or updated buffer belongs to."""

    name: str
    kind: OutputKind
    target: str | None = None


@dataclass(frozen=True)
class TracedOutput:
    """What a traced Python function hands back for one output."""

    spec: GraphOutput
    tensor: torch.Tensor


def is_getitem(node: torch.fx.Node) -> bool:
    """Whether a node takes one of several results."""
    return node.target is operator.getitem


def is_random(node: torch.fx.Node) -> bool:
    """Whether a node draws random numbers from PyTorch's generator."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


@dataclass
class CapturedProgram:
    """A functional ATen graph with named inputs and outputs, in placeholder and output order.

    Attributes:
        graph_module: Every node's `meta["val"]` is a fake tensor; `meta["nn_module_path"]` the calling module's name.
        inputs: One per placeholder, in order.
        outputs: One per element of the output node's tuple, in order.
        dimensions: Name of each dynamic dimension ("batch") to the sympy expression it has in `meta["val"]` shapes: a
            symbol, or an expression of other dimensions' symbols where the forward ties it to them.
        output_spec: How to rebuild the structure the forward returned from the "output" entries; None for gradients.
        unused: Names in `wrt` that the value does not depend on, and that therefore have no gradient output.
        shape_env: The constraints gathered on the dynamic dimensions.
        function: The Python function that was traced: named tensors to outputs. Verification runs it eagerly.
        notes: What verification found out that the caller should know; shared by copies with other values.
    """

    graph_module: torch.fx.GraphModule
    inputs: tuple[GraphInput, ...]
    outputs: tuple[GraphOutput, ...]
    dimensions: Mapping[str, Any]
    output_spec: Any
    unused: tuple[str, ...]
    shape_env: ShapeEnv
    function: Callable[[Mapping[str, torch.Tensor]], Sequence[TracedOutput]]
    notes: list[str] = field(default_factory=list)

    @property
    def symbol_names(self) -> dict[str, str]:
        """The tracer's symbols ("s77") to dimension names."""
        return {str(expression): name for name, expression in self.dimensions.items() if expression.is_Symbol}

    @property
    def random_nodes(self) -> list[torch.fx.Node]:
        return [node for node in self.graph_module.graph.nodes if is_random(node)]

    def run(self, *user_inputs: torch.Tensor, **replaced: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the graph eagerly; parameters, buffers and constants keep their values unless given by name."""
        remaining = iter(user_inputs)
        values = [
            replaced[spec.name] if spec.name in replaced else next(remaining) if spec.kind == "user" else spec.value
            for spec in self.inputs
        ]
        with torch.no_grad():
            results = self.graph_module(*values)
        return {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}
