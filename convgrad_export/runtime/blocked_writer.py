"""The nodes of one convolution in onnxruntime's blocked layout (`blocked.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..geometry import ConvGeometry
from .blocked_volumes import write_volume
from .convolution_entries import FORWARD, INPUT, WEIGHT, ConvolutionEntry, reversed_pads

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
        if entry.geometry.rank == 3:
            write_volume(self, entry)
            return self._nodes
        {FORWARD: self._forward, INPUT: self._input_gradient, WEIGHT: self._weight_gradient}[entry.kind](entry)
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

    def _block_tensor(self, name: str, channels: int, size: Sequence[int]) -> str:
        """(N, C, *size) as blocked (N, C, H, W)."""
        blocked = f"{name}.blocked"
        if self.once(blocked):
            self.reorder_input(self._plane_tensor(name, channels, size), blocked)
        return blocked

    def _weight(self, entry: ConvolutionEntry, name: str) -> str:
        """The weight as (O/B, I/B, K, B, B), of the Conv that is to run, in the shape that the operator wants to see.

        A depthwise one, and one of fewer than B input channels, is (O/B, I, K, B). An input gradient's Conv takes the
        kernel reversed, and the channels the other way round. Every step moves whole blocks, or one axis to an end:
        for anything else onnxruntime's Transpose and Gather take ten times as long.
        """
        g = entry.geometry
        taps, block, stem = int(np.prod(g.kernel_size)), self.block, f"{entry.result}.weight"
        groups, outputs, inputs = g.groups, g.out_channels, g.in_channels_per_group
        if entry.kind == INPUT and inputs >= block:
            flat = self.node("Reshape", [name, self.ints(outputs * inputs, taps)], f"{stem}.flat")
            first = self.node("Transpose", [flat], f"{stem}.taps_first", perm=[1, 0])
            first = self.node("Gather", [first, self.ints(*range(taps - 1, -1, -1))], f"{stem}.reversed", axis=0)
            split = self.ints(taps, groups, outputs // groups // block, block, inputs // block, block)
            first = self.node("Reshape", [first, split], f"{stem}.split")
            inner = self.node("Transpose", [first], f"{stem}.inner", perm=[1, 4, 2, 0, 3, 5])
            outputs, inputs = inputs * groups, outputs // groups
        else:
            image = self.node("Reshape", [name, self.ints(1, outputs, inputs, taps)], f"{stem}.image")
            inner = self.reorder_input(image, f"{stem}.lanes")  # (O/B, I, K, B)
            if inputs >= block:
                split = self.ints(outputs // block, inputs // block, block, taps, block)
                inner = self.node("Reshape", [inner, split], f"{stem}.split")
                inner = self.node("Transpose", [inner], f"{stem}.inner", perm=[0, 1, 3, 2, 4])
            elif entry.kind == INPUT:
                inner = self.node("Reshape", [inner, self.ints(outputs // block, taps, block)], f"{stem}.split")
                inner = self.node("Gather", [inner, self.ints(*range(taps - 1, -1, -1))], f"{stem}.reversed", axis=1)
        return self.node("Reshape", [inner, self.ints(outputs, inputs, *_plane(g.kernel_size))], f"{stem}.blocked")

    def _forward(self, entry: ConvolutionEntry) -> None:
        g = entry.geometry
        x, w, *bias = entry.operands
        few = g.groups == 1 and g.in_channels < self.block  # then the operator reads rows as they are
        convert = self._plane_tensor if few else self._block_tensor
        self._image(entry, [convert(x, g.in_channels, g.input_size), self._weight(entry, w), *bias])

    def _input_gradient(self, entry: ConvolutionEntry) -> None:
        g = entry.geometry
        grad_output, w = entry.operands
        data = self._block_tensor(grad_output, g.out_channels, g.output_size)
        if set(g.stride) != {1}:
            data = self._spread(entry, data)
        self._image(entry, [data, self._weight(entry, w)])

    def _spread(self, entry: ConvolutionEntry, blocked: str) -> str:
        """`stride` - 1 zeros behind each element of a blocked (N, C, H, W), along both axes."""
        g = entry.geometry
        (height, width), (down, right) = _plane(g.output_size), _plane(g.stride)
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
        blocked = self.node(
            "Conv",
            inputs,
            f"{output}.blocked_result",
            DOMAIN,
            group=g.groups,
            kernel_shape=_plane(g.kernel_size),
            strides=_plane(stride),
            dilations=_plane(g.dilation),
            pads=_plane_pads(pads),
        )
        return self.node("ReorderOutput", [blocked], output, DOMAIN, channels=channels)

    def _weight_gradient(self, entry: ConvolutionEntry) -> None:
        """Result element k of channel (n, c) is the sum over grad_output of input, k dilations on: a Conv.

        Stride and dilation change places. A last window that the forward convolution left out is cut off.
        """
        g = entry.geometry
        grad_output, x = entry.operands
        together = int(g.batch) * g.in_channels
        stem = f"{entry.result}.weight_gradient"
        data = self._block_tensor(x, g.in_channels, g.input_size)
        data = self.node("Reshape", [data, self.ints(1, together, *_plane(g.input_size))], f"{stem}.image")
        kernel = self._block_tensor(grad_output, g.in_channels, g.output_size)
        kernel = self.node("Reshape", [kernel, self.ints(together, 1, *_plane(g.output_size))], f"{stem}.kernel")
        blocked = self.node(
            "Conv",
            [data, kernel],
            f"{stem}.blocked",
            DOMAIN,
            group=together,
            kernel_shape=_plane(g.output_size),
            strides=_plane(g.dilation),
            dilations=_plane(g.stride),
            pads=_plane_pads(g.onnx_pads),
        )
        taps = self.node("ReorderOutput", [blocked], f"{stem}.taps", DOMAIN, channels=together)
        size = _plane(g.kernel_size)
        if _weight_windows(g) != size:
            taps = self.node("Slice", [taps, self.ints(0, 0), self.ints(*size), self.ints(2, 3)], f"{stem}.cut")
        shape = self.ints(int(g.batch), g.in_channels, 1, *g.kernel_size)
        samples = self.node("Reshape", [taps, shape], f"{stem}.samples")
        self.node("ReduceSum", [samples, self.ints(0)], entry.result, keepdims=0)


def _weight_windows(g: ConvGeometry) -> list[int]:
    """Positions that the Conv of the weight gradient has; the first of them are the kernel's."""
    padded = [lo + size + hi for size, (lo, hi) in zip(g.input_size, g.pads, strict=True)]
    spans = [s * (o - 1) + 1 for s, o in zip(g.stride, g.output_size, strict=True)]
    counts = [(p - e) // d + 1 for p, e, d in zip(padded, spans, g.dilation, strict=True)]
    return _plane(counts)


def _plane(sizes: Sequence[int]) -> list[int]:
    """The last two axes, the first of size 1 where there is one."""
    return [1, *sizes][-2:]


def _plane_pads(pads: Sequence[int]) -> list[int]:
    """The same of all beginnings, then all ends."""
    axes = len(pads) // 2
    return [0] * (axes == 1) + list(pads[:axes][-2:]) + [0] * (axes == 1) + list(pads[axes:][-2:])
