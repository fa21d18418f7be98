"""What happens to a translated model before it is written: folding, opset conversion, names, checks.

torch.onnx's optimizer matches each of some ninety rewrite patterns against each node, and the patterns with several
outputs look at the whole graph every time: on a ResNet-18 training graph two thirds of the whole export go there. The
passes below are linear.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from convgrad_export.emit.long_sums import split_long_sums
from convgrad_export.emit.onnx import ir_version
from convgrad_export.errors import ArgumentTypeError, ConvGradError, VerificationError, in_one_line
from convgrad_export.integrations.convolution_marks import remove_marks, write_metadata
from convgrad_export.integrations.opset_downgrade import downgrade
from convgrad_export.integrations.scalar_rank import raise_scalar_ranks

# torch.onnx writes its graphs at the first; other versions are reached by conversion.
BASE_OPSET, MIN_OPSET, MAX_OPSET = 18, 13, 23
CONSTANT = "convgrad_constant"  # in the `meta` of an initializer that is neither parameter nor buffer
_SHARED_CONSTANT_BYTES = 65536
_LARGEST_FOLDED = 4096


def check_opset(opset: int) -> None:
    if isinstance(opset, bool) or not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise ArgumentTypeError(f"opset_version is {opset!r}, expected an integer from {MIN_OPSET} to {MAX_OPSET}")


def finish(model: ir.Model, *, opset: int = BASE_OPSET) -> ir.Model:
    """Fold constants, drop what nothing reads, share what is equal, convert to `opset`. In place; returns `model`.

    Outputs keep their names and their order, also where several turn out to be one value.

    Raises:
        UnsupportedOperatorError: A node has no form at an opset below 18.
        ArgumentTypeError: An opset outside 13 to 23.
    """
    check_opset(opset)
    from onnxscript.optimizer import _constant_folding

    promised = [output.name for output in model.graph.outputs]
    # Parameters keep their names and stay what they are: a folded Transpose would be a nameless copy.
    parameters = {name for name, value in model.graph.initializers.items() if CONSTANT not in value.meta}
    ir.passes.Sequential(
        passes.InlinePass(),
        _constant_folding.FoldConstantsPass(
            shape_inference=False,
            input_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
            output_size_limit=_LARGEST_FOLDED,  # an index table is computed when the model is loaded
            should_fold=lambda node: (
                False if any(v is not None and v.name in parameters for v in node.inputs) else None
            ),
        ),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )(model)
    raise_scalar_ranks(model, parameters)
    split_long_sums(model.graph)
    _share_equal_constants(model, parameters)
    ir.passes.Sequential(
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
    )(model)
    _merge_chains(model.graph)
    _name_outputs(model.graph, promised)
    passes.NameFixPass()(model)
    marks = remove_marks(model)
    _transpose_in_gemm(model)
    model.opset_imports.setdefault("", BASE_OPSET)
    if opset < BASE_OPSET:
        downgrade(model, opset)
        passes.RemoveUnusedNodesPass()(model)  # inputs that became attributes
    elif opset > BASE_OPSET:
        _upgrade(model, opset)
    model.ir_version = ir_version(opset)
    _strip_metadata(model)
    write_metadata(model, marks)
    return model


def complete_shapes(model: ir.Model) -> None:
    """Give inner values the shapes that follow from the others', in place; those that are known stay as they are.

    For what plans a model's memory before it runs (`runtime.lifetimes`). Sizes that no input gives a name stay open.
    """
    values = [value for node in model.graph for value in node.outputs]
    known = {value: value.shape for value in values if value.shape is not None}
    names = {dim.value for value in model.graph.inputs for dim in value.shape or () if not isinstance(dim, int)}
    passes.ShapeInferencePass()(model)
    for value in values:
        if value in known:
            value.shape = known[value]
        elif value.shape is not None:  # the pass makes names up
            value.shape = ir.Shape([d if isinstance(d, int) or d.value in names else None for d in value.shape])


def _share_equal_constants(model: ir.Model, parameters: set[str]) -> None:
    """One initializer for equal constants. Parameters stay apart: fresh scales and variances are all ones."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if name in parameters or tensor is None or tensor.nbytes > _SHARED_CONSTANT_BYTES or value.is_graph_output():
            continue
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]


def _merge_chains(graph: ir.Graph) -> None:
    """One Reshape for two in a row, and one Transpose, where nothing else reads the tensor between them.

    To be called while the marks are in the graph: a mark reads a convolution's operands, which have to stay.
    """
    for node in list(graph):
        value = node.inputs[0] if node.inputs else None
        first = value.producer() if value is not None else None
        if value is None or first is None or first.graph is not graph:
            continue
        if node.domain or first.domain or first.op_type != node.op_type:
            continue
        if len(value.uses()) != 1 or value.is_graph_output():
            continue
        if node.op_type == "Reshape" and _is_whole_shape(node):
            node.replace_input_with(0, first.inputs[0])
        elif node.op_type == "Transpose" and "perm" in node.attributes and "perm" in first.attributes:
            inner = first.attributes["perm"].as_ints()
            merged = [inner[axis] for axis in node.attributes["perm"].as_ints()]
            source = first.inputs[0]
            if merged == sorted(merged) and source is not None and not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(source)
            else:
                node.replace_input_with(0, source)
                node.attributes["perm"] = ir.AttrInt64s("perm", merged)
        else:
            continue
        if not value.uses():
            graph.remove(first, safe=True)


def _is_whole_shape(reshape: ir.Node) -> bool:
    """Whether the shape is a constant that takes no size from the tensor that is reshaped (0 would)."""
    shape = reshape.inputs[1]
    if shape is None or shape.const_value is None:
        return False
    allowzero = reshape.attributes.get("allowzero")
    return bool((allowzero is not None and allowzero.as_int()) or (shape.const_value.numpy() != 0).all())


def copied(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Another value equal to this one, through an Identity at the end of the graph."""
    node = ir.node("Identity", [value])
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph.append(node)
    return node.outputs[0]


def _name_outputs(graph: ir.Graph, promised: Sequence[str | None]) -> None:
    """Every output a value of its own, with the name that it had before the passes made one value of equal ones."""
    outputs: list[ir.Value] = []
    for index, (value, name) in enumerate(zip(graph.outputs, promised, strict=True)):
        if value in outputs or value.producer() is None:
            graph.outputs[index] = value = copied(graph, value)
        outputs.append(value)
        value.name = name
    inner = [value for node in graph for value in node.outputs if value not in outputs]
    for value in inner:
        if value.name in promised:
            value.name = None  # the pass that follows finds another one


def _transpose_in_gemm(model: ir.Model) -> None:
    """Gemm reads a transposed matrix itself: a Linear layer is one node with PyTorch's own weight."""
    for node in list(model.graph):
        if node.op_type != "Gemm":
            continue
        for index, name in ((0, "transA"), (1, "transB")):
            value = node.inputs[index]
            source = value.producer() if value is not None else None
            if source is None or source.op_type != "Transpose" or source.inputs[0] is None:
                continue
            perm = source.attributes.get("perm")
            if perm is not None and list(perm.as_ints()) != [1, 0]:
                continue
            old = node.attributes.get(name)
            node.replace_input_with(index, source.inputs[0])
            node.attributes[name] = ir.AttrInt64(name, 1 - (old.as_int() if old is not None else 0))
    passes.RemoveUnusedNodesPass()(model)


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
    """Strict onnx.checker and full shape inference, for models below protobuf's 2 GB.

    Raises:
        VerificationError: Not a valid model; a translation passed in by the caller can do that.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(
            f"the exported model is no valid ONNX model: {in_one_line(error)}. If custom_translation_table or "
            "decompositions were passed, look there first. Nothing was written."
        ) from error
