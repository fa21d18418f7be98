"""Predicted time of a lowering, from the graph it emits: a sum of what each kernel call does times what that costs.

Every step of the graph is turned into amounts (multiplications, bytes packed, bytes copied, rows, calls); a cost is so
many nanoseconds a unit. The amounts know onnxruntime's kernels, not the formulas, so a new lowering needs no cost of
its own. `calibration` has the costs: shipped ones, which make predictions the same on every machine, and measured ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..geometry import ConvGeometry
from ..lowering import CPU
from .graph_walk import Step, Tensor, expands_whole_image, reads_directly, steps

Amounts = dict[str, float]

# The unit of each amount, and whether onnxruntime's kernel divides it among its threads.
UNITS: dict[str, tuple[str, bool]] = {
    "call": ("one node", False),
    "gemm_mac": ("multiply-add of MatMul, sides rounded up to the register tile", True),
    "gemm_pack": ("byte of the right operand, packed", True),
    "gemm_pack_transposed": ("byte of the right operand, packed from a transposed layout", True),
    "gemm_result": ("byte of the result, once for each block of 128 along the sum", True),
    "gemm_call": ("one matrix of a batched MatMul", True),
    "conv_mac": ("multiply-add of Conv, rounded likewise", True),
    "conv_column": ("element of Conv's columns", True),
    "conv_serial_column": ("element of columns built for a whole image, on one thread", False),
    "conv_call": ("one image and group of a Conv", True),
    "deconv_mac": ("multiply-add of ConvTranspose, rounded likewise", True),
    "deconv_column": ("element of ConvTranspose's columns, added to the image", False),
    "deconv_call": ("one image and group of a ConvTranspose", False),
    "col2im": ("element of Col2Im's columns", False),
    "copy_near": ("byte copied in tensors up to 1 MiB", False),
    "copy_far": ("byte copied in tensors up to 16 MiB", False),
    "copy_memory": ("byte copied in larger tensors", False),
    "copy_row": ("contiguous row copied", False),
    "strided": ("element copied with a step", False),
    "transposed": ("element whose row changes in a Transpose", False),
    "elementwise": ("byte of an elementwise operator", True),
    "reduced": ("byte of a reduction", True),
}
_NEAR, _FAR = 2**20, 2**24
_ROWS, _COLUMNS, _SUM_BLOCK = 12, 16, 128


@dataclass(frozen=True)
class Costs:
    """Nanoseconds of one unit of each amount, on one thread and on two.

    Attributes:
        one, two: by name of `UNITS`. source: where they come from, in words.
    """

    one: Mapping[str, float]
    two: Mapping[str, float]
    source: str = ""

    def at(self, threads: int) -> dict[str, float]:
        """Costs at a thread count: the step from one thread to two is repeated for each further doubling."""
        doublings = math.log2(max(threads, 1))
        result = {}
        for name, (_, shared) in UNITS.items():
            first, second = self.one[name], self.two[name]
            gain = min(1.0, max(0.5, second / first)) if shared and first > 0 else 1.0
            result[name] = first * gain**doublings if shared else (first if threads == 1 else second)
        return result


def predict_ms(
    name: str,
    geometry: ConvGeometry,
    dtype: str = "float32",
    provider: str = CPU,
    opset: int = 18,
    *,
    costs: Costs,
    threads: int = 1,
) -> float:
    """Predicted milliseconds of one call of a lowering, every size of `geometry` being an integer.

    Raises:
        GeometryError: an open size.
    """
    per_unit = costs.at(threads)
    return sum(count * per_unit[key] for key, count in amounts(name, geometry, dtype, provider, opset)) * 1e-6


@functools.lru_cache(maxsize=4096)
def amounts(
    name: str, geometry: ConvGeometry, dtype: str = "float32", provider: str = CPU, opset: int = 18
) -> tuple[tuple[str, float], ...]:
    """What a lowering does, summed over its steps, as (name of `UNITS`, count)."""
    total: Amounts = {}
    for step in steps(name, geometry, dtype, provider, opset):
        for key, count in step_amounts(step).items():
            total[key] = total.get(key, 0.0) + count
    return tuple(sorted(total.items()))


def step_amounts(step: Step) -> Amounts:
    """What one kernel call does. An operator without a rule of its own counts as elementwise."""
    rule = _RULES.get(step.op_type, _elementwise)
    return {"call": 1.0, **rule(step)}


def _product(batch: float, m: float, n: float, k: float, prefix: str, item: int) -> Amounts:
    """Multiply-adds of `batch` products (m, k) x (k, n), with the waste of partly filled register tiles."""
    rest = m % _ROWS
    rows = m - rest + (max(rest, 3) if rest else 0)
    columns = math.ceil(n / _COLUMNS) * _COLUMNS
    return {f"{prefix}_mac": batch * rows * columns * k * (item / 4), f"{prefix}_call": batch}


def _matmul(step: Step) -> Amounts:
    left, right, out = step.inputs[0], step.inputs[1], step.output
    m, n, k = out.shape[-2], out.shape[-1], left.shape[-1]
    batch = math.prod(out.shape[:-2])
    if len(right.shape) == 2 or math.prod(right.shape[:-2]) == 1:
        batch, m = 1, m * batch  # one matrix on the right: onnxruntime multiplies all rows at once
    result = _product(batch, m, n, k, "gemm", out.item)
    packed = "gemm_pack_transposed" if step.transposed[1] else "gemm_pack"
    result[packed] = batch * k * n * out.item
    if step.transposed[0]:
        result["gemm_pack_transposed"] = result.get("gemm_pack_transposed", 0.0) + batch * m * k * out.item
    result["gemm_result"] = batch * m * n * math.ceil(k / _SUM_BLOCK) * out.item
    return result


def _conv(step: Step) -> Amounts:
    weight, out = step.inputs[1], step.output
    groups = step.attributes.get("group", 1)
    positions, k = math.prod(out.shape[2:]), math.prod(weight.shape[1:])
    images = out.shape[0] * groups
    result = _product(images, weight.shape[0] // groups, positions, k, "conv", out.item)
    if not reads_directly(step):
        key = "conv_serial_column" if expands_whole_image(step) else "conv_column"
        result[key] = float(images * positions * k)
    return result


def _conv_transpose(step: Step) -> Amounts:
    data, weight = step.inputs[0], step.inputs[1]
    groups = step.attributes.get("group", 1)
    positions, rows = math.prod(data.shape[2:]), math.prod(weight.shape[1:])
    images = data.shape[0] * groups
    result = _product(images, rows, positions, weight.shape[0] // groups, "deconv", data.item)
    result["deconv_column"] = float(images * positions * rows)
    return result


def _col2im(step: Step) -> Amounts:
    return {"col2im": float(step.inputs[0].size)}


def _copied(moved: int, rows: float, largest: Tensor) -> Amounts:
    size = "copy_near" if largest.bytes <= _NEAR else "copy_far" if largest.bytes <= _FAR else "copy_memory"
    return {size: float(moved), "copy_row": rows}


def _slice(step: Step) -> Amounts:
    data, out = step.inputs[0], step.output
    stepping = step.constants[4] if len(step.constants) > 4 else None
    axes = step.constants[3] if len(step.constants) > 3 else None
    if stepping is not None and axes is not None:
        last = dict(zip(axes, stepping, strict=True)).get(len(out.shape) - 1, 1)
        if last != 1:
            return {"strided": float(out.size)}
    row = 1
    for before, after in zip(reversed(data.shape), reversed(out.shape), strict=True):
        row *= after
        if before != after:
            break
    return _copied(out.bytes, out.size / max(row, 1), out)


def _pad(step: Step) -> Amounts:
    data, out = step.inputs[0], step.output
    row = 1
    for before, after in zip(reversed(data.shape), reversed(out.shape), strict=True):
        row *= before
        if before != after:
            break
    return _copied(data.bytes + out.bytes, data.size / max(row, 1), out)


def _concat(step: Step) -> Amounts:
    axis = step.attributes["axis"]
    rows = sum(tensor.size / max(math.prod(tensor.shape[axis:]), 1) for tensor in step.inputs)
    return _copied(step.output.bytes, rows, step.output)


def _gather(step: Step) -> Amounts:
    row = max(math.prod(step.inputs[0].shape[step.attributes.get("axis", 0) + 1 :]), 1)
    return _copied(step.output.bytes, step.output.size / row, step.output)


def _transpose(step: Step) -> Amounts:
    perm, out = list(step.attributes["perm"]), step.output
    row, axis = 1, len(perm) - 1
    # Axes of size 1 can stand anywhere without moving anything.
    kept = [p for p in perm if step.inputs[0].shape[p] != 1]
    if kept == sorted(kept):
        return _copied(out.bytes, 1.0, out)
    while axis >= 0 and perm[axis] == axis:
        row *= out.shape[axis]
        axis -= 1
    if row == 1:
        return {"transposed": float(out.size)}
    return _copied(out.bytes, out.size / max(row, 1), out)


def _elementwise(step: Step) -> Amounts:
    return {"elementwise": float(step.output.bytes + sum(tensor.bytes for tensor in step.inputs))}


def _reduce(step: Step) -> Amounts:
    return {"reduced": float(step.inputs[0].bytes)}


_RULES: dict[str, Callable[[Step], Amounts]] = {
    "MatMul": _matmul,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Col2Im": _col2im,
    "Slice": _slice,
    "Pad": _pad,
    "Concat": _concat,
    "Gather": _gather,
    "Transpose": _transpose,
    "ReduceSum": _reduce,
}
