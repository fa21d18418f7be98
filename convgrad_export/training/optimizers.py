"""Optimizer updates as functions of tensors, so that a trace turns them into graph nodes.

Each formula is that of the torch.optim class of the same name (torch 2.13, single-tensor form), with the learning rate
and the step count as tensors: both are runtime inputs of the exported step. Half parameters come in as float32, as
PyTorch's kernels compute them, and the averages of Adam and RMSprop stay so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..arguments import as_names
from ..errors import ArgumentTypeError
from ..integrations.arguments import signature_of
from ..integrations.half_widening import HALF
from .optimizer_state import check_same_step, own_state, rate_scale

State = dict[str, Tensor]
UpdateFunction = Callable[[Tensor, Tensor, State, Tensor, Tensor], tuple[Tensor, State]]


class Optimizer(Protocol):
    """What `export_training_step` needs of an optimizer."""

    def initial_state(self, parameter: Tensor) -> State:
        """The state of a parameter before the first step, by name; may be empty."""

    def update(
        self, parameter: Tensor, gradient: Tensor, state: State, learning_rate: Tensor, step: Tensor
    ) -> tuple[Tensor, State]:
        """New parameter and state. `step` is a 0-d float64 tensor that counts from 1."""


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(optimizer: Any) -> None:
    """Refuse hyperparameters that are no numbers, or outside their range."""
    for field in dataclasses.fields(optimizer):
        value = getattr(optimizer, field.name)
        if isinstance(value, list):  # as torch takes it; a rule has to be hashable
            value = tuple(value)
            object.__setattr__(optimizer, field.name, value)
        name = f"{type(optimizer).__name__}.{field.name}"
        if isinstance(field.default, bool):
            if not isinstance(value, bool):
                raise ArgumentTypeError(f"{name} is {value!r}, expected True or False")
            continue
        values = value if isinstance(value, tuple) else (value,)
        several = isinstance(value, tuple) and field.name != "betas"
        if several or not all(_is_finite(v) for v in values):
            raise ArgumentTypeError(f"{name} is {value!r}, expected a finite number")
        if any(v < 0 for v in values):
            raise ArgumentTypeError(f"{name} is {value!r}, expected no negative number")
        if field.name == "betas" and (len(values) != 2 or any(v >= 1 for v in values)):
            raise ArgumentTypeError(f"{name} is {value!r}, expected two numbers in [0, 1)")


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD. With momentum, the first step takes the gradient itself as the buffer, without dampening."""

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        _check(self)
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ArgumentTypeError("SGD.nesterov needs a momentum above 0 and a dampening of 0")

    def initial_state(self, parameter: Tensor) -> State:
        return {"momentum_buffer": torch.zeros_like(parameter)} if self.momentum else {}

    def update(
        self, parameter: Tensor, gradient: Tensor, state: State, learning_rate: Tensor, step: Tensor
    ) -> tuple[Tensor, State]:
        gradient = -gradient if self.maximize else gradient
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        if not self.momentum:
            return parameter - learning_rate * gradient, {}
        if self.dampening:
            # torch starts the buffer with the whole gradient at the first step
            taken = (1.0 - self.dampening) + self.dampening * (step <= 1).to(gradient.dtype)
            buffer = self.momentum * state["momentum_buffer"] + taken * gradient
        else:
            buffer = self.momentum * state["momentum_buffer"] + gradient  # the buffer starts at zero
        direction = gradient + self.momentum * buffer if self.nesterov else buffer
        return parameter - learning_rate * direction, {"momentum_buffer": buffer}


def _adam(
    options: Adam | AdamW, parameter: Tensor, gradient: Tensor, state: State, learning_rate: Tensor, step: Tensor
) -> tuple[Tensor, State]:
    """Kingma and Ba, arXiv:1412.6980, algorithm 1; amsgrad: Reddi et al., arXiv:1904.09237."""
    beta1, beta2 = options.betas
    average = beta1 * state["exp_avg"] + (1 - beta1) * gradient
    square = beta2 * state["exp_avg_sq"] + (1 - beta2) * (gradient * gradient)
    # The powers of beta in float64: at step 1 the second correction is 1 - 0.999, of which float32 keeps 4 digits.
    first = (1 - _power(beta1, step)).to(parameter.dtype)
    second = (1 - _power(beta2, step)).sqrt().to(parameter.dtype)
    new = {"exp_avg": average, "exp_avg_sq": square}
    largest = square
    if options.amsgrad:
        largest = torch.maximum(state["max_exp_avg_sq"], square)
        new["max_exp_avg_sq"] = largest
    # average / (sqrt(largest) / second + eps), with `second` moved into the two scalars: one pass less over the tensors
    denominator = largest.sqrt() + options.eps * second
    return parameter - (learning_rate * second / first) * (average / denominator), new


def _power(base: float, exponent: Tensor) -> Tensor:
    return torch.exp(exponent * math.log(base)) if base else torch.zeros_like(exponent)


def _adam_state(options: Adam | AdamW, parameter: Tensor) -> State:
    names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if options.amsgrad else ()))
    return {name: _average(parameter) for name in names}


def _average(parameter: Tensor) -> Tensor:
    """Zeros for an average of gradients or of their squares; in float32 for half parameters.

    torch.optim keeps them in the parameter's type. In float16 a square of a gradient below 0.008, times 0.001, is zero,
    and one above 8,000 infinite: the next parameter is infinite or not a number.
    """
    return torch.zeros_like(parameter, dtype=torch.float32 if parameter.dtype in HALF else parameter.dtype)


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam; `weight_decay` is added to the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def initial_state(self, parameter: Tensor) -> State:
        return _adam_state(self, parameter)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: State, learning_rate: Tensor, step: Tensor
    ) -> tuple[Tensor, State]:
        gradient = -gradient if self.maximize else gradient
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        return _adam(self, parameter, gradient, state, learning_rate, step)


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW: decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def initial_state(self, parameter: Tensor) -> State:
        return _adam_state(self, parameter)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: State, learning_rate: Tensor, step: Tensor
    ) -> tuple[Tensor, State]:
        gradient = -gradient if self.maximize else gradient
        if self.weight_decay:
            parameter = parameter * (1 - learning_rate * self.weight_decay)
        return _adam(self, parameter, gradient, state, learning_rate, step)


@dataclass(frozen=True)
class RMSprop:
    """torch.optim.RMSprop; centered: Graves, arXiv:1308.0850."""

    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def initial_state(self, parameter: Tensor) -> State:
        names = [
            "square_avg",
            *(["grad_avg"] if self.centered else []),
            *(["momentum_buffer"] if self.momentum else []),
        ]
        return {name: _average(parameter) for name in names}

    def update(
        self, parameter: Tensor, gradient: Tensor, state: State, learning_rate: Tensor, step: Tensor
    ) -> tuple[Tensor, State]:
        gradient = -gradient if self.maximize else gradient
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        square = self.alpha * state["square_avg"] + (1 - self.alpha) * (gradient * gradient)
        new = {"square_avg": square}
        variance = square
        if self.centered:
            mean = state["grad_avg"] + (1 - self.alpha) * (gradient - state["grad_avg"])
            new["grad_avg"] = mean
            variance = square - mean * mean
        direction = gradient / (variance.sqrt() + self.eps)
        if self.momentum:
            direction = self.momentum * state["momentum_buffer"] + direction
            new["momentum_buffer"] = direction
        return parameter - learning_rate * direction, new


@dataclass(frozen=True)
class CustomOptimizer:
    """An update function of your own, in torch operations.

    Attributes:
        function: (parameter, gradient, state, learning_rate, step) -> (new parameter, new state). `step` is a 0-d
            float64 tensor that counts from 1, the learning rate a 0-d one in the parameter's type.
        state_names: names of the state tensors of a parameter, each of its shape and zero at first.
    """

    function: UpdateFunction
    state_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ArgumentTypeError(
                f"CustomOptimizer.function is {self.function!r:.80}, expected a function of (parameter, gradient, "
                "state, learning_rate, step)"
            )
        if (signature := signature_of(self.function)) is not None:
            try:
                signature.bind(*[None] * 5)
            except TypeError as error:
                raise ArgumentTypeError(
                    "the update function does not take (parameter, gradient, state, learning_rate, step), the state as "
                    f"a dict: {error}"
                ) from error
        names = as_names(self.state_names, "CustomOptimizer.state_names", "momentum")
        if wrong := [name for name in names if not name or "." in name or names.count(name) > 1]:
            raise ArgumentTypeError(f"CustomOptimizer.state_names holds {wrong}, expected different names without dots")
        object.__setattr__(self, "state_names", tuple(names))

    def initial_state(self, parameter: Tensor) -> State:
        return {name: torch.zeros_like(parameter) for name in self.state_names}

    def update(
        self, parameter: Tensor, gradient: Tensor, state: State, learning_rate: Tensor, step: Tensor
    ) -> tuple[Tensor, State]:
        result = self.function(parameter, gradient, state, learning_rate, step)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            got = "tensor" if isinstance(result, Tensor) else type(result).__name__
            raise ArgumentTypeError(
                f"the update function returned a {got}, expected (new parameter, new state), the state a dict"
            )
        new, new_state = result
        if set(new_state) != set(self.state_names):
            raise ArgumentTypeError(
                f"the update function returned the state {sorted(new_state)}, expected {sorted(self.state_names)}"
            )
        return new, dict(new_state)


BY_NAME: Mapping[str, Callable[[], Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "rmsprop": RMSprop}
_TORCH: Mapping[type, type] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.RMSprop: RMSprop,
}


@dataclass(frozen=True)
class ParameterRule:
    """How one parameter is updated: the optimizer, and a factor on the learning rate input."""

    optimizer: Optimizer
    learning_rate_scale: float = 1.0


@dataclass(frozen=True)
class ResolvedOptimizer:
    """An optimizer for the parameters of one module.

    Attributes:
        rules: by parameter name; parameters without a rule stay as they are.
        learning_rate: the default of the runtime input.
        states: by parameter name, what a torch optimizer has gathered in steps that it has made already.
        steps: by parameter name, how many those are.
    """

    rules: Mapping[str, ParameterRule]
    learning_rate: float
    states: Mapping[str, State] = dataclasses.field(default_factory=dict)
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def initial_state(self, name: str, parameter: Tensor) -> State:
        """The state that a parameter with a rule starts from."""
        return self.states.get(name) or self.rules[name].optimizer.initial_state(parameter)

    @property
    def step(self) -> int:
        """The number of steps before the first exported one."""
        return max(self.steps.values(), default=0)

    def check_steps(self, names: Iterable[str]) -> None:
        """Refuse a state in which the parameters of these names are at different steps.

        Raises:
            ArgumentTypeError: their formulas need one number of the step.
        """
        check_same_step({n: self.steps.get(n, 0) for n in names if _counts(self.rules[n].optimizer)}, self.step)


def _counts(optimizer: Optimizer) -> bool:
    """Whether the update of a torch optimizer reads the step's number."""
    return isinstance(optimizer, (Adam, AdamW)) or (isinstance(optimizer, SGD) and optimizer.dampening != 0)


def resolve_optimizer(optimizer: Any, parameters: Mapping[str, Tensor]) -> ResolvedOptimizer:
    """The optimizer of every parameter.

    Args:
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, ``"rmsprop"``; an instance of the classes above; an update
            function; or an instance of the torch.optim class, whose parameter groups and state are kept.
        parameters: the trainable ones, by name.

    Raises:
        ArgumentTypeError: another optimizer, an option that is not supported, or parameters of another module.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return _from_torch(optimizer, parameters)
    if isinstance(optimizer, type):
        raise ArgumentTypeError(f"optimizer is the class {optimizer.__name__}, expected an instance of it")
    if isinstance(optimizer, str):
        if optimizer.lower() not in BY_NAME:
            raise ArgumentTypeError(f"optimizer is {optimizer!r}, expected one of: {', '.join(BY_NAME)}")
        optimizer = BY_NAME[optimizer.lower()]()
    elif callable(optimizer) and not hasattr(optimizer, "update"):
        optimizer = CustomOptimizer(cast(UpdateFunction, optimizer))
    if not callable(getattr(optimizer, "update", None)) or not callable(getattr(optimizer, "initial_state", None)):
        raise ArgumentTypeError(
            f"optimizer is a {type(optimizer).__name__}, expected a name ({', '.join(BY_NAME)}), a torch.optim "
            "instance, an instance of convgrad_export.training's classes, or an update function"
        )
    return ResolvedOptimizer(dict.fromkeys(parameters, ParameterRule(optimizer)), 1e-3)


def _from_torch(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> ResolvedOptimizer:
    kind = _TORCH.get(type(optimizer))
    if kind is None:
        names = ", ".join(f"torch.optim.{each.__name__}" for each in _TORCH)
        raise ArgumentTypeError(
            f"optimizer is a {type(optimizer).__module__}.{type(optimizer).__name__}, expected {names}, or an update "
            "function"
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ArgumentTypeError(
            "optimizer has hooks from register_step_pre_hook or register_step_post_hook, which an exported step "
            "cannot run: remove them, or do their work in an update function (max_grad_norm clips gradients)"
        )
    names_of = {id(tensor): name for name, tensor in parameters.items()}
    base = float(optimizer.param_groups[0]["lr"])
    rules, states, steps = {}, {}, {}
    for group in optimizer.param_groups:
        rule_kind = AdamW if kind is Adam and group.get("decoupled_weight_decay") else kind
        known = {field.name for field in dataclasses.fields(kind)}
        options = {name: group[name] for name in known if name in group}
        if "betas" in options:
            options["betas"] = tuple(float(beta) for beta in cast(Sequence[Any], options["betas"]))
        rule = ParameterRule(rule_kind(**options), rate_scale(group, optimizer.param_groups[0]))
        for tensor in group["params"]:
            if id(tensor) not in names_of:
                continue
            name = names_of[id(tensor)]
            rules[name] = rule
            found = own_state(name, tensor, optimizer, rule.optimizer.initial_state(tensor.detach()))
            if found is not None:
                states[name], steps[name] = found
    if not rules:
        raise ArgumentTypeError(
            "optimizer holds none of the module's trainable parameters; it was made for another module"
        )
    return ResolvedOptimizer(rules, base, states, steps)
