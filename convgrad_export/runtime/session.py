"""`GradientSession`: an exported gradient model on onnxruntime."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, overload

from ..arguments import as_bool, check_pool
from ..errors import ArgumentTypeError, ModelFileError
from ..provider_names import CPU, CUDA
from ..session_memory import free_early
from . import cuda_run, tensors
from .blocked import in_blocked_layout
from .declared import Declared, NamedSizes
from .model_source import model_source
from .placement import RECORD_ASSIGNMENT, PlacementReport, read_placement
from .providers import Providers, is_cpu_alone, onnxruntime, open_session, raise_refused, resolve

# numpy has no bfloat16, and onnxruntime's arrays of uint64 are of the C type that torch does not take.
_BOUND_TYPES = {"tensor(bfloat16)", "tensor(uint64)"}


@contextlib.contextmanager
def _settings(options: Any, threads: int | None) -> Iterator[Any]:
    """The options with the session's own settings; the thread count is the caller's again afterwards."""
    before, (key, value) = options.intra_op_num_threads, RECORD_ASSIGNMENT
    try:
        recorded = options.get_session_config_entry(key)
    except RuntimeError:  # never set
        recorded = None
    if recorded != value:  # onnxruntime warns of an entry that is written twice
        options.add_session_config_entry(key, value)
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        yield options
    finally:
        options.intra_op_num_threads = before


class GradientSession:
    """A model loaded into onnxruntime.

    Takes numpy arrays or torch tensors and gives back the same kind. torch tensors are read in place when contiguous,
    and results share onnxruntime's memory.

    Args:
        model: path of an ``.onnx`` file, its bytes, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.
        providers: as in `onnxruntime.InferenceSession`, also ``"cpu"``, ``"cuda"`` and `CudaOptions`; None is the CPU.
        threads: size of the intra-op thread pool; None leaves the choice to onnxruntime.
        session_options: an `onnxruntime.SessionOptions` to start from; `threads` still applies. It stays as it was,
            but for the entry that has onnxruntime record which provider runs each node. Without it, a session on the
            CPU gives back each tensor's memory at its last use (`session_memory.py`).
        blocked_layout: compute depthwise convolutions and their gradients in the layout that onnxruntime keeps for
            constant weights, on the CPU (`runtime/blocked.py`). False runs the file's own formulas.

    Raises:
        ModelFileError: missing, truncated, not an ONNX model, or with external data outside its folder.
        ProviderError: the first provider asked for is missing or could not start, or has no such option.
        ArgumentTypeError: an argument of another kind, no thread, or far more of them than the machine has processors.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes | Any,
        providers: Providers = None,
        *,
        threads: int | None = None,
        session_options: Any = None,
        blocked_layout: bool = True,
    ) -> None:
        ort = onnxruntime()
        source, parsed = model_source(model)
        wanted = resolve(providers)
        check_pool(threads)
        as_bool(blocked_layout, "blocked_layout")
        if session_options is not None and not isinstance(session_options, ort.SessionOptions):
            raise ArgumentTypeError(
                f"session_options is a {type(session_options).__name__}, expected an onnxruntime.SessionOptions or None"
            )
        where = str(source) if isinstance(source, Path) else "the model given as bytes"
        self._requested, settings = wanted[0]
        stream = cuda_run.stream_for(settings) if self._requested == CUDA else None
        on_cpu = is_cpu_alone(wanted)
        rewritten = in_blocked_layout(source, parsed, threads) if blocked_layout and on_cpu else source
        del parsed  # its weights: the session has its own
        if session_options is None:
            session_options = ort.SessionOptions()
            if on_cpu:
                free_early(session_options)
        with _settings(session_options, threads) as options:
            try:
                self._session = open_session(rewritten, options, wanted, where)
            except ModelFileError:
                if rewritten is source:
                    raise
                self._session = open_session(source, options, wanted, where)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._inputs = {value.name: Declared.of(value, f"input {value.name}") for value in inputs}
        self._output_names = [value.name for value in outputs]
        self._distinct = list(dict.fromkeys(self._output_names))  # a model may list one twice, a binding holds it once
        self._through_numpy = _BOUND_TYPES.isdisjoint(value.type for value in (*inputs, *outputs))
        self._cuda = None if stream is None else cuda_run.CudaRun(self._session, stream, settings)
        if self._requested != CPU and (report := self.placement()).left:
            warnings.warn(f"{report}. See GradientSession.placement().", RuntimeWarning, stacklevel=2)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self._inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(self._output_names)

    @property
    def inference_session(self) -> Any:
        """The underlying `onnxruntime.InferenceSession`."""
        return self._session

    def placement(self) -> PlacementReport:
        """Which provider runs each node; `PlacementReport.left` lists those that left the requested one."""
        return read_placement(self._session, self._requested)

    @overload
    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]: ...

    @overload
    def run(self, inputs: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]: ...

    def run(
        self, inputs: Mapping[str, Any] | Sequence[str] | None, input_feed: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | list[Any]:
        """Run the model once.

        Two forms: ``run({"weight": w, "grad_output": g})`` returns a dict of all outputs; onnxruntime's own
        ``run(output_names, {...})`` returns a list, of all outputs for None.

        Args:
            inputs: arrays or tensors by input name, all numpy or all torch and then on one device.
            input_feed: the arrays by name, in the second form.

        Raises:
            ArgumentTypeError: a missing, unknown or mixed kind of input, an unknown output name, or values that an
                operator refuses within the run.
            DTypeError: an input of another element type than the model's. GeometryError: an input of another shape.
            DeviceError: a tensor neither on the CPU nor on CUDA.
        """
        if isinstance(inputs, Mapping):
            if input_feed is not None:
                raise ArgumentTypeError(
                    f"run got the inputs twice, as a mapping and as input_feed ({type(input_feed).__name__}), expected "
                    "them once"
                )
            return dict(zip(self._distinct, self._run(self._distinct, inputs), strict=True))
        if input_feed is None:
            raise ArgumentTypeError(f"run got {inputs!r}, expected a mapping from input name to array")
        if isinstance(inputs, str) or not isinstance(inputs, Sequence | None):
            raise ArgumentTypeError(f"run got {inputs!r}, expected a list of output names, or None for all outputs")
        if not isinstance(input_feed, Mapping):
            raise ArgumentTypeError(
                f"run got the inputs as a {type(input_feed).__name__}, expected a mapping from input name to array"
            )
        names = list(inputs or self._output_names)
        unknown = [name for name in names if name not in self._output_names]
        if unknown:
            raise ArgumentTypeError(f"run: unknown outputs {unknown}, the model has {self._output_names}")
        once = list(dict.fromkeys(names))
        found = dict(zip(once, self._run(once, input_feed), strict=True))
        return [found[name] for name in names]

    def _run(self, names: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        if set(feeds) != set(self._inputs):
            missing = sorted(set(self._inputs) - set(feeds)) or "none"
            unknown = sorted(set(feeds) - set(self._inputs), key=str) or "none"
            raise ArgumentTypeError(
                f"the model takes the inputs {list(self._inputs)}; missing: {missing}, unknown: {unknown}"
            )
        views = {name: tensors.view(value, name) for name, value in feeds.items()}
        kinds = {tensors.is_torch(value): name for name, value in feeds.items()}
        if len(kinds) > 1:
            raise ArgumentTypeError(
                f"inputs mix numpy arrays ({kinds[False]}) and torch tensors ({kinds[True]}), expected one kind"
            )
        as_torch = True in kinds
        sizes: NamedSizes = {}
        for name, value in views.items():
            self._inputs[name].check(value, sizes)
        try:
            return self._compute(names, views, {name: size for name, (size, _) in sizes.items()}, as_torch)
        except Exception as error:
            raise_refused(error, "the run")

    def _compute(
        self, names: Sequence[str], views: Mapping[str, tensors.TensorView], sizes: Mapping[str, int], as_torch: bool
    ) -> list[Any]:
        """The outputs `names` of checked inputs, by the shortest way that their place and types allow."""
        if self._through_numpy and all(value.device_type == "cpu" for value in views.values()):
            # Half of a binding's time. The results lie in onnxruntime's memory, not in that of the inputs.
            arrays = self._session.run(names, {name: value.array for name, value in views.items()})
            return [sys.modules["torch"].from_numpy(array) for array in arrays] if as_torch else arrays
        codes = {name: self._inputs[name].code for name in views}
        if self._cuda is not None and self._cuda.takes(views.values()):
            return self._cuda.run(names, views, codes, sizes)
        binding = self._session.io_binding()
        for name, value in views.items():
            binding.bind_input(name, value.device_type, value.device_index, codes[name], value.shape, value.pointer)
        device, index = next(((v.device_type, v.device_index) for v in views.values()), ("cpu", 0))
        for name in names:
            binding.bind_output(name, device, index)
        if device == "cuda":
            tensors.wait_for_torch(index)
        self._session.run_with_iobinding(binding)
        if device != "cpu":
            binding.synchronize_outputs()
        convert = tensors.to_torch if as_torch else tensors.to_numpy
        results = [convert(value) for value in binding.get_outputs()]
        # onnxruntime hands out an input that is an output in the caller's memory.
        return [deepcopy(r) if name in self._inputs else r for name, r in zip(names, results, strict=True)]
