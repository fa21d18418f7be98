"""The scalar whose gradient `export_gradient` takes: a sum, a class score, a product with a cotangent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from convgrad_export.errors import ArgumentTypeError, DynamicShapeError
from convgrad_export.integrations.capture import capture
from convgrad_export.integrations.other_sizes import example_sizes, substituted


def scalar_of(of: int | str | Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor] | None:
    """The function of the output that `of` stands for, None for its sum.

    Raises:
        ArgumentTypeError: anything else, a class among it.
    """
    if callable(of) and not isinstance(of, type):
        return of
    if of is None or (isinstance(of, str) and of == "sum"):
        return None
    if isinstance(of, (int, np.integer)) and not isinstance(of, bool):
        index = int(of)

        def class_score(output: torch.Tensor) -> torch.Tensor:
            if (
                not isinstance(output, torch.Tensor)
                or output.dim() < 2
                or not -output.shape[1] <= index < output.shape[1]
            ):
                shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
                raise ArgumentTypeError(f"of={index} takes class {index} of an output (batch, classes), got {shape}")
            return output[:, index].sum()

        return class_score
    kind = f"the class {of.__name__}" if isinstance(of, type) else f"{of!r:.80}"
    raise ArgumentTypeError(f"of is {kind}, expected an int (class), 'sum', 'vjp' or a function of the output")


def cotangent_product(output: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    return (output * cotangent).sum()


def example_cotangent(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> tuple[torch.Tensor, Any]:
    """An example cotangent, and its dynamic dimensions: those of the output that are not fixed.

    Raises:
        ArgumentTypeError: Several outputs. DynamicShapeError: A dynamic size of the example's output is 1.
    """
    program = capture(module, args, kwargs, dynamic_shapes=dynamic_shapes)
    outputs = [spec for spec in program.outputs if spec.kind == "output"]
    if len(outputs) != 1:
        raise ArgumentTypeError(f"of='vjp' needs a forward with one tensor as its output, this one has {len(outputs)}")
    (node,) = [n for n in program.graph_module.graph.nodes if n.op == "output"]
    value = node.args[0][program.outputs.index(outputs[0])].meta["val"]
    sizes: list[int] = []
    dynamic: dict[int, str] = {}
    # The trace's own hints are not the example's sizes: it reads 0 and 1 as 2.
    known = example_sizes(program.inputs)
    for axis, size in enumerate(value.shape):
        if isinstance(size, torch.SymInt):
            sizes.append(int(substituted(program, size.node.expr, known)))
            dynamic[axis] = program.symbol_names.get(str(size.node.expr), f"output_dim_{axis}")
            # A trace reads a dynamic size of 1 as 2, the cotangent's too, and the output's follows from the input's.
            if sizes[axis] == 1 and not size.node.expr.is_Symbol:
                raise DynamicShapeError(
                    f"of='vjp': axis {axis} of the example's output has one position, and its size follows from a "
                    "dimension declared dynamic. Give a larger example, with at least two positions there, or declare "
                    "that dimension static"
                )
        else:
            sizes.append(int(size))
    return torch.ones(sizes, dtype=value.dtype), {"cotangent": dynamic}
