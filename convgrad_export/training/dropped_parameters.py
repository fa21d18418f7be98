"""Parameters of a module that its ONNX forward model has no more, as far as the exporter's own notes tell.

torch.onnx's exporter of torch.export's programs drops biases that are 0, which those of a new network often are, and
folds normalization into the convolution before it, whatever mode the module is in. The model computes the same, but to
train it is not to train the module. The exporter notes the program's parameters with the graph, and with every node the
call that it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import onnx

from ..errors import UnsupportedOperatorError

_SIGNATURE = "pkg.torch.export.ExportedProgram.graph_signature"
_CALL = "pkg.torch.onnx.fx_node"
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def refuse_dropped(graph: Any, trained: Iterable[str]) -> None:
    """Refuse a graph that lacks parameters of layers whose other parameters are trained.

    Args:
        trained: names of initializers.

    Raises:
        UnsupportedOperatorError: with the parameters' names.
    """
    trained = set(trained)
    if names := [name for name, layer in dropped_parameters(graph).items() if layer & trained]:
        shown = f"{', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        raise UnsupportedOperatorError(
            f"the ONNX model has no {shown}, which the module has that it was exported from: torch.onnx drops biases "
            "that are 0 and folds normalization into convolutions, and what is left trains otherwise. Export it for "
            "training (torch.onnx.export(..., dynamo=False, training=torch.onnx.TrainingMode.TRAINING, "
            "do_constant_folding=False)), or give the torch module itself. To train what is left, name it in "
            "requires_grad"
        )


def dropped_parameters(graph: Any) -> dict[str, set[str]]:
    """Each parameter that is missing, with the floating-point initializers that its layer still reads."""
    signature = next((entry.value for entry in graph.metadata_props if entry.key == _SIGNATURE), "")
    targets = dict(re.findall(r"^(\w+): PARAMETER target='([^']+)'", signature, re.MULTILINE))
    tensors = {tensor.name for tensor in graph.initializer}
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type in _FLOATS and tensor.dims}
    layers: dict[str, list[Any]] = {}
    for node in graph.node:
        if call := next((entry.value for entry in node.metadata_props if entry.key == _CALL), ""):
            layers.setdefault(call, []).append(node)
    dropped: dict[str, set[str]] = {}
    for call, nodes in layers.items():
        given = [targets[name] for name in re.findall(r"%(\w+)", call) if name in targets]
        missing = [name for name in given if name not in tensors]
        read = {name for node in nodes for name in node.input if name in floats}
        folded = "batch_norm" in call and all(node.op_type != "BatchNormalization" for node in nodes)
        # Initializers with names of their own are parameters in another form (a transposed weight), weights first.
        other = 0 if folded else len(read - set(targets.values()))
        dropped.update(dict.fromkeys(missing[other:], read))
    return dropped
