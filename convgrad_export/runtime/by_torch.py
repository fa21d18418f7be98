"""The eager gradients as ATen calls, for tensors whose memory nobody can read: those of a tracer, above all.

`torch.export`, `make_fx` and FakeTensorMode follow a program with tensors that have shapes and no data, or record the
operators that it calls. onnxruntime is no operator of PyTorch: of a run, they would keep a constant. So they get
`aten::convolution_backward`, which is what torch.nn.grad gives them, and what exporters and compilers know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..geometry import ConvGeometry
from ..torch_convolution import last_axis_first


def gradients_by_torch(
    geometry: ConvGeometry, gradients: Sequence[str], operands: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The gradients of one checked convolution, by name; a missing operand has a shape and no part in them."""
    g, grad_output = geometry, operands["grad_output"]
    input, weight = (
        operands[name] if name in operands else grad_output.new_empty(1).expand(shape)
        for name, shape in (("input", g.input_shape), ("weight", g.weight_shape))
    )
    begin, extra, grad = list(g.begin), list(g.output_padding), grad_output
    uneven = any(lo != hi for lo, hi in g.pads)
    if uneven:  # ATen pads both ends of an axis alike
        begin, extra = [0] * g.rank, [0] * g.rank
        if g.transposed:  # padding of a transposed convolution cuts its result, output padding lengthens the end
            ends = [(lo, hi - more) for (lo, hi), more in zip(g.pads, g.output_padding, strict=True)]
            grad = torch.nn.functional.pad(grad_output, last_axis_first(ends))
        else:
            input = torch.nn.functional.pad(input, last_axis_first(g.pads))
    mask = [name in gradients for name in ("input", "weight", "bias")]
    found = torch.ops.aten.convolution_backward.default(
        grad, input, weight, [g.out_channels], g.stride, begin, g.dilation, g.transposed, extra, g.groups, mask
    )
    results = dict(zip(("input", "weight", "bias"), found, strict=True))
    if uneven and g.transposed and "bias" in gradients:
        results["bias"] = grad_output.sum([0, *range(2, 2 + g.rank)])  # of what was lengthened, too
    elif uneven and not g.transposed and "input" in gradients:
        results["input"] = torch.nn.functional.pad(results["input"], last_axis_first([(-lo, -hi) for lo, hi in g.pads]))
    return {name: results[name] for name in gradients}
