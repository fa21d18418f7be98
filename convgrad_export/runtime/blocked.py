"""Convolutions and their gradients in onnxruntime's own blocked layout, written when a model is loaded.

onnxruntime's Conv takes a depthwise layer channel by channel, unless its weight is a constant of the model: then it
keeps B channels side by side (NCHWc, B = 8 or 16 as the processor's registers are wide) and multiplies B of them at
once, three to twenty times as fast; dense layers gain a tenth to a third. In training, and in a gradient, the weight
is no constant. The operators for that layout can be named in a model all the same (onnxruntime saves
optimized models with them), but which B they mean depends on the machine, so that they have no place in a file. A
session writes them for the machine it runs on:

- forward: Conv over blocked input and weight;
- input gradient: the same over grad_output, zeros between its elements where the stride is above 1, with the kernel
  reversed;
- weight gradient, depthwise: sample and channel together are the channels of one Conv whose kernel is grad_output.

`block_size` finds B by computing, not by asking: a layout that is not the machine's gives wrong numbers.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..geometry import ConvGeometry
from ..provider_names import CPU
from .convolution_entries import FORWARD, INPUT, METADATA, WEIGHT, ConvolutionEntry, from_text, one_to_one
from .formula import intact
from .graph_nodes import put_nodes, reads
from .model_source import external_locations, loaded
from .providers import onnxruntime

DOMAIN = "com.microsoft.nchwc"
_CANDIDATES = (16, 8)
_BLOCKS_TOGETHER = 4  # of filters, which onnxruntime's kernel takes at once
# Dense layers: output positions of all samples from which on the weight's rearrangement is little beside the Conv, and
# elements of a weight that is little anyway.
_POSITIONS, _SMALL_WEIGHT = 256, 1 << 16
_TAPS, _FEW_CHANNELS = 3, 64  # kernels of fewer taps on one axis read what they rearrange too seldom, from here on


def put_blocked_layout(model: Any, threads: int | None = None) -> bool:
    """Bring the convolutions of an onnx.ModelProto into the blocked layout, those that nobody has edited since.

    Args:
        threads: that will run the model; None for several.

    Returns:
        False where none can be, or would gain; then the model is as it was.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA), None)
    entries = from_text(text)
    if not entries or external_locations(model):  # as bytes it would take them from the current folder
        return False
    block = block_size()
    if block is None:
        return False
    wanted = [entry for entry in entries if _applies(entry, block) and (threads == 1 or _divides(entry, block))]
    return _rewrite(model, intact(model, wanted), block)


def in_blocked_layout(source: Path | bytes, parsed: Any | None = None, threads: int | None = None) -> Path | bytes:
    """The same for a model's file or bytes, as they came where nothing changes.

    Args:
        parsed: the onnx.ModelProto that is in it, to be changed; read from it without one.
        threads: as in `put_blocked_layout`.
    """
    model = parsed
    if model is None and _mentions(source, METADATA.encode()):
        model = loaded(source)
    return source if model is None or not put_blocked_layout(model, threads) else model.SerializeToString()


def _mentions(source: Path | bytes, text: bytes) -> bool:
    """Whether the text is in it; a large file is not read into memory for that."""
    if isinstance(source, bytes):
        return text in source
    with source.open("rb") as stream:
        if not os.fstat(stream.fileno()).st_size:
            return False
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text) >= 0


@functools.cache
def block_size() -> int | None:
    """Channels side by side in this machine's blocked layout, None where onnxruntime has none."""
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    channels = 2 * max(_CANDIDATES)
    x = rng.integers(-4, 5, (2, channels, 5, 4)).astype(np.float32)
    w = rng.integers(-4, 5, (channels, 1, 3, 3)).astype(np.float32)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in (("x", x), ("w", w), ("y", x))]
    conv = helper.make_node("Conv", ["x", "w"], ["y"], group=channels, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    plain = helper.make_model(
        helper.make_graph([conv], "conv", values[:2], values[2:]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    geometry = ConvGeometry.from_forward(x.shape, w.shape, padding=1, groups=channels)
    entry = ConvolutionEntry(FORWARD, "y", ("x", "w"), geometry)
    expected = _run(plain, {"x": x, "w": w})
    for block in _CANDIDATES:
        blocked = type(plain)()
        blocked.CopyFrom(plain)
        _rewrite(blocked, [entry], block)
        try:
            found = _run(blocked, {"x": x, "w": w})
        except Exception:  # a build without the operators; onnxruntime raises private classes
            return None
        if np.array_equal(found, expected):
            return block
    return None


def _run(model: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    result: np.ndarray = session.run(None, feeds)[0]
    return result


def _rewrite(model: Any, entries: Sequence[ConvolutionEntry], block: int) -> bool:
    """Replace what computes the entries' results; entries that do not fit the graph are left alone.

    Args:
        entries: that apply to the block.
    """
    graph = model.graph
    place = {name: i for i, node in enumerate(graph.node) for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    given = {value.name for value in graph.input} | constants
    found = {
        entry.result: entry
        for entry in entries
        if entry.result in place
        and len(graph.node[place[entry.result]].output) == 1
        and all(name in given or place.get(name, len(place)) < place[entry.result] for name in entry.operands)
        and (entry.kind == WEIGHT or entry.operands[1] not in constants)  # onnxruntime does those by itself
    }
    if not found:
        return False
    writer = _Writer(block)
    nodes: list[Any] = []
    for node in graph.node:
        entry = found.get(node.output[0]) if node.output else None
        if entry is None:
            nodes.append(node)
            continue
        nodes.extend(writer.nodes_of(entry))
    graph.initializer.extend(writer.constants.values())
    outputs = {value.name for value in graph.output}
    put_nodes(graph, _used(nodes, outputs), outputs)
    if not any(opset.domain == DOMAIN for opset in model.opset_import):
        model.opset_import.add(domain=DOMAIN, version=1)
    return True


def _used(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """The nodes that an output depends on, in their order."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(reads(node))
    return kept[::-1]


def _applies(entry: ConvolutionEntry, block: int) -> bool:
    g = entry.geometry
    if 0 in (*g.input_size, *g.output_size) or g.out_channels % block:
        return False
    depthwise = one_to_one(g)
    if entry.kind == INPUT and (min(_reversed_pads(g)) < 0 or not (depthwise or set(g.stride) == {1})):
        return False
    if depthwise:
        return entry.kind != WEIGHT or _batch(g) > 0
    inputs, outputs = g.in_channels_per_group, g.out_channels_per_group
    blocks = inputs % block == 0 or (entry.kind == FORWARD and g.groups == 1 and inputs < block)
    return entry.kind != WEIGHT and blocks and outputs % block == 0 and _dense_pays(g, inputs * outputs)


def _divides(entry: ConvolutionEntry, block: int) -> bool:
    """Whether there is work for two threads: a Conv is divided by sample, group, four blocks of filters and row."""
    g = entry.geometry
    if not isinstance(g.batch, int) or one_to_one(g):
        return True
    forward = entry.kind == FORWARD
    rows = 1 if g.rank == 1 else (g.output_size if forward else g.input_size)[0]
    filters = g.out_channels_per_group if forward else g.in_channels_per_group
    return g.batch * g.groups * -(-filters // (_BLOCKS_TOGETHER * block)) * rows > 1


def _dense_pays(g: ConvGeometry, channels: int) -> bool:
    """Whether bringing weight, operand and result into the layout and out of it costs less than it saves.

    Args:
        channels: pairs of an input and an output channel of a group.
    """
    taps, positions = int(np.prod(g.kernel_size)), int(np.prod(g.output_size))
    if len(g.kernel_size) == 1 and taps < _TAPS and channels > _FEW_CHANNELS**2:
        return False
    return channels * taps <= _SMALL_WEIGHT or max(_batch(g), 1) * positions >= _POSITIONS


def _reversed_pads(g: ConvGeometry) -> list[int]:
    """Padding of grad_output, with `stride` - 1 zeros behind each element, that gives a result of the input's size."""
    reach = [e - 1 for e in g.extent]
    begin = [r - pad for r, pad in zip(reach, g.begin, strict=True)]
    spread = [s * size for s, size in zip(g.stride, g.output_size, strict=True)]
    end = [i + r - s - b for i, r, s, b in zip(g.input_size, reach, spread, begin, strict=True)]
    return [*begin, *end]


class _Writer:
    """Writes nodes; a tensor is brought into the blocked layout once, however many read it."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._made: set[str] = set()
        self._nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def nodes_of(self, entry: ConvolutionEntry) -> list[Any]:
        self._nodes = []
        {FORWARD: self._forward, INPUT: self._input_gradient, WEIGHT: self._weight_gradient}[entry.kind](entry)
        return self._nodes

    def _node(self, operator: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        from onnx import helper

        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def _ints(self, *values: int) -> str:
        from onnx import numpy_helper

        name = "blocked.ints." + ".".join(str(value) for value in values)
        self.constants.setdefault(name, numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def _plane_tensor(self, name: str, channels: int, size: Sequence[int]) -> str:
        """(N, C, *size) as (N, C, H, W): a row is an image of height 1."""
        plane = name if len(size) == 2 else f"{name}.plane"
        if plane not in self._made and plane != name:
            self._made.add(plane)
            self._node("Reshape", [name, self._ints(0, channels, 1, size[0])], plane)
        return plane

    def _block_tensor(self, name: str, channels: int, size: Sequence[int]) -> str:
        """(N, C, *size) as blocked (N, C, H, W)."""
        blocked = f"{name}.blocked"
        if blocked not in self._made:
            self._made.add(blocked)
            self._node("ReorderInput", [self._plane_tensor(name, channels, size)], blocked, DOMAIN)
        return blocked

    def _weight(self, entry: ConvolutionEntry, name: str) -> str:
        """The weight as (O/B, I/B, K, B, B), of the Conv that is to run, in the shape that the operator wants to see.

        A depthwise one, and one of fewer than B input channels, is (O/B, I, K, B). An input gradient's Conv takes the
        kernel reversed, and the channels the other way round. Every step moves whole blocks, or one axis to an end:
        for anything else onnxruntime's Transpose and Gather take ten times as long.
        """
        g = entry.geometry
        taps, block, stem = int(np.prod(g.kernel_size)), self._block, f"{entry.result}.weight"
        groups, outputs, inputs = g.groups, g.out_channels, g.in_channels_per_group
        if entry.kind == INPUT and inputs >= block:
            flat = self._node("Reshape", [name, self._ints(outputs * inputs, taps)], f"{stem}.flat")
            first = self._node("Transpose", [flat], f"{stem}.taps_first", perm=[1, 0])
            first = self._node("Gather", [first, self._ints(*range(taps - 1, -1, -1))], f"{stem}.reversed", axis=0)
            split = self._ints(taps, groups, outputs // groups // block, block, inputs // block, block)
            first = self._node("Reshape", [first, split], f"{stem}.split")
            inner = self._node("Transpose", [first], f"{stem}.inner", perm=[1, 4, 2, 0, 3, 5])
            outputs, inputs = inputs * groups, outputs // groups
        else:
            image = self._node("Reshape", [name, self._ints(1, outputs, inputs, taps)], f"{stem}.image")
            inner = self._node("ReorderInput", [image], f"{stem}.lanes", DOMAIN)  # (O/B, I, K, B)
            if inputs >= block:
                split = self._ints(outputs // block, inputs // block, block, taps, block)
                inner = self._node("Reshape", [inner, split], f"{stem}.split")
                inner = self._node("Transpose", [inner], f"{stem}.inner", perm=[0, 1, 3, 2, 4])
            elif entry.kind == INPUT:
                inner = self._node("Reshape", [inner, self._ints(outputs // block, taps, block)], f"{stem}.split")
                inner = self._node("Gather", [inner, self._ints(*range(taps - 1, -1, -1))], f"{stem}.reversed", axis=1)
        return self._node("Reshape", [inner, self._ints(outputs, inputs, *_plane(g.kernel_size))], f"{stem}.blocked")

    def _forward(self, entry: ConvolutionEntry) -> None:
        g = entry.geometry
        x, w, *bias = entry.operands
        few = g.groups == 1 and g.in_channels < self._block  # then the operator reads rows as they are
        convert = self._plane_tensor if few else self._block_tensor
        inputs = [convert(x, g.in_channels, g.input_size), self._weight(entry, w), *bias]
        self._convolve(entry, inputs, g.stride, g.onnx_pads, g.out_channels, g.output_size)

    def _input_gradient(self, entry: ConvolutionEntry) -> None:
        g = entry.geometry
        grad_output, w = entry.operands
        data = self._block_tensor(grad_output, g.out_channels, g.output_size)
        if set(g.stride) != {1}:
            data = self._spread(entry, data)
        ones, pads = [1] * len(g.stride), _reversed_pads(g)
        self._convolve(entry, [data, self._weight(entry, w)], ones, pads, g.in_channels, g.input_size)

    def _spread(self, entry: ConvolutionEntry, blocked: str) -> str:
        """`stride` - 1 zeros behind each element of a blocked (N, C, H, W), along both axes."""
        g = entry.geometry
        (height, width), (down, right) = _plane(g.output_size), _plane(g.stride)
        rows, stem = g.out_channels // self._block * height, f"{entry.result}.spread"
        apart = self._node("Reshape", [blocked, self._ints(0, rows, 1, width, 1, self._block)], f"{stem}.apart")
        amounts = self._ints(*[0] * 8, down - 1, 0, right - 1, 0)
        padded = self._node("Pad", [apart, amounts], f"{stem}.padded")
        shape = self._ints(0, g.out_channels, height * down, width * right)
        return self._node("Reshape", [padded, shape], stem)

    def _convolve(
        self,
        entry: ConvolutionEntry,
        inputs: Sequence[str],
        stride: Sequence[int],
        pads: Sequence[int],
        channels: int,
        size: Sequence[int],
    ) -> None:
        """The Conv, and its result as the graph's (N, channels, *size)."""
        g = entry.geometry
        blocked = self._node(
            "Conv",
            inputs,
            f"{entry.result}.blocked_result",
            DOMAIN,
            group=g.groups,
            kernel_shape=_plane(g.kernel_size),
            strides=_plane(stride),
            dilations=_plane(g.dilation),
            pads=_plane_pads(pads),
        )
        if len(size) == 2:
            self._node("ReorderOutput", [blocked], entry.result, DOMAIN, channels=channels)
            return
        plane = self._node("ReorderOutput", [blocked], f"{entry.result}.result_plane", DOMAIN, channels=channels)
        self._node("Reshape", [plane, self._ints(0, channels, size[0])], entry.result)

    def _weight_gradient(self, entry: ConvolutionEntry) -> None:
        """Result element k of channel (n, c) is the sum over grad_output of input, k dilations on: a Conv.

        Stride and dilation change places. A last window that the forward convolution left out is cut off.
        """
        g = entry.geometry
        grad_output, x = entry.operands
        together = _batch(g) * g.in_channels
        stem = f"{entry.result}.weight_gradient"
        data = self._block_tensor(x, g.in_channels, g.input_size)
        data = self._node("Reshape", [data, self._ints(1, together, *_plane(g.input_size))], f"{stem}.image")
        kernel = self._block_tensor(grad_output, g.in_channels, g.output_size)
        kernel = self._node("Reshape", [kernel, self._ints(together, 1, *_plane(g.output_size))], f"{stem}.kernel")
        blocked = self._node(
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
        taps = self._node("ReorderOutput", [blocked], f"{stem}.taps", DOMAIN, channels=together)
        size = _plane(g.kernel_size)
        if _weight_windows(g) != size:
            taps = self._node("Slice", [taps, self._ints(0, 0), self._ints(*size), self._ints(2, 3)], f"{stem}.cut")
        shape = self._ints(_batch(g), g.in_channels, 1, *g.kernel_size)
        samples = self._node("Reshape", [taps, shape], f"{stem}.samples")
        self._node("ReduceSum", [samples, self._ints(0)], entry.result, keepdims=0)


def _weight_windows(g: ConvGeometry) -> list[int]:
    """Positions that the Conv of the weight gradient has; the first of them are the kernel's."""
    padded = [lo + size + hi for size, (lo, hi) in zip(g.input_size, g.pads, strict=True)]
    spans = [s * (o - 1) + 1 for s, o in zip(g.stride, g.output_size, strict=True)]
    counts = [(p - e) // d + 1 for p, e, d in zip(padded, spans, g.dilation, strict=True)]
    return _plane(counts)


def _batch(g: ConvGeometry) -> int:
    """0 where it is not fixed."""
    return g.batch if isinstance(g.batch, int) else 0


def _plane(sizes: Sequence[int]) -> list[int]:
    return [1] * (2 - len(sizes)) + list(sizes)


def _plane_pads(pads: Sequence[int]) -> list[int]:
    return list(pads) if len(pads) == 4 else [0, pads[0], 0, pads[1]]
