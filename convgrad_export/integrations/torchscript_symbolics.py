"""What `torch.onnx.export(..., dynamo=False)` lacks for modules that call `cg.torchscript`: legacy, kept thin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

OPSETS = range(11, 19)

# Where each ATen call keeps its integers, after (input, weight, bias).
_LAYOUTS: dict[str, tuple[str, ...]] = {
    "_convolution": ("stride", "padding", "dilation", "transposed", "output_padding", "groups"),
    "convolution": ("stride", "padding", "dilation", "transposed", "output_padding", "groups"),
    **{f"conv{rank}d": ("stride", "padding", "dilation", "groups") for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": ("stride", "padding", "output_padding", "groups", "dilation") for rank in (1, 2, 3)},
}

_PER_AXIS = {"stride", "padding", "dilation", "output_padding"}


def register_torchscript_symbolics() -> None:
    """Let torch.onnx.export(..., dynamo=False) export convolutions whose kernel is computed, opset 11 to 18.

    A weight gradient is a convolution whose kernel is grad_output, so its size is not known to the exporter, which
    then refuses although ONNX's Conv does not need it; nor does it take a list of one for all axes. Every other
    convolution is still left to PyTorch's own symbolic functions. Calling this more than once is harmless; it holds
    for the process.
    """
    import torch
    from torch.onnx import symbolic_opset9

    for name, layout in _LAYOUTS.items():
        symbolic = _symbolic(getattr(symbolic_opset9, name), name, layout)
        for opset in OPSETS:
            torch.onnx.register_custom_op_symbolic(f"aten::{name}", symbolic, opset)


def _symbolic(original: Callable[..., Any], name: str, layout: tuple[str, ...]) -> Callable[..., Any]:
    from torch.onnx import symbolic_helper

    def convolution(g: Any, input: Any, weight: Any, bias: Any, *rest: Any) -> Any:
        sizes = symbolic_helper._get_tensor_sizes(weight)
        values = dict(zip(layout, rest, strict=False))
        given: dict[str, list[int]] = {}
        for key in set(values) & _PER_AXIS:
            with contextlib.suppress(ValueError):  # padding="same"
                given[key] = list(symbolic_helper._get_const(values[key], "is", key))
        rank = int(name[-2]) if name[-2].isdigit() else max(map(len, given.values()))
        rank = rank if sizes is None else len(sizes) - 2
        complete = all(len(found) in (0, rank) for found in given.values())  # PyTorch's own takes no list of one
        if complete and sizes is not None and all(size is not None for size in sizes[2:]):
            return original(g, input, weight, bias, *rest)

        def integers(key: str, default: int) -> list[int]:
            found = given.get(key, [default])
            return found * rank if len(found) == 1 else found

        stride = integers("stride", 1)
        transposed = name.startswith("conv_transpose") or bool(
            "transposed" in values and symbolic_helper._get_const(values["transposed"], "i", "transposed")
        )
        padding = integers("padding", 0)
        attributes = {
            "strides_i": stride,
            "pads_i": padding + padding,
            "dilations_i": integers("dilation", 1),
            "group_i": symbolic_helper._get_const(values["groups"], "i", "groups"),
        }
        if transposed:
            attributes["output_padding_i"] = integers("output_padding", 0)
        operands = [input, weight] if symbolic_helper._is_none(bias) else [input, weight, bias]
        return g.op("ConvTranspose" if transposed else "Conv", *operands, **attributes)

    return convolution
