"""Execution providers: what a caller may ask for, and making sure that it is what runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ..errors import ArgumentTypeError, ModelFileError, ProviderError, in_one_line, raise_missing
from ..provider_names import CPU, CUDA, SHORT_NAMES
from .cuda_options import CudaOptions

Provider: TypeAlias = "str | CudaOptions | tuple[str, Mapping[str, Any]]"
Providers: TypeAlias = "Provider | Sequence[Provider] | None"


def onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        MissingDependencyError: neither onnxruntime nor onnxruntime-gpu is installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise_missing(error)
    return onnxruntime


def resolve(providers: Providers, default: str = CPU) -> list[tuple[str, dict[str, Any]]]:
    """`providers` as (name, options) pairs, the CPU last as the fallback that onnxruntime always has.

    Args:
        providers: a name, a (name, options) pair, a `CudaOptions`, or a sequence of them; ``"cpu"`` and ``"cuda"`` are
            short for the full names. None stands for `default`.

    Returns:
        onnxruntime's own options; for CUDA those of `CudaOptions`, its defaults where none are given.

    Raises:
        ProviderError: this onnxruntime was built without the provider, or CUDA has no such option or value.
        ArgumentTypeError: not of the forms above.
    """
    if providers is None:
        providers = [default]
    elif isinstance(providers, (str, CudaOptions)) or _is_pair(providers):
        providers = [providers]  # type: ignore[list-item]
    if not isinstance(providers, Sequence):
        raise ArgumentTypeError(f"providers is {providers!r} ({type(providers).__name__}), expected a name or names")
    resolved = []
    for entry in providers:
        if isinstance(entry, CudaOptions):
            entry = (CUDA, {name: getattr(entry, name) for name in entry.__dataclass_fields__})
        name, options = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, {})
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise ArgumentTypeError(f"providers holds {entry!r}, expected a name or a (name, options) pair")
        name = SHORT_NAMES.get(name, name)
        own = CudaOptions.from_mapping(options).provider_options() if name == CUDA else dict(options)
        resolved.append((name, own))
    if not resolved:
        raise ArgumentTypeError("providers is empty, expected at least one execution provider")
    available = onnxruntime().get_available_providers()
    for name, _ in resolved:
        if name not in available:
            hint = (
                " Take the extra onnxruntime-gpu in place of onnxruntime: uninstall both first, then install the one, "
                "because both put their files into one folder."
                if name == CUDA
                else ""
            )
            raise ProviderError(f"provider {name} is not in this onnxruntime, which has {', '.join(available)}.{hint}")
    if all(name != CPU for name, _ in resolved):
        resolved.append((CPU, {}))
    return resolved


def open_session(
    source: Path | bytes, options: Any, providers: Sequence[tuple[str, Mapping[str, Any]]], what: str
) -> Any:
    """An `onnxruntime.InferenceSession` whose first provider is active.

    Args:
        source: the model's path, or its bytes. options: an `onnxruntime.SessionOptions`.
        providers: names and options, as `resolve` gives them. what: the model, in words, for the error.

    Raises:
        ModelFileError: onnxruntime cannot load the model, or its path is no UTF-8.
        ProviderError: the first provider could not start, or the CPU's has no such option.
    """
    if not isinstance(source, bytes) and not _is_unicode(str(source)):
        raise ModelFileError(f"onnxruntime cannot load {what}: it takes no path that is not UTF-8; rename it")
    try:
        session = onnxruntime().InferenceSession(
            source if isinstance(source, bytes) else str(source),
            options,
            providers=[name for name, _ in providers],
            provider_options=[settings for _, settings in providers],
            enable_fallback=0 if providers[0][0] == CPU else 1,  # it would print, and try the CPU again
        )
        for value in (*session.get_inputs(), *session.get_outputs()):
            _ = value.name, value.type, value.shape
    except Exception as error:  # onnxruntime raises a private class for each status code
        # The names of a damaged file may be no UTF-8, which shows when they become Python's.
        if not type(error).__module__.startswith("onnxruntime") and not isinstance(error, UnicodeDecodeError):
            raise
        raise ModelFileError(f"onnxruntime cannot load {what}: {in_one_line(error)}") from error
    check_active(providers[0][0], session.get_providers())
    known = session.get_provider_options().get(CPU, {})  # onnxruntime drops what is not among them without a word
    if unknown := [option for name, settings in providers if name == CPU for option in settings if option not in known]:
        raise ProviderError(
            f"{CPU} has no option {unknown[0]!r}; this onnxruntime's takes {', '.join(sorted(known)) or 'none'}. "
            "Leave it out; what GradientSession can be told otherwise is in threads= and session_options="
        )
    return session


def _is_unicode(path: str) -> bool:
    """Whether every byte of a path could be decoded, by the locale's encoding."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_onnxruntime_error(error: Exception) -> bool:
    """Whether a run raised it: with a binding mostly a RuntimeError, else a private class for each status code."""
    return type(error) is RuntimeError or type(error).__module__.startswith("onnxruntime")


def raise_refused(error: Exception, within: str) -> NoReturn:
    """Inputs whose values or sizes an operator refuses, in words of ours; any other error as it is.

    Raises:
        ArgumentTypeError: for an error of onnxruntime's.
    """
    if not is_onnxruntime_error(error):
        raise error
    raise ArgumentTypeError(
        f"onnxruntime stopped within {within}; a label outside the classes, an index out of range or sizes that do not "
        f"fit each other are the usual causes: {in_one_line(error)}"
    ) from error


def is_cpu_alone(providers: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    """Whether `resolve` gave the CPU's provider and no other."""
    return [name for name, _ in providers] == [CPU]


def model_metadata(session: Any, what: str) -> dict[str, str]:
    """The text entries of a session's model.

    Raises:
        ModelFileError: one of them is no UTF-8.
    """
    try:
        return dict(session.get_modelmeta().custom_metadata_map)
    except UnicodeDecodeError as error:
        raise ModelFileError(f"the metadata of {what} is damaged: {error}") from error


def check_active(requested: str, active: Sequence[str]) -> None:
    """onnxruntime drops a provider that cannot start (no usable CUDA, say) with one log line; this is an error here."""
    if requested not in active:
        raise ProviderError(
            f"provider {requested} could not start and onnxruntime fell back to {', '.join(active)}: check the driver, "
            f"CUDA and cuDNN versions that this onnxruntime was built for, or ask for the CPU"
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], Mapping)
