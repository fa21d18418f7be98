"""Tracing a Python function to functional ATen: the one module that touches unstable parts of PyTorch.

Two passes over fake tensors; no data is read and no arithmetic done.

1. The function runs with autograd on, below which `make_fx` records what reaches ATen: forward operators, and the
   backward operators that autograd.grad or torch.func call. In-place operators are still in place here.
2. The recorded graph is replayed through functionalization and a decomposition table. `add_` becomes `add`,
   BatchNorm's training mode returns its running statistics, and the result has no aliasing left.

One pass would need functionalization to work under the user's own torch.func transforms; two do not.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
import torch.fx.experimental._config
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import eager_transforms
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd import forward_ad
from torch.autograd.graph import _engine_run_backward
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import stateless

from convgrad_export.errors import (
    CaptureError,
    ConstantGradientError,
    ConvGradError,
    DynamicShapeError,
    UnsupportedOperatorError,
    in_one_line,
)
from convgrad_export.integrations.compiled_modules import as_written
from convgrad_export.integrations.concatenated_statistics import concatenated_statistics
from convgrad_export.integrations.convolutions_in_steps import has_open_weights
from convgrad_export.integrations.differentiable import DifferentiableReplacements
from convgrad_export.integrations.fake_inputs import (
    TracedSizes,
    check_dynamic,
    fake_inputs,
    narrowed_by_autograd,
    require_data,
)
from convgrad_export.integrations.module_attributes import kept_attributes
from convgrad_export.integrations.one_at_a_time import ONE_AT_A_TIME
from convgrad_export.integrations.packed import PaddedPacking
from convgrad_export.integrations.places import MODULE_PATH, module_path, module_paths, node_place, user_frame
from convgrad_export.integrations.program import CapturedProgram, GraphInput, GraphOutput, TracedOutput, is_random
from convgrad_export.integrations.slice_sums import slice_sums
from convgrad_export.integrations.value_checks import without_value_checks
from convgrad_export.tensor_names import HESSIAN_PRODUCT

Decompositions = Mapping[Any, Callable[..., Any]]
TracedFunction = Callable[[Mapping[str, torch.Tensor]], Sequence[TracedOutput]]

_COPYING = {
    torch.ops.aten.clone.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.detach_.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.lift_fresh.default,
}

# What PyTorch says when Python reads a traced tensor's values.
_READS_VALUES = ("Cannot access data pointer", "numpy() is not supported", "tolist() is not supported", "_local_scalar")
# And where Python needs an integer, for an index, rather than a decision.
_NEEDS_INTEGER = "Could not extract specialized integer"
# What a kernel that reads sizes as numbers says of dynamic ones in torch 2.11 and 2.12: second derivatives do.
_OPEN_SIZES = "with symbolic sizes/strides"


def _zeros(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None) -> Any:
    if not size and forward_ad._current_level >= 0 and not eager_transforms.JVP_NESTING:
        return NotImplemented  # the tangent of a number that meets dual ones: PyTorch would read its value
    return torch.zeros(size, dtype=dtype, device=device)


# In the first pass: autograd's zeros without memory (the derivative of a sign, the tangent of a parameter) are on the
# device meta in a trace, and a sum with one makes numbers of the other's dynamic sizes.
_ZEROS: Decompositions = {torch.ops.aten._efficientzerotensor.default: _zeros}


def trace_function(
    function: TracedFunction, inputs: Sequence[GraphInput], *, decompositions: Decompositions | None = None
) -> CapturedProgram:
    """Trace `function`, which maps named tensors to outputs, into a `CapturedProgram`.

    Args:
        function: Called once, or twice (`differentiable.py`), with fake tensors under the names of `inputs`.
        inputs: In the order the placeholders will have. Constants that the function closes over are appended.
        decompositions: Applied in the second pass.

    Raises:
        CaptureError, ConstantGradientError, DynamicShapeError: See `capture.capture`.
        DeviceError: An input has no data.
    """
    require_data(inputs)
    replacements = DifferentiableReplacements()
    first: CapturedProgram | ConvGradError
    try:
        first = _traced(function, inputs, decompositions, replacements)
    except (DynamicShapeError, CaptureError) as error:
        if isinstance(error, CaptureError) and _OPEN_SIZES not in str(error):
            raise
        first = error
    if replacements.fused and (isinstance(first, ConvGradError) or _is_narrow(first)):
        with contextlib.suppress(ConvGradError):
            return _traced(function, inputs, decompositions, DifferentiableReplacements(in_steps=True))
    if isinstance(first, ConvGradError):
        raise first
    return first


def _is_narrow(program: CapturedProgram) -> bool:
    """Whether a derivative of PyTorch's own holds for some sizes only, or on some runtimes."""
    return narrowed_by_autograd(program.shape_env) or has_open_weights(program.graph_module)


def _traced(
    function: TracedFunction,
    inputs: Sequence[GraphInput],
    decompositions: Decompositions | None,
    replacements: DifferentiableReplacements,
) -> CapturedProgram:
    shape_env = TracedSizes()
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    # Sizes 0 and 1 of a dynamic dimension must not become special cases: an exported model also runs at batch 1.
    config: Any = torch.fx.experimental._config  # a config module: its `patch` is added at run time
    with ONE_AT_A_TIME, config.patch(backed_size_oblivious=True):
        fakes = fake_inputs(inputs, mode)
        specs: list[GraphOutput] = []

        def flat(values: list[torch.Tensor]) -> list[torch.Tensor]:
            named = {spec.name: value for spec, value in zip(inputs, values, strict=True)}
            outputs = list(function(named))
            specs[:] = [output.spec for output in outputs]
            return [output.tensor for output in outputs]

        recorded = _record(flat, fakes, mode, replacements)
        _drop_profiling(recorded.graph)
        recorded.graph.eliminate_dead_code()
        taken = {name for spec in inputs for name in spec.names}
        constants = _lift_constants(recorded, taken)
        _refuse_constant_outputs(recorded, specs, inputs)
        constant_fakes = [mode.from_tensor(c.value, static_shapes=True) for c in constants]
        functional = _functionalize(recorded, [*fakes, *constant_fakes], mode, decompositions)
        # Decompositions bring constants of their own (index tables).
        constants += _lift_constants(functional, taken, first=len(constants))
        slice_sums(functional.graph)
        concatenated_statistics(functional.graph)
    dimensions = check_dynamic(inputs, fakes, shape_env)
    return _program(functional, [*inputs, *constants], specs, dimensions, shape_env, function)


def run_backward(
    value: torch.Tensor, wanted: Sequence[torch.Tensor], *, create_graph: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of a 0-d tensor, None where it does not depend on one of `wanted`.

    torch.autograd.grad would leave the active torch function modes, and a part of the forward that
    `torch.utils.checkpoint` calls again in here has to stay in them: for its random numbers, and for what stands in for
    fused operators. It ends in this call.
    """
    found: tuple[torch.Tensor | None, ...] = _engine_run_backward(
        (value,),
        (torch.ones_like(value),),
        create_graph,  # keep the graph
        create_graph,
        tuple(wanted),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


@contextlib.contextmanager
def swapped_tensors(
    module: torch.nn.Module, state: Sequence[GraphInput], tensors: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Put `tensors` (by first name) in place of the module's own, tied names included.

    Buffers that the forward assigns anew (`self.count = self.count + 1`) are found in `tensors` afterwards. Other
    attributes of the module are as they were.
    """
    spread = {name: tensors[s.name] for s in state if s.name in tensors for name in s.names}
    before = dict(spread)
    # Undone in reverse order: a submodule with two names is swapped twice, and the first swap found its own tensors.
    with kept_attributes(module), stateless._reparametrize_module(module, spread, stack_weights=True):
        yield
    for spec in state:
        if spec.name not in tensors:
            continue
        # An alias may have been assigned where the first name was not.
        changed = [spread[n] for n in (spec.name, *spec.aliases) if spread[n] is not before[n]]
        if changed:
            tensors[spec.name] = changed[-1]


def _record(
    flat: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    fakes: list[torch.Tensor],
    mode: FakeTensorMode,
    replacements: DifferentiableReplacements,
) -> torch.fx.GraphModule:
    """First pass: what the function calls, with the calling module and the user's line on every node."""
    try:
        with (
            as_written(),
            _without_onednn(),  # an LSTM would be one oneDNN operator, which has no ONNX form
            mode,
            enable_python_dispatcher(),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),  # the fused CPU kernel has no ONNX form, forward or backward
            fx_traceback.preserve_node_meta(),
            module_paths(),
            without_value_checks(),
            replacements,
            PaddedPacking(),
        ):
            return make_fx(flat, decomposition_table=dict(_ZEROS), record_stack_traces=True)(fakes)
    except ConvGradError:
        raise
    except Exception as error:
        where = user_frame(error)
        if _reads_values(error):
            raise ConstantGradientError(
                f"{where}: the forward reads tensor values into Python ({_first_line(error)}). Whatever is computed "
                "from them would be a constant in the exported graph (pytorch#89675). Keep the computation in tensors."
            ) from error
        if type(error).__name__ == "GuardOnDataDependentSymNode" and _NEEDS_INTEGER in str(error):
            raise CaptureError(
                f"{where}: the forward takes a tensor's value as a Python integer: an index x[i] or a slice x[i:] with "
                "a 0-d tensor i, or int(i). A graph would hold this one value. Index with a tensor of one axis, "
                "x[i.reshape(1)] or x[i.reshape(1)] = value, or choose with a mask."
            ) from error
        if type(error).__name__ == "GuardOnDataDependentSymNode":
            raise CaptureError(
                f"{where}: the forward takes a Python decision on a tensor's values, and a graph would hold one of its "
                "branches only. Compute both and choose with torch.where, or move the decision out of the forward. "
                "(Functions of PyTorch's decide on a number from item() too: compute with the tensor there.)"
            ) from error
        if isinstance(error, (DynamicOutputShapeException, UnsupportedOperatorException)):
            raise UnsupportedOperatorError(
                f"{where}: {error.args[0]} cannot be part of a graph: PyTorch has no rule for the sizes of its results "
                "that does without its data. Replace it, or leave this part out of the exported module."
            ) from error
        raise CaptureError(f"{where}: the forward cannot be traced: {_first_line(error)}") from error


def _drop_profiling(graph: torch.fx.Graph) -> None:
    """Take out the marks of `torch.profiler.record_function` (DataParallel makes one), which compute nothing."""
    for node in reversed(graph.nodes):
        if getattr(node.target, "namespace", "") == "profiler":
            graph.erase_node(node)


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")  # talks about other hardware
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _lift_constants(recorded: torch.fx.GraphModule, taken: Set[str], first: int = 0) -> list[GraphInput]:
    """Turn tensors that the function closed over from attributes of the graph into placeholders at its end.

    Args:
        taken: the names of the other inputs.
        first: the number of the first one.
    """
    placeholders = [node for node in recorded.graph.nodes if node.op == "placeholder"]
    lifted: dict[str, tuple[GraphInput, torch.fx.Node]] = {}
    for node in [node for node in recorded.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(recorded, node.target)
        if not isinstance(tensor, torch.Tensor):
            continue
        if node.target not in lifted:
            name = f"constant_{first + len(lifted)}"
            while name in taken:
                name += "_"
            with recorded.graph.inserting_after(placeholders[-1] if placeholders else None):
                placeholder = recorded.graph.placeholder(name)
            placeholders.append(placeholder)
            placeholder.meta["val"] = node.meta.get("val", tensor)
            placeholder.meta["lifted_from"] = node.meta.get("stack_trace") or node.stack_trace
            lifted[node.target] = (GraphInput(name, "constant", tensor.detach()), placeholder)
        node.replace_all_uses_with(lifted[node.target][1])
        recorded.graph.erase_node(node)
    recorded.recompile()
    return [spec for spec, _ in lifted.values()]


def _refuse_constant_outputs(
    recorded: torch.fx.GraphModule, specs: Sequence[GraphOutput], inputs: Sequence[GraphInput]
) -> None:
    """Refuse outputs that nothing the caller can change has any influence on (pytorch#89675)."""
    placeholders = [node for node in recorded.graph.nodes if node.op == "placeholder"]
    living = {node for node, spec in zip(placeholders, inputs, strict=False) if spec.kind != "constant"}
    for node in recorded.graph.nodes:
        if node.op == "call_function" and (is_random(node) or any(a in living for a in node.all_input_nodes)):
            living.add(node)
    (output,) = [node for node in recorded.graph.nodes if node.op == "output"]
    for spec, node in zip(specs, output.args[0], strict=True):
        # A Hessian's product is linear in the vector: one that does not depend on it is zero, and rightly constant.
        rightly = spec.kind == "buffer" or spec.name.endswith(HESSIAN_PRODUCT)
        if rightly or not isinstance(node, torch.fx.Node) or node in living:
            continue
        where = node_place(node) or node_place(next(iter(node.all_input_nodes), node)) or "in the forward"
        raise ConstantGradientError(
            f"output {spec.name!r} depends on no input and no parameter: it would be baked into the exported graph as "
            f"a constant (pytorch#89675). It was computed {where}, from tensors that are neither arguments nor "
            "registered parameters or buffers. Compute it inside the forward, from the forward's arguments."
        )


def _functionalize(
    recorded: torch.fx.GraphModule,
    fakes: list[torch.Tensor],
    mode: FakeTensorMode,
    decompositions: Decompositions | None,
) -> torch.fx.GraphModule:
    """Second pass: no in-place operators, and decompositions applied."""

    def replay(*values: torch.Tensor) -> Any:
        return _Replay(recorded).run(*values)

    try:
        with mode, enable_python_dispatcher(), torch.no_grad(), fx_traceback.preserve_node_meta():
            functional = make_fx(
                torch.func.functionalize(replay, remove="mutations"), decomposition_table=dict(decompositions or {})
            )(*fakes)
    except Exception as error:
        raise CaptureError(
            f"{user_frame(error)}: the captured graph cannot be made functional: {in_one_line(error)}"
        ) from error
    functional.graph.eliminate_dead_code()
    return functional


class _Replay(torch.fx.Interpreter):
    """Runs the recorded graph; each node hands its module path and source line on to the nodes made from it.

    A decomposition may give a tensor other strides than the kernel it stands for, so views become reshapes.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)


def _program(
    functional: torch.fx.GraphModule,
    inputs: Sequence[GraphInput],
    specs: Sequence[GraphOutput],
    dimensions: Mapping[str, Any],
    shape_env: ShapeEnv,
    function: TracedFunction,
) -> CapturedProgram:
    """Drop outputs for buffers that are what they were, tidy names, attach module paths."""
    graph = functional.graph
    (output,) = [node for node in graph.nodes if node.op == "output"]
    own = {source.name: node for node, source in zip(graph.find_nodes(op="placeholder"), inputs, strict=True)}
    kept_nodes, kept_specs = [], []
    for spec, node in zip(specs, output.args[0], strict=True):
        if spec.kind == "buffer" and _source(node) is own.get(str(spec.target)):
            continue
        kept_nodes.append(node)
        kept_specs.append(spec)
    output.args = (tuple(kept_nodes),)
    for node in list(graph.nodes):
        # A clone into another memory format is what a following view relies on.
        if node.target in _COPYING and node.kwargs.get("memory_format") in (None, torch.preserve_format):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, source in zip(placeholders, inputs, strict=True):
        node.meta["input_name"] = source.name
    for node in graph.nodes:
        node.meta[MODULE_PATH] = module_path(node, inputs)
    functional.recompile()
    return CapturedProgram(
        functional, tuple(inputs), tuple(kept_specs), dict(dimensions), None, (), shape_env, function
    )


def _source(node: torch.fx.Node) -> torch.fx.Node:
    while node.target in _COPYING:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _reads_values(error: BaseException) -> bool:
    text = f"{type(error).__name__}: {error}"
    return type(error).__name__ == "DataDependentOutputException" or any(sign in text for sign in _READS_VALUES)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
