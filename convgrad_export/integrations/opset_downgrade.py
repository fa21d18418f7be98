"""From opset 18, at which graphs are translated, down to 13: operator by operator, by the ONNX change log.

Only what really changed is rewritten. A node that has no equivalent at the target is refused, with all others of its
kind, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from convgrad_export.errors import UnsupportedOperatorError

# First opset that has the operator at all.
_INTRODUCED = {
    **dict.fromkeys(("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im", "Mish"), 18),
    **dict.fromkeys(("GroupNormalization", "OptionalGetElement", "OptionalHasElement"), 18),
    **dict.fromkeys(("BlackmanWindow", "DFT", "HammingWindow", "HannWindow", "LayerNormalization", "STFT"), 17),
    **dict.fromkeys(("SequenceMap",), 17),
    **dict.fromkeys(("GridSample",), 16),
    **dict.fromkeys(("Bernoulli", "CastLike", "Optional"), 15),
    **dict.fromkeys(("HardSwish", "Trilu"), 14),
}
_REDUCTIONS = {
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSumSquare"),
}


class _InexpressibleError(Exception):
    """A node has no form at the target opset; the text says why."""


def downgrade(model: ir.Model, target: int) -> None:
    """Rewrite a model of opset 18 in place to `target`, 13 to 17.

    Raises:
        UnsupportedOperatorError: Nodes that need a newer opset, by operator, with the opset they need.
    """
    problems: dict[str, int] = {}
    likes = [node.inputs[1] for node in model.graph if node.op_type == "CastLike"]
    if any(value is not None and value.dtype is None for value in likes):
        ShapeInferencePass()(model)
    for node in list(model.graph):
        try:
            if _INTRODUCED.get(node.op_type, 0) > target:
                replacement = _REPLACED.get(node.op_type)
                if replacement is None:
                    raise _InexpressibleError(f"{node.op_type} (opset {_INTRODUCED[node.op_type]})")
                replacement(model, node)
            else:
                _rewrite(model, node, target)
        except _InexpressibleError as reason:
            problems[str(reason)] = problems.get(str(reason), 0) + 1
    if problems:
        listed = ", ".join(f"{count}x {reason}" for reason, count in sorted(problems.items()))
        raise UnsupportedOperatorError(f"the model cannot be written at opset {target}: it needs {listed}")
    for node in model.graph:
        if node.version is not None:
            node.version = target
    model.opset_imports[""] = target


def _rewrite(model: ir.Model, node: ir.Node, target: int) -> None:
    if node.op_type in _REDUCTIONS:
        _axes_to_attribute(node)
    elif node.op_type == "Split" and "num_outputs" in node.attributes:
        _equal_split(node)
    elif node.op_type == "Pad" and len(node.inputs) > 3 and node.inputs[3] is not None:
        raise _InexpressibleError("Pad with axes (opset 18)")
    elif node.op_type in ("ScatterElements", "ScatterND") and "reduction" in node.attributes:
        reduction = node.attributes["reduction"].as_string()
        needed = {"none": 0, "add": 16, "mul": 16}.get(reduction, 18)
        if needed > target:
            raise _InexpressibleError(f"{node.op_type} with reduction {reduction} (opset {needed})")
        if target < 16:
            del node.attributes["reduction"]
    elif node.op_type == "Resize":
        for name, default in (("antialias", 0), ("keep_aspect_ratio_policy", "stretch")):
            _drop_default(node, name, default, 18)
        if "axes" in node.attributes:
            raise _InexpressibleError("Resize with axes (opset 18)")
    elif node.op_type == "Reshape" and target < 14:
        _drop_allowzero(node)
    elif node.op_type in ("GRU", "LSTM", "RNN") and target < 14:
        _drop_default(node, "layout", 0, 14)
    elif node.op_type == "BatchNormalization" and target < 14:
        _drop_default(node, "training_mode", 0, 14)
    elif node.op_type == "Shape" and target < 15:
        _shape_with_slice(model, node)


def _drop_default(node: ir.Node, name: str, default: int | str, introduced: int) -> None:
    if name in node.attributes:
        if node.attributes[name].value != default:
            raise _InexpressibleError(f"{node.op_type} with {name}={node.attributes[name].value} (opset {introduced})")
        del node.attributes[name]


def _drop_allowzero(node: ir.Node) -> None:
    """allowzero only matters for a shape with a zero in it; a computed shape has one for empty tensors alone."""
    if "allowzero" in node.attributes:
        shape = node.inputs[1]
        if shape is not None and shape.const_value is not None and (shape.const_value.numpy() == 0).any():
            _drop_default(node, "allowzero", 0, 14)
        node.attributes.pop("allowzero", None)


def _constant_of(value: ir.Value | None, what: str) -> np.ndarray:
    if value is not None and value.const_value is not None:
        return value.const_value.numpy()
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Constant":
        for name in ("value", "value_ints", "value_int"):
            if name in producer.attributes:
                raw = producer.attributes[name].value
                return raw.numpy() if name == "value" else np.atleast_1d(np.array(raw, dtype=np.int64))
    raise _InexpressibleError(what)


def _axes_to_attribute(node: ir.Node) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is not None:
        values = [int(a) for a in np.atleast_1d(_constant_of(axes, f"{node.op_type} with computed axes (opset 18)"))]
        node.attributes.add(ir.AttrInt64s("axes", values))
    elif "noop_with_empty_axes" in node.attributes and node.attributes["noop_with_empty_axes"].as_int():
        raise _InexpressibleError(f"{node.op_type} without axes that does nothing (opset 18)")
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)


def _equal_split(node: ir.Node) -> None:
    count = node.attributes["num_outputs"].as_int()
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    size = shape[axis] if shape is not None else None
    if not isinstance(size, int) or size % count:
        raise _InexpressibleError("Split into unequal parts (opset 18)")
    del node.attributes["num_outputs"]


def _shape_with_slice(model: ir.Model, node: ir.Node) -> None:
    """Shape(start, end) as Shape and Slice."""
    if "start" not in node.attributes and "end" not in node.attributes:
        return
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else np.iinfo(np.int64).max
    for name in ("start", "end"):
        node.attributes.pop(name, None)
    result = node.outputs[0]
    whole = ir.node("Shape", node.inputs)
    bounds = [_integers(model, result, suffix, [value]) for suffix, value in (("start", start), ("end", int(end)))]
    part = ir.node("Slice", [whole.outputs[0], *bounds])
    _replace(model, node, [whole, part], part.outputs[0])


def _integers(model: ir.Model, result: ir.Value, suffix: str, values: list[int]) -> ir.Value:
    name = f"{result.name}_{suffix}"
    tensor = ir.tensor(np.array(values, dtype=np.int64), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(values)]), const_value=tensor)
    model.graph.initializers[name] = value
    return value


def _replace(model: ir.Model, node: ir.Node, new_nodes: list[ir.Node], new_value: ir.Value) -> None:
    old = node.outputs[0]
    new_value.type, new_value.shape = old.type, old.shape
    for index, inner in enumerate(new_nodes):
        for output in inner.outputs:
            if output is not new_value:
                output.name = f"{old.name}_step{index}"
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], new_nodes, [old], [new_value])


def _cast_like(model: ir.Model, node: ir.Node) -> None:
    like = node.inputs[1]
    if like is None or like.dtype is None:
        raise _InexpressibleError("CastLike of unknown type (opset 15)")
    cast = ir.node("Cast", [node.inputs[0]], {"to": int(like.dtype)})
    _replace(model, node, [cast], cast.outputs[0])


def _hard_swish(model: ir.Model, node: ir.Node) -> None:
    x = node.inputs[0]
    gate = ir.node("HardSigmoid", [x], {"alpha": 1.0 / 6.0, "beta": 0.5})
    product = ir.node("Mul", [x, gate.outputs[0]])
    _replace(model, node, [gate, product], product.outputs[0])


_REPLACED: dict[str, Callable[[ir.Model, ir.Node], None]] = {"CastLike": _cast_like, "HardSwish": _hard_swish}
