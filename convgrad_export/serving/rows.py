"""Whether the rows of a batch are independent, found by running the model: what merging clients' requests rests on."""

from __future__ import annotations

import numpy as np

from ..errors import ConvGradError
from ..runtime.session import GradientSession
from .signature import ModelSignature, TensorSpec, concrete_shape, unknown_sizes

ROWS = 3
# Kernels sum in another order for another batch size; a row that sees its neighbours differs in its leading digits.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 3e-2, "bfloat16": 2e-1}


def why_rows_depend(signature: ModelSignature, sizes: dict[str, int], seed: int = 0) -> tuple[bool | None, str]:
    """Run three rows together and one by one.

    Floats are uniform in [0, 1), integers and booleans are 0 or 1; for a model that does not run on these (a class that
    it lacks, say) they are 0, if it has floats that tell its rows apart.

    Returns:
        (True, "") when every output agrees row for row; (False, which output does not); (None, why it was not run).
    """
    if unknown := unknown_sizes(signature.inputs, sizes, skip=1):
        return None, f"the sizes of {', '.join(unknown)} are not known; give them as --size NAME=VALUE"
    rng = np.random.default_rng(seed)
    try:
        feeds = {tensor.name: _rows(tensor, sizes, rng) for tensor in signature.inputs}
    except MemoryError as error:
        return None, f"{ROWS} rows of the declared sizes do not fit into memory: {error}"
    zeros = {t.name: feeds[t.name] if t.is_float else np.zeros_like(feeds[t.name]) for t in signature.inputs}
    has_floats = any(tensor.is_float for tensor in signature.inputs)
    try:
        session = GradientSession(signature.path)
        try:
            together, single = _run(session, feeds)
        except ConvGradError:
            if not has_floats:  # rows of zeros alone are alike, and show nothing
                raise
            together, single = _run(session, zeros)
    except ConvGradError as error:
        return None, f"the model could not be run on random data: {error}"
    for tensor in signature.outputs:
        whole = together[tensor.name]
        parts = [result[tensor.name] for result in single]
        if whole.shape[:1] != (ROWS,) or any(part.shape != (1, *whole.shape[1:]) for part in parts):
            return False, f"output {tensor.name} has shape {whole.shape} for a batch of {ROWS}"
        if not _close(whole, np.concatenate(parts), tensor.dtype):
            return False, f"output {tensor.name} of a row changes with the other rows of its batch"
    return True, ""


def _rows(tensor: TensorSpec, sizes: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    """Values of `ROWS` rows that differ."""
    shape = (ROWS, *(concrete_shape(tensor, sizes, skip=1) or ()))
    if tensor.is_float:
        return rng.random(shape).astype(_numpy_dtype(tensor.dtype))
    values = rng.integers(0, 2, shape)
    values.reshape(ROWS, -1)[:, :1] = np.arange(ROWS)[:, None] % 2  # chance might make them alike
    return values.astype(_numpy_dtype(tensor.dtype))


def _run(
    session: GradientSession, feeds: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The outputs of all rows together, and those of each alone."""
    single = [session.run({name: value[row : row + 1] for name, value in feeds.items()}) for row in range(ROWS)]
    return session.run(feeds), single


def _numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes  # numpy has none

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _close(a: np.ndarray, b: np.ndarray, dtype: str) -> bool:
    if dtype not in TOLERANCE:
        return bool(np.array_equal(a, b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = float(np.max(np.abs(b), initial=0.0))
    return bool(np.all(np.abs(a - b) <= TOLERANCE[dtype] * scale + 1e-30))
