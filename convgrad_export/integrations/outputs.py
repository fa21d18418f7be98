"""Names of what a forward returned, and of the buffers that it changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from convgrad_export.integrations.arguments import key_text, refuse_hidden_output
from convgrad_export.integrations.program import GraphInput, GraphOutput, TracedOutput
from convgrad_export.tensor_names import UPDATED


def named_outputs(result: Any, taken: Iterable[str], names: Sequence[str] | None = None) -> list[TracedOutput]:
    """The tensors that a forward returned; what is no tensor is left out.

    Args:
        taken: names of the graph's inputs and of its other outputs; one of these gets ``output.`` put before it.
        names: of the flattened result, by default `flat_output_names`.
    """
    flat = pytree.tree_leaves(result)
    used = set(taken)
    outputs = []
    for name, tensor in zip(names if names is not None else flat_output_names(result, flat), flat, strict=True):
        if not isinstance(tensor, torch.Tensor):
            refuse_hidden_output(tensor)
            continue
        while name in used:
            name = f"output.{name}"
        used.add(name)
        outputs.append(TracedOutput(GraphOutput(name, "output"), tensor))
    return outputs


def flat_output_names(result: Any, flat: Sequence[Any]) -> list[str]:
    """ "output", "output_0", ... for sequences; a mapping's own keys, and "<key>_<key or index>" for what is nested."""
    if len(flat) == 1 and not isinstance(result, Mapping):
        return ["output"]
    numbered = [f"output_{i}" for i in range(len(flat))]
    try:
        paths = [path for path, _ in pytree.tree_flatten_with_path(result)[0]]
    except (ValueError, TypeError, KeyError):  # a registered type that does not tell its keys (transformers' outputs)
        return [str(key) for key in result] if isinstance(result, Mapping) and len(result) == len(flat) else numbered
    names = ["_".join(key_text(key) for key in path) for path in paths]
    if not isinstance(result, Mapping):
        names = [f"output_{name}" for name in names]
    return names if len(set(names)) == len(names) else numbered


def updated(name: str, tensor: torch.Tensor) -> TracedOutput:
    """The new value of a tensor that is an input of the graph under its own name."""
    return TracedOutput(GraphOutput(f"{name}{UPDATED}", "buffer", name), tensor)


def buffer_outputs(state: Sequence[GraphInput], tensors: Mapping[str, torch.Tensor]) -> list[TracedOutput]:
    """All buffers after the call. `trace_function` drops those that turn out to be unchanged."""
    return [updated(spec.name, tensors[spec.name]) for spec in state if spec.kind == "buffer"]
