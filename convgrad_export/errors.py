"""Every error this package raises on purpose.

One base class, one subclass per cause. Each subclass is also the builtin a caller of torch or onnxruntime would
catch, so `except ValueError` keeps working around a call that used to go to `torch.nn.grad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn


class _OneLine:
    """A message of one line, whatever the names in it hold; what is to stand below it, is given line by line."""

    args: tuple[object, ...]

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


class ConvGradError(_OneLine, Exception):
    """Base class: catch this to catch everything the package raises on purpose."""


class GeometryError(ConvGradError, ValueError):
    """Shapes, stride, padding, dilation, groups or output_padding that no convolution has."""


class ArgumentTypeError(ConvGradError, TypeError):
    """An argument of the wrong Python type (a float for `groups`, say)."""


class DTypeError(ConvGradError, TypeError):
    """A tensor dtype that convolution gradients are not defined or not supported for, or a mix of dtypes."""


class DeviceError(ConvGradError, ValueError):
    """Tensors on different devices, or on a device that the session cannot read."""


class UnsupportedLoweringError(ConvGradError, ValueError):
    """A lowering was asked for by name and does not apply to this geometry, dtype or target."""


class UnsupportedOperatorError(ConvGradError, NotImplementedError):
    """A user's model needs operators that have no translation."""


class ConstantGradientError(ConvGradError, RuntimeError):
    """A gradient was baked into the exported graph as a constant (pytorch#89675)."""


class CaptureError(ConvGradError, RuntimeError):
    """A user's module cannot be traced to a graph."""


class DynamicShapeError(ConvGradError, ValueError):
    """A dimension that was declared dynamic is fixed by the model, or two sizes of one name differ."""


class VerificationError(ConvGradError, RuntimeError):
    """An exported model ran, and disagrees with PyTorch by more than the error bound."""


class NonFiniteLossError(ConvGradError, ArithmeticError):
    """A training step's loss or gradient norm became infinite or not a number; the state is that before the step."""


class ModelFileError(ConvGradError, ValueError):
    """A file that is missing, truncated, foreign, or unsafe to load."""


class TuningCacheError(ConvGradError, ValueError):
    """A tuning cache that is damaged, edited by hand, or not a tuning cache."""


class OutputExistsError(ConvGradError, FileExistsError):
    """The output path exists already and overwriting was not asked for."""


class OutputPathError(ConvGradError, OSError):
    """The output path cannot be written."""


class ProviderError(ConvGradError, RuntimeError):
    """An execution provider was asked for that this onnxruntime cannot give."""


class BenchmarkError(ConvGradError, ValueError):
    """A benchmark that cannot run as asked, or a file that holds no benchmark results."""


class MissingDependencyError(ConvGradError, ImportError):
    """An optional package is needed for what was asked; the message names the extra that installs it."""


class ServingConfigError(ConvGradError, ValueError):
    """A setting of a served model that does not fit the model, or does not fit what the repository already holds."""


class ServerError(ConvGradError, RuntimeError):
    """An inference server that cannot be found, does not start, or has ended."""


class TuningWarning(_OneLine, UserWarning):
    """``lowering="tuned"`` took the fixed policy's choice, because the cache holds no usable measurement."""


def printable(text: str) -> str:
    """The text with control characters, line feeds among them, as `repr` shows them: a file's name may hold any."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def listed(lines: Sequence[object], most: int = 20) -> list[str]:
    """Further lines of a message: the first so many, and how many there are besides."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return [f"  {line}" for line in (*lines[:most], *more)]


def in_one_line(error: BaseException) -> str:
    """The message of somebody else's error, some of which end in a line feed, or hold several lines."""
    return " ".join(str(error).split())


_WITH = {name: f"pip install 'convgrad-export[{name}]'" for name in ("torch", "examples", "serving")}
# Name in an import statement -> what installs it.
_INSTALL = {
    "torch": _WITH["torch"],
    "onnxruntime": "pip install 'convgrad-export[onnxruntime]' for the CPU, or "
    "'convgrad-export[onnxruntime-gpu]' for CUDA (one of the two, they overwrite each other)",
    "matplotlib": _WITH["examples"],
    "sklearn": _WITH["examples"],
    "tritonclient": _WITH["serving"],
    "grpc": _WITH["serving"],
}


def raise_missing(error: ImportError, otherwise: str = "") -> NoReturn:
    """Raise the error of an import again, as a MissingDependencyError where one of our extras installs the package.

    Args:
        otherwise: what to do without the package, to follow "or".
    """
    package = (error.name or "").partition(".")[0]
    if package not in _INSTALL:
        raise error
    state = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
    advice = _INSTALL[package] + (f", or {otherwise}" if otherwise else "")
    raise MissingDependencyError(f"{package} {state}, and this needs it: {advice}") from error
