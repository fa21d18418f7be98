"""The caller's own names for a model's inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from convgrad_export.errors import ArgumentTypeError
from convgrad_export.integrations.convolution_marks import rename_in_metadata
from convgrad_export.integrations.report import ExportReport, describe
from convgrad_export.tensor_names import inner_name


def check_names(what: str, names: Any) -> None:
    """Refuse what is no list of different, non-empty names."""
    listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names)
    if not listed or len(set(names)) != len(names):
        raise ArgumentTypeError(f"{what} is {names!r:.80}, expected a list of different names")


def rename(
    model: ir.Model, report: ExportReport, input_names: Sequence[str] | None, output_names: Sequence[str] | None
) -> None:
    """Give inputs and outputs the caller's names; a value inside that has one of them already gets another.

    Raises:
        ArgumentTypeError: The wrong number of names, or one that something else of the model keeps.
    """
    renamed: dict[ir.Value, str] = {}
    for what, values, names in (
        ("input_names", model.graph.inputs, input_names),
        ("output_names", model.graph.outputs, output_names),
    ):
        if names is None:
            continue
        if len(names) != len(values):
            raise ArgumentTypeError(
                f"{what} is {list(names)}, expected {len(values)} different names for {[v.name for v in values]}"
            )
        renamed.update(zip(values, names, strict=True))
    if not renamed:
        return
    kept = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    taken = Counter(renamed.get(value, str(value.name)) for value in kept)
    if twice := [name for name in renamed.values() if taken[name] > 1]:
        raise ArgumentTypeError(
            f"input_names and output_names give {', '.join(map(repr, twice))}, which another input or output, or a "
            "parameter of the model, is called as well"
        )
    inner = [value for node in model.graph for value in node.outputs]
    used = {*taken, *(str(value.name) for value in inner)}
    for value in inner:
        if value not in renamed and value.name in taken and not value.is_graph_output():
            renamed[value] = inner_name(str(value.name), used)
            used.add(renamed[value])
    names_before = {str(value.name): name for value, name in renamed.items()}
    for value, name in renamed.items():
        value.name = name
    rename_in_metadata(model, names_before)
    report.errors = {names_before.get(name, name): error for name, error in report.errors.items()}
    report.inputs, report.outputs = describe(model)["inputs"], describe(model)["outputs"]
