"""What rounding does to a PyTorch function: float64 runs in which every operator rounds at random, coarsely.

Monte Carlo arithmetic (Parker, 1997): each element of an operator's result that the model's own type cannot hold
exactly is moved by a random part of itself. Two or three such runs show how far the rounding inside the operators,
whichever way it falls, moves the function's results. They see what moving the inputs alone does not: a ReLU or a max
pooling deep inside that is as good as tied, and sums that cancel (the gradient of a bias before a normalization is zero
but for rounding, and its rounding has the size of what cancels).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_PLACES = 4096
# Of the last place, by which results are moved that are in a coarser type than the amount.
_UNITS = 4.0
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.lift_fresh_copy.default)
# Kernels that subtract means inside, where no rounding would be seen: a sum of what they return cancels.
_TAKEN_APART = get_decompositions([
    torch.ops.aten.native_batch_norm_backward,
    torch.ops.aten.native_layer_norm_backward,
    torch.ops.aten.native_group_norm_backward,
    torch.ops.aten._softmax_backward_data,
    torch.ops.aten._log_softmax_backward_data,
])  # fmt: skip
# Operators whose results are elements of an operand, or their magnitudes, which no runtime rounds anew. What compares
# the two (the gradient of a maximum, a mask of the largest ones) finds none that equals a result that moved, and makes
# NaN of that.
_aten = torch.ops.aten
_PICKING = {
    *(_aten.amax, _aten.amin, _aten.aminmax, _aten.max, _aten.min, _aten.median, _aten.nanmedian, _aten.mode),
    *(_aten.cummax, _aten.cummin, _aten.kthvalue, _aten.topk, _aten.sort),
    *(_aten.gather, _aten.index, _aten.index_select, _aten.take, _aten.abs, _aten.neg),
}
# These do where an argument has one of the values: the largest magnitude, the extreme of what falls on a place.
_PICKING_WHERE = {
    _aten.linalg_vector_norm: ("ord", (math.inf, -math.inf)),
    **dict.fromkeys((_aten.scatter_reduce, _aten.scatter_reduce_), ("reduce", ("amax", "amin"))),
}


def _picks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Whether the operator's results are elements of its operands."""
    operator = getattr(func, "overloadpacket", None)
    if operator not in _PICKING_WHERE:
        return operator in _PICKING
    name, values = _PICKING_WHERE[operator]
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
    return given.get(name) in values


class RandomRounding(TorchDispatchMode):
    """While active, operators' floating-point results are moved by up to `amount` of themselves, element by element.

    Elements that `storage` holds exactly stay: zeros, indices, positions on a grid, and whatever else does not round.
    So do those that an operator picks from its operands (a maximum, a sort).
    What a float64 module computes in float32 (a timestep's embedding) moves by float32's rounding instead.

    Args:
        amount: relative, several units of the last place of the arithmetic that is imitated.
        storage: the model's type, float32 for float32 and float64 models (a float64 computation that float32 holds
            exactly is one without rounding). None moves every number but zero, those inside of normalizations'
            backward kernels too; a copy stays a copy.
        seed: of this run's rounding.
    """

    def __init__(self, amount: float, storage: torch.dtype | None, seed: int) -> None:
        super().__init__()
        self._amount, self._storage = amount, storage
        self._generator = torch.Generator().manual_seed(seed)
        self._factors = torch.empty(0, dtype=torch.float64)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._storage is None and func in _TAKEN_APART:
            with self:
                return _TAKEN_APART[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns] if isinstance(func, torch._ops.OpOverload) else []
        kept = _picks(func, args, kwargs) or (self._storage is None and func in _COPIES)
        if not kept and all(alias is None or alias.is_write for alias in aliases):  # a view holds no new values
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and _has_memory(tensor):
                    self._round(tensor)
        return result

    def _round(self, tensor: torch.Tensor) -> None:
        factors = self._drawn(tensor.numel())
        coarser = torch.finfo(tensor.dtype).eps / self._amount
        if coarser > 1.0:
            factors = (factors - 1.0) * (_UNITS * coarser) + 1.0
        factors = factors.to(tensor.dtype).view(tensor.shape)
        if self._storage is not None:
            exact = tensor.to(self._storage) == tensor if coarser <= 1.0 else _is_short(tensor)
            factors = factors.masked_fill(exact, 1.0)
        tensor.mul_(factors)  # not added to: an infinity, of a mask, say, stays one

    def _drawn(self, count: int) -> torch.Tensor:
        """Factors around 1 from one long sequence, at a random place: drawing anew would take most of the time."""
        with torch._C.DisableTorchFunction():  # a training step's random numbers are a mode's, in backward passes too
            if self._factors.numel() < count + _PLACES:
                fresh = torch.rand(count + _PLACES, generator=self._generator, dtype=torch.float32).double()
                self._factors = fresh.mul_(2).sub_(1).mul_(self._amount).add_(1)
            start = int(torch.randint(_PLACES, (), generator=self._generator))
            return self._factors[start : start + count]


def _is_short(tensor: torch.Tensor) -> torch.Tensor:
    """Where a number is whole, or of so few digits that no operator has rounded it."""
    return (tensor == tensor.round()) | (tensor.to(torch.bfloat16) == tensor)


def _has_memory(tensor: torch.Tensor) -> bool:
    """Not autograd's zeros (the derivative of a sign), nor the meta tensors by which PyTorch finds their sizes."""
    return tensor.numel() > 0 and not tensor._is_zerotensor() and not tensor.is_meta
