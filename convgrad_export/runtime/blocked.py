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
from .blocked_writer import DOMAIN, BlockedWriter
from .convolution_entries import FORWARD, METADATA, WEIGHT, ConvolutionEntry, from_text
from .formula import intact
from .graph_nodes import put_nodes, used_nodes
from .layout_rules import applies, divides
from .model_source import external_locations, loaded
from .providers import onnxruntime

_CANDIDATES = (16, 8)


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
    return block is not None and applies(entry, block) and (threads == 1 or divides(entry, block))


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
    put_nodes(graph, used_nodes(nodes, outputs), outputs)
    if not any(opset.domain == DOMAIN for opset in model.opset_import):
        model.opset_import.add(domain=DOMAIN, version=1)
    return True
