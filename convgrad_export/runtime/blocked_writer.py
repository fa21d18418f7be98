"""The nodes of one convolution in onnxruntime's blocked layout (`blocked.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .blocked_kernels import dense_kernel, narrow_kernel
from .blocked_volumes import write_volume
from .blocked_weights import write_dense_weight, write_depthwise_weight
from .convolution_entries import (
    FORWARD,
    INPUT,
    WEIGHT,
    ConvolutionEntry,
    one_to_one,
    plane_of,
    plane_pads,
    reversed_pads,
)

DOMAIN = "com.microsoft.nchwc"


class BlockedWriter:
    """Writes nodes; a tensor is brought into the blocked layout once, however many read it."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._made: set[str] = set()
        self._nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def nodes_of(self, entry: ConvolutionEntry) -> list[Any]:
        self._nodes = []
        g = entry.geometry
        if g.rank == 3:
            write_volume(self, entry)
        elif entry.kind == WEIGHT:
            (write_depthwise_weight if one_to_one(g) else write_dense_weight)(self, entry)
        else:
            (self._forward if entry.kind == FORWARD else self._input_gradient)(entry)
        return self._nodes

    def node(self, operator: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        from onnx import helper

        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def ints(self, *values: int) -> str:
        from onnx import numpy_helper

        name = "blocked.ints." + ".".join(str(value) for value in values)
        self.constants.setdefault(name, numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def once(self, name: str) -> bool:
        """Whether nobody has asked for this tensor yet: then its nodes have to be written."""
        new = name not in self._made
        self._made.add(name)
        return new

    def reorder_input(self, name: str, output: str) -> str:
        """(N, C, H, W) in the blocked layout."""
        return self.node("ReorderInput", [name], output, DOMAIN)

    def _plane_tensor(self, name: str, channels: int, size: Sequence[int]) -> str:
        """(N, C, *size) as (N, C, H, W): a row is an image of height 1."""
        plane = name if len(size) == 2 else f"{name}.plane"
        if plane != name and self.once(plane):
            self.node("Reshape", [name, self.ints(0, channels, 1, size[0])], plane)
        return plane

    def reorder_output(self, blocked: str, output: str, channels: int) -> str:
        """Blocked (N, channels, H, W) as it lies without blocks."""
        return self.node("ReorderOutput", [blocked], output, DOMAIN, channels=channels)

    def conv(self, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Conv over blocked operands, with a blocked result."""
        return self.node("Conv", inputs, output, DOMAIN, **attributes)

    def channels_last(self, name: str, channels: int, size: Sequence[int]) -> str:
        """(N, C, *size) as (N, *size, C); one block lies so already."""
        result, positions = f"{name}.channels_last", int(np.prod(size))
        if self.once(result):
            last = f"{name}.blocked"
            if channels != self.block or last not in self._made:
                flat = self.node("Reshape", [name, self.ints(0, channels, positions)], f"{result}.flat")
                last = self.node("Transpose", [flat], f"{result}.positions", perm=[0, 2, 1])
            self.node("Reshape", [last, self.ints(0, *size, channels)], result)
        return result

    def block_tensor(self, name: str, channels: int, size: Sequence[int]) -> str:
        """(N, C, *size) as blocked (N, C, H, W)."""
        blocked = f"{name}.blocked"
        if self.once(blocked):
            self.reorder_input(self._plane_tensor(name, channels, size), blocked)
        return blocked

    def rearranged(self, name: str, axes: Mapping[str, int], order: str, stem: str) -> str:
        """A tensor, read as these axes (a letter and a size each), with them in the order of the letters.

        Axes of one element are left out, so that onnxruntime sees where one axis, or whole blocks, are moved. The shape
        of the result is open.
        """
        sizes = {letter: size for letter, size in axes.items() if size > 1}
        letters, wanted = list(sizes), [letter for letter in order if letter in sizes]
        if letters == wanted:
            return name
        split = self.node("Reshape", [name, self.ints(*sizes.values())], f"{stem}.axes")
        return self.node("Transpose", [split], f"{stem}.moved", perm=[letters.index(letter) for letter in wanted])

    def _weight(self, entry: ConvolutionEntry) -> str:
        """The weight, in the shape that the operator wants to see."""
        g = entry.geometry
        outputs, inputs = g.out_channels, g.in_channels_per_group
        if inputs < self.block:
            kernel = narrow_kernel(self, entry)
        else:
            kernel = dense_kernel(self, entry)
            if entry.kind == INPUT:
                outputs, inputs = inputs * g.groups, outputs // g.groups
        shape = self.ints(outputs, inputs, *plane_of(g.kernel_size))
        return self.node("Reshape", [kernel, shape], f"{entry.result}.weight.blocked")

    def _forward(self, entry: ConvolutionEntry) -> None:
        g = entry.geometry
        x, _, *bias = entry.operands
        few = g.groups == 1 and g.in_channels < self.block  # then the operator reads rows as they are
        convert = self._plane_tensor if few else self.block_tensor
        self._image(entry, [convert(x, g.in_channels, g.input_size), self._weight(entry), *bias])

    def _input_gradient(self, entry: ConvolutionEntry) -> None:
        g = entry.geometry
        grad_output = entry.operands[0]
        data = self.block_tensor(grad_output, g.out_channels, g.output_size)
        if set(g.stride) != {1}:
            data = self._spread(entry, data)
        self._image(entry, [data, self._weight(entry)])

    def _spread(self, entry: ConvolutionEntry, blocked: str) -> str:
        """`stride` - 1 zeros behind each element of a blocked (N, C, H, W), along both axes."""
        g = entry.geometry
        (height, width), (down, right) = plane_of(g.output_size), plane_of(g.stride)
        rows, stem = g.out_channels // self.block * height, f"{entry.result}.spread"
        apart = self.node("Reshape", [blocked, self.ints(0, rows, 1, width, 1, self.block)], f"{stem}.apart")
        amounts = self.ints(*[0] * 8, down - 1, 0, right - 1, 0)
        padded = self.node("Pad", [apart, amounts], f"{stem}.padded")
        shape = self.ints(0, g.out_channels, height * down, width * right)
        return self.node("Reshape", [padded, shape], stem)

    def _image(self, entry: ConvolutionEntry, inputs: Sequence[str]) -> None:
        """The entry's result, of its own rank."""
        if entry.geometry.rank == 2:
            self.convolve(entry, inputs, entry.result)
            return
        plane = self.convolve(entry, inputs, f"{entry.result}.result_plane")
        _, channels, length = entry.geometry.input_shape if entry.kind == INPUT else entry.geometry.output_shape
        self.node("Reshape", [plane, self.ints(0, channels, length)], entry.result)

    def convolve(self, entry: ConvolutionEntry, inputs: Sequence[str], output: str) -> str:
        """The entry's Conv over its last two axes, blocked operands to a plain (N, channels, H, W).

        An input gradient's has a stride of 1: the zeros that a stride leaves between the elements are in its operand.
        """
        g = entry.geometry
        if entry.kind == INPUT:
            channels, stride, pads = g.in_channels, [1] * g.rank, reversed_pads(g)
        else:
            channels, stride, pads = g.out_channels, list(g.stride), g.onnx_pads
        blocked = self.conv(
            inputs,
            f"{output}.blocked_result",
            group=g.groups,
            kernel_shape=plane_of(g.kernel_size),
            strides=plane_of(stride),
            dilations=plane_of(g.dilation),
            pads=plane_pads(pads),
        )
        return self.reorder_output(blocked, output, channels)
