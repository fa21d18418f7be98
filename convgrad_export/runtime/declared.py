"""What a model says of one of its inputs, and the check of what the caller gives for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import DTypeError, GeometryError
from .tensors import TensorView, onnx_type

# The named sizes of one run: by a size's name in the model its value, and the label of the input that it was read off.
NamedSizes = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Declared:
    """An input as its model declares it, read once: each question to a session's own description takes a microsecond.

    Attributes:
        label: what an error calls the input.
        code: TensorProto's number of the element type. dtype: numpy's name of it.
        shape: of each axis the size, the size's name in the model, or None where it has neither.
    """

    label: str
    code: int
    dtype: str
    shape: tuple[int | str | None, ...]

    @classmethod
    def of(cls, value: Any, label: str) -> Declared:
        """Of an entry of onnxruntime's `get_inputs()`.

        Raises:
            DTypeError: it is no dense numeric tensor.
        """
        code, dtype = onnx_type(value.type)
        return cls(label, code, dtype, tuple(value.shape))

    def check(self, view: TensorView, sizes: NamedSizes) -> None:
        """Refuse a tensor of another type or shape.

        Args:
            sizes: takes up the named sizes, to be handed to the check of every input of the run.

        Raises:
            DTypeError: another element type. GeometryError: another size, or one that differs from an input's before.
        """
        if view.dtype != self.dtype:
            raise DTypeError(f"{self.label} is {view.dtype}, expected {self.dtype}")
        if view.shape == self.shape:
            return
        if len(view.shape) != len(self.shape):
            raise self._other_shape(view)
        for want, got in zip(self.shape, view.shape, strict=True):
            if isinstance(want, int) and want != got:
                raise self._other_shape(view)
            if isinstance(want, str):
                size, other = sizes.setdefault(want, (got, self.label))
                if size != got:
                    raise self._other_shape(view, f" with {want} = {size} as in {other}")

    def _other_shape(self, view: TensorView, more: str = "") -> GeometryError:
        wanted = ", ".join("?" if size is None else str(size) for size in self.shape)
        return GeometryError(f"{self.label} has shape {view.shape}, expected ({wanted}){more}")
