"""`convgrad build`: one gradient operator as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import GeometryError
from . import options


def register(app: typer.Typer) -> None:
    app.command("build")(build)


def build(
    context: typer.Context,
    operator: Annotated[str, typer.Argument(help="conv1d_input ... conv3d_weight, or convolution_backward.")],
    output: Annotated[Path, options.output("File to write.")],
    input_shape: options.InputShape = None,
    weight_shape: options.WeightShape = None,
    layer: Annotated[
        Path | None,
        typer.Option(
            help="Take the geometry from a torch.export program (.pt2), all but sizes that it leaves open, or the "
            "weight's shape from saved weights (.safetensors, .pt); an option that the file determines is refused."
        ),
    ] = None,
    layer_name: Annotated[str | None, typer.Option(help="Name of the convolution (or its weight) in --layer.")] = None,
    stride: options.Stride = "1",
    padding: options.Padding = "0",
    dilation: options.Dilation = "1",
    groups: options.Groups = 1,
    transposed: options.Transposed = False,
    output_padding: options.OutputPadding = "0",
    dtype: options.DType = "float32",
    dynamic: Annotated[str, typer.Option(help="Of batch, channels, space, kernel; separated by commas.")] = "batch",
    opset: options.Opset = 18,
    lowering: Annotated[str, typer.Option(help="auto, tuned, or a name that `convgrad lowerings` lists.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads the lowerings are for; several by default.")] = None,
    max_error_factor: options.MaxErrorFactor = 2.0,
    max_workspace: Annotated[
        int | None, typer.Option(help="Most bytes of intermediate tensors, at the batch of --input-shape.")
    ] = None,
    keep_function: Annotated[bool, typer.Option("--keep-function", help="Keep the convgrad function node.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: options.Json = False,
) -> None:
    """Build one gradient operator as an ONNX model of standard operators."""
    from ..build import build_model
    from ..files import check_output, write_atomically

    check_output(output, overwrite=overwrite)
    arguments = options.geometry_arguments(
        input_shape, weight_shape, stride, padding, dilation, groups, transposed, output_padding
    )
    if layer is not None:
        from .layer_file import layer_geometry

        found = layer_geometry(layer, layer_name, arguments["input_shape"])
        options.refuse_given(context, found, f"--layer {layer} determines it")
        arguments |= found
    elif layer_name is not None:
        raise GeometryError(f"--layer-name is {layer_name!r}, but --layer is missing: give the file that holds it")
    model = build_model(
        operator,
        **arguments,
        dtype=dtype,
        dynamic=options.words(dynamic),
        opset_version=opset,
        lowering=lowering,
        threads=threads,
        max_error_factor=max_error_factor,
        max_workspace=max_workspace,
        inline=not keep_function,
    )
    data = model.SerializeToString(deterministic=True)
    write_atomically(output, data, overwrite=overwrite)
    metadata = {item.key: item.value for item in model.metadata_props}
    report: dict[str, Any] = {
        "path": str(output),
        "operator": operator,
        "lowering": metadata["convgrad.lowering"],
        "dtype": metadata["convgrad.dtype"],
        "opset": opset,
        "nodes": [node.op_type for node in model.graph.node],
        "inputs": [value.name for value in model.graph.input],
        "outputs": [value.name for value in model.graph.output],
        "bytes": len(data),
    }
    if as_json:
        options.print_json(report)
        return
    typer.echo(
        f"{output}: {operator} by {report['lowering']}, {len(report['nodes'])} nodes, {len(data)} bytes; "
        f"inputs {', '.join(report['inputs'])}; outputs {', '.join(report['outputs'])}"
    )
