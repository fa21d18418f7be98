"""What happens to a translated model before it is written: folding, opset conversion, names, checks.

torch.onnx's optimizer matches each of some ninety rewrite patterns against each node, and the patterns with several
outputs look at the whole graph every time: on a ResNet-18 training graph two thirds of the whole export go there. The
passes below are linear.
"""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from convgrad_export.emit.onnx import ir_version
from convgrad_export.errors import ArgumentTypeError, ConvGradError
from convgrad_export.integrations.opset_downgrade import downgrade

BASE_OPSET, MIN_OPSET, MAX_OPSET = 18, 13, 23


def check_opset(opset: int) -> None:
    if isinstance(opset, bool) or not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise ArgumentTypeError(f"opset_version is {opset!r}, expected an integer from {MIN_OPSET} to {MAX_OPSET}")


def finish(model: ir.Model, *, opset: int = BASE_OPSET) -> ir.Model:
    """Fold constants, drop what nothing reads, share what is equal, convert to `opset`. In place; returns `model`.

    Raises:
        UnsupportedOperatorError: A node has no form at an opset below 18.
        ArgumentTypeError: An opset outside 13 to 23.
    """
    check_opset(opset)
    from onnxscript.optimizer import _constant_folding

    # Its note that outputs are left alone is no news here.
    logging.getLogger("onnx_ir.passes.common.initializer_deduplication").setLevel(logging.ERROR)
    ir.passes.Sequential(
        passes.InlinePass(),
        _constant_folding.FoldConstantsPass(
            shape_inference=False,
            input_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
            output_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
            should_fold=lambda node: None,
        ),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
    model.opset_imports.setdefault("", BASE_OPSET)
    if opset < BASE_OPSET:
        downgrade(model, opset)
        passes.RemoveUnusedNodesPass()(model)  # inputs that became attributes
    elif opset > BASE_OPSET:
        _upgrade(model, opset)
    model.ir_version = ir_version(opset)
    _strip_metadata(model)
    return model


def _upgrade(model: ir.Model, opset: int) -> None:
    from onnxscript import version_converter

    version_converter.convert_version(model, opset, fallback=False)
    if model.opset_imports.get("") != opset:
        raise ConvGradError(f"the model could not be converted from opset {BASE_OPSET} to {opset}")


def _strip_metadata(model: ir.Model) -> None:
    """The tracer's notes (source lines, module stacks) hold the exporting machine's paths; they stay out of files."""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()


def check_model(proto: onnx.ModelProto) -> None:
    """Strict onnx.checker and full shape inference, for models below protobuf's 2 GB."""
    onnx.checker.check_model(proto, full_check=True)
