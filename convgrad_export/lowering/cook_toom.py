"""Matrices of Winograd's minimal filtering algorithms, constructed exactly by the Cook-Toom method.

``F(m, r)`` gives m outputs of a correlation with an r-tap filter from n = m + r - 1 inputs with n multiplications:

    y = A^T [ (G g) * (B^T d) ]

The linear convolution of polynomials of degree r - 1 and m - 1 is evaluation at n points (infinity among them), a
product at each point, and interpolation; transposing that bilinear algorithm gives the correlation. Rows of B^T are
scaled to integers where the points are integers, and the scale is taken out of G.

Source: Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, arXiv:1509.09308; points after Barabasz
et al., arXiv:1803.10986.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import numpy as np

Matrix = list[list[Fraction]]

# Without infinity, which is always the last point. Small magnitudes keep the amplification of rounding errors low.
_POINTS = {
    4: (Fraction(0), Fraction(1), Fraction(-1)),
    6: (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2)),
}
TILES = tuple(_POINTS)


@lru_cache(maxsize=64)
def minimal_filtering(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A^T, G, B^T) of F(outputs, taps) as float64 arrays of shapes (m, n), (n, r), (n, n).

    ``outputs + taps - 1`` is 1 (the identity, for an axis that needs no filtering), 4 or 6.
    """
    n = outputs + taps - 1
    if n == 1:
        one = np.ones((1, 1))
        return one, one, one
    points = _POINTS[n]
    a = _evaluation(points, outputs)
    g = _evaluation(points, taps)
    b_transposed = _transpose(_inverse(_evaluation(points, n)))
    for row, point in enumerate(points):
        scale = Fraction(1)
        for other in points:
            if other != point:
                scale *= abs(point - other)
        b_transposed[row] = [value * scale for value in b_transposed[row]]
        g[row] = [value / scale for value in g[row]]
    return _array(_transpose(a)), _array(g), _array(b_transposed)


def _evaluation(points: tuple[Fraction, ...], coefficients: int) -> Matrix:
    """Values of a polynomial at the points and, last, its leading coefficient (its value at infinity)."""
    rows = [[point**power for power in range(coefficients)] for point in points]
    return [*rows, [Fraction(int(power == coefficients - 1)) for power in range(coefficients)]]


def _transpose(matrix: Matrix) -> Matrix:
    return [list(row) for row in zip(*matrix, strict=True)]


def _inverse(matrix: Matrix) -> Matrix:
    """Gauss-Jordan elimination over the rationals."""
    size = len(matrix)
    work = [[*row, *(Fraction(int(i == j)) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next(row for row in range(column, size) if work[row][column] != 0)
        work[column], work[pivot] = work[pivot], work[column]
        lead = work[column][column]
        work[column] = [value / lead for value in work[column]]
        for row in range(size):
            factor = work[row][column]
            if row != column and factor:
                work[row] = [x - factor * y for x, y in zip(work[row], work[column], strict=True)]
    return [row[size:] for row in work]


def _array(matrix: Matrix) -> np.ndarray:
    return np.array([[float(value) for value in row] for row in matrix])
