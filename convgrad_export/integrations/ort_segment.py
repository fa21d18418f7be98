"""A group of ATen nodes as one onnxruntime session that reads and writes torch's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..lowering import CPU, CUDA
from ..runtime import cuda_run, tensors
from ..runtime.blocked import in_blocked_layout
from ..runtime.cuda_options import CudaOptions
from ..runtime.providers import is_onnxruntime_error, onnxruntime
from ..selection.policy import AUTO
from ..session_memory import free_early
from .finishing import finish
from .program import CapturedProgram, GraphInput, GraphOutput
from .translation import translate

_CODES = {getattr(torch, name): code for name, code in tensors.CODES.items()}


def extract(nodes: Sequence[torch.fx.Node]) -> tuple[torch.fx.GraphModule, list[torch.fx.Node], list[torch.fx.Node]]:
    """The nodes as a graph of their own, with the nodes it reads and those of its own that others read."""
    members = set(nodes)
    inputs = list(dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in members))
    outputs = [
        node
        for node in nodes
        if isinstance(node.meta.get("val"), torch.Tensor) and any(user not in members for user in node.users)
    ]
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for source in inputs:
        copies[source] = graph.placeholder(source.name)
        copies[source].meta = dict(source.meta)
    for source in nodes:
        copies[source] = graph.node_copy(source, lambda a: copies[a])
        copies[source].meta.setdefault("nn_module_stack", {"0": ("", torch.nn.Module)})  # else torch.onnx warns
    graph.output(tuple(copies[node] for node in outputs))
    return torch.fx.GraphModule({}, graph), inputs, outputs


class OrtSegment:
    """Runs a graph of ATen nodes on onnxruntime.

    Args:
        nodes: calls in graph order, all translatable.
        lowering: as in `torch.onnx` translation: "auto", or a catalogue name.
        provider: execution provider; the tensors lie on its device.

    Raises:
        UnsupportedOperatorError: a node cannot be translated after all.
        RuntimeError: onnxruntime refuses the model (a kernel it lacks), or gives a result another type.
    """

    def __init__(self, nodes: Sequence[torch.fx.Node], lowering: str = AUTO, provider: str = CPU) -> None:
        graph_module, self.inputs, self.outputs = extract(nodes)
        program = CapturedProgram(
            graph_module,
            tuple(GraphInput(node.name, "user", node.meta["val"]) for node in self.inputs),
            tuple(GraphOutput(node.name, "output") for node in self.outputs),
            {},
            None,
            (),
            None,  # type: ignore[arg-type]  # sizes are bound by name, nothing is verified against them
            lambda values: (),
        )
        import onnx_ir as ir

        self.model = ir.to_proto(finish(translate(program, lowering=lowering, provider=provider).model))
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads of onnxruntime that spin would take the cores from PyTorch's own.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings = cuda_settings(self.inputs + self.outputs) if provider == CUDA else {}
        self._stream = cuda_run.stream_for(settings) if provider == CUDA else None
        content = self.model.SerializeToString()
        if provider == CPU:
            free_early(options)
            content = in_blocked_layout(content, threads=torch.get_num_threads())
        try:
            self._session = ort.InferenceSession(content, options, providers=[provider], provider_options=[settings])
        except Exception as error:
            if not is_onnxruntime_error(error):
                raise
            raise RuntimeError(str(error)) from error
        self._types = {value.name: tensors.onnx_type(value.type)[1] for value in self._session.get_inputs()}
        self._anything = np.zeros(1)
        self._positions = {node.name: index for index, node in enumerate(self.inputs)}
        self._writes = [value.name for value in self._session.get_outputs()]
        self._dtypes = [node.meta["val"].dtype for node in self.outputs]
        for value, dtype in zip(self._session.get_outputs(), self._dtypes, strict=True):
            if tensors.onnx_type(value.type)[0] != _CODES[dtype]:  # torch.any of uint8 is uint8
                raise RuntimeError(f"it gives {value.name} as {value.type}, and PyTorch as {dtype}")

    def __call__(self, values: Sequence[Any], shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Any]:
        """One run.

        Args:
            values: tensors and integers in the order of `inputs`.
            shapes: of the results, in the order of `outputs`.
            device: where the results lie.

        Returns:
            Contiguous tensors in torch's own memory.
        """
        binding = self._session.io_binding()
        alive: list[Any] = []  # copies must outlive the run
        for name, dtype in self._types.items():
            value = values[self._positions[name]]
            if not isinstance(value, torch.Tensor):
                value = np.asarray(value, dtype=dtype)
                binding.bind_cpu_input(name, value)
                alive.append(value)
                continue
            dense = value.detach().resolve_neg().contiguous()
            alive.append(dense)
            place, pointer = (dense.device.type, dense.device.index or 0), dense.data_ptr()
            if dense.numel() == 0:  # no memory to point at, so that of anything
                place, pointer = ("cpu", 0), self._anything.ctypes.data
            binding.bind_input(name, *place, _CODES[dense.dtype], list(dense.shape), pointer)
        results = []
        for name, shape, dtype in zip(self._writes, shapes, self._dtypes, strict=True):
            result = torch.empty(shape, dtype=dtype, device=device)
            results.append(result)
            if result.numel():
                binding.bind_output(name, device.type, device.index or 0, _CODES[dtype], list(shape), result.data_ptr())
        if not any(result.numel() for result in results):
            return results  # onnxruntime refuses a run without outputs
        if self._stream is not None:
            self._stream.before_run()
            self._session.run_with_iobinding(binding, cuda_run.unsynchronised())
            self._stream.after_run()
            for tensor in (*(value for value in alive if isinstance(value, torch.Tensor)), *results):
                self._stream.hold(tensor)
        else:
            self._session.run_with_iobinding(binding)
        return results


def cuda_settings(nodes: Sequence[torch.fx.Node]) -> dict[str, str]:
    """The CUDA provider's options for a graph whose tensors lie on one device."""
    devices = [node.meta["val"].device for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    index = next((device.index for device in devices if device.type == "cuda"), None)
    return CudaOptions(device_id=index or 0).provider_options()
