"""Forward-mode derivatives of operators that take dual numbers and tensors without a tangent, over dynamic sizes.

PyTorch reads the sizes of such a tensor as Python numbers in a concatenation, which fixes a dynamic batch, and its
storage where a slice of it is written to, which has none in a trace. Both leave a tensor alone that has a tangent. The
tangent of a Python number that meets a dual one is on the device meta, which fixes a batch, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import eager_transforms, pyfunctorch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from convgrad_export.errors import CaptureError

from .places import present_place

_JOINING = {
    *(torch.cat, torch.concat, torch.concatenate, torch.stack),
    *(torch.hstack, torch.vstack, torch.row_stack, torch.dstack, torch.column_stack),
}
_ARITHMETIC = {
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "rsub"),
    *("__rsub__", "__rdiv__", "__rtruediv__", "add_", "sub_", "subtract_", "mul_", "multiply_", "div_", "divide_"),
}


def with_tangents(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """`args` of a call with a tangent of zeros where one is missing; a tensor that is written to gets its own.

    Raises:
        CaptureError: a view of a tensor without a tangent is changed in place.
    """
    if func in _JOINING and args:
        dual = _first_dual(args[0])
        return args if dual is None else ([_with_tangent(each, dual) for each in args[0]], *args[1:])
    if args and isinstance(args[0], Tensor) and _writes(func):
        _give_tangent(args[0], [*args[1:], *kwargs.values()])
    if len(args) == 2 and not eager_transforms.JVP_NESTING and getattr(func, "__name__", "") in _ARITHMETIC:
        return args[0], _as_tensor(args[1], args[0])
    return args


def _as_tensor(value: Any, other: Any) -> Any:
    """A number that meets a dual one; what is none as it is."""
    of_numbers = isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and isinstance(other, Tensor)
    if not of_numbers or not other.dtype.is_floating_point or not _has_tangent(other):
        return value
    number = torch.scalar_tensor(value, dtype=other.dtype, device=other.device)
    return number.reshape(1) if other.dim() else _zero_tangent(number, other)


def _writes(func: Any) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _give_tangent(written: Tensor, others: list[Any]) -> None:
    dual = _first_dual(others)
    if dual is None or _has_tangent(written) or not (_is_open(written) or _is_open(dual)):
        return
    if written._is_view():
        raise CaptureError(
            f"{present_place()}: a view of a tensor is changed in place (y[:, 1:] += x), which PyTorch does not trace "
            "there over a dynamic size. Assign to the part of the tensor: y[:, 1:] = y[:, 1:] + x"
        )
    written.copy_(_zero_tangent(written, dual))


def _first_dual(values: Any) -> Tensor | None:
    return next((each for each in pytree.tree_leaves(values) if isinstance(each, Tensor) and _has_tangent(each)), None)


def _has_tangent(x: Tensor) -> bool:
    """In one of the transforms that a call is in: that of torch.func.grad inside torch.func.jvp has none."""
    if forward_ad.unpack_dual(x).tangent is not None:
        return True
    level, top = _functorch.maybe_get_level(x), _functorch.maybe_current_level()
    if level is None or level < 1 or top is None:
        return False
    inner = _functorch.get_unwrapped(x) if level == top else x
    with pyfunctorch.temporarily_pop_interpreter_stack():
        return _has_tangent(inner)


def _is_open(x: Tensor) -> bool:
    return any(not isinstance(size, int) for size in x.shape)


def _with_tangent(x: Tensor, dual: Tensor) -> Tensor:
    return x if _has_tangent(x) or not _is_open(x) else _zero_tangent(x, dual)


def _zero_tangent(x: Tensor, dual: Tensor) -> Tensor:
    """`x`, by a choice of nothing from a dual number."""
    if not x.dtype.is_floating_point:
        return x
    return torch.where(torch.zeros([], dtype=torch.bool, device=x.device), dual.sum().to(x.dtype), x)
