"""One phase of a training step on onnxruntime: its session, and the memory that it reads and writes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime import tensors
from ..runtime.ordered_session import open_ordered_session
from ..runtime.providers import is_cpu_alone, model_metadata, onnxruntime, open_session
from ..session_memory import free_early

_ERRORS, _FATAL = 3, 4  # onnxruntime's levels of severity; errors are raised too, and the second keeps them to that


class PhaseSession:
    """A model loaded into onnxruntime.

    Args:
        source: the model's path, or its bytes.
        providers: names and options, as `runtime.providers.resolve` gives them.
        threads: size of the intra-op thread pool, None for onnxruntime's choice.
        shared: another session runs between two runs of this one: its threads do not wait busily for the next.
        views: shapes of inputs and outputs that the memory bound to them does not have itself.
        sizes: of the model's tensors in bytes, as far as they are known: its nodes run in the order in which these live
            shorter; on the CPU alone. Without them onnxruntime orders the nodes.
        add: as in `open_ordered_session`; with `sizes` alone.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``, where its tensors lie.
        inputs, outputs: onnxruntime's descriptions, by name.

    Raises:
        ModelFileError: onnxruntime cannot load the model.
        ProviderError: the first provider cannot start, or has no such option.
    """

    def __init__(
        self,
        source: Path | bytes,
        providers: Sequence[tuple[str, Mapping[str, Any]]],
        threads: int | None,
        *,
        shared: bool = False,
        views: Mapping[str, tuple[int, ...]] | None = None,
        sizes: Mapping[str, int] | None = None,
        add: Callable[[Any], None] | None = None,
    ) -> None:
        on_cpu, what = is_cpu_alone(providers), "the training step"
        make_options = functools.partial(_options, on_cpu, shared, threads, _FATAL if add else _ERRORS)
        if sizes and on_cpu and isinstance(source, bytes):
            self._session = open_ordered_session(source, make_options, providers, what, sizes, add)
        else:
            self._session = open_session(source, make_options(), providers, what)
        self.device = "cuda" if providers[0][0].startswith("CUDA") else "cpu"
        self._views = views or {}
        self.inputs = {value.name: value for value in self._session.get_inputs()}
        self.outputs = {value.name: value for value in self._session.get_outputs()}
        # Kept from run to run, for a network's tensors are some thousand: binding them takes a tenth of a small step.
        self._binding = self._session.io_binding()
        self._bound_inputs: dict[str, Any] = {}
        self._bound_outputs: dict[str, Any] = {}
        self._nothing = onnxruntime().OrtValue.ortvalue_from_numpy(np.empty(0, np.float32))

    @property
    def metadata(self) -> Mapping[str, str]:
        """The model's own text entries.

        Raises:
            ModelFileError: one of them is no UTF-8.
        """
        return model_metadata(self._session, "the training step")

    def run(
        self,
        batch: Mapping[str, tensors.TensorView],
        settings: Mapping[str, float],
        state: Mapping[str, Any],
        handed: Mapping[str, Any],
        targets: Mapping[str, Any],
        wanted: Collection[str],
    ) -> dict[str, Any]:
        """One run.

        Args:
            batch: tensors of the caller's; settings: numbers, in the input's dtype.
            state: OrtValues to read.
            handed: OrtValues to read that the phase before has made; they are held no longer than the run.
            targets: OrtValues to write outputs to; may be some that are read.
            wanted: names of further outputs.

        Returns:
            OrtValues of the wanted outputs that are this phase's, the CPU's where nobody has bound them.

        Raises:
            onnxruntime's own errors, which `runtime.providers.is_onnxruntime_error` knows.
        """
        binding = self._binding
        for name, value in self.inputs.items():
            if name in batch:
                view = batch[name]
                code, _ = tensors.onnx_type(value.type)
                binding.bind_input(name, view.device_type, view.device_index, code, view.shape, view.pointer)
            elif name in settings:
                _, dtype = tensors.onnx_type(value.type)
                binding.bind_cpu_input(name, np.array(settings[name], dtype))
            elif name in handed:
                self._bind_input(name, handed[name])
            elif self._bound_inputs.get(name) is not state[name]:
                self._bind_input(name, state[name])
                self._bound_inputs[name] = state[name]
        for name in self.outputs:
            target = targets.get(name)
            if target is None:
                binding.bind_output(name, "cpu")  # again for each run, which would write over the last one's otherwise
            elif self._bound_outputs.get(name) is not target:
                self._bind_output(name, target)
                self._bound_outputs[name] = target
        try:
            self._session.run_with_iobinding(binding)
        finally:
            for name in handed:
                if name in self.inputs:
                    binding.bind_ortvalue_input(name, self._nothing)
        places = [(i, name) for i, name in enumerate(self.outputs) if name in wanted]
        if not places:
            return {}
        made = binding.get_outputs_as_ortvaluevector()  # wrapping every output takes a hundredth of a small step
        return {name: onnxruntime().OrtValue(made[i]) for i, name in places}

    def _bind_input(self, name: str, value: Any) -> None:
        if name in self._views:
            code, _ = tensors.onnx_type(self.inputs[name].type)
            self._binding.bind_input(name, self.device, 0, code, self._views[name], value.data_ptr())
        else:
            self._binding.bind_ortvalue_input(name, value)

    def _bind_output(self, name: str, value: Any) -> None:
        if name in self._views:
            code, _ = tensors.onnx_type(self.outputs[name].type)
            self._binding.bind_output(name, self.device, 0, code, self._views[name], value.data_ptr())
        else:
            self._binding.bind_ortvalue_output(name, value)


def _options(on_cpu: bool, shared: bool, threads: int | None, severity: int) -> Any:
    options = onnxruntime().SessionOptions()
    if on_cpu:
        free_early(options)
        # The zeros that a max pooling's gradient is scattered into would be kept as constants: 90 MiB for Inception v3.
        # onnxruntime warns of each that it leaves, and of a model written for one machine; on the CPU alone it has no
        # other warning worth a line.
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(1 << 20))
        options.log_severity_level = severity
    if shared:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
