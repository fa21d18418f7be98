"""Fake tensors that stand for a trace's inputs, and the sizes of their dynamic dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from convgrad_export.errors import DeviceError, DynamicShapeError
from convgrad_export.integrations.places import present_place
from convgrad_export.integrations.program import GraphInput


class TracedSizes(ShapeEnv):
    """The constraints on dynamic sizes, and where in the traced code each became a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed_at: dict[str, str] = {}  # by the number

    def _set_replacement(self, a: Any, tgt: Any, *reason: Any) -> None:
        if not tgt.free_symbols and str(tgt) not in self.fixed_at:
            self.fixed_at[str(tgt)] = present_place()
        super()._set_replacement(a, tgt, *reason)


def narrowed_by_autograd(shape_env: ShapeEnv) -> bool:
    """Whether the trace holds for some sizes only (odd ones, say) by a derivative that PyTorch computed."""
    return any(
        isinstance(guard.expr, sympy.Eq) and _engine_run_backward.__name__ in str(guard.sloc)
        for guard in shape_env.guards
    )


def require_data(inputs: Sequence[GraphInput]) -> None:
    """Before a trace, which does not read the data that the model's file will hold.

    Raises:
        DeviceError: A tensor is on the "meta" device.
    """
    names = [spec.name for spec in inputs if spec.value.is_meta]
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise DeviceError(
            f"{', '.join(names[:4])}{more}: on the device 'meta', which holds no values, expected the CPU; move the "
            "module with to_empty(device='cpu') and load its state_dict, and make the example there"
        )


def fake_inputs(inputs: Sequence[GraphInput], mode: FakeTensorMode) -> list[torch.Tensor]:
    _refuse_two_sizes(inputs)
    fakes: list[torch.Tensor] = []
    first_of: dict[str, Any] = {}  # SymInt
    for spec in inputs:
        example = spec.value
        if example.is_inference():  # made under torch.inference_mode: autograd takes a copy only
            example = example.detach().clone().requires_grad_(example.requires_grad)
        if spec.kind == "user":
            # One tensor has one fake. The same tensor given twice, or held by the module too, is still another input.
            example = example.detach().requires_grad_(example.requires_grad)
        if not spec.dynamic:
            fakes.append(mode.from_tensor(example, static_shapes=True))
            continue
        sizes = [DimDynamic.DYNAMIC if a in spec.dynamic else DimDynamic.STATIC for a in range(spec.value.ndim)]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        fake = mode.from_tensor(_with_general_sizes(example, spec.dynamic), symbolic_context=context)
        for axis, label in spec.dynamic.items():
            size: Any = fake.shape[axis]
            if label in first_of:
                torch._check(size == first_of[label])
            else:
                first_of[label] = size
        fakes.append(fake)
    return fakes


def _refuse_two_sizes(inputs: Sequence[GraphInput]) -> None:
    found: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        for axis, label in spec.dynamic.items():
            size, first = found.setdefault(label, (spec.value.shape[axis], spec.name))
            if spec.value.shape[axis] != size:
                raise DynamicShapeError(
                    f"dimension {label!r} is {spec.value.shape[axis]} in {spec.name!r} and {size} in {first!r}: one "
                    "name is one size"
                )


def _with_general_sizes(example: torch.Tensor, dynamic: Mapping[int, str]) -> torch.Tensor:
    """The example, or zeros with 2 for a dynamic size of 0 or 1: fake tensors read no data, only sizes."""
    shape = [max(size, 2) if axis in dynamic else size for axis, size in enumerate(example.shape)]
    if shape == list(example.shape):
        return example
    general = torch.zeros(shape, dtype=example.dtype, device=example.device)
    return general.requires_grad_(example.requires_grad)


def check_dynamic(
    inputs: Sequence[GraphInput], fakes: Sequence[torch.Tensor], shape_env: TracedSizes
) -> dict[str, Any]:
    """Each dynamic dimension's name and what tracing found it to be: a symbol, or an expression of others."""
    dimensions: dict[str, Any] = {}
    for spec, fake in zip(inputs, fakes, strict=True):
        for axis, label in spec.dynamic.items():
            size = fake.shape[axis]
            expression = size.node.expr if isinstance(size, torch.SymInt) else size
            if not getattr(expression, "free_symbols", None):
                place = shape_env.fixed_at.get(str(expression))
                raise DynamicShapeError(
                    f"dimension {axis} of {spec.name!r} was declared dynamic ({label!r}), but the forward only works "
                    f"for size {expression}{f': it is fixed {place}' if place else ''}. Declare it static, or "
                    "remove what fixes it: int() or range() of a size, a loop over the tensor, torch.func.vmap over "
                    "the dimension, a recurrent layer along it, an operator that PyTorch traces for fixed sizes only"
                )
            dimensions.setdefault(label, expression)
    return dimensions
