"""`convgrad lowerings`: the catalogue, with reasons for a geometry."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from . import options


def register(app: typer.Typer) -> None:
    app.command("lowerings")(lowerings)


def lowerings(
    context: typer.Context,
    operator: Annotated[str, typer.Argument(help="conv1d_input ... conv3d_weight, or convolution_backward.")],
    input_shape: options.InputShape = None,
    weight_shape: options.WeightShape = None,
    stride: options.Stride = "1",
    padding: options.Padding = "0",
    dilation: options.Dilation = "1",
    groups: options.Groups = 1,
    transposed: options.Transposed = False,
    output_padding: options.OutputPadding = "0",
    dtype: options.DType = "float32",
    opset: options.Opset = 18,
    provider: Annotated[str, typer.Option(help="Execution provider the graph is for.")] = "CPUExecutionProvider",
    as_json: options.Json = False,
) -> None:
    """List the lowerings of an operator; with shapes, which apply, why not, and which one auto and tuned take."""
    from ..build import lowerings as catalogue

    if input_shape is None and weight_shape is None:
        given = (
            "stride",
            "padding",
            "dilation",
            "groups",
            "transposed",
            "output_padding",
            "dtype",
            "opset",
            "provider",
        )
        why = "--input-shape and --weight-shape are missing, and the list alone depends on nothing"
        options.refuse_given(context, given, why, advice="give the shapes, or leave it out")
        entries = catalogue(operator)
    else:
        arguments = options.geometry_arguments(
            input_shape, weight_shape, stride, padding, dilation, groups, transposed, output_padding
        )
        entries = catalogue(operator, **arguments, dtype=dtype, opset_version=opset, provider=provider)
    if as_json:
        options.print_json({"operator": operator, "lowerings": [asdict(entry) for entry in entries]})
        return
    from rich.table import Table

    asked = input_shape is not None
    table = Table(title=f"{operator}: lowerings", show_lines=False)
    for heading in ("lowering", "for", "here" if asked else "formula"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        state = "chosen" if entry.chosen else "applies" if entry.why_not is None else f"no: {entry.why_not}"
        state += ", tuned" if entry.tuned else ""
        table.add_row(entry.name, entry.when, state if asked else entry.summary)
    options.print_table(table)
