"""What an export did: operators, lowerings, measured errors, sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from convgrad_export.integrations.convolution_translation import LoweringChoice


@dataclass(frozen=True)
class OutputError:
    """How far onnxruntime's result is from float64 eager, over all inputs tried.

    Attributes:
        relative: ||onnxruntime - float64|| / ||float64||, Euclidean norms, the largest over the inputs.
        bound: What it had to stay below on that input; see `verification.py`.
        maximum: Largest absolute difference of one element.
        cancelled: The result is zero but for rounding (the gradient of a bias before a normalization, say); `relative`
            and `bound` then refer to the size of the terms that cancel.
    """

    relative: float
    bound: float
    maximum: float
    cancelled: bool = False

    @property
    def within(self) -> bool:
        """False for not-a-number as well."""
        return self.relative <= self.bound

    def described(self, name: str) -> str:
        """As the worst of a report."""
        of = ", of the terms that cancel" if self.cancelled else ""
        return f"worst relative error {self.relative:.1e} ({name}), bound {self.bound:.1e}{of}"


@dataclass
class ExportReport:
    """Returned by `cg.export` and `cg.export_gradient`.

    Attributes:
        path: The file, None when none was asked for.
        opset: Version of the standard operators.
        inputs, outputs: Names to shapes, symbolic dimensions by name.
        operators: Node count by operator.
        lowerings: One entry for each convolution gradient in the model.
        errors: By output name; empty without verification.
        verified_sizes: The dynamic dimensions' sizes that were run, one mapping per run.
        sizes: Bytes: "weights", "graph" (everything else), "files" (what was written).
        seconds: Time spent in each step.
        notes: What the caller should know (an output that is random and was not compared, say).
        model: The model itself.
    """

    path: Path | None
    opset: int
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    operators: dict[str, int]
    lowerings: tuple[LoweringChoice, ...]
    model: ir.Model = field(repr=False)
    errors: dict[str, OutputError] = field(default_factory=dict)
    verified_sizes: list[dict[str, int]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def model_proto(self) -> onnx.ModelProto:
        """The model as a protobuf; refused by protobuf itself above 2 GB."""
        return ir.to_proto(self.model)

    @property
    def verified(self) -> bool:
        return bool(self.errors)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, in types that JSON has."""
        counts = Counter((choice.gradient, choice.geometry, choice.lowering) for choice in self.lowerings)
        return {
            "path": str(self.path) if self.path is not None else None,
            "opset": self.opset,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "operators": self.operators,
            "lowerings": [
                {"gradient": gradient, "geometry": geometry, "lowering": lowering, "count": count}
                for (gradient, geometry, lowering), count in counts.items()
            ],
            "errors": {name: asdict(error) for name, error in self.errors.items()},
            "verified_sizes": self.verified_sizes,
            "sizes": self.sizes,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [f"{self.path or 'model'}: opset {self.opset}, {sum(self.operators.values())} nodes"]
        lines += [f"  {key}: {value:,} bytes" for key, value in self.sizes.items()]
        chosen = Counter(choice.lowering for choice in self.lowerings)
        lines += [f"  {count}x {name}" for name, count in chosen.most_common()]
        if self.errors:
            name, worst = max(self.errors.items(), key=lambda item: item[1].relative / item[1].bound)
            lines.append(f"  verified: {worst.described(name)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def describe(model: ir.Model) -> dict[str, Any]:
    """The parts of a report that are read off the model."""

    def shapes(values: Any) -> dict[str, list[Any]]:
        return {
            value.name: [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()] for value in values
        }

    return {
        "inputs": shapes(model.graph.inputs),
        "outputs": shapes(model.graph.outputs),
        "operators": dict(Counter(node.op_type for node in model.graph).most_common()),
    }


def weight_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def merged(first: Mapping[str, OutputError], second: Mapping[str, OutputError]) -> dict[str, OutputError]:
    """The worse of two runs, output by output, measured against each run's own bound."""
    result = dict(first)
    for name, error in second.items():
        kept = result.get(name)
        if kept is None or error.relative / error.bound > kept.relative / kept.bound:
            result[name] = error
    return result
