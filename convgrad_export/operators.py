"""The operator names of the public interface and what each stands for."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ArgumentTypeError, GeometryError

CONVOLUTION_BACKWARD = "convolution_backward"


@dataclass(frozen=True)
class Operator:
    """A public operator name, read.

    Attributes:
        name: ``"conv2d_weight"``, say.
        rank: number of spatial axes; None for convolution_backward, which takes any.
        gradients: the gradients it gives, in output order.
    """

    name: str
    rank: int | None
    gradients: tuple[str, ...]


OPERATORS: dict[str, Operator] = {
    f"conv{rank}d_{gradient}": Operator(f"conv{rank}d_{gradient}", rank, (gradient,))
    for gradient in ("input", "weight")
    for rank in (1, 2, 3)
} | {CONVOLUTION_BACKWARD: Operator(CONVOLUTION_BACKWARD, None, ("input", "weight", "bias"))}


def operator(name: str, argument: str = "operator") -> Operator:
    """Look a name up, which the caller was given as `argument`.

    Raises:
        GeometryError: no such operator; the message lists them.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(f"{argument} is {name!r}, expected one of {', '.join(OPERATORS)}")
    if name not in OPERATORS:
        raise GeometryError(f"{argument} is {name!r}, expected one of {', '.join(OPERATORS)}")
    return OPERATORS[name]
