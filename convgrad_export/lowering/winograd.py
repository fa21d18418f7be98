"""Both gradients of a stride-1 convolution by Winograd's minimal filtering: fewer multiplications, larger errors.

Tiles of n positions along each axis that has a kernel of more than one tap, n = 4 or 6. The multiplications are n**axes
batched GEMMs; for a 3x3 kernel 2.25 times fewer than the direct form with n = 4, and 4 times fewer with n = 6. Data
moves in whole rows: tensors are first laid out as (positions, N*channels), so that gathering tiles copies contiguous
rows, and the transforms are one small constant matrix times everything.

Not exact on integers: the transforms hold fractions, and a NaN or infinity spreads over its tile. The policy never
takes these unless the caller allows a larger error (see `selection.policy`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from ..geometry import ConvGeometry, Window, window
from .blocks import Ops, Value, crop, floats, ints, pad, reshape
from .cook_toom import minimal_filtering

# Largest error seen over random data, in units of the direct form's bound, with room: see benchmarks/NOTES.md.
ERROR_FACTORS = {4: 2.0, 6: 8.0}


def _tile_steps(g: ConvGeometry, tile: int) -> list[int]:
    """Per axis, n - K + 1: outputs of F(n-K+1, K) for grad-input, taps of F(K, n-K+1) for grad-weight."""
    return [tile - k + 1 if k > 1 else 1 for k in g.kernel_size]


def _kron(matrices: Sequence[np.ndarray]) -> np.ndarray:
    return reduce(np.kron, matrices)


def _positions_first(
    op: Ops, value: Value, sizes: Sequence[int], windows: Sequence[Window], lengths: list[int]
) -> Value:
    """(N, c, *sizes) as (positions of the windows, N*c)."""
    rank = len(sizes)
    rows = op.Transpose(reshape(op, value, [-1, math.prod(sizes)]), perm=[1, 0])
    if not any(w.crops or w.pads for w in windows):
        return rows
    image = crop(op, reshape(op, rows, [*sizes, -1]), windows, sizes, first_axis=0)
    image = pad(op, image, [w.pad_begin for w in windows], [w.pad_end for w in windows], first_axis=0, trailing=1)
    return reshape(op, image, [math.prod(lengths), -1]) if rank > 1 else image


def _tile_index(
    counts: Sequence[int], steps: Sequence[int], sizes: Sequence[int], lengths: Sequence[int]
) -> np.ndarray:
    """Row numbers of every tile element: tile elements (row-major) first, then tiles (row-major)."""
    axes = [
        np.arange(size)[:, None] + np.arange(count)[None, :] * step
        for size, count, step in zip(sizes, counts, steps, strict=True)
    ]
    rank = len(axes)
    total = np.zeros((1,) * (2 * rank), np.int64)
    for axis, index in enumerate(axes):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = index.shape
        total = total * lengths[axis] + index.reshape(shape) if axis else index.reshape(shape)
    return total.ravel()


def _transform(op: Ops, matrix: np.ndarray, rows: Value, index: np.ndarray, tiles: int, channels: int) -> Value:
    """Gather tiles and multiply by the transform: (n**axes, tiles*N, channels)."""
    elements = index.size // tiles
    gathered = reshape(op, op.Gather(rows, ints(op, index.tolist()), axis=0), [elements, -1])
    return reshape(op, op.MatMul(floats(op, matrix), gathered), [matrix.shape[0], -1, channels])


def input_gradient(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value, tile: int) -> Value:
    steps, kernel = _tile_steps(g, tile), g.kernel_size
    counts = [math.ceil(i / m) for i, m in zip(g.input_size, steps, strict=True)]
    lengths = [t * m + k - 1 for t, m, k in zip(counts, steps, kernel, strict=True)]
    windows = [
        window(o, lo - (k - 1), length)
        for o, lo, k, length in zip(g.output_size, g.begin, kernel, lengths, strict=True)
    ]
    matrices = [minimal_filtering(m, k) for m, k in zip(steps, kernel, strict=True)]
    rows = _positions_first(op, grad_output, g.output_size, windows, lengths)
    sizes = [m + k - 1 for m, k in zip(steps, kernel, strict=True)]
    tiles = math.prod(counts)
    index = _tile_index(counts, steps, sizes, lengths)
    data = _transform(op, _kron([b for _, _, b in matrices]), rows, index, tiles, g.out_channels)

    taps_first = op.Transpose(weight, perm=[*range(2, 2 + g.rank), 0, 1])
    # The kernel is reversed by reversing the columns of its transform.
    flipped = _kron([f[:, ::-1] for _, f, _ in matrices])
    filters = op.MatMul(floats(op, flipped), reshape(op, taps_first, [g.taps, g.out_channels * g.in_channels]))
    filters = reshape(op, filters, [flipped.shape[0], g.out_channels, g.in_channels])

    product = reshape(op, op.MatMul(data, filters), [flipped.shape[0], -1])
    result = op.MatMul(floats(op, _kron([a for a, _, _ in matrices])), product)
    result = reshape(op, result, [math.prod(steps) * tiles, -1])  # (tile elements and tiles, N*C)
    placed = op.Gather(result, ints(op, _untile_index(g.input_size, steps, counts).tolist()), axis=0)
    return reshape(op, op.Transpose(placed, perm=[1, 0]), [-1, g.in_channels, *g.input_size])


def _untile_index(sizes: Sequence[int], steps: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """For every position of the result, its row among (tile elements, tiles); elements past the edge are left out."""
    element = np.zeros((1,) * len(sizes), np.int64)
    tile = np.zeros((1,) * len(sizes), np.int64)
    for axis, (size, step, count) in enumerate(zip(sizes, steps, counts, strict=True)):
        shape = [1] * len(sizes)
        shape[axis] = size
        where = np.arange(size).reshape(shape)
        element = element * step + where % step
        tile = tile * count + where // step
    return (element * math.prod(counts) + tile).ravel()


def weight_gradient(op: Ops, g: ConvGeometry, grad_output: Value, input: Value, tile: int) -> Value:
    steps, kernel = _tile_steps(g, tile), g.kernel_size
    counts = [math.ceil(o / r) for o, r in zip(g.output_size, steps, strict=True)]
    tiles = math.prod(counts)
    matrices = [minimal_filtering(k, r) for k, r in zip(kernel, steps, strict=True)]

    lengths = [t * r + k - 1 for t, r, k in zip(counts, steps, kernel, strict=True)]
    windows = [window(i, -lo, length) for i, lo, length in zip(g.input_size, g.begin, lengths, strict=True)]
    rows = _positions_first(op, input, g.input_size, windows, lengths)
    sizes = [r + k - 1 for r, k in zip(steps, kernel, strict=True)]
    index = _tile_index(counts, steps, sizes, lengths)
    data = _transform(op, _kron([b for _, _, b in matrices]), rows, index, tiles, g.in_channels)

    padded = [t * r for t, r in zip(counts, steps, strict=True)]
    windows = [window(o, 0, length) for o, length in zip(g.output_size, padded, strict=True)]
    rows = _positions_first(op, grad_output, g.output_size, windows, padded)
    index = _tile_index(counts, steps, steps, padded)
    filters = _transform(op, _kron([f for _, f, _ in matrices]), rows, index, tiles, g.out_channels)

    product = op.MatMul(op.Transpose(filters, perm=[0, 2, 1]), data)
    inverse = _kron([a for a, _, _ in matrices])
    pairs = g.out_channels * g.in_channels
    result = op.MatMul(floats(op, inverse), reshape(op, product, [inverse.shape[1], pairs]))
    result = reshape(op, result, [*kernel, g.out_channels, g.in_channels])
    return op.Transpose(result, perm=[g.rank, g.rank + 1, *range(g.rank)])


def why_not(tile: int) -> Callable[[ConvGeometry], str | None]:
    """The condition for tiles of `tile` positions."""

    def condition(g: ConvGeometry) -> str | None:
        for name, values in (("stride", g.stride), ("dilation", g.dilation)):
            if any(value != 1 for value in values):
                return f"{name} is {values}, it needs 1"
        if g.groups != 1:
            return f"groups is {g.groups}, it needs 1"
        if g.taps == 1:
            return "the kernel has one tap"
        largest = max(g.kernel_size)
        return f"the kernel has {largest} taps on an axis, more than {tile - 1}" if largest > tile - 1 else None

    return condition


def _named(formula: Callable[..., Value], tile: int, outputs: str) -> Callable[..., Value]:
    def body(op: Ops, g: ConvGeometry, grad_output: Value, operand: Value) -> Value:
        return formula(op, g, grad_output, operand, tile)

    body.__doc__ = f"Winograd's minimal filtering in tiles of {tile} positions an axis, {outputs} for a 3-tap axis."
    return body


INPUT_BODIES = {tile: _named(input_gradient, tile, f"F({tile - 2}, 3)") for tile in (4, 6)}
WEIGHT_BODIES = {tile: _named(weight_gradient, tile, f"F(3, {tile - 2})") for tile in (4, 6)}
