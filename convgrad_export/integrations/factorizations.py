"""LU and Cholesky factors column by column, and systems solved by substitution: what ONNX has no operator for.

Determinants of invertible 1x1 convolutions, Cayley's orthogonal parametrization and whitening compute them. The steps
are those of LAPACK's unblocked forms, rows are exchanged as there, so the error bounds are the same (Higham, Accuracy
and Stability of Numerical Algorithms, chapters 8 to 10). The graph grows with the size of the matrix, which has to be
a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _size(x: Tensor) -> int | None:
    """The number of rows; None where it is open, or the matrix holds complex numbers."""
    rows: Any = x.shape[-2]
    return rows if isinstance(rows, int) and isinstance(x.shape[-1], int) and not x.is_complex() else None


def _info(x: Tensor) -> Tensor:
    """That all went well: a graph does not raise, what cannot be solved is infinite or not-a-number."""
    return torch.zeros(x.shape[:-2], dtype=torch.int32, device=x.device)


def _factors(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """L below the diagonal and U in one matrix, and the row that each was exchanged with, counted from 1."""
    rows = torch.arange(size, device=x.device)
    exchanged = []
    for k in range(size):
        found = torch.where(rows >= k, x[..., k].abs(), -1.0).argmax(-1, keepdim=True)
        x = _exchanged(x, k, found)
        pivot = x[..., k, k : k + 1]
        pivot = torch.where(pivot == 0, 1.0, pivot)  # of a singular matrix, with nothing but zeros below
        behind = rows > k
        below = torch.where(behind, x[..., k] / pivot, 0.0).unsqueeze(-1)
        right = torch.where(behind, x[..., k, :], 0.0).unsqueeze(-2)
        x = torch.where(behind.unsqueeze(-1) & (rows == k), below, x - below * right)
        exchanged.append(found + 1)
    return x, torch.cat(exchanged, -1).to(torch.int32)


def _exchanged(x: Tensor, k: int, other: Tensor) -> Tensor:
    """Rows `k` and `other`, which has a last axis of one element."""
    rows = torch.arange(x.shape[-2], device=x.device)
    order = torch.where(rows == k, other, torch.where(rows == other, k, rows))
    return x.gather(-2, order.unsqueeze(-1).expand(x.shape))


def _substituted(matrix: Tensor, right: Tensor, *, upper: bool, unit: bool) -> Tensor:
    """The solution of a triangular system, row by row."""
    size = matrix.shape[-1]
    found: list[Tensor] = []  # from the first row on, or from the last
    for k in reversed(range(size)) if upper else range(size):
        row = right[..., k : k + 1, :]
        if found:
            known = torch.cat(found[::-1] if upper else found, -2)
            factors = matrix[..., k : k + 1, k + 1 :] if upper else matrix[..., k : k + 1, :k]
            row = row - torch.matmul(factors, known)
        found.append(row if unit else row / matrix[..., k : k + 1, k : k + 1])
    return torch.cat(found[::-1] if upper else found, -2)


def _solved(factors: Tensor, exchanged: Tensor, right: Tensor, transposed: bool = False) -> Tensor:
    batch = torch.broadcast_shapes(factors.shape[:-2], right.shape[:-2])
    factors, right = (each.expand([*batch, *each.shape[-2:]]) for each in (factors, right))
    others = (exchanged.to(torch.int64) - 1).expand([*batch, exchanged.shape[-1]])
    rows = range(factors.shape[-1])
    if transposed:
        right = _substituted(factors.mT, right, upper=False, unit=False)
        right = _substituted(factors.mT, right, upper=True, unit=True)
        return _all_exchanged(right, others, reversed(rows))
    right = _substituted(factors, _all_exchanged(right, others, rows), upper=False, unit=True)
    return _substituted(factors, right, upper=True, unit=False)


def _all_exchanged(x: Tensor, others: Tensor, order: Iterable[int]) -> Tensor:
    """Each row with the other one that `others` has for it, one after the other."""
    for k in order:
        x = _exchanged(x, k, others[..., k : k + 1])
    return x


def _sign(exchanged: Tensor, size: int) -> Tensor:
    """-1 for an odd number of exchanges."""
    moved = (exchanged != torch.arange(1, size + 1, device=exchanged.device)).to(torch.int64).sum(-1)
    return 1 - 2 * torch.remainder(moved, 2)


def _same_determinant(x: Tensor) -> Tensor:
    """What PyTorch factors instead, and the gradient's formula expects: rows as columns, if LAPACK reads them so."""
    return x.mT if x.is_contiguous() else x


def determinant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not (size := _size(x)):
        return NotImplemented
    factors, exchanged = _factors(_same_determinant(x), size)
    product = factors.diagonal(0, -2, -1).prod(-1)
    return product * _sign(exchanged, size).to(x.dtype), factors, exchanged


def sign_and_log_determinant(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not (size := _size(x)):
        return NotImplemented
    factors, exchanged = _factors(_same_determinant(x), size)
    diagonal = factors.diagonal(0, -2, -1)
    sign = diagonal.sign().prod(-1) * _sign(exchanged, size).to(x.dtype)
    return sign, diagonal.abs().log().sum(-1), factors, exchanged


def lu_factor(x: Tensor, *, pivot: bool = True, check_errors: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    size = _size(x)
    if not size or not pivot or size != x.shape[-1]:
        return NotImplemented
    return (*_factors(x, size), _info(x))


def lu_solve(factors: Tensor, exchanged: Tensor, right: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    if not _size(factors):
        return NotImplemented
    if left:
        return _solved(factors, exchanged, right, adjoint)
    return _solved(factors, exchanged, right.mT, not adjoint).mT


def solve(
    x: Tensor, right: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not (size := _size(x)):
        return NotImplemented
    factors, exchanged = _factors(x, size)
    is_vector = right.dim() == 1 or (right.dim() == x.dim() - 1 and right.shape == x.shape[:-1])
    columns = right.unsqueeze(-1) if is_vector else right
    result = lu_solve(factors, exchanged, columns, left=left or is_vector)
    return result.squeeze(-1) if is_vector else result, factors, exchanged, _info(x)


def inverse(x: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    if not (size := _size(x)):
        return NotImplemented
    identity = torch.eye(size, dtype=x.dtype, device=x.device).expand(x.shape)
    return _solved(*_factors(x, size), identity), _info(x)


def solve_triangular(
    x: Tensor, right: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    if not _size(x):
        return NotImplemented
    if not left:
        return solve_triangular(x.mT, right.mT, upper=not upper, unitriangular=unitriangular).mT
    return _substituted(x, right, upper=upper, unit=unitriangular)


def cholesky(x: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Of the lower half, or of the upper one; not-a-number where the matrix is not positive definite."""
    if not (size := _size(x)):
        return NotImplemented
    rest, info, rows = x.mT if upper else x, _info(x), torch.arange(size, device=x.device)
    columns = []
    for k in range(size):
        root = rest[..., k, k : k + 1].sqrt()
        column = torch.where(rows == k, root, torch.where(rows > k, rest[..., k] / root, 0.0))
        rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
        columns.append(column)
    return torch.stack(columns, -2 if upper else -1), info


def no_errors(info: Tensor, name: str, *, is_matrix: bool) -> None:
    """What cannot be solved is infinite or not-a-number: a graph cannot raise."""


TABLE: Mapping[Any, Callable[..., Any]] = {
    aten._linalg_det.default: determinant,
    aten._linalg_slogdet.default: sign_and_log_determinant,
    aten.linalg_lu_factor_ex.default: lu_factor,
    aten.linalg_lu_solve.default: lu_solve,
    aten._linalg_solve_ex.default: solve,
    aten.linalg_inv_ex.default: inverse,
    aten.linalg_solve_triangular.default: solve_triangular,
    aten.linalg_cholesky_ex.default: cholesky,
    aten._linalg_check_errors.default: no_errors,
}
