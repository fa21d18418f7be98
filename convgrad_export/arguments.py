"""Turning a caller's arguments into canonical integers, or into one clear error.

Booleans are refused where an integer is meant, and floats everywhere: `groups=2.0` is a mistake, not a request.
A tracer's symbolic integer (torch.SymInt, sympy-backed) passes through untouched, so no guard is added to a trace.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from .errors import ArgumentTypeError, GeometryError

LARGEST = 2**63 - 1  # ONNX stores 64-bit integers
_FEW_THREADS, _PER_PROCESSOR = 256, 4  # that a pool may have on any machine, and for each processor of a large one


def is_symbolic(value: Any) -> bool:
    """True for a tracer's symbolic integer or a dimension name, False for a plain integer."""
    if type(value) is int:  # almost all are, and to ask an abstract base class takes ten times as long
        return False
    return isinstance(value, str) or (not isinstance(value, numbers.Integral) and hasattr(value, "node"))


def as_int(value: Any, name: str, minimum: int | None = None) -> Any:
    """`value` as an int (symbolic integers unchanged), at least `minimum`.

    Raises:
        ArgumentTypeError: not an integer. GeometryError: below `minimum`.
    """
    if type(value) is int:
        result = value
    elif not isinstance(value, str) and is_symbolic(value):
        return value
    elif isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentTypeError(f"{name} is {value!r} ({type(value).__name__}), expected an integer")
    else:
        result = int(value)
    if minimum is not None and result < minimum:
        raise GeometryError(f"{name} is {result}, expected at least {minimum}")
    if abs(result) > LARGEST:
        raise GeometryError(f"{name} is {result}, expected at most {LARGEST}: ONNX stores 64-bit integers")
    return result


def as_bool(value: Any, name: str) -> bool:
    """`value` as a bool; 0, 1 and numpy's booleans are taken too.

    Raises:
        ArgumentTypeError: anything else.
    """
    of_numpy = getattr(getattr(value, "dtype", None), "kind", None) == "b" and value.ndim == 0
    if isinstance(value, bool) or of_numpy or (isinstance(value, numbers.Integral) and int(value) in (0, 1)):
        return bool(value)
    raise ArgumentTypeError(f"{name} is {value!r} ({type(value).__name__}), expected True or False")


def as_text(value: Any, name: str) -> str:
    """`value` if it is a string.

    Raises:
        ArgumentTypeError: anything else.
    """
    if isinstance(value, str):
        return value
    raise ArgumentTypeError(f"{name} is {value!r} ({type(value).__name__}), expected a string")


def check_flags(**given: Any) -> None:
    """Refuse an option that is neither True nor False: "no", say, which is true."""
    for name, value in given.items():
        as_bool(value, name)


def check_table(table: Any, name: str) -> None:
    """Refuse what is no mapping from ATen overloads to functions; None is no table.

    Raises:
        ArgumentTypeError: anything else.
    """
    if table is not None and not (isinstance(table, Mapping) and all(callable(value) for value in table.values())):
        raise ArgumentTypeError(f"{name} is {table!r:.80}, expected functions by ATen overload, or None")


def as_number(
    value: Any,
    name: str,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float | None = None,
    finite: bool = False,
) -> float:
    """`value` as a float that is a number.

    Args:
        minimum, maximum: the least and the most that it may be. above: what it has to be larger than. finite: infinity
            is refused.

    Raises:
        ArgumentTypeError: no number, or one out of range.
    """
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    in_range = minimum <= number <= maximum and (above is None or number > above)  # which NaN is not
    if in_range and not (finite and math.isinf(number)):
        return number
    expected = "a finite number" if finite else "a number"
    if maximum < math.inf:
        expected += f" from {minimum:g} to {maximum:g}"
    elif minimum > -math.inf:
        expected += f", {minimum:g} or above"
    if above is not None:
        expected += f" above {above:g}"
    kind = "" if isinstance(value, numbers.Real) else f" ({type(value).__name__})"
    raise ArgumentTypeError(f"{name} is {value!r:.80}{kind}, expected {expected}")


def check_error_factor(max_error_factor: Any) -> float:
    """A limit on the error bound, in units of the direct form's.

    Raises:
        ArgumentTypeError: anything but a number of at least 1.
    """
    return as_number(max_error_factor, "max_error_factor", minimum=1)


def check_workspace(max_workspace: Any) -> int | None:
    """A limit in bytes, or None for none.

    Raises:
        ArgumentTypeError: anything but an integer, 0 or above.
    """
    if max_workspace is None:
        return None
    if isinstance(max_workspace, numbers.Integral) and not isinstance(max_workspace, bool) and int(max_workspace) >= 0:
        return int(max_workspace)
    raise ArgumentTypeError(f"max_workspace is {max_workspace!r}, expected a number of bytes, or None for no limit")


def check_threads(threads: Any) -> int | None:
    """A number of threads, or None for several.

    Raises:
        ArgumentTypeError: anything else.
    """
    if threads is None:
        return None
    if isinstance(threads, numbers.Integral) and not isinstance(threads, bool) and 1 <= int(threads) < 2**31:
        return int(threads)
    raise ArgumentTypeError(f"threads is {threads!r}, expected a number of threads, at least 1, or None for several")


def check_pool(threads: Any) -> int | None:
    """`check_threads` of a pool that is about to be started.

    Raises:
        ArgumentTypeError: as `check_threads`, or more threads than onnxruntime starts in reasonable time, which grows
            with the square of their number: a thousand on two processors take a minute.
    """
    count = check_threads(threads)
    processors = os.cpu_count() or 1
    most = max(_FEW_THREADS, _PER_PROCESSOR * processors)
    if count is not None and count > most:
        raise ArgumentTypeError(
            f"threads is {count}, expected at most {most} on this machine of {processors} processors: more than "
            f"there are processors make nothing faster, and None is onnxruntime's own choice"
        )
    return count


def as_mask(value: Any, name: str = "output_mask") -> tuple[bool, bool, bool]:
    """Three booleans: input, weight, bias.

    Raises:
        ArgumentTypeError: no sequence, or of other things than booleans. GeometryError: not three.
    """
    if not _is_sequence(value):
        raise ArgumentTypeError(
            f"{name} is {value!r} ({type(value).__name__}), expected three booleans: input, weight, bias"
        )
    if len(value) != 3:
        raise GeometryError(f"{name} is {tuple(value)}, expected three booleans: input, weight, bias")
    first, second, third = (as_bool(item, f"{name}[{index}]") for index, item in enumerate(value))
    return first, second, third


def as_groups(value: Any) -> int:
    groups: int = as_int(value, "groups", minimum=1)
    return groups


def _is_sequence(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return True
    if isinstance(value, Sequence):
        return not isinstance(value, str | bytes)
    return hasattr(value, "__array_interface__") and value.ndim > 0  # a numpy array


def as_shape(value: Any, name: str, *, allow_name: bool = False) -> tuple[Any, ...]:
    """A tensor shape: non-negative sizes; with `allow_name` the batch (dimension 0) may be a string."""
    if not _is_sequence(value):
        try:
            value = tuple(value)  # numpy arrays, protobuf repeated fields
        except TypeError:
            raise ArgumentTypeError(
                f"shape of {name} is {value!r} ({type(value).__name__}), expected a sequence of integers"
            ) from None
    if isinstance(value, str):
        raise ArgumentTypeError(f"shape of {name} is {value!r}, expected a sequence of integers")
    sizes = []
    for axis, size in enumerate(value):
        usual = type(size) is int and 0 <= size <= LARGEST  # for which no name need be put together
        if usual or (axis == 0 and allow_name and isinstance(size, str)):
            sizes.append(size)
        else:
            sizes.append(as_int(size, f"{name} dimension {axis}", minimum=0))
    return tuple(sizes)


def as_sizes(value: Any, rank: int, name: str, *, minimum: int) -> tuple[int, ...]:
    """One integer per spatial axis; a single integer or a sequence of length one stands for all axes."""
    if not _is_sequence(value):
        return (as_int(value, name, minimum),) * rank
    if len(value) not in (1, rank):
        raise GeometryError(f"{name} is {tuple(value)}, expected one integer or {rank} (one per spatial axis)")
    sizes = tuple(as_int(item, f"{name}[{axis}]", minimum) for axis, item in enumerate(value))
    return sizes * rank if len(sizes) == 1 else sizes


def as_padding(
    value: Any, kernel: Sequence[Any], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[Any, Any], ...]:
    """(begin, end) per spatial axis from any of the forms of `padding`.

    ``"same"`` follows torch: total ``d(K-1)``, the smaller half first, stride 1 only.
    """
    rank = len(kernel)
    if isinstance(value, str):
        return _named_padding(value, kernel, stride, dilation)
    if not _is_sequence(value):
        amount = as_int(value, "padding", 0)
        return ((amount, amount),) * rank
    if any(_is_sequence(item) for item in value):
        return _pair_padding(value, rank)
    return tuple((amount, amount) for amount in as_sizes(value, rank, "padding", minimum=0))


def _named_padding(
    value: str, kernel: Sequence[Any], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[Any, Any], ...]:
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value != "same":
        raise GeometryError(f"padding is {value!r}, expected 'same', 'valid', integers or (begin, end) pairs")
    if any(s != 1 for s in stride):
        raise GeometryError(f"padding is 'same' with stride {tuple(stride)}, expected stride 1: give integers instead")
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def _pair_padding(value: Sequence[Any], rank: int) -> tuple[tuple[Any, Any], ...]:
    if len(value) != rank or not all(_is_sequence(item) and len(item) == 2 for item in value):
        raise GeometryError(f"padding is {value!r}, expected {rank} pairs (begin, end), one per spatial axis")
    return tuple(
        (as_int(lo, f"padding[{axis}][0]", 0), as_int(hi, f"padding[{axis}][1]", 0))
        for axis, (lo, hi) in enumerate(value)
    )


def as_names(value: Any, name: str, example: str) -> list[str]:
    """Names as a list.

    Raises:
        ArgumentTypeError: a single name (its letters would be taken for names), or anything but a sequence or set of
            texts.
    """
    if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes):
        if all(isinstance(item, str) for item in value):
            return list(value)
        wrong = next(item for item in value if not isinstance(item, str))
        raise ArgumentTypeError(
            f"{name} holds {wrong!r:.80} ({type(wrong).__name__}), expected names alone, such as {example!r}"
        )
    hint = f": put it into a list, [{value!r:.80}]" if isinstance(value, str) else f", such as [{example!r}]"
    raise ArgumentTypeError(f"{name} is {value!r:.80} ({type(value).__name__}), expected a sequence of names{hint}")


def as_path(value: Any, name: str) -> Path:
    """A path, without looking at the disk.

    Raises:
        ArgumentTypeError: neither a text nor a path.
    """
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise ArgumentTypeError(f"{name} is {value!r:.80} ({type(value).__name__}), expected a path, such as 'step.onnx'")
