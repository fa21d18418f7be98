"""Checking a model of ours against float64 autograd."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from . import dtypes
from .accuracy import compare, reference_and_bounds
from .arguments import as_int
from .errors import ArgumentTypeError, ConvGradError, DTypeError, GeometryError, ModelFileError
from .files import as_path
from .geometry import ConvGeometry
from .lowering import LOWERINGS, compute_dtype
from .operators import operator
from .reference import make_operands
from .runtime.providers import model_metadata
from .runtime.session import GradientSession

# Sizes that a dynamic model leaves open are these: a remainder on every axis with strides of 2 and 3.
_SIZES, _KERNELS = (11, 9, 7), (3, 2, 3)


@dataclass(frozen=True)
class GradientCheck:
    """One output of one model on one kind of data.

    Attributes:
        model: path of the file. output: name of the gradient. lowering: what the model was built with.
        data: ``"integers"`` or ``"random"``.
        worst: largest error in units of the bound of `accuracy`. largest: largest absolute error.
        exact: equal to the reference rounded to the dtype.
        passed: within the bound, and exact where integers allow it (direct forms).
    """

    model: str
    output: str
    lowering: str
    dtype: str
    data: str
    worst: float
    largest: float
    exact: bool
    passed: bool


def check_model(path: str | os.PathLike[str], *, seed: int = 0, batch: int = 2) -> list[GradientCheck]:
    """Run a model that `build_model` made on integer-valued and on random data, and compare.

    Args:
        path: the model file. seed: of the data. batch: batch size used where the model's batch is dynamic, at least 1.

    Raises:
        ArgumentTypeError, GeometryError: an argument that is none of the above.
        ModelFileError: not an ONNX model, truncated, not made by this package, or edited so that its inputs and outputs
            are no longer those of its metadata.
    """
    path = as_path(path, "path")
    seed, batch = as_int(seed, "seed", minimum=0), as_int(batch, "batch", minimum=1)
    session = GradientSession(path, blocked_layout=False)  # what the file says, for any runtime
    metadata = _metadata(session, path)
    lowerings = _lowerings(metadata, session, path)
    geometry = _geometry(metadata, session, batch, path)
    dtype = metadata["convgrad.dtype"]
    checks = []
    for data in ("integers", "random"):
        try:
            operands = make_operands(geometry, dtype, integers=data == "integers", seed=seed)
        except MemoryError as error:
            raise ModelFileError(f"{path}: data of the sizes in its metadata cannot be made: {error}") from error
        results = _run(session, operands, geometry, dtype, path)
        _check_declared(results, path)
        expected = reference_and_bounds(geometry, operands, dtype, compute_dtype(dtype))
        for gradient, name in lowerings.items():
            factor = LOWERINGS[name].error_factor if name in LOWERINGS else 1.0
            report = compare(results[f"grad_{gradient}"], *expected[gradient], factor)
            must_be_exact = data == "integers" and factor == 1.0
            checks.append(
                GradientCheck(
                    model=str(path),
                    output=f"grad_{gradient}",
                    lowering=name,
                    dtype=dtype,
                    data=data,
                    worst=report.worst,
                    largest=report.largest,
                    exact=report.exact,
                    passed=report.within and (report.exact or not must_be_exact),
                )
            )
    return checks


def _metadata(session: GradientSession, path: Path) -> dict[str, str]:
    metadata = model_metadata(session.inference_session, str(path))
    missing = [
        key
        for key in ("convgrad.op", "convgrad.geometry", "convgrad.lowering", "convgrad.dtype")
        if key not in metadata
    ]
    if missing:
        raise ModelFileError(f"{path} was not made by convgrad build: its metadata lacks {', '.join(missing)}")
    if metadata["convgrad.dtype"] not in dtypes.NAMES:
        raise ModelFileError(
            f"{path}: convgrad.dtype is {metadata['convgrad.dtype']!r}, expected one of {', '.join(dtypes.NAMES)}"
        )
    return metadata


def _lowerings(metadata: dict[str, str], session: GradientSession, path: Path) -> dict[str, str]:
    """Gradient to lowering, as the metadata says; the model must have an output for each, and no other."""
    try:
        possible = operator(metadata["convgrad.op"]).gradients
    except ConvGradError as error:
        raise ModelFileError(f"{path}: convgrad.op is damaged: {error}") from error
    found = {name.partition(".")[0]: name for name in metadata["convgrad.lowering"].split(",")}
    if unknown := [name for gradient, name in found.items() if gradient not in possible]:
        raise ModelFileError(
            f"{path}: convgrad.lowering is {metadata['convgrad.lowering']!r}, {unknown[0]!r} is for no gradient of "
            f"{metadata['convgrad.op']} ({', '.join(possible)})"
        )
    wanted = [f"grad_{gradient}" for gradient in found]
    if set(wanted) != set(session.output_names):
        raise ModelFileError(
            f"{path} has the outputs {', '.join(session.output_names)}, expected {', '.join(wanted)} by its metadata: "
            "outputs that were renamed, added or removed cannot be checked"
        )
    return found


def _run(
    session: GradientSession, operands: Mapping[str, np.ndarray], geometry: ConvGeometry, dtype: str, path: Path
) -> dict[str, np.ndarray]:
    feeds = {name: array.astype(dtypes.numpy_dtype(dtype)) for name, array in operands.items()}
    feeds["input_size"] = np.array(geometry.input_shape, np.int64)
    feeds["weight_size"] = np.array(geometry.weight_shape, np.int64)
    if unknown := [name for name in session.input_names if name not in feeds]:
        raise ModelFileError(f"{path} has the inputs {', '.join(unknown)}, expected some of {', '.join(feeds)}")
    try:
        return session.run({name: feeds[name] for name in session.input_names})
    except (GeometryError, DTypeError) as error:
        raise ModelFileError(f"{path}: the metadata does not fit the model: {error}") from error
    except ArgumentTypeError as error:
        raise ModelFileError(f"{path} cannot be run: {error}") from error


def _check_declared(results: Mapping[str, np.ndarray], path: Path) -> None:
    """Refuse an output that is declared with another shape than it has, which onnxruntime only writes into its log."""
    for value in onnx.load(path, load_external_data=False).graph.output:
        tensor, got = value.type.tensor_type, results[value.name].shape
        fixed = [size.HasField("dim_value") and size.dim_value >= 0 for size in tensor.shape.dim]
        sizes = [size.dim_value if own else "?" for size, own in zip(tensor.shape.dim, fixed, strict=True)]
        fits = len(sizes) == len(got) and all(want in ("?", size) for want, size in zip(sizes, got, strict=True))
        if tensor.HasField("shape") and not fits:
            raise ModelFileError(f"{path} declares {value.name} as {sizes}, and it has the shape {list(got)}")


def _geometry(metadata: dict[str, str], session: GradientSession, batch: int, path: Path) -> ConvGeometry:
    try:
        arguments = json.loads(metadata["convgrad.geometry"])
        if "input_shape" not in arguments:
            arguments |= _sizes(metadata["convgrad.op"], arguments, session)
        geometry = ConvGeometry.from_dict(arguments)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise ModelFileError(f"{path}: convgrad.geometry is damaged: {error}") from error
    rank = operator(metadata["convgrad.op"]).rank
    if rank not in (None, geometry.rank):
        raise ModelFileError(f"{path}: convgrad.op is {metadata['convgrad.op']}, of a convolution in {geometry.rank}d")
    fixed = any(
        value.name in ("input", "grad_output") and value.shape and isinstance(value.shape[0], int)
        for value in session.inference_session.get_inputs()
    )
    return geometry if fixed else geometry.with_batch(batch)


def _sizes(name: str, attributes: dict[str, Any], session: GradientSession) -> dict[str, Any]:
    """Shapes that fit a canonical function's model: the sizes that it declares, and where it leaves them open ours."""
    op = operator(name)
    values = (*session.inference_session.get_inputs(), *session.inference_session.get_outputs())
    declared = {value.name: value.shape for value in values}
    image = declared.get("input", declared.get("grad_input"))
    kernel = declared.get("weight", declared.get("grad_weight"))

    def fixed(shape: Any, axis: int, otherwise: Any) -> Any:
        return shape[axis] if shape and axis < len(shape) and isinstance(shape[axis], int) else otherwise

    sizes, taps = [], []
    for axis in range(op.rank or 0):
        dilation, stride, padding = (attributes[key][axis] for key in ("dilation", "stride", "padding"))
        size = fixed(image, axis + 2, None)
        most = _KERNELS[axis] if size is None else min(_KERNELS[axis], (size + 2 * padding - 1) // dilation + 1)
        taps.append(fixed(kernel, axis + 2, max(1, most)))
        # What the kernel needs, and a remainder.
        sizes.append(max(_SIZES[axis], dilation * (taps[-1] - 1) + 2 * stride) if size is None else size)
    groups = attributes["groups"]
    return {
        "input_shape": (fixed(image, 0, 2), fixed(image, 1, 2 * groups), *sizes),
        "weight_shape": (fixed(kernel, 0, 3 * groups), fixed(kernel, 1, 2), *taps),
    }
