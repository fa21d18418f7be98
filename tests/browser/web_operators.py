"""Measure which standard operators onnxruntime-web loads: `python -m tests.browser.web_operators` (under a minute).

One model a question: one node, its inputs as graph inputs without shapes, graph optimisations off. The answer is the
error of InferenceSession.create, or none. Writes convgrad_export/web_operators.json.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from onnx.defs import OpSchema

from convgrad_export.web_target import ANY

from .node_runner import HERE, run_script

TABLE = HERE.parents[1] / "convgrad_export" / "web_operators.json"
FIRST_OPSET = 13
_CODES = {name.lower(): number for name, number in TensorProto.DataType.items()}
_FIRST_CHOICES = ("float", "int64", "int32", "bool", "double", "string", "uint8")
_ATTRIBUTES = {
    ("Einsum", "equation"): "ij,jk->ik",
    ("DepthToSpace", "mode"): "DCR",
    ("RegexFullMatch", "pattern"): "a",
    ("BitShift", "direction"): "LEFT",
}
_VALUES: Mapping[str, Any] = {"INT": 1, "FLOAT": 1.0, "STRING": "x", "INTS": [1, 1], "FLOATS": [1.0, 1.0]}
Key = tuple[str, int, str, str]  # operator, version, type parameter, tensor type


def try_models(models: list[onnx.ModelProto], runtime: str, timeout: float = 500) -> tuple[str, list[str | None]]:
    """onnxruntime-web's version, and for each model None or why it did not load.

    Args:
        runtime: ``"web"`` or ``"webgpu"``, as in runtime.mjs.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "models.json"
        path.write_text(json.dumps([base64.b64encode(model.SerializeToString()).decode() for model in models]))
        # Without the optimising compiler: Node.js would not end before it is through with 27 MB of WebAssembly.
        answer = run_script(HERE / "try_models.mjs", path, runtime, timeout=timeout, flags=["--liftoff-only"])
        found = json.loads(answer)
    return found["version"], found["answers"]


def verdict(answer: str | None) -> bool | None:
    """Whether the build has the kernel; None where the answer does not tell.

    A kernel that complains about its attributes was found. So was one whose model JavaScript refuses afterwards,
    because a graph input has a type that its tensors lack.
    """
    if answer is None or "unsupported data type" in answer or "core/providers" in answer:
        return True
    if any(text in answer for text in ("Could not find an implementation", "Failed to find kernel", "MLDataType for")):
        return False
    return None


def one_node(
    schema: OpSchema, types: Mapping[str, str], opset: int, ir_version: int | None = None
) -> onnx.ModelProto | None:
    """A model of one node of this operator; None where an attribute or input is of a kind not made here."""
    names: list[str] = []
    values = []
    for index, formal in enumerate(schema.inputs):
        if formal.option == OpSchema.FormalParameterOption.Optional and index >= schema.min_input:
            break
        dtype = types.get(formal.type_str) or _tensor_type(formal.type_str)
        if dtype is None:
            return None
        variadic = formal.option == OpSchema.FormalParameterOption.Variadic
        for number in range(2 if variadic and schema.max_input >= index + 2 else 1):
            names.append(f"i{index}_{number}")
            values.append(helper.make_tensor_value_info(names[-1], _CODES[dtype], None))
    attributes: dict[str, Any] = {}
    for name, attribute in schema.attributes.items():
        if attribute.required:
            value = _ATTRIBUTES.get((schema.name, name), _VALUES.get(attribute.type.name))
            if value is None:
                return None
            attributes[name] = value
    if schema.name in ("GRU", "LSTM", "RNN"):
        attributes["hidden_size"] = 2
    if schema.name == "Constant":
        attributes["value_float"] = 1.0
    if schema.name in ("Cast", "BitCast"):
        attributes["to"] = _CODES[types["T2"]]
    outputs = [f"o{index}" for index in range(max(1, schema.min_output))]
    node = helper.make_node(schema.name, names, outputs, name="node", **attributes)
    graph = helper.make_graph([node], "one", values, [onnx.ValueInfoProto(name=name) for name in outputs])
    version = ir_version or helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version)


def _with_subgraph(name: str, opset: int) -> onnx.ModelProto | None:
    """If with a constant in each branch, Loop that passes a value on; None for other operators."""
    info, float_, bool_, int64 = helper.make_tensor_value_info, TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
    if name == "If":
        constant = helper.make_node("Constant", [], ["c"], value_float=1.0)
        branch = helper.make_graph([constant], "branch", [], [info("c", float_, [])])
        values = [info("condition", bool_, [])]
        node = helper.make_node("If", ["condition"], ["o"], then_branch=branch, else_branch=branch, name="node")
    elif name == "Loop":
        body = helper.make_graph(
            [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["w"])],
            "body",
            [info("i", int64, []), info("c", bool_, []), info("v", float_, [])],
            [info("d", bool_, []), info("w", float_, [])],
        )
        values = [info("trips", int64, []), info("condition", bool_, []), info("v0", float_, [])]
        node = helper.make_node("Loop", ["trips", "condition", "v0"], ["o"], body=body, name="node")
    else:
        return None
    opsets = [helper.make_opsetid("", opset)]
    graph = helper.make_graph([node], "one", values, [info("o", float_, [])])
    return helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))


def _tensor_type(text: str) -> str | None:
    return text[len("tensor(") : -1] if text.startswith("tensor(") else None


def schemas(last_opset: int) -> Iterator[OpSchema]:
    """Every version of every standard operator that some opset from 13 to the last one uses."""
    by_name: dict[str, list[OpSchema]] = defaultdict(list)
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= last_opset:
            by_name[schema.name].append(schema)
    for _, versions in sorted(by_name.items()):
        versions.sort(key=lambda schema: schema.since_version)
        for index, schema in enumerate(versions):
            superseded = index + 1 < len(versions) and versions[index + 1].since_version <= FIRST_OPSET
            if not superseded and not schema.deprecated:
                yield schema


def questions(last_opset: int) -> list[tuple[Key, onnx.ModelProto]]:
    """One model for each operator, version, type parameter and tensor type, the other parameters at a common type."""
    made = []
    for schema in schemas(last_opset):
        allowed = {
            constraint.type_param_str: [t for t in map(_tensor_type, constraint.allowed_type_strs) if t]
            for constraint in schema.type_constraints
        }
        common = {
            name: next((t for t in _FIRST_CHOICES if t in types), types[0]) for name, types in allowed.items() if types
        }
        opset = max(FIRST_OPSET, schema.since_version)
        read = {formal.type_str for formal in schema.inputs} | ({"T2"} if schema.name == "Cast" else set())
        if not read & set(allowed) or schema.name in ("If", "Loop"):
            model = _with_subgraph(schema.name, opset) or one_node(schema, common, opset)
            if model is not None:
                made.append(((schema.name, schema.since_version, ANY, ANY), model))
            continue
        for parameter, types in allowed.items():
            for dtype in types if parameter in read else ():
                model = one_node(schema, {**common, parameter: dtype}, opset)
                if model is not None:
                    made.append(((schema.name, schema.since_version, parameter, dtype), model))
    return made


def limits() -> dict[str, int]:
    """The newest opset and the newest IR version that load."""
    identity = onnx.defs.get_schema("Relu")
    opsets = list(range(FIRST_OPSET, onnx.defs.onnx_opset_version() + 1))
    irs = list(range(8, onnx.IR_VERSION + 1))
    models = [one_node(identity, {"T": "float"}, opset, ir_version=8) for opset in opsets]
    models += [one_node(identity, {"T": "float"}, FIRST_OPSET, ir_version=version) for version in irs]
    _, answers = try_models([model for model in models if model is not None], "web")
    loads = [answer is None for answer in answers]
    return {
        "opset": max(opset for opset, ok in zip(opsets, loads, strict=False) if ok),
        "ir_version": max(version for version, ok in zip(irs, loads[len(opsets) :], strict=True) if ok),
    }


def measure() -> dict[str, Any]:
    """The table: operator -> version -> type parameter -> {"both" | "wasm" | "none": tensor types}."""
    found = limits()
    asked = questions(found["opset"])
    models = [model for _, model in asked]
    version, wasm = try_models(models, "web")
    _, webgpu = try_models(models, "webgpu")
    operators: dict[str, dict[str, dict[str, dict[str, list[str]]]]] = {}
    for ((name, since, parameter, dtype), _), first, second in zip(asked, wasm, webgpu, strict=True):
        answers = verdict(first), verdict(second)
        if None in answers:
            continue
        kind = {(True, True): "both", (True, False): "wasm", (False, False): "none"}.get(answers, "none")
        entry = operators.setdefault(name, {}).setdefault(str(since), {}).setdefault(parameter, {})
        entry.setdefault(kind, []).append(dtype)
    return {"package": "onnxruntime-web", "version": version, "limits": found, "operators": operators}


def main() -> None:
    table = measure()
    operators = table.pop("operators")
    head = json.dumps(table)[1:-1]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(operators.items()))
    TABLE.write_text(f'{{\n {head},\n "operators": {{\n{lines}\n }}\n}}\n')
    print(f"{TABLE.name}: {len(operators)} operators, {TABLE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
