"""From a captured program to an ONNX model: torch.onnx's translations, ours where they are missing, names kept.

torch.onnx.export spends most of its time on re-tracing, type promotion and verification passes. A captured program
needs none of them: it is functional and decomposed already. What is used here is the translation of single nodes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from convgrad_export.arguments import as_int
from convgrad_export.emit.onnx import ir_version
from convgrad_export.errors import ArgumentTypeError, ConvGradError, DTypeError, UnsupportedOperatorError
from convgrad_export.integrations import torchlib
from convgrad_export.integrations.convolution_marks import insert_marks
from convgrad_export.integrations.convolution_translation import (
    ConvolutionBackwardTranslation,
    LoweringChoice,
    convolution_translation,
)
from convgrad_export.integrations.empty_means import nan_of_no_elements
from convgrad_export.integrations.finishing import BASE_OPSET, CONSTANT, MIN_OPSET, copied
from convgrad_export.integrations.float64_constants import keep_in_float64
from convgrad_export.integrations.half_widening import compare_extremes_in_float32, lacks_float16, widen_half
from convgrad_export.integrations.one_at_a_time import ONE_AT_A_TIME
from convgrad_export.integrations.program import CapturedProgram, GraphInput, is_getitem
from convgrad_export.integrations.symbolic_scalars import scalars_to_tensors
from convgrad_export.lowering import CPU, check_provider
from convgrad_export.selection.policy import AUTO
from convgrad_export.selection.reduced_arithmetic import DEFAULT_ERROR_FACTOR
from convgrad_export.tensor_names import inner_name

PRODUCER = "convgrad_export"

_TOP_MODULE = "the top module's own forward"
_TO_TENSOR = torch.ops.aten.scalar_tensor.default
_ASSERTIONS = {
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten._assert_async.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_tensor_metadata.default,
}


@dataclass(frozen=True)
class Translation:
    """An ONNX model, marks and all (`finish` takes them out), and what each convolution gradient in it became."""

    model: ir.Model
    choices: tuple[LoweringChoice, ...]


def translation_table(
    *, lowering: str = AUTO, provider: str = CPU, opset_version: int = BASE_OPSET
) -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export(..., dynamo=True, custom_translation_table=cg.translation_table())`.

    Args:
        lowering: "auto", or a catalogue name that every convolution of the model must allow.
        provider: The execution provider the lowerings are chosen for.
        opset_version: The version passed to torch.onnx.export.

    Returns:
        ATen overload to translation function: `aten.convolution_backward` alone. What torch.onnx translates wrongly in
        training graphs (see `decompositions.py`) is repaired by `export`, not by this table.

    Raises:
        ArgumentTypeError: an opset that is no number, or below 13. UnsupportedLoweringError: an unknown lowering.
        ProviderError: `provider` is not the name of an execution provider.
    """
    if as_int(opset_version, "opset_version") < MIN_OPSET:
        raise ArgumentTypeError(f"opset_version is {opset_version}, expected at least {MIN_OPSET}")
    check_provider(provider)
    return {
        torch.ops.aten.convolution_backward.default: ConvolutionBackwardTranslation(
            lowering, provider, min(opset_version, BASE_OPSET)
        ).function
    }


def translate(
    program: CapturedProgram,
    *,
    lowering: str = AUTO,
    provider: str = CPU,
    opset: int = BASE_OPSET,
    custom: Mapping[Any, Callable[..., Any]] | None = None,
    as_inputs: Callable[[GraphInput], bool] = lambda spec: spec.kind == "user",
    threads: int | None = None,
    max_error_factor: float = DEFAULT_ERROR_FACTOR,
) -> Translation:
    """Translate every node; parameters, buffers and constants become initializers under their names.

    Args:
        program: Captured with `onnx_decompositions()`. Its graph is changed in place.
        lowering: "auto" or a catalogue name, for every convolution gradient.
        provider: The execution provider to choose lowerings for.
        opset: The version the model will be converted to.
        custom: Further translations by ATen overload, which take precedence.
        as_inputs: Which graph inputs become model inputs; a training step also takes parameters and buffers.
        threads: That will run the model, for the choice of lowerings; None for onnxruntime's default.
        max_error_factor: What "auto" may take, in units of the direct form's error bound.

    Raises:
        UnsupportedOperatorError: Operators without a translation, all of them, with the modules that call them.
        DTypeError: bfloat16 parameters that would be inputs of the model.
    """
    from torch.onnx._internal.exporter import _core, _errors, _fx_passes, _ir_passes

    _refuse_bfloat16_parameters(program, as_inputs)
    graph = program.graph_module.graph
    for node in [n for n in graph.nodes if n.target in _ASSERTIONS]:
        graph.erase_node(node)
    nan_of_no_elements(graph)
    scalars_to_tensors(graph)
    compare_extremes_in_float32(program.graph_module)
    widen_half(program.graph_module, lacks_float16)
    for node in graph.nodes:
        node.meta.setdefault("nn_module_stack", {"0": ("", torch.nn.Module)})  # else torch.onnx logs a line a node
    oldest = min(opset, BASE_OPSET)
    convolution = ConvolutionBackwardTranslation(lowering, provider, oldest, threads, max_error_factor)
    registry = torchlib.registry()
    forward = torch.ops.aten.convolution.default
    own = registry.get_decomps(forward)[0].onnx_function
    trained = any(spec.kind == "parameter" and as_inputs(spec) for spec in program.inputs)
    own = convolution_translation(
        own, provider, threads, max_error_factor, convolution.marks, trained=trained, opset=oldest
    )
    registry.register_op(forward, own)
    registry.register_op(torch.ops.aten.convolution_backward.default, convolution.function)
    for target, function in (custom or {}).items():
        registry.register_op(target, function)
    refuse_untranslatable(program, registry.is_registered)
    if _mixes_dtypes(graph):
        _fx_passes.insert_type_promotion_nodes(program.graph_module)
        graph = program.graph_module.graph
    keep_in_float64(registry, graph)
    model = ir.Model(ir.Graph([], [], nodes=[], name="main"), ir_version=ir_version(BASE_OPSET), producer_name=PRODUCER)
    try:
        with ONE_AT_A_TIME, torchlib.without_hints():
            values = _core._translate_fx_graph(
                graph, model, graph_like=model.graph, owned_graphs={}, lower="at_conversion", registry=registry
            )
    except _errors.ConversionError as error:
        cause = _root_cause(error)
        if isinstance(cause, ConvGradError):  # a lowering that does not apply, say, and no operator that is missing
            raise type(cause)(f"{cause}. Nothing was written.") from error
        raise UnsupportedOperatorError(f"{_describe_failed(graph, error, cause)} Nothing was written.") from error
    _name_inputs(program, model, values, as_inputs)
    _name_outputs(program, model, values)
    _name_dimensions(program, model)
    insert_marks(model, convolution.marks)
    _ir_passes.add_opset_imports(model)
    return Translation(model, tuple(convolution.choices))


def _refuse_bfloat16_parameters(program: CapturedProgram, as_inputs: Callable[[GraphInput], bool]) -> None:
    names = [
        spec.name
        for spec in program.inputs
        if spec.kind == "parameter" and as_inputs(spec) and spec.value.dtype == torch.bfloat16
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise DTypeError(
            f"parameters {', '.join(names[:3])}{more} are bfloat16, expected float32, float64 or float16: onnxruntime "
            "has no bfloat16 kernels to train with on the CPU, and bfloat16 loses an optimizer's small changes. Train "
            "in float32 (module.float()), or take gradients alone with export_gradient. Nothing was written."
        )


def _describe_failed(graph: torch.fx.Graph, error: Exception, cause: BaseException) -> str:
    """The operator, the module that calls it and the reason, for a node whose translation refused its arguments."""
    text = f"{type(cause).__name__}: {cause}".replace("\n", " ").rstrip(".")
    named = re.search(r"translating node %(\w+)", str(error))
    node = next((n for n in graph.nodes if named is not None and n.name == named[1]), None)
    if node is None:
        return f"{str(error).partition('See the stack trace')[0].strip()} {text}."
    place = f"{node.target}, called by {node.meta.get('nn_module_path') or _TOP_MODULE},"
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    if any(isinstance(value, torch.Tensor) and value.is_complex() for value in values):
        return (
            f"{place} computes with complex numbers, of which ONNX has none, and torch.onnx has no translation for it. "
            "Compute the real and the imaginary part apart (torch.view_as_real), or with real operators (a "
            "convolution with the rows of a DFT matrix)."
        )
    if "Unsupported attribute type" in text and (computed := _computed_numbers(node)):
        return (
            f"{place} takes a number that depends on a dynamic size or on a tensor's values ({', '.join(computed)}), "
            "where ONNX has an attribute, which is a constant. Declare the dimension static, or compute with operators "
            "that take a tensor there."
        )
    return f"{place} has no ONNX translation for its arguments here: {text}."


def _computed_numbers(node: torch.fx.Node) -> list[str]:
    """The names of arguments, or of what they hold, that are numbers which the graph computes."""
    schema: Any = getattr(node.target, "_schema", None)
    named = [*zip([a.name for a in schema.arguments], node.args, strict=False), *node.kwargs.items()] if schema else []

    def is_computed(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(is_computed(item) for item in value)
        kinds = (torch.SymInt, torch.SymFloat)
        return isinstance(value, torch.fx.Node) and isinstance(value.meta.get("val"), kinds)

    return [name for name, value in named if is_computed(value)]


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def refuse_untranslatable(program: CapturedProgram, is_registered: Callable[[Any], bool]) -> None:
    """Raise one error with every operator that cannot be translated."""
    _refuse_changed_parameters(program)
    missing: dict[str, Counter[str]] = {}
    for node in program.graph_module.graph.nodes:
        if node.op != "call_function" or is_registered(node.target) or is_getitem(node):
            continue
        module = node.meta.get("nn_module_path") or _TOP_MODULE
        missing.setdefault(str(node.target), Counter())[module] += 1
    if not missing:
        return
    lines = []
    for target, modules in sorted(missing.items()):
        shown = [f"{name} ({count}x)" if count > 1 else name for name, count in modules.most_common(4)]
        more = f" and {len(modules) - 4} more" if len(modules) > 4 else ""
        lines.append(f"  {target}: called by {', '.join(shown)}{more}")
    raise UnsupportedOperatorError(
        f"{len(missing)} operator(s) of this model have no ONNX translation:",
        *lines,
        "Nothing was written. Replace the operators in the named modules, or give export and export_gradient "
        "decompositions={overload: function}.",
    )


def _refuse_changed_parameters(program: CapturedProgram) -> None:
    """A trace ends in copies to the parameters that the forward wrote to; those of a training step are its state."""
    graph = program.graph_module.graph
    specs = dict(zip([n for n in graph.nodes if n.op == "placeholder"], program.inputs, strict=True))
    copies = [node.args[0] for node in graph.nodes if node.target is torch.ops.aten.copy_.default]
    names = [specs[node].name for node in copies if node in specs and specs[node].kind == "parameter"]
    if names:
        raise UnsupportedOperatorError(
            f"the forward changes {', '.join(names[:3])} in place (as an Embedding with max_norm does), and parameters "
            "are constants of an exported model. Change them once before the export and leave it out of the forward, "
            "or export a training step, whose state they are. Nothing was written."
        )


_PROMOTING = {
    *("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "remainder", "fmod", "floor_divide", "atan2"),
    *("eq", "ne", "lt", "le", "gt", "ge", "where", "lerp", "addcmul", "addcdiv", "clamp", "clamp_min", "clamp_max"),
    *("sqrt", "rsqrt", "exp", "log", "log2", "log1p", "expm1", "sin", "cos", "tan", "tanh", "sigmoid", "reciprocal"),
    *("erf", "square", "hypot", "xlogy", "logaddexp", "asin", "acos", "atan", "sinh", "cosh", "mean", "logit"),
    "mse_loss",
}


def _mixes_dtypes(graph: torch.fx.Graph) -> bool:
    """Whether some elementwise call relies on PyTorch's implicit type promotion. Few graphs have one.

    A call that is missed here gives a model with mixed operand types, which no checker and no runtime accepts.
    """
    for node in graph.nodes:
        name = getattr(node.target, "_opname", "") if node.op == "call_function" else ""
        if name not in _PROMOTING:
            continue
        arguments = node.args[1:] if name == "where" else node.args
        values = [a.meta.get("val") if isinstance(a, torch.fx.Node) else a for a in arguments]
        dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor)}
        if len(dtypes) > 1:
            return True
        result = node.meta.get("val")
        if dtypes and isinstance(result, torch.Tensor) and result.dtype != torch.bool and result.dtype not in dtypes:
            return True
        if any(isinstance(v, torch.SymInt) for v in values) and any(d.is_floating_point for d in dtypes):
            return True
        has_float = any(isinstance(v, (float, torch.SymFloat)) for v in values)
        if has_float and dtypes and not next(iter(dtypes)).is_floating_point:
            return True
    return False


def _name_inputs(
    program: CapturedProgram, model: ir.Model, values: Mapping[str, Any], as_inputs: Callable[[GraphInput], bool]
) -> None:
    """Model inputs are the user's, in order; everything else becomes an initializer."""
    placeholders = [node for node in program.graph_module.graph.nodes if node.op == "placeholder"]
    model.graph.inputs.clear()
    for node, spec in zip(placeholders, program.inputs, strict=True):
        value = values[node.name]
        value.name = spec.name
        if isinstance(node.meta["val"], torch.SymFloat) and all(user.target is _TO_TENSOR for user in node.users):
            value.dtype = ir.DataType.DOUBLE  # of a Cast alone, which rounds to what the number meets
        if as_inputs(spec):
            model.graph.inputs.append(value)
            continue
        if spec.kind == "constant":
            value.meta[CONSTANT] = True
        value.const_value = tensor_of(spec.value, spec.name)
        model.graph.initializers[spec.name] = value
    _rename_inner(model)


def _rename_inner(model: ir.Model) -> None:
    """Another name for each result that is called as an input or a parameter is: folded, it would be a second one."""
    given = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    used = given.union(value.name for value in _all_values(model))
    for value in _all_values(model):
        if value.name in given:
            value.name = inner_name(str(value.name), used)
            used.add(value.name)


def tensor_of(tensor: torch.Tensor, name: str) -> ir.TensorProtocol:
    """A torch tensor as an onnx_ir tensor that shares its memory where it can."""
    from torch.onnx._internal.exporter import _core

    return _core.TorchTensor(tensor.detach().contiguous(), name=name)


def _name_outputs(program: CapturedProgram, model: ir.Model, values: Mapping[str, Any]) -> None:
    """Outputs under their own names. A value that is an input, or an output already, goes through Identity."""
    (output,) = [node for node in program.graph_module.graph.nodes if node.op == "output"]
    model.graph.outputs.clear()
    taken = {v.name for v in model.graph.inputs} | set(model.graph.initializers)
    internal = {value.name: value for value in _all_values(model)}
    for node, spec in zip(output.args[0], program.outputs, strict=True):
        value = values[node.name]
        if not isinstance(value, ir.Value):
            raise AssertionError(f"output {spec.name} is no single value")
        name = spec.name if spec.name not in taken else f"{spec.name}_output"
        if value in model.graph.outputs or value.producer() is None:
            value = copied(model.graph, value)
        clash = internal.get(name)
        if clash is not None and clash is not value and clash.name == name:  # it may be an output by now
            clash.name = f"{name}_inner"
        value.name = name
        internal[name] = value
        taken.add(name)
        model.graph.outputs.append(value)


def _all_values(model: ir.Model) -> list[ir.Value]:
    return [output for node in model.graph for output in node.outputs]


def _name_dimensions(program: CapturedProgram, model: ir.Model) -> None:
    """Write "batch" instead of the tracer's "s77"; inner values keep integers only, checkers infer the rest."""
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is None:
            continue
        value.shape = ir.Shape([_dimension(program, dim) for dim in value.shape])
    for value in _all_values(model):
        if value.shape is not None and value not in model.graph.outputs:
            value.shape = ir.Shape([dim if isinstance(dim, int) else _dimension(program, dim) for dim in value.shape])


def _dimension(program: CapturedProgram, dim: Any) -> Any:
    if isinstance(dim, int) or getattr(dim, "value", None) is None:
        return dim
    return re.sub(r"\bs\d+\b", lambda match: program.symbol_names.get(match[0], match[0]), str(dim.value))
