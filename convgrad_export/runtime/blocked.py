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
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..depth_planes import all_taps
from ..geometry import ConvGeometry
from ..provider_names import CPU
from .blocked_volumes import plane_pairs
from .blocked_weights import fills_blocks
from .blocked_writer import DOMAIN, BlockedWriter
from .convolution_entries import (
    FORWARD,
    INPUT,
    METADATA,
    WEIGHT,
    ConvolutionEntry,
    from_text,
    one_to_one,
    reversed_pads,
)
from .formula import intact
from .graph_nodes import put_nodes, reads
from .model_source import external_locations, loaded
from .providers import onnxruntime

_CANDIDATES = (16, 8)
_BLOCKS_TOGETHER = 4  # of filters, which onnxruntime's kernel takes at once
# Dense layers: output positions of all samples from which on the weight's rearrangement is little beside the Conv, and
# elements of a weight that is little anyway.
_POSITIONS, _SMALL_WEIGHT = 256, 1 << 16
# Of a weight gradient, which every sample adds to.
_WEIGHT_POSITIONS, _SMALL_WEIGHT_POSITIONS = 512, 128
_PIECES, _FEW_FILTERS, _FEW_COLUMNS, _SMALL_IMAGE = 5, 32, 32, 256
_LONG = 1024  # positions of one axis, from where on the transpositions, which run on one thread, weigh too much for two
# The same over three axes, where the file's own forms are slower; and of an input gradient also per element of weight.
_VOLUME_POSITIONS, _WEIGHT_USES = 128, 1 << 13
_MOST_PAIRS = 1 << 12  # of a plane and a depth tap, which are listed one by one
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
    wanted = [entry for entry in entries if takes_layout(entry, threads)]
    return _rewrite(model, intact(model, wanted), block)


def takes_layout(entry: ConvolutionEntry, threads: int | None = None) -> bool:
    """Whether a session with so many threads computes this in the layout, on this machine."""
    block = block_size()
    return block is not None and _applies(entry, block) and (threads == 1 or _divides(entry, block))


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
    writer = BlockedWriter(block)
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
    if g.rank == 3:
        return _volume_applies(entry, block)
    depthwise = one_to_one(g)
    if entry.kind == INPUT and (min(reversed_pads(g)) < 0 or not (depthwise or set(g.stride) == {1})):
        return False
    if depthwise:
        return entry.kind != WEIGHT or _batch(g) > 0
    if entry.kind == WEIGHT:
        return fills_blocks(g, block) and _weight_pays(g)
    inputs, outputs = g.in_channels_per_group, g.out_channels_per_group
    blocks = inputs % block == 0 or (entry.kind == FORWARD and g.groups == 1 and inputs < block)
    return blocks and outputs % block == 0 and _dense_pays(g, inputs * outputs)


def _volume_applies(entry: ConvolutionEntry, block: int) -> bool:
    g = entry.geometry
    axes, pads = g.rank, reversed_pads(g)
    if entry.kind == WEIGHT or g.groups > 1 or g.in_channels % block:
        return False
    if entry.kind == INPUT and (set(g.stride[1:]) != {1} or min(*pads[1:axes], *pads[axes + 1 :]) < 0):
        return False
    if g.input_size[0] * g.kernel_size[0] > _MOST_PAIRS or not all(pairs := plane_pairs(entry)):
        return False
    positions = max(_batch(g), 1) * math.prod(g.output_size)
    # The file's input gradient reads the weight nearly as it lies; its Conv reads all of it for every sample.
    used = len(all_taps(pairs)) * math.prod(g.kernel_size[1:])
    needed = used * g.in_channels * g.out_channels // _WEIGHT_USES if entry.kind == INPUT else 0
    return positions >= max(_VOLUME_POSITIONS, needed)


def _divides(entry: ConvolutionEntry, block: int) -> bool:
    """Whether there is work for two threads: a Conv is divided by sample, group, four blocks of filters and row."""
    g = entry.geometry
    if not isinstance(g.batch, int) or one_to_one(g) or g.rank == 3:  # a volume's planes are samples
        return True
    if entry.kind == WEIGHT:
        return _weight_divides(g, block)
    forward = entry.kind == FORWARD
    rows = 1 if g.rank == 1 else (g.output_size if forward else g.input_size)[0]
    filters = g.out_channels_per_group if forward else g.in_channels_per_group
    return g.batch * g.groups * -(-filters // (_BLOCKS_TOGETHER * block)) * rows > 1


def _weight_divides(g: ConvGeometry, block: int) -> bool:
    """The same of a dense weight gradient, whose rows are the kernel's: three leave one of two threads idle.

    Of few filters the file's own form is slower still, for its matrix product has as many rows.
    """
    if g.rank == 1 and g.output_size[0] > _LONG:
        return False
    pieces = g.kernel_size[0] * -(-g.out_channels // (_BLOCKS_TOGETHER * block))
    if pieces % 2 == 0 or pieces >= _PIECES:
        return True
    small = g.in_channels <= _FEW_CHANNELS or math.prod(g.output_size) <= _SMALL_IMAGE
    return pieces > 1 and g.out_channels <= _FEW_FILTERS and small


def _dense_pays(g: ConvGeometry, channels: int) -> bool:
    """Whether bringing weight, operand and result into the layout and out of it costs less than it saves.

    Args:
        channels: pairs of an input and an output channel of a group.
    """
    taps, positions = int(np.prod(g.kernel_size)), int(np.prod(g.output_size))
    if len(g.kernel_size) == 1 and taps < _TAPS and channels > _FEW_CHANNELS**2:
        return False
    return channels * taps <= _SMALL_WEIGHT or max(_batch(g), 1) * positions >= _POSITIONS


def _weight_pays(g: ConvGeometry) -> bool:
    """Whether a dense weight gradient has enough products for what is moved, its result above all."""
    if all(k <= s for k, s in zip(g.kernel_size, g.stride, strict=True)):  # the file's form copies nothing twice
        return False
    if g.out_channels > _FEW_FILTERS and g.in_channels * g.taps < _FEW_COLUMNS:
        return False
    samples, positions = _batch(g), _batch(g) * math.prod(g.output_size)
    small = samples > 1 and math.prod(g.weight_shape) <= _SMALL_WEIGHT
    return positions >= (_SMALL_WEIGHT_POSITIONS if small else _WEIGHT_POSITIONS)


def _batch(g: ConvGeometry) -> int:
    """0 where it is not fixed."""
    return g.batch if isinstance(g.batch, int) else 0
