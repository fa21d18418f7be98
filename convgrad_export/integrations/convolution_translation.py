"""`aten.convolution_backward` for torch.onnx: read the call's integers, choose a lowering, record it.

And `aten.convolution`, where Conv and ConvTranspose cannot run the call, or another formula beats them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onnxscript import opset18 as op

from convgrad_export import dtypes
from convgrad_export.emit.onnx import GradientRequest, record_gradients
from convgrad_export.errors import DTypeError
from convgrad_export.geometry import ConvGeometry, aten_attributes
from convgrad_export.integrations import dynamic_convolution as dynamic
from convgrad_export.integrations import float64_convolution
from convgrad_export.integrations.convolution_marks import Mark, mark
from convgrad_export.lowering import CPU, CUDA, GRADIENTS, Lowering
from convgrad_export.runtime.convolution_entries import FORWARD, WEIGHT, may_replace
from convgrad_export.selection.forward_policy import forward_body
from convgrad_export.selection.policy import AUTO, check_name, choose
from convgrad_export.selection.reduced_arithmetic import DEFAULT_ERROR_FACTOR


@dataclass(frozen=True)
class LoweringChoice:
    """What one gradient of one convolution in the model became."""

    gradient: str
    geometry: str
    lowering: str


class ConvolutionBackwardTranslation:
    """Makes the translation function, `function`; `choices` lists what it chose, in the order of the calls.

    `marks` lists those of them that a session may compute in another way: the policy's choices, direct forms among
    those of dense convolutions.

    Args:
        lowering: "auto" for the fixed policy, "tuned" for the tuning cache, or a catalogue name, which then has to
            apply to every convolution of the model whose spatial sizes are known.
        provider: The execution provider to choose for.
        opset: The opset the model will have; lowerings that need a newer one are not chosen.
        threads: That will run the model; None for onnxruntime's default.
        max_error_factor: Largest allowed error bound, in units of the direct form's.
    """

    def __init__(
        self,
        lowering: str = AUTO,
        provider: str = CPU,
        opset: int = 18,
        threads: int | None = None,
        max_error_factor: float = DEFAULT_ERROR_FACTOR,
    ) -> None:
        self._lowering, self._provider, self._opset = check_name(lowering), provider, opset
        self._threads, self._max_error_factor = threads, max_error_factor
        self.choices: list[LoweringChoice] = []
        self.marks: list[Mark] = []

        # torch.onnx reads the signature of a function; it accepts no callable object.
        def aten_convolution_backward(
            grad_output: Any,
            input: Any,
            weight: Any,
            bias_sizes: Any,
            stride: Sequence[int],
            padding: Sequence[int],
            dilation: Sequence[int],
            transposed: bool,
            output_padding: Sequence[int],
            groups: int,
            output_mask: Sequence[bool],
        ) -> tuple[Any, Any, Any]:
            attributes = (stride, padding, dilation, transposed, output_padding, groups)
            return self._translate(
                {"grad_output": grad_output, "input": input, "weight": weight}, attributes, output_mask
            )

        self.function = aten_convolution_backward

    def _translate(
        self, operands: dict[str, Any], attributes: tuple[Any, ...], output_mask: Sequence[bool]
    ) -> tuple[Any, Any, Any]:
        """(dX, dW, db). A gradient that the mask leaves out is a constant, which nothing reads."""
        # The mask's third entry with bias_sizes=None is legal: the sizes are the output channels anyway.
        wanted = [gradient for gradient, asked in zip(GRADIENTS, output_mask, strict=True) if asked]
        dtype = dtypes.from_onnx_code(int(operands["grad_output"].dtype))
        if dtype is None:
            raise DTypeError(f"convolution_backward of {operands['grad_output'].dtype.name} tensors has no ONNX form")
        shapes = {name: list(value.shape) for name, value in operands.items()}
        spatial = [*shapes["input"][2:], *shapes["grad_output"][2:]]
        if all(isinstance(size, int) for size in spatial):
            results = self._static(operands, shapes, wanted, dtype, attributes)
        else:
            g = _dynamic(shapes["weight"], *attributes)
            results = self._dynamic(operands, g, wanted, dtype)
        placed = [results[name] if name in results else op.Constant(value_float=0.0) for name in GRADIENTS]
        return placed[0], placed[1], placed[2]

    def _static(
        self,
        operands: dict[str, Any],
        shapes: dict[str, list[Any]],
        wanted: Sequence[str],
        dtype: str,
        attributes: tuple[Any, ...],
    ) -> dict[str, Any]:
        batch = shapes["input"][0] if isinstance(shapes["input"][0], int) else "batch"
        geometry = ConvGeometry.from_backward(
            (batch, *shapes["grad_output"][1:]),
            (batch, *shapes["input"][1:]),
            shapes["weight"],
            **aten_attributes(*attributes),
        )
        lowerings = {
            gradient: choose(
                gradient,
                geometry,
                dtype,
                lowering=self._lowering,
                provider=self._provider,
                opset=self._opset,
                threads=self._threads,
                max_error_factor=self._max_error_factor,
            )
            for gradient in wanted
        }
        self.choices += [LoweringChoice(key, geometry.describe(), value.name) for key, value in lowerings.items()]
        request = GradientRequest(geometry, lowerings, dtype, self._opset, self._provider)
        results = record_gradients(op, request, operands)
        if self._lowering == AUTO and self._provider == CPU:
            self.marks += self._marked(geometry, dtype, lowerings, operands, results)
        return results

    @staticmethod
    def _marked(
        geometry: ConvGeometry,
        dtype: str,
        lowerings: dict[str, Lowering],
        operands: dict[str, Any],
        results: dict[str, Any],
    ) -> list[Mark]:
        """Marks of what a session may compute in another way; of a transposed convolution as its adjoint has it."""
        grad_output, marks = operands["grad_output"], []
        if not geometry.transposed:
            for gradient, other in (("input", "weight"), ("weight", "input")):
                if gradient in results and may_replace(gradient, geometry, lowerings[gradient].name):
                    marks += mark(gradient, geometry, dtype, results[gradient], (grad_output, operands[other]))
            return marks
        adjoint = geometry.adjoint()
        if "input" in results and lowerings["input"].name == "input.conv":
            marks += mark(FORWARD, adjoint, dtype, results["input"], (grad_output, operands["weight"]))
        if "weight" in results and may_replace(WEIGHT, adjoint, lowerings["weight"].name):
            marks += mark(WEIGHT, adjoint, dtype, results["weight"], (operands["input"], grad_output))
        return marks

    def _dynamic(
        self, operands: dict[str, Any], g: dynamic.DynamicConvolution, wanted: Sequence[str], dtype: str
    ) -> dict[str, Any]:
        grad_output, input, weight = operands["grad_output"], operands["input"], operands["weight"]
        matmul = dtype == "float64" and self._provider == CPU

        def input_gradient() -> Any:
            if not matmul:
                return dynamic.input_gradient(op, g, grad_output, input, weight, even_pads=self._provider == CUDA)
            if not g.transposed:
                return float64_convolution.scattered(op, g, grad_output, weight, like=input)
            return dynamic.crop_to(op, g, float64_convolution.gathered(op, g, grad_output, weight), input, [0] * g.rank)

        names = float64_convolution.NAMES if matmul else dynamic.NAMES
        forms: dict[str, tuple[str, Callable[[], Any]]] = {
            "input": (names["transposed_input" if g.transposed else "input"], input_gradient),
            "weight": (dynamic.NAMES["weight"], lambda: dynamic.weight_gradient(op, g, grad_output, input)),
            "bias": ("bias.reduce_sum", lambda: _bias_gradient(g, grad_output)),
        }
        results = {}
        for gradient in wanted:
            chosen, build = forms[gradient]
            self.choices.append(LoweringChoice(gradient, f"weight {g.weight_shape}, dynamic size", chosen))
            results[gradient] = build()
        return results


def convolution_translation(
    otherwise: Callable[..., Any],
    provider: str = CPU,
    threads: int | None = None,
    max_error_factor: float = DEFAULT_ERROR_FACTOR,
    marks: list[Mark] | None = None,
    *,
    trained: bool = True,
    opset: int = 18,
) -> Callable[..., Any]:
    """The translation of `aten.convolution`.

    Args:
        otherwise: torch.onnx's own translation, for every call that is better left to Conv or ConvTranspose.
        provider: The execution provider the model is for.
        trained: The weights are inputs of the model, so that another formula may beat Conv.
        threads, max_error_factor: As in `ConvolutionBackwardTranslation`.
        marks: Takes up those that a session may compute in another way.
        opset: The opset the model will have.
    """

    def aten_convolution(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        transposed: bool = False,
        output_padding: Sequence[int] = (0,),
        groups: int = 1,
    ) -> Any:
        def unchanged() -> Any:
            return otherwise(
                input,
                weight,
                bias,
                stride=stride,
                padding=padding,
                dilation=dilation,
                transposed=transposed,
                output_padding=output_padding,
                groups=groups,
            )

        shape, weight_shape = list(input.shape), list(weight.shape)
        g = _dynamic(weight_shape, stride, padding, dilation, transposed, output_padding, groups)
        known = all(isinstance(size, int) for size in weight_shape)
        if known and int(input.dtype) == dtypes.onnx_code("float64") and provider == CPU:
            form = float64_convolution.scattered if transposed else float64_convolution.gathered
            return _with_bias(form(op, g, input, weight), bias, g.rank)
        if g.pads_whole_strides:
            return _with_bias(dynamic.transposed_forward(op, g, input, weight), bias, g.rank)
        if not trained or not all(isinstance(size, int) for size in (*shape[1:], *weight_shape)):
            return unchanged()
        batch = shape[0] if isinstance(shape[0], int) else "batch"
        geometry = ConvGeometry.from_forward(
            (batch, *shape[1:]),
            weight_shape,
            **aten_attributes(stride, padding, dilation, transposed, output_padding, groups),
        )
        dtype = dtypes.from_onnx_code(int(input.dtype)) or ""
        body = forward_body(geometry, dtype, provider, max_error_factor, threads, opset)
        result = unchanged() if body is None else _with_bias(body(op, geometry, input, weight), bias, geometry.rank)
        if marks is not None and provider == CPU and not transposed and (groups > 1 or body is None):
            operands = (input, weight) if bias is None else (input, weight, bias)
            marks.extend(mark(FORWARD, geometry, dtype, result, operands))
        return result

    return aten_convolution


def _with_bias(result: Any, bias: Any, rank: int) -> Any:
    if bias is None:
        return result
    aligned: Any = op.Constant(value_ints=[1, -1, *[1] * rank])
    return op.Add(result, op.Reshape(bias, aligned))


def _bias_gradient(g: dynamic.DynamicConvolution, grad_output: Any) -> Any:
    axes: Any = op.Constant(value_ints=[0, *range(2, 2 + g.rank)])
    return op.ReduceSum(grad_output, axes, keepdims=0)


def _dynamic(
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> dynamic.DynamicConvolution:
    rank = len(weight_shape) - 2

    def full(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values) * rank if len(values) == 1 else tuple(values)

    return dynamic.DynamicConvolution(
        tuple(weight_shape),
        full(stride),
        full(padding),
        full(dilation),
        groups,
        bool(transposed),
        full(output_padding) if transposed else (0,) * rank,
    )
