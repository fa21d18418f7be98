"""A call's arguments as named tensors, and which of their dimensions are dynamic."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from convgrad_export.errors import ArgumentTypeError
from convgrad_export.integrations.program import GraphInput

DynamicShapes = Mapping[str, Any] | Sequence[Any] | None


class CallArguments:
    """`module(*args, **kwargs)`, with each tensor known by a name and replaceable.

    A tensor passed for the forward parameter `x` is called "x"; tensors nested in a list, tuple or dict passed for `x`
    are "x_0", "x_1" or "x_<key>", and so are those in a class that is registered with pytree. Where two tensors would
    have one name (an argument "x_0" beside a list "x"), "_2" is put behind that of a nested one. Values that are no
    tensors stay as they are.

    Raises:
        ArgumentTypeError: No module, arguments that its forward does not take, a numpy array, or a tensor inside an
            object that is not registered: either would be a constant.
    """

    def __init__(self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
        check_module(module)
        module = unwrapped(module)
        if isinstance(args, torch.Tensor):
            args = (args,)
        if not isinstance(args, (list, tuple)):
            raise ArgumentTypeError(f"args is a {type(args).__name__}, expected a tuple of the forward's arguments")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ArgumentTypeError(f"kwargs is a {type(kwargs).__name__}, expected a dict of the forward's arguments")
        self._module = module
        self._args = tuple(args)
        self._kwargs = dict(kwargs or {})
        self._arguments = _bind(module, self._args, self._kwargs)
        self._names: dict[str, tuple[str, ...]] = {}
        self.examples: dict[str, torch.Tensor] = {}
        plain = {argument for argument, value in self._arguments.items() if isinstance(value, torch.Tensor)}
        for argument, value in self._arguments.items():
            names = []
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                if isinstance(leaf, torch.Tensor):
                    name = "_".join([argument, *(key_text(key) for key in path)])
                    if path:
                        name = _free(name, {*self.examples, *plain})
                    check_strided(name, leaf)
                    self.examples[name] = leaf
                    names.append(name)
                else:
                    _refuse_hidden(argument, leaf)
            self._names[argument] = tuple(names)
        # What a caller sees may have to differ from the argument's name where a parameter has that name already.
        self._renamed: dict[str, str] = {}

    def inputs(self, others: Sequence[GraphInput], dynamic_shapes: DynamicShapes) -> tuple[GraphInput, ...]:
        """The tensors as graph inputs. `others` hold names that are taken ("weight" of a bare Linear)."""
        dims = self._dynamic(dynamic_shapes)
        taken = {name for other in others for name in other.names}
        specs = []
        for name, tensor in self.examples.items():
            free = _free(f"{name}_input", {*taken, *self.examples}) if name in taken else name
            self._renamed[name] = free
            specs.append(GraphInput(free, "user", tensor, dynamic=dims[name]))
        return tuple(specs)

    def call(self, module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Any:
        """Call the module with the named tensors in place of the examples."""

        def replaced(argument: str, value: Any) -> Any:
            names = iter(self._names[argument])
            leaves, spec = pytree.tree_flatten(value)
            leaves = [values[self._public(next(names))] if isinstance(x, torch.Tensor) else x for x in leaves]
            return pytree.tree_unflatten(leaves, spec)

        bound = [replaced(argument, value) for argument, value in self._arguments.items()]
        positional = len(self._args)
        keywords = list(self._arguments)[positional:]
        return unwrapped(module)(*bound[:positional], **dict(zip(keywords, bound[positional:], strict=True)))

    def _spread(self, dynamic_shapes: Mapping[str, Any]) -> dict[str, Any]:
        """With the entries of `*args` (a sequence) and `**kwargs` (a dict), as torch.export takes them, one by one."""
        result = dict(dynamic_shapes)
        with contextlib.suppress(TypeError, ValueError):
            for parameter in forward_signature(self._module).parameters.values():
                entry = None if parameter.name in self._arguments else result.get(parameter.name)
                if parameter.kind is inspect.Parameter.VAR_POSITIONAL and isinstance(entry, (list, tuple)):
                    del result[parameter.name]
                    result.update({f"{parameter.name}_{i}": one for i, one in enumerate(entry)})
                elif parameter.kind is inspect.Parameter.VAR_KEYWORD and isinstance(entry, Mapping):
                    del result[parameter.name]
                    result.update(entry)
        return result

    @property
    def argument_names(self) -> tuple[str, ...]:
        """The forward's arguments in call order, those without a tensor too."""
        return tuple(self._arguments)

    def unknown(self, dynamic_shapes: Mapping[str, Any]) -> list[str]:
        """Names in `dynamic_shapes` that no argument has."""
        spread = self._spread(dynamic_shapes)
        return [name for name in spread if name not in self._arguments and name not in self.examples]

    def _public(self, name: str) -> str:
        return self._renamed.get(name, name)

    def _dynamic(self, dynamic_shapes: DynamicShapes) -> dict[str, dict[int, str]]:
        if dynamic_shapes is None:
            return {name: {} for name in self.examples}
        if isinstance(dynamic_shapes, Mapping):
            by_argument = self._spread(dynamic_shapes)
            if unknown := self.unknown(dynamic_shapes):
                raise ArgumentTypeError(
                    f"dynamic_shapes names {', '.join(map(repr, unknown))}; arguments: {', '.join(self._arguments)}"
                )
        else:
            if not isinstance(dynamic_shapes, (list, tuple)):
                raise ArgumentTypeError(
                    f"dynamic_shapes is {dynamic_shapes!r:.80}, expected a dict by argument or a tuple in their order"
                )
            if len(dynamic_shapes) != len(self._arguments):
                raise ArgumentTypeError(
                    f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(self._arguments)} arguments"
                )
            by_argument = dict(zip(self._arguments, dynamic_shapes, strict=True))
        given: dict[str, Any] = {}
        for argument, value in self._arguments.items():
            given.update({name: by_argument.get(name) for name in self._names[argument]})
            if by_argument.get(argument) is not None:
                entries = [entry for _, entry in _by_tensor(argument, argument, value, by_argument[argument])]
                given.update(zip(self._names[argument], entries, strict=True))
        return {name: _dimension_names(name, tensor, given[name]) for name, tensor in self.examples.items()}


def check_module(module: Any) -> None:
    """Refuse what is no module: a function, or a class."""
    if not isinstance(module, torch.nn.Module):
        raise ArgumentTypeError(
            f"module is {module!r:.80}, expected a torch.nn.Module instance; wrap a function in a module's forward"
        )


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module that `torch.nn.DataParallel` or `DistributedDataParallel` calls on each device; any other as it is.

    Their own forward spreads a batch over devices, which a graph does not. The names of the module's tensors stay those
    of the wrapper's `state_dict`.
    """
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while isinstance(module, wrappers) and not module._forward_hooks and not module._forward_pre_hooks:
        module = module.module
    return module


def _free(name: str, taken: Set[str]) -> str:
    """The name itself, or with the first number behind it that makes it another."""
    numbered = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    return next(candidate for candidate in numbered if candidate not in taken)


def _by_tensor(name: str, place: str, value: Any, spec: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a nested dynamic_shapes that belong to the tensors inside `value`, under the tensors' names.

    Raises:
        ArgumentTypeError: `spec` has other keys, or another length, than `value`.
    """
    if isinstance(value, torch.Tensor):
        yield name, spec
        return
    children = pytree.tree_flatten_with_path(value, is_leaf=lambda inner: inner is not value)[0]
    inside = [(path[0], child) for path, child in children if path]
    keys = [getattr(key, "key", getattr(key, "name", None)) for key, _ in inside]
    if spec is None:
        entries: list[Any] = [None] * len(inside)
    elif not inside:
        raise ArgumentTypeError(f"dynamic_shapes of {place} is {spec!r:.80}, expected None: {place} holds no tensor")
    elif isinstance(spec, Mapping):
        if set(spec) != set(keys):
            raise ArgumentTypeError(
                f"dynamic_shapes of {place} has the keys {list(spec)}, expected those of the argument, with None for "
                f"what is static: {keys if None not in keys else f'a sequence of {len(keys)} entries'}"
            )
        entries = [spec[key] for key in keys]
    elif isinstance(spec, (list, tuple)) and not isinstance(value, Mapping):
        if len(spec) != len(inside):
            raise ArgumentTypeError(
                f"dynamic_shapes of {place} has {len(spec)} entries, the argument has {len(inside)}: give one for "
                "each, None for what is static"
            )
        entries = list(spec)
    else:
        wanted = f"a dict with the keys {keys}" if isinstance(value, Mapping) else "a sequence with an entry for each"
        raise ArgumentTypeError(f"dynamic_shapes of {place} is {spec!r:.80}, expected {wanted}")
    for (key, child), entry in zip(inside, entries, strict=True):
        yield from _by_tensor(f"{name}_{key_text(key)}", f"{place}[{key_text(key)!r}]", child, entry)


def _refuse_hidden(argument: str, leaf: Any) -> None:
    """Refuse an array, or an object that holds one or a tensor: nothing would tell that it became a constant.

    Raises:
        ArgumentTypeError: naming where the tensor is, and how to register the class.
    """
    if isinstance(leaf, np.ndarray):
        raise ArgumentTypeError(
            f"argument {argument} is or holds a numpy array, which would be a constant: pass torch.from_numpy of it"
        )
    place = next(_held(leaf, argument, set()), None)
    if place is None:
        return
    raise ArgumentTypeError(
        f"argument {argument} holds a {type(leaf).__name__} with a tensor in it ({place}), which would be a constant "
        f"of the model: {_registration(leaf)}, or pass its tensors as arguments, alone or in tuples, lists and dicts"
    )


def refuse_hidden_output(leaf: Any) -> None:
    """Refuse an object with a tensor in it that a forward returns: the tensor would be left out of the model.

    Raises:
        ArgumentTypeError: naming the class and how to register it.
    """
    if next(_held(leaf, "output", set()), None) is not None:
        raise ArgumentTypeError(
            f"the forward returns a {type(leaf).__name__} with a tensor in it, which would be left out of the model: "
            f"{_registration(leaf)}, or return its tensors, alone or in tuples, lists and dicts"
        )


def _registration(leaf: Any) -> str:
    if dataclasses.is_dataclass(leaf):
        return f"register the class (torch.export.register_dataclass({type(leaf).__name__}))"
    return "register the class (torch.utils._pytree.register_pytree_node)"


def _held(value: Any, place: str, seen: set[int]) -> Iterator[str]:
    """Where inside an object tensors and arrays are. Modules, functions and classes may hold constants."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield place
        return
    if isinstance(value, (torch.nn.Module, ModuleType, type)) or callable(value) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts: Any = [(f"{place}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = [(f"{place}[{index}]", part) for index, part in enumerate(value)]
    else:
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        slots = [name for kind in type(value).__mro__ for name in _listed(getattr(kind, "__slots__", ()))]
        names = [*slots, *(f.name for f in fields)]
        named = {**getattr(value, "__dict__", {}), **{name: getattr(value, name, None) for name in names}}
        parts = [(f"{place}.{name}", part) for name, part in named.items()]
    for name, part in parts:
        yield from _held(part, name, seen)


def _listed(slots: str | Iterable[str]) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def named_tensors(
    tensors: Mapping[str, torch.Tensor],
    dynamic_shapes: DynamicShapes,
    others: Sequence[GraphInput],
    option: str = "dynamic_shapes",
) -> tuple[GraphInput, ...]:
    """Plain named tensors as graph inputs, `dynamic_shapes` (the caller's `option`) by name or in order.

    Raises:
        ArgumentTypeError: One is no dense tensor, or dynamic_shapes has other names or another length.
    """
    taken = {name for other in others for name in other.names}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentTypeError(f"{name} is a {type(tensor).__name__}, expected a torch tensor")
        check_strided(name, tensor)
    if dynamic_shapes is None:
        by_name: dict[str, Any] = {}
    elif isinstance(dynamic_shapes, Mapping):
        by_name = dict(dynamic_shapes)
        if unknown := [name for name in by_name if name not in tensors]:
            raise ArgumentTypeError(
                f"{option} names {', '.join(map(repr, unknown))}, expected some of: {', '.join(tensors)}"
            )
    elif isinstance(dynamic_shapes, (list, tuple)) and len(dynamic_shapes) == len(tensors):
        by_name = dict(zip(tensors, dynamic_shapes, strict=True))
    else:
        raise ArgumentTypeError(
            f"{option} is {dynamic_shapes!r:.80}, expected an entry for each of: {', '.join(tensors)}"
        )
    return tuple(
        GraphInput(
            f"{name}_input" if name in taken else name,
            "user",
            tensor,
            dynamic=_dimension_names(name, tensor, by_name.get(name)),
        )
        for name, tensor in tensors.items()
    )


def check_strided(name: str, tensor: torch.Tensor) -> None:
    """Refuse sparse and other layouts, and tensors without numbers of their own: an ONNX input is a dense tensor."""
    if isinstance(tensor, FakeTensor):
        raise ArgumentTypeError(f"{name} is a tensor of FakeTensorMode, which holds no values, expected a plain one")
    if tensor.is_nested:
        raise ArgumentTypeError(f"{name} is a nested tensor, expected a dense one: pass .to_padded_tensor() of it")
    if tensor.is_quantized:
        raise ArgumentTypeError(f"{name} is a quantized tensor, expected a plain one: pass .dequantize() of it")
    if tensor.layout != torch.strided:
        raise ArgumentTypeError(
            f"{name} has the layout {tensor.layout}, expected a dense tensor: pass .to_dense() of it"
        )


def wrt_names(wrt: str | Sequence[str]) -> list[str]:
    """`wrt` as a list.

    Raises:
        ArgumentTypeError: Neither a name nor a list of names.
    """
    names = [wrt] if isinstance(wrt, str) else wrt
    if not isinstance(names, (Sequence, Set)) or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(
            f"wrt is {wrt!r:.80}, expected 'inputs', 'parameters', or a list of these and of names: of inputs, "
            "parameters or submodules"
        )
    return list(names)


def forward_signature(module: torch.nn.Module) -> inspect.Signature:
    """What the module's forward takes; of a module from `torch.jit`, whose methods have no signature, by its schema.

    Raises:
        TypeError, ValueError: a forward that has none.
    """
    forward: Any = module.forward
    if not isinstance(forward, torch.ScriptMethod):
        return inspect.signature(forward)
    kind, none = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else none)
            for a in forward.schema.arguments[1:]
        ]
    )


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """What a function, or a module's forward, takes; None where it does not say, as some of torch's own."""
    try:
        return forward_signature(function) if isinstance(function, torch.nn.Module) else inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _bind(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Argument names in call order: positional ones first, then keywords, varargs numbered."""
    try:
        signature = forward_signature(module)
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentTypeError(f"{type(module).__name__}.forward does not take these arguments: {error}") from error
    except ValueError:
        return {**{f"input_{i}": a for i, a in enumerate(args)}, **kwargs}
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(args) - len(names))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY and len(names) < len(args):
            names.append(parameter.name)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def key_text(key: Any) -> str:
    """One step of a pytree path as part of a name."""
    if isinstance(key, pytree.SequenceKey):
        return str(key.idx)
    return str(getattr(key, "key", getattr(key, "name", key)))


def _dimension_names(name: str, tensor: torch.Tensor, spec: Any) -> dict[int, str]:
    """One tensor's entry of dynamic_shapes as {dimension: symbolic name}."""
    if spec is None:
        return {}
    if not isinstance(spec, (Mapping, list, tuple)):
        raise ArgumentTypeError(
            f"dynamic_shapes of {name!r} is {spec!r:.80}, expected a dict from dimension to name, or a tuple with an "
            "entry for each dimension"
        )
    entries = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
    result = {}
    for axis, dim in entries:
        if not isinstance(axis, int) or not -tensor.ndim <= axis < tensor.ndim:
            raise ArgumentTypeError(f"dynamic_shapes of {name!r} names dimension {axis!r} of a {tensor.ndim}-D tensor")
        if dim is None or isinstance(dim, int) or "STATIC" in str(dim):
            continue
        positive = axis % tensor.ndim
        label = dim if isinstance(dim, str) else getattr(dim, "__name__", None)
        if not isinstance(label, str):
            # Dim.DYNAMIC and Dim.AUTO have no name of their own
            label = f"{name}_dim_{positive}"
        result[positive] = label
    return result
