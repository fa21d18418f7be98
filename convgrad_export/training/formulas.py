"""Telling whether an update computes the same of its tensors as another does of others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..runtime.graph_nodes import VIEWS
from ..tensor_names import UPDATED
from .chunks import ELEMENTWISE, Update


class Formulas:
    """The updates of a graph as formulas: equal ones compute the same.

    Equal subexpressions have one number (value numbering; Alpern, Wegman, Zadeck, POPL 1988). Numbers of one element
    count by their value, whatever their rank is.

    Args:
        graph: an onnx.GraphProto in topological order.
        shapes, types: of its inputs, element types as a TensorProto's.
        shown: of inputs that are views, the name of what they show.
    """

    def __init__(
        self, graph: Any, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, int], shown: Mapping[str, str]
    ) -> None:
        from onnx import numpy_helper

        self._known: dict[Any, int] = {}
        self._types = types
        single = [name for name, shape in shapes.items() if math.prod(shape) == 1]
        self._scalars = {name: self._number("input", shown.get(name, name)) for name in single}
        for tensor in graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.size == 1:
                self._scalars[tensor.name] = self._number("constant", tensor.data_type, array.tobytes())
        for node in graph.node:
            if node.op_type in VIEWS and node.input[0] in self._scalars:
                self._scalars[node.output[0]] = self._scalars[node.input[0]]
            elif node.op_type in ELEMENTWISE and all(name in self._scalars for name in node.input):
                self._scalars[node.output[0]] = self._applied(node, self._scalars)

    def of(self, update: Update, roles: Mapping[str, str]) -> frozenset[tuple[str, int]] | None:
        """What the update makes of each of its tensors.

        Args:
            roles: what its tensors are to it, and their names.

        Returns:
            None where it reads something else.
        """
        read = {name: self._number("role", role, self._types[name]) for role, name in roles.items()}
        numbers = {**self._scalars, **read}
        for node in update.nodes:
            if any(name not in numbers for name in node.input):
                return None
            numbers[node.output[0]] = self._applied(node, numbers)
        made = ((role, numbers[name + UPDATED]) for role, name in roles.items() if name + UPDATED in numbers)
        return frozenset([*made, *((role, read[name]) for role, name in roles.items())])

    def _applied(self, node: Any, numbers: Mapping[str, int]) -> int:
        attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        operands = [numbers[name] for name in node.input]
        return self._number(node.domain, node.op_type, *attributes, *operands)

    def _number(self, *expression: Any) -> int:
        return self._known.setdefault(expression, len(self._known))
