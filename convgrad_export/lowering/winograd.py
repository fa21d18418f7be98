"""Convolution and both gradients at stride 1 by Winograd's minimal filtering: fewer multiplications.

Tiles of n positions along each axis that has a kernel of more than one tap, n = 4 or 6. The multiplications are n**axes
batched GEMMs; for a 3x3 kernel 2.25 times fewer than the direct form with n = 4, and 4 times fewer with n = 6. Data
moves in whole rows: tensors are first laid out as (positions, N*channels), so that gathering tiles copies contiguous
rows, and the transforms are one small constant matrix times everything. The tiles are worked through in parts that stay
in the cache. The forward pass and the weight gradient transform the input alike, the forward pass and the input
gradient the weight: a graph that holds more than one of them shares those nodes.

Tiles of 4 transform by halves and whole numbers alone. On integers every value is then a multiple of 2**-axes, and the
result is exact as long as none exceeds 2**(24 - axes). Tiles of 6 hold other fractions and are not exact. In both, a
NaN or infinity spreads over its tile, as it does in other libraries' Winograd kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from ..geometry import ConvGeometry
from ..windows import window
from .blocks import Ops, Value, crop, floats, ints, pad, reshape, stack, strided_why_not, total
from .cook_toom import minimal_filtering

# Largest error seen over random data, in units of the direct form's bound, with room: see benchmarks/NOTES.md.
ERROR_FACTORS = {4: 2.0, 6: 8.0}

_PART = 3 << 19  # transformed elements, 6 MiB
_MOST_PARTS = 16
_MOST_LISTED = 1 << 24  # positions, 128 MiB of the model
_ASSUMED_BATCH = 8  # where the batch is open


@dataclass(frozen=True)
class _Tiling:
    """Tiles over the positions `size` of every axis: `step` positions each, read from as many and `taps` - 1 more.

    Under dilation d the positions of a tile are d apart, and d tiles lie one position apart.
    """

    size: tuple[int, ...]
    step: tuple[int, ...]
    taps: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def runs(self) -> list[int]:
        """Tiles in a row, d positions between their elements."""
        axes = zip(self.size, self.step, self.dilation, strict=True)
        return [math.ceil(size / (d * step)) for size, step, d in axes]

    @property
    def tiles(self) -> int:
        return math.prod(self.runs) * math.prod(self.dilation)

    @property
    def padded(self) -> list[int]:
        """Positions of the whole tiles."""
        return [run * step * d for run, step, d in zip(self.runs, self.step, self.dilation, strict=True)]

    @property
    def read(self) -> list[int]:
        """Elements that the whole tiles read."""
        axes = zip(self.padded, self.taps, self.dilation, strict=True)
        return [size + d * (taps - 1) for size, taps, d in axes]

    def elements(self, counts: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """Row numbers, in an image of `lengths`, of `counts` elements of every tile: by element, then by tile."""
        rank = len(lengths)
        rows = np.zeros((1,) * (2 * rank), np.int64)
        for axis, length in enumerate(lengths):
            step, d = self.step[axis], self.dilation[axis]
            first = (np.arange(d)[:, None] + np.arange(self.runs[axis])[None, :] * step * d).ravel()
            index = np.arange(counts[axis])[:, None] * d + first[None, :]
            shape = [1] * (2 * rank)
            shape[axis], shape[rank + axis] = index.shape
            rows = rows * length + index.reshape(shape)
        return rows.reshape(math.prod(counts), self.tiles)

    def part_sizes(self, parts: int) -> list[int]:
        """The tiles in equal parts, as far as they divide."""
        ends = [self.tiles * part // parts for part in range(parts + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]

    def split(self, counts: Sequence[int], lengths: Sequence[int], parts: int) -> list[np.ndarray]:
        """`elements` of one part of the tiles after another."""
        ends = list(itertools.accumulate(self.part_sizes(parts)))
        return np.split(self.elements(counts, lengths), ends[:-1], axis=1)

    def places(self) -> np.ndarray:
        """For every position, its row among (tile elements, tiles); elements past the edge are left out."""
        rank = len(self.size)
        element = np.zeros((1,) * rank, np.int64)
        tile = np.zeros((1,) * rank, np.int64)
        for axis, (size, step, run, d) in enumerate(zip(self.size, self.step, self.runs, self.dilation, strict=True)):
            shape = [1] * rank
            shape[axis] = size
            where, first = np.divmod(np.arange(size).reshape(shape), d)
            element = element * step + where % step
            tile = (tile * d + first) * run + where // step
        return (element * self.tiles + tile).ravel()


def _tiling(size: Sequence[int], g: ConvGeometry, tile: int) -> _Tiling:
    """n - K + 1 positions a tile: the outputs of F(n-K+1, K), or the taps of F(K, n-K+1)."""
    step = tuple(tile - k + 1 if k > 1 else 1 for k in g.kernel_size)
    # One tap has no distance to another.
    dilation = tuple(d if k > 1 else 1 for d, k in zip(g.dilation, g.kernel_size, strict=True))
    return _Tiling(tuple(size), step, g.kernel_size, dilation)


def _kron(matrices: Iterable[np.ndarray]) -> np.ndarray:
    return reduce(np.kron, matrices)


def _positions_first(
    op: Ops, value: Value, sizes: Sequence[int], begin: Sequence[int], lengths: Sequence[int]
) -> Value:
    """(N, c, *sizes) as (positions, N*c): `lengths` positions of every axis from `begin` on, zeros beside the image."""
    windows = [window(*axis) for axis in zip(sizes, begin, lengths, strict=True)]
    rows = op.Transpose(reshape(op, value, [-1, math.prod(sizes)]), perm=[1, 0])
    if not any(w.crops or w.pads for w in windows):
        return rows
    image = crop(op, reshape(op, rows, [*sizes, -1]), windows, sizes, first_axis=0)
    image = pad(op, image, [w.pad_begin for w in windows], [w.pad_end for w in windows], first_axis=0, trailing=1)
    return reshape(op, image, [math.prod(lengths), -1]) if len(sizes) > 1 else image


def _parts(g: ConvGeometry, tiling: _Tiling, tile: int) -> int:
    """How many parts the tiles are worked through in, so that a part of both operands stays in the cache.

    A part is to be larger than the transformed weight, which every part reads (or, for the weight gradient, adds up).
    """
    rows = tiling.tiles * (g.batch if isinstance(g.batch, int) else _ASSUMED_BATCH)
    operands = rows * (g.in_channels + g.out_channels)
    products = tile ** sum(k > 1 for k in g.kernel_size)
    most = 2 * operands // (3 * g.in_channels * g.out_channels)
    return max(1, min(math.ceil(products * operands / _PART), most, _MOST_PARTS, tiling.tiles))


def _transform(op: Ops, matrix: np.ndarray, rows: Value, index: np.ndarray, channels: int) -> Value:
    """Gather tiles and multiply by the transform: (n**axes, tiles*N, channels)."""
    gathered = reshape(op, op.Gather(rows, ints(op, index.ravel().tolist()), axis=0), [matrix.shape[1], -1])
    return reshape(op, op.MatMul(floats(op, matrix), gathered), [matrix.shape[0], -1, channels])


def _data(
    op: Ops,
    value: Value,
    sizes: Sequence[int],
    channels: int,
    begin: Sequence[int],
    tiling: _Tiling,
    matrix: np.ndarray,
    parts: int,
) -> list[Value]:
    """Transformed tiles of `value` (N, channels, *sizes), which they read from position `begin` on, part by part."""
    rows = _positions_first(op, value, sizes, begin, tiling.read)
    elements = [step + taps - 1 for step, taps in zip(tiling.step, tiling.taps, strict=True)]
    return [_transform(op, matrix, rows, index, channels) for index in tiling.split(elements, tiling.read, parts)]


def _filters(op: Ops, g: ConvGeometry, weight: Value, matrix: np.ndarray) -> Value:
    """The transformed weight, (n**axes, M, C)."""
    taps_first = op.Transpose(reshape(op, weight, [g.out_channels * g.in_channels, g.taps]), perm=[1, 0])
    return reshape(op, op.MatMul(floats(op, matrix), taps_first), [-1, g.out_channels, g.in_channels])


def _filtered(
    op: Ops, data: Sequence[Value], filters: Value, tiling: _Tiling, matrix: np.ndarray, channels: int
) -> Value:
    """Products with the filters transformed back by `matrix` and put in their places: (N, channels, *size)."""
    positions, products = matrix.shape
    results = []
    for part, tiles in zip(data, tiling.part_sizes(len(data)), strict=True):
        product = reshape(op, op.MatMul(part, filters), [products, -1])
        results.append(reshape(op, op.MatMul(floats(op, matrix), product), [positions, tiles, -1]))
    result = reshape(op, stack(op, results, axis=1), [math.prod(tiling.padded), -1])
    placed = op.Gather(result, ints(op, tiling.places().tolist()), axis=0)
    return reshape(op, op.Transpose(placed, perm=[1, 0]), [-1, channels, *tiling.size])


def forward(op: Ops, g: ConvGeometry, input: Value, weight: Value, tile: int) -> Value:
    """The convolution itself, (N, M, *O); it reads the input's tiles as the weight gradient does."""
    tiling = _tiling(g.output_size, g, tile)
    matrices = [minimal_filtering(m, k) for m, k in zip(tiling.step, g.kernel_size, strict=True)]
    outputs, filtering, data_transform = (_kron(axes) for axes in zip(*matrices, strict=True))
    parts = _parts(g, tiling, tile)
    data = _data(op, input, g.input_size, g.in_channels, [-lo for lo in g.begin], tiling, data_transform, parts)
    filters = op.Transpose(_filters(op, g, weight, filtering), perm=[0, 2, 1])
    return _filtered(op, data, filters, tiling, outputs, g.out_channels)


def input_gradient(op: Ops, g: ConvGeometry, grad_output: Value, weight: Value, tile: int) -> Value:
    tiling = _tiling(g.input_size, g, tile)
    matrices = [minimal_filtering(m, k) for m, k in zip(tiling.step, g.kernel_size, strict=True)]
    outputs, filtering, data_transform = (_kron(axes) for axes in zip(*matrices, strict=True))
    flipped = _kron(f[:, ::-1] for _, f, _ in matrices)
    # The kernel is reversed by reversing the columns of its transform. Where that only changes the order of the rows,
    # the order of everything else is changed in its place: the transformed weight is then the forward pass's.
    order = _row_order(filtering, flipped)
    if order is None:
        filtering = flipped
    else:
        outputs, data_transform = outputs[:, order], data_transform[order]
    begin = [lo - d * (k - 1) for lo, d, k in zip(g.begin, g.dilation, g.kernel_size, strict=True)]
    data = _data(op, grad_output, g.output_size, g.out_channels, begin, tiling, data_transform, _parts(g, tiling, tile))
    return _filtered(op, data, _filters(op, g, weight, filtering), tiling, outputs, g.in_channels)


def _row_order(rows: np.ndarray, permuted: np.ndarray) -> list[int] | None:
    """For every row, where it stands in `permuted`; None if the two differ in more than the order of their rows."""
    where = {row.tobytes(): number for number, row in enumerate(permuted + 0.0)}  # + 0.0: no negative zeros
    order = [where.get(row.tobytes(), -1) for row in rows + 0.0]
    return order if sorted(order) == list(range(len(rows))) else None


def weight_gradient(op: Ops, g: ConvGeometry, grad_output: Value, input: Value, tile: int) -> Value:
    tiling = _tiling(g.output_size, g, tile)
    matrices = [minimal_filtering(k, r) for k, r in zip(g.kernel_size, tiling.step, strict=True)]
    inverse, filtering, data_transform = (_kron(axes) for axes in zip(*matrices, strict=True))
    parts = _parts(g, tiling, tile)
    data = _data(op, input, g.input_size, g.in_channels, [-lo for lo in g.begin], tiling, data_transform, parts)
    rows = _positions_first(op, grad_output, g.output_size, [0] * g.rank, tiling.padded)
    products = []
    for part, index in zip(data, tiling.split(tiling.step, tiling.padded, parts), strict=True):
        filters = _transform(op, filtering, rows, index, g.out_channels)
        products.append(op.MatMul(op.Transpose(filters, perm=[0, 2, 1]), part))
    product = reshape(op, total(op, products), [inverse.shape[1], g.out_channels * g.in_channels])
    result = op.MatMul(floats(op, inverse), product)
    return reshape(op, op.Transpose(result, perm=[1, 0]), g.weight_shape)


def why_not(tile: int) -> Callable[[ConvGeometry], str | None]:
    """The condition for tiles of `tile` positions."""

    def condition(g: ConvGeometry) -> str | None:
        if reason := strided_why_not(g):
            return reason
        if g.groups != 1:
            return f"groups is {g.groups}, it needs 1"
        if g.taps == 1:
            return "the kernel has one tap"
        if all(size == 1 for size in g.output_size):
            return "each tap has one product a sample, of which none can be saved"
        largest = max(g.kernel_size)
        if largest > tile - 1:
            return f"the kernel has {largest} taps on an axis, more than {tile - 1}"
        listed = _listed(g, tile)
        return f"the graph would list {listed} positions, more than {_MOST_LISTED}" if listed > _MOST_LISTED else None

    return condition


def _listed(g: ConvGeometry, tile: int) -> int:
    """About how many positions the Gathers of tiles list; sizes that are open count as none."""
    count = 1
    for sizes in zip(g.input_size, g.output_size, g.kernel_size, strict=True):
        size, k = max((size for size in sizes[:2] if isinstance(size, int)), default=0), sizes[2]
        count *= tile * -(-size // (tile - k + 1)) if k > 1 else size
    return count


def _named(formula: Callable[..., Value], tile: int, outputs: str) -> Callable[..., Value]:
    def body(op: Ops, g: ConvGeometry, grad_output: Value, operand: Value) -> Value:
        return formula(op, g, grad_output, operand, tile)

    body.__doc__ = f"Winograd's minimal filtering in tiles of {tile} positions an axis, {outputs} for a 3-tap axis."
    return body


INPUT_BODIES = {tile: _named(input_gradient, tile, f"F({tile - 2}, 3)") for tile in (4, 6)}
WEIGHT_BODIES = {tile: _named(weight_gradient, tile, f"F(3, {tile - 2})") for tile in (4, 6)}
