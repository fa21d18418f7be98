"""Rewriting graphs: every `aten.convolution_backward` becomes a graph of ordinary forward operators.

`rewrite_convolution_backward` takes graphs from make_fx, AOTAutograd, torch.export and torch.func transforms and leaves
no convolution_backward behind. `RewriteConvolutionBackwardPass` is the same as a custom pass of Inductor, where it
leaves PyTorch's kernel in place for convolutions on which no lowering is faster. `decomposition_table` is for
`ExportedProgram.run_decompositions` and AOTAutograd.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import ArgumentTypeError, ConvGradError
from ..lowering import GRADIENTS
from ..selection import aten_measurements
from ..selection.aten_policy import AUTO, FASTEST, check_lowering
from .aten_convolution import ConvolutionCall, Plan, decomposition, has_no_form, normalized, plan, read_call, run_plan
from .one_at_a_time import ONE_AT_A_TIME
from .source_hash import source_hash

TARGET = torch.ops.aten.convolution_backward.default
_OF_THE_RESULT = ("val", "tensor_meta", "example_value", "unbacked_bindings")


@dataclass(frozen=True)
class Rewrite:
    """What one convolution_backward node became.

    Attributes:
        node: its name. geometry: the convolution, in words.
        lowerings: gradient (``"input"``, ``"weight"``, ``"bias"``) to the name of its lowering.
        kept: gradients left to PyTorch's kernel.
    """

    node: str
    geometry: str
    lowerings: Mapping[str, str]
    kept: tuple[str, ...] = ()


class RewriteResult(PassResult):
    """A `PassResult` (graph_module, modified) that also says what was done.

    Attributes:
        rewrites: one `Rewrite` for each node that was replaced, in graph order.
    """

    rewrites: tuple[Rewrite, ...] = ()

    @property
    def rewritten(self) -> int:
        """Number of convolution_backward nodes that were replaced."""
        return len(self.rewrites)

    def summary(self) -> str:
        """One line: how many nodes, and how often each lowering was taken."""
        used = Counter(name for rewrite in self.rewrites for name in rewrite.lowerings.values())
        listed = ", ".join(f"{name} {times}x" for name, times in sorted(used.items()))
        return f"{self.rewritten} convolution_backward rewritten" + (f": {listed}" if listed else "")


def rewrite_convolution_backward(graph_module: torch.fx.GraphModule, *, lowering: str = AUTO) -> RewriteResult:
    """Replace every `aten.convolution_backward` of a graph, subgraphs included, by forward operators. In place.

    Args:
        graph_module: with fake (or example) tensors in the nodes' ``meta["val"]``, as every tracer of PyTorch leaves
            them. For an ExportedProgram, its ``graph_module``.
        lowering: ``"auto"`` takes the lowering measured to be faster than PyTorch's kernel where there is one, and the
            portable one elsewhere; ``"portable"`` the portable one everywhere; or a catalogue name, for its gradient.

    Returns:
        The module, whether it changed, and what was done. `meta` of a replaced node (stack trace, module path, tags)
        is passed on to the nodes that replace it; results keep dtype, device and strides.

    Raises:
        GeometryError, DTypeError, DeviceError: a call that no forward pass has; the message names the node and its
            stack trace. ArgumentTypeError: no example values. UnsupportedLoweringError: `lowering` does not apply.
            Nothing is changed when an error is raised.
    """
    if not isinstance(graph_module, torch.fx.GraphModule):
        raise ArgumentTypeError(f"graph_module is a {type(graph_module).__name__}, expected a torch.fx.GraphModule")
    check_lowering(lowering, complete=True)
    return _rewrite(graph_module, lowering, None)


class RewriteConvolutionBackwardPass(CustomGraphPass):
    """`rewrite_convolution_backward` as a custom graph pass of Inductor.

    Use: ``torch._inductor.config.post_grad_custom_pre_pass = cg.RewriteConvolutionBackwardPass()``.

    Args:
        lowering: ``"auto"`` rewrites a gradient only where a lowering was measured to be faster than the kernel that
            Inductor calls, so that a compiled step does not become slower; the kernel stays elsewhere. ``"portable"``
            leaves no convolution_backward, for backends that have none. A catalogue name decides its own gradient and
            leaves the others to the kernel.
    """

    def __init__(self, lowering: str = AUTO) -> None:
        self.lowering = check_lowering(lowering)
        self.rewrites: list[Rewrite] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        from torch._inductor.decomposition import select_decomp_table

        way = FASTEST if self.lowering == AUTO else self.lowering
        if not isinstance(graph, torch.fx.Graph):
            raise ArgumentTypeError(f"graph is a {type(graph).__name__}, expected a torch.fx.Graph")
        if graph.owning_module is None:
            raise ArgumentTypeError("graph belongs to no GraphModule, expected one that does")
        result = _rewrite(graph.owning_module, way, select_decomp_table())
        self.rewrites += result.rewrites

    def uuid(self) -> str:
        """Changes with this package's sources, the policy and what was measured: no stale compiled graph is taken."""
        return f"convgrad_export:{self.lowering}:{source_hash()}:{aten_measurements.digest()}"


class _Sequence(CustomGraphPass):
    """Several passes as one."""

    def __init__(self, passes: Sequence[Callable[[torch.fx.Graph], Any]]) -> None:
        self.passes = passes

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        found = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return None if None in found else found  # None: what the pass compiles is not cached


def in_order(passes: Sequence[Callable[[torch.fx.Graph], Any]]) -> Any:
    """Passes as Inductor's setting for custom passes, which takes one alone in torch 2.11."""
    if len(passes) == 1:
        return passes[0]
    several = hasattr(custom_graph_pass, "get_custom_graph_passes")
    return list(passes) if several else _Sequence(passes)


def decomposition_table(*, lowering: str = AUTO) -> dict[Any, Callable[..., Any]]:
    """For ``ExportedProgram.run_decompositions``, ``aot_autograd(decompositions=...)`` and make_fx.

    Args:
        lowering: as in `rewrite_convolution_backward`.

    Raises:
        ArgumentTypeError, UnsupportedLoweringError: `lowering` is none of these.
    """
    check_lowering(lowering, complete=True)
    return {TARGET: decomposition(lowering)}


@dataclass
class _Replacement:
    """A traced graph over (grad_output, input, weight) that stands for one node."""

    node: torch.fx.Node
    traced: torch.fx.GraphModule
    rewrite: Rewrite


def _rewrite(graph_module: torch.fx.GraphModule, lowering: str, table: Any) -> RewriteResult:
    rewrites: list[Rewrite] = []
    modules = [module for module in graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    # All replacements are made before the first change: an error leaves every graph as it was.
    work = [(module, _replacements(module, lowering, table)) for module in modules]
    for module, replacements in work:
        for replacement in replacements:
            _splice(module, replacement)
            rewrites.append(replacement.rewrite)
        if replacements:
            module.graph.lint()
            module.recompile()
    result = RewriteResult(graph_module, bool(rewrites))
    result.rewrites = tuple(rewrites)
    return result


def _replacements(module: torch.fx.GraphModule, lowering: str, table: Any) -> list[_Replacement]:
    cache: dict[Any, torch.fx.GraphModule] = {}
    found = []
    for node in module.graph.find_nodes(op="call_function", target=TARGET):
        try:
            replacement = _replacement(node, lowering, table, cache)
        except ConvGradError as error:
            trace = (node.stack_trace or "").strip()
            place = f"node {node.name}" + ("" if trace else " (no stack trace recorded)")
            raise type(error)(f"{place}: {error}", *(["from", *trace.splitlines()] if trace else [])) from error
        if replacement is not None:
            found.append(replacement)
    return found


def _replacement(
    node: torch.fx.Node, lowering: str, table: Any, cache: dict[Any, torch.fx.GraphModule]
) -> _Replacement | None:
    arguments = normalized(map_arg(node.args, _value), map_arg(dict(node.kwargs), _value))
    if lowering == FASTEST and has_no_form(arguments[:3]):
        return None
    call = read_call(*arguments)
    used = _used_gradients(node, call)
    chosen = plan(call, lowering, used)
    if chosen and all(value is None for value in chosen.values()):
        return None
    key = _cache_key(call, chosen, arguments)
    traced = cache.get(key) if key is not None else None
    if traced is None:
        traced = _trace(call, chosen, arguments, table)
        if key is not None:
            cache[key] = traced
    names = {gradient: _name_of(value) for gradient, value in chosen.items() if value is not None}
    kept = tuple(gradient for gradient, value in chosen.items() if value is None)
    return _Replacement(node, traced, Rewrite(node.name, call.geometry.describe(), names, kept))


def _name_of(chosen: Any) -> str:
    return str(getattr(chosen, "name", chosen))


def _used_gradients(node: torch.fx.Node, call: ConvolutionCall) -> list[str]:
    """Gradients that something reads; all of the mask where the node is used whole."""
    if any(user.target is not operator.getitem for user in node.users):
        return list(call.gradients)
    read = {user.args[1] for user in node.users if user.users}
    return [name for index, name in enumerate(GRADIENTS) if index in read and call.mask[index]]


def _cache_key(call: ConvolutionCall, chosen: Plan, arguments: Sequence[Any]) -> Any:
    """Equal for calls whose replacement is the same graph; None where sizes are symbolic."""
    tensors = arguments[:3]
    sizes = [item for tensor in tensors for item in (*tensor.shape, *tensor.stride())]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return None
    names = tuple((gradient, _name_of(value)) for gradient, value in chosen.items())
    device = str(tensors[0].device)
    return (call.geometry, call.mask, call.dtype, device, names, tuple(sizes), arguments[3] is None)


def _trace(call: ConvolutionCall, chosen: Plan, arguments: Sequence[Any], table: Any) -> torch.fx.GraphModule:
    """The plan as a graph over (grad_output, input, weight)."""
    mode, fakes = _in_one_mode(arguments[:3])

    def compute(grad_output: Any, input: Any, weight: Any) -> list[Any]:
        return list(run_plan(call, chosen, [grad_output, input, weight, *arguments[3:]]))

    with ONE_AT_A_TIME, disable_proxy_modes_tracing(), mode, enable_python_dispatcher(), torch.no_grad():
        traced = make_fx(compute, decomposition_table=dict(table or {}))(*fakes)
    traced.graph.eliminate_dead_code()
    return traced


def _in_one_mode(tensors: Sequence[Any]) -> tuple[FakeTensorMode, list[FakeTensor]]:
    """The tensors as fakes of one mode: their own if they share it, as those of make_fx on real tensors do not."""
    modes = {id(value.fake_mode): value.fake_mode for value in tensors if isinstance(value, FakeTensor)}
    if len(modes) == 1 and all(isinstance(value, FakeTensor) for value in tensors):
        return next(iter(modes.values())), list(tensors)
    mode = FakeTensorMode()
    with mode:
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]
    return mode, fakes  # type: ignore[return-value]


def _splice(module: torch.fx.GraphModule, replacement: _Replacement) -> None:
    """Copy the traced graph in front of the node, give its users the results, and remove the node."""
    node, graph = replacement.node, module.graph
    inherited = {key: value for key, value in node.meta.items() if key not in _OF_THE_RESULT}
    mapped: dict[torch.fx.Node, Any] = {}
    results: Sequence[Any] = ()
    # Read only now: an operand may be the result of a node that has been replaced in the meantime.
    operands = iter(normalized(node.args, dict(node.kwargs))[:3])
    with graph.inserting_before(node):
        for source in replacement.traced.graph.nodes:
            if source.op == "placeholder":
                mapped[source] = next(operands)
            elif source.op == "output":
                results = [mapped[value] if isinstance(value, torch.fx.Node) else None for value in source.args[0]]
            elif source.op == "get_attr":
                mapped[source] = _copy_constant(module, replacement.traced, source)
            else:
                copy = graph.node_copy(source, lambda value: mapped[value])
                own = {key: value for key, value in source.meta.items() if key in _OF_THE_RESULT}
                copy.meta = {**inherited, **own}
                mapped[source] = copy
        results = [_restrided(graph, value, node, index) for index, value in enumerate(results)]
    for user in list(node.users):
        if user.target is operator.getitem:
            _replace_uses(user, results[user.args[1]])  # type: ignore[index]
        else:
            _replace_uses(node, tuple(results), [user])
    graph.erase_node(node)


def _copy_constant(module: torch.fx.GraphModule, traced: torch.fx.GraphModule, source: torch.fx.Node) -> torch.fx.Node:
    value = getattr(traced, str(source.target))
    name = next(n for i in range(10**6) if not hasattr(module, n := f"_convgrad_constant_{i}"))
    if isinstance(value, FakeTensor):
        raise AssertionError(f"the constant {source.target} of a lowering has no data")
    module.register_buffer(name, value, persistent=False)
    node = module.graph.get_attr(name)
    node.meta["val"] = source.meta.get("val")
    return node


def _restrided(graph: torch.fx.Graph, value: Any, node: torch.fx.Node, index: int) -> Any:
    """A copy in the strides that the tracer recorded for the replaced result, where they differ."""
    traced = node.meta.get("val")
    if not isinstance(value, torch.fx.Node) or not isinstance(traced, (tuple, list)):
        return value
    expected, got = traced[index], value.meta.get("val")
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        return value
    if any(isinstance(size, torch.SymInt) for size in (*expected.stride(), *got.stride())):
        return value
    if all(a == b or size <= 1 for a, b, size in zip(expected.stride(), got.stride(), got.shape, strict=True)):
        return value
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        rank_fits = memory_format == torch.contiguous_format or got.dim() == 4 + (memory_format != torch.channels_last)
        if rank_fits and expected.is_contiguous(memory_format=memory_format):
            copy = graph.call_function(torch.ops.aten.clone.default, (value,), {"memory_format": memory_format})
            copy.meta = {**value.meta, "val": expected}
            return copy
    return value


def _replace_uses(old: torch.fx.Node, new: Any, users: Sequence[torch.fx.Node] | None = None) -> None:
    """Put `new` (a node, None, or a tuple of them) where `old` was an argument. A getitem is removed, its name kept."""
    for user in list(old.users) if users is None else users:
        substitute: Any = lambda node: new if node is old else node  # noqa: E731
        user.args = map_arg(user.args, substitute)
        user.kwargs = map_arg(user.kwargs, substitute)
    if old.target is not operator.getitem:
        return
    name, graph = old.name, old.graph
    inherits_name = isinstance(new, torch.fx.Node) and new.op == "call_function" and bool(new.users)
    graph.erase_node(old)
    if inherits_name:
        # Signatures of exported programs know outputs by name.
        new.name = name


def _value(node: torch.fx.Node) -> Any:
    """The example value of an argument."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if value is None:
        raise ArgumentTypeError(
            f"argument {node.name} has no example value in meta['val'], so its shape is unknown: trace with make_fx or "
            "torch.export, or run torch.fx.passes.fake_tensor_prop.FakeTensorProp on the graph first"
        )
    return value
