"""From a module and example arguments to one functional ATen graph, gradients included.

The result is a `CapturedProgram`: an FX graph of functional ATen operators whose placeholders are the parameters,
buffers and inputs *by name*, and whose outputs say what they are.

Two functions make one:

    capture(module, args, kwargs, *, dynamic_shapes=None, ...)
        The forward pass as it stands. The forward may call torch.autograd.grad, torch.func.grad/vjp/jacrev or
        torch.nn.grad; tracing happens below autograd, so those gradients become ordinary nodes.

    capture_gradients(module, args, kwargs, *, wrt="parameters", value=None, value_args=(), ...)
        Forward, a scalar of the output, and its gradients, in one graph. `value(output, *value_args)` is the loss;
        each of `value_args` becomes a further input (labels). Outputs: "value", then the gradients
        ("conv1.weight.grad", "x.grad"), then the updated buffers ("bn1.running_mean.updated").

How the tracing is done, and which parts of PyTorch it relies on, is in `tracing.py`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from convgrad_export.errors import ArgumentTypeError, ConstantGradientError
from convgrad_export.integrations.arguments import (
    CallArguments,
    DynamicShapes,
    named_tensors,
    signature_of,
    wrt_names,
)
from convgrad_export.integrations.outputs import buffer_outputs, named_outputs
from convgrad_export.integrations.program import CapturedProgram, GraphInput, GraphOutput, TracedOutput
from convgrad_export.integrations.tracing import Decompositions, run_backward, swapped_tensors, trace_function
from convgrad_export.tensor_names import GRADIENT, HESSIAN_PRODUCT


def capture(
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: DynamicShapes = None,
    output_names: Sequence[str] | None = None,
    decompositions: Decompositions | None = None,
) -> CapturedProgram:
    """Capture `module(*args, **kwargs)` with every gradient that its forward computes.

    Args:
        module: Called as it is: its training mode decides what BatchNorm and dropout do.
        args: Example arguments. Tensors (nested in lists, tuples and dicts too) become inputs named after the forward
            parameter; other values are taken as constants.
        kwargs: Example keyword arguments, likewise.
        dynamic_shapes: torch.export's form: per argument a dict from dimension to a name or `torch.export.Dim`, or a
            sequence with one entry per dimension. Dimensions with one name are one symbol.
        output_names: Names of the flattened outputs; by default "output", or "output_0", ... or a dict's keys.
        decompositions: ATen overload to Python function, applied in the second pass.

    Raises:
        CaptureError: The forward cannot be traced; the message holds the line of user code.
        ConstantGradientError: An output does not depend on any input or parameter, or the forward reads tensor values
            into Python (`.item()`, `.numpy()`), which would bake them in.
        DynamicShapeError: A dimension declared dynamic is fixed by the forward.
    """
    arguments = CallArguments(module, args, kwargs)
    state = state_inputs(module)
    user = arguments.inputs(state, dynamic_shapes)
    spec_holder: list[Any] = []

    def traced(values: Mapping[str, torch.Tensor]) -> list[TracedOutput]:
        buffers = {s.name: values[s.name].clone() for s in state if s.kind == "buffer"}
        tensors = {**{s.name: values[s.name] for s in state if s.kind == "parameter"}, **buffers}
        # A forward may change its arguments in place; the caller's stay as they are.
        given = {s.name: values[s.name].detach().clone() for s in user}
        for name, tensor in given.items():
            tensor.requires_grad_(values[name].requires_grad)
        with swapped_tensors(module, state, tensors):
            result = arguments.call(module, given)
        spec_holder[:] = [pytree.tree_structure(result)]
        taken = {name for s in (*state, *user) for name in s.names}
        outputs = named_outputs(result, taken, output_names)
        if not outputs:
            raise ArgumentTypeError(
                f"the forward returns a {type(result).__name__} without a tensor in it, expected tensors, alone or in "
                "tuples, lists and dicts"
            )
        return outputs + buffer_outputs(state, tensors)

    program = trace_function(traced, (*state, *user), decompositions=decompositions)
    program.output_spec = spec_holder[0]
    return program


def capture_gradients(
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    wrt: str | Sequence[str] = "parameters",
    value: Callable[..., torch.Tensor] | None = None,
    value_args: Sequence[torch.Tensor] = (),
    value_arg_names: Sequence[str] | None = None,
    frozen: Sequence[str] = (),
    return_outputs: bool = False,
    hessian_vector: bool = False,
    dynamic_shapes: DynamicShapes = None,
    value_dynamic_shapes: DynamicShapes = None,
    unused: Literal["error", "omit", "zeros"] = "omit",
    decompositions: Decompositions | None = None,
) -> CapturedProgram:
    """Capture forward, `value(output, *value_args)` and its gradients as one graph.

    Args:
        module: As for `capture`.
        args: As for `capture`.
        kwargs: As for `capture`.
        wrt: "parameters", "inputs", or a list of these two and of names: of parameters, of inputs, or of submodules,
            whose output activation is then meant ("layer4"); an activation is also returned, under that name.
            "parameters" leaves out those with requires_grad=False; their own names take them in.
        value: Maps the forward's output and `value_args` to a scalar; the sum of a single tensor by default.
        value_args: Example tensors, each a further input of the graph (labels, targets).
        value_arg_names: Their names; the value function's own parameter names by default.
        frozen: Parameter names left out of `wrt="parameters"`.
        return_outputs: Also return the forward's outputs ("output", ...), before the gradients. "output." is put
            before a name that something else has.
        hessian_vector: Also take a "<name>.vector" for each differentiated tensor and return "<name>.hvp", the product
            of the value's Hessian (with respect to all of them together) and the vectors.
        dynamic_shapes: As for `capture`.
        value_dynamic_shapes: The same for `value_args`.
        unused: What to do about a name that the value does not depend on: refuse, leave its gradient out (it is listed
            in `CapturedProgram.unused`), or return zeros.
        decompositions: As for `capture`.

    Returns:
        Outputs in this order: "value"; the forward's outputs if asked for; activations named in `wrt`; one
        "<name>.grad" per differentiated tensor; "<name>.updated" for every buffer that the forward updates.

    Raises:
        ArgumentTypeError: `wrt` names nothing, or nothing that the module has; `value` does not return a scalar.
        ConstantGradientError: With unused="error", a gradient that is zero whatever the input.
        CaptureError, DynamicShapeError: As for `capture`.
    """
    arguments = CallArguments(module, args, kwargs)
    state = state_inputs(module)
    user = arguments.inputs(state, dynamic_shapes)
    labels = _value_inputs(value, value_args, value_arg_names, value_dynamic_shapes, (*state, *user))
    targets = _differentiated(module, wrt, state, user, frozen)
    vectors = _vector_inputs(targets, (*state, *user)) if hessian_vector else ()
    spec_holder: list[Any] = []
    unused_names: list[str] = []

    def traced(values: Mapping[str, torch.Tensor]) -> list[TracedOutput]:
        leaves = {
            name: values[name].detach().requires_grad_() for name, kind in targets.items() if kind != "activation"
        }
        tensors = {s.name: leaves.get(s.name, values[s.name]) for s in state if s.kind == "parameter"}
        tensors.update({s.name: values[s.name].clone() for s in state if s.kind == "buffer"})
        # A forward may change its arguments in place; the gradient is that of what was passed.
        given = {s.name: leaves.get(s.name, values[s.name]).clone() for s in user}
        activations = [name for name, kind in targets.items() if kind == "activation"]
        products: list[torch.Tensor] = []
        # Differentiated inside, too: a checkpointed part of the module is called again by its backward pass.
        with swapped_tensors(module, state, tensors):
            with _recorded(module, activations) as recorded:
                result = arguments.call(module, given)
            spec_holder[:] = [pytree.tree_structure(result)]
            scalar = _scalar(value, result, [values[s.name] for s in labels])
            wanted = [recorded[name] if kind == "activation" else leaves[name] for name, kind in targets.items()]
            grads: Sequence[torch.Tensor | None] = [None] * len(wanted)
            if scalar.requires_grad:
                grads = run_backward(scalar, wanted, create_graph=hessian_vector)
            elif wanted and unused != "zeros":
                raise ConstantGradientError(
                    f"the value depends on nothing that wrt names ({', '.join(list(targets)[:4])}): the forward runs "
                    "under torch.no_grad, detaches, or reads tensors that are neither arguments nor parameters"
                )
            if hessian_vector:
                products = _hessian_vector_products(wanted, grads, [values[s.name] for s in vectors])
        taken = {name for s in (*state, *user, *labels, *vectors) for name in s.names}
        value_name = "value" if "value" not in {*taken, *activations} else "scalar_value"
        outputs = [TracedOutput(GraphOutput(value_name, "value"), scalar)]
        if return_outputs:
            others = (*activations, *(name + suffix for name in targets for suffix in (GRADIENT, HESSIAN_PRODUCT)))
            outputs += named_outputs(result, (*taken, value_name, *others))
        outputs += [TracedOutput(GraphOutput(name, "output", name), recorded[name]) for name in activations]
        for name, tensor, grad in zip(targets, wanted, grads, strict=True):
            if grad is None:
                unused_names.append(name)
                if unused == "omit":
                    continue
                grad = torch.zeros_like(tensor)
            outputs.append(TracedOutput(GraphOutput(f"{name}{GRADIENT}", "gradient", name), grad))
        if hessian_vector:
            specs = [GraphOutput(f"{name}{HESSIAN_PRODUCT}", "gradient", name) for name in targets]
            outputs += [TracedOutput(spec, product) for spec, product in zip(specs, products, strict=True)]
        return outputs + buffer_outputs(state, tensors)

    program = trace_function(traced, (*state, *user, *labels, *vectors), decompositions=decompositions)
    program.output_spec = spec_holder[0]
    program.unused = tuple(dict.fromkeys(unused_names))
    if unused == "error" and unused_names:
        raise ConstantGradientError(
            f"the value does not depend on {', '.join(unused_names)}: the gradient would be a constant zero. "
            "Leave the name out of wrt."
        )
    return program


def state_inputs(module: torch.nn.Module) -> tuple[GraphInput, ...]:
    """Every parameter and buffer once, under its first name; further names of a tied tensor are its aliases.

    Raises:
        ArgumentTypeError: A lazy module that has not run yet: its parameters have no shape.
    """
    kinds: dict[str, Literal["parameter", "buffer"]] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[int, list[str]] = {}
    named: list[tuple[str, Literal["parameter", "buffer"], torch.Tensor]] = [
        *((n, "parameter", p) for n, p in module.named_parameters(remove_duplicate=False)),
        *((n, "buffer", b) for n, b in module.named_buffers(remove_duplicate=False)),
    ]
    if lazy := [name for name, _, tensor in named if is_lazy(tensor)]:
        raise ArgumentTypeError(
            f"{', '.join(lazy)} of {type(module).__name__} has no shape yet; lazy modules learn it in their first run: "
            "call the module once on the example before exporting it"
        )
    for name, kind, tensor in named:
        if id(tensor) in aliases:
            aliases[id(tensor)].append(name)
            continue
        aliases[id(tensor)] = []
        kinds[name], tensors[name] = kind, tensor
    return tuple(GraphInput(n, kinds[n], t, tuple(aliases[id(t)])) for n, t in tensors.items())


def _value_inputs(
    value: Callable[..., torch.Tensor] | None,
    examples: Sequence[torch.Tensor],
    names: Sequence[str] | None,
    dynamic_shapes: DynamicShapes,
    others: Sequence[GraphInput],
) -> tuple[GraphInput, ...]:
    """What the value takes after the forward's output. Callers know the four as `of`, `of_args` and so on."""
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    signature = None if value is None else signature_of(value)
    if signature is not None:
        try:
            signature.bind(None, *examples)
        except TypeError as error:
            raise ArgumentTypeError(
                f"of does not take the forward's output and the {len(examples)} tensor(s) of of_args: {error}. Pass in "
                "of_args one tensor for each parameter that follows the output"
            ) from error
    if names is None:
        parameters = [] if signature is None else list(signature.parameters.values())[1:]
        by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        names = [p.name for p in parameters if p.kind not in by_keyword][: len(examples)]
        names += [f"value_arg_{i}" for i in range(len(names), len(examples))]
    if len(names) != len(examples):
        raise ArgumentTypeError(f"of_arg_names has {len(names)} names for the {len(examples)} tensor(s) of of_args")
    return named_tensors(dict(zip(names, examples, strict=True)), dynamic_shapes, others, "of_dynamic_shapes")


def _vector_inputs(
    targets: Mapping[str, Literal["parameter", "user", "activation"]], inputs: Sequence[GraphInput]
) -> tuple[GraphInput, ...]:
    by_name = {spec.name: spec for spec in inputs}
    if activations := [name for name, kind in targets.items() if kind == "activation"]:
        raise ArgumentTypeError(
            f"hessian_vector takes inputs and parameters, but wrt names the activation(s) {', '.join(activations)}"
        )
    return tuple(
        GraphInput(
            f"{name}.vector", "user", torch.ones_like(by_name[name].value.detach()), dynamic=by_name[name].dynamic
        )
        for name in targets
    )


def _hessian_vector_products(
    leaves: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], vectors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """d/dx <grad(x), v>, zeros where the gradient does not depend on a leaf."""
    terms = [(g * v).sum() for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
    if not terms:
        return [torch.zeros_like(leaf) for leaf in leaves]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    products = run_backward(total, leaves)
    return [torch.zeros_like(x) if p is None else p for p, x in zip(products, leaves, strict=True)]


def _differentiated(
    module: torch.nn.Module,
    wrt: str | Sequence[str],
    state: Sequence[GraphInput],
    user: Sequence[GraphInput],
    frozen: Sequence[str],
) -> dict[str, Literal["parameter", "user", "activation"]]:
    """Each name to differentiate with respect to, and what it is."""
    parameters = {alias: s.name for s in state if s.kind == "parameter" for alias in s.names}
    inputs = [s.name for s in user if s.value.is_floating_point()]
    if unknown := [name for name in frozen if name not in parameters]:
        raise ArgumentTypeError(f"frozen names no parameter of {type(module).__name__}: {', '.join(unknown)}")
    left_out = {parameters[name] for name in frozen}
    floating = [s for s in state if s.kind == "parameter" and s.value.is_floating_point()]
    trainable = [s.name for s in floating if s.value.requires_grad]
    result: dict[str, Literal["parameter", "user", "activation"]] = {}
    modules = dict(module.named_modules())
    for name in wrt_names(wrt):
        if name == "parameters" and name not in parameters:
            result.update(dict.fromkeys([n for n in trainable if n not in left_out], "parameter"))
        elif name == "inputs" and name not in inputs:
            if not inputs:
                raise ArgumentTypeError("wrt names 'inputs', but no argument is a floating-point torch tensor")
            result.update(dict.fromkeys(inputs, "user"))
        elif name in inputs:
            result[name] = "user"
        elif name in parameters:
            result[parameters[name]] = "parameter"
        elif name in modules and name:
            result[name] = "activation"
        else:
            close = ", ".join([*inputs, *list(modules)[1:9]])
            raise ArgumentTypeError(
                f"wrt names {name!r}, which is no floating-point input, parameter or submodule of "
                f"{type(module).__name__}; inputs and first submodules: {close}"
            )
    if not result:
        why = f"{type(module).__name__} has no parameter to differentiate with respect to"
        if floating:
            names = ", ".join(s.name for s in floating[:3])
            why = f"every parameter is frozen or has requires_grad=False ({names}, ...); name those that are meant"
        raise ArgumentTypeError(
            f"wrt is {wrt!r}, which names nothing: {why if wrt else 'expected inputs, parameters or names'}"
        )
    return result


@contextlib.contextmanager
def _recorded(module: torch.nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Keep the output of each named submodule; the rest of the forward goes on with a copy.

    The copy matters: a later in-place operation (ReLU(inplace=True)) would otherwise change the recorded tensor, and
    the gradient would be that of the changed one.
    """
    recorded: dict[str, torch.Tensor] = {}
    handles = []

    def record(name: str) -> Callable[..., torch.Tensor]:
        def hook(_module: torch.nn.Module, _args: Any, output: Any) -> torch.Tensor:
            if not isinstance(output, torch.Tensor):
                raise ArgumentTypeError(f"wrt names {name!r}, whose output is a {type(output).__name__}, not a tensor")
            if name in recorded:
                raise ArgumentTypeError(f"wrt names {name!r}, which the forward calls more than once")
            # A frozen trunk has no graph up to here; the activation is then a leaf of its own.
            recorded[name] = output if output.requires_grad else output.detach().requires_grad_()
            return recorded[name].clone()

        return hook

    try:
        for name in names:
            handles.append(module.get_submodule(name).register_forward_hook(record(name)))
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in names if name not in recorded]:
        raise ArgumentTypeError(f"wrt names {', '.join(missing)}, which the forward never calls")


def _scalar(value: Callable[..., torch.Tensor] | None, result: Any, labels: Sequence[torch.Tensor]) -> torch.Tensor:
    if value is None:
        if not isinstance(result, torch.Tensor):
            raise ArgumentTypeError(
                f"the forward returns a {type(result).__name__}: pass of=..., a function of it that returns a scalar"
            )
        return result.sum()
    scalar = value(result, *labels)
    if not isinstance(scalar, torch.Tensor) or scalar.numel() != 1:
        got = f"tensor of shape {tuple(scalar.shape)}" if isinstance(scalar, torch.Tensor) else type(scalar).__name__
        raise ArgumentTypeError(f"of returned a {got}, expected a tensor with one element")
    return scalar.reshape(())
