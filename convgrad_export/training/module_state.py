"""A module's own tensors in a traced step: what stands for them, and where a trace would lose sight of them.

PyTorch's modules change their tensors in place, and anything may read or write these through references of its own. A
graph has inputs and outputs by name instead, so what goes past the module's names is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, UnsupportedOperatorError
from ..integrations.outputs import updated
from ..integrations.program import CapturedProgram, GraphInput, TracedOutput


class StandIns:
    """Tensors for a forward to read, and to change in place, instead of the module's.

    Args:
        state: the module's parameters and buffers.
        trained: those to differentiate with respect to, by name, from `backward.leaves`.
        values: all of them as the graph's inputs.

    Attributes:
        tensors: by name; after `tracing.swapped_tensors` the module's new ones where it assigned any.
    """

    def __init__(
        self, state: Sequence[GraphInput], trained: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> None:
        self.tensors = {
            s.name: trained[s.name] if s.name in trained else values[s.name].detach().clone() for s in state
        }
        self._given = dict(self.tensors)
        self._memory = {name: tensor.untyped_storage() for name, tensor in self.tensors.items()}

    def outputs(self, but: Collection[str | None] = ()) -> list[TracedOutput]:
        """Their values after the forward, without those of the names `but`; `trace_function` drops the unchanged ones.

        Raises:
            UnsupportedOperatorError: one was given other memory, of which a trace knows nothing.
            ArgumentTypeError: one has another shape or dtype now than the next call's input.
        """
        moved = [n for n, t in self._given.items() if t.untyped_storage()._cdata != self._memory[n]._cdata]
        if moved:
            raise UnsupportedOperatorError(
                f"the forward assigns to .data of {', '.join(moved)}, which no trace records: change the tensor in "
                "place under torch.no_grad() (x.copy_(new), x.mul_(m).add_(y))"
            )
        for name, tensor in self.tensors.items():
            before, after = _form(self._given[name]), _form(tensor)
            if after != before:
                raise ArgumentTypeError(
                    f"the forward assigns a tensor of {after} to {name}, which is {before}: a step's state keeps its "
                    "shape and dtype. Make the buffer so from the start, and leave out what depends on the batch's size"
                )
        return [updated(name, tensor.detach()) for name, tensor in self.tensors.items() if name not in but]

    def references(self) -> dict[str, str]:
        """Names of tensors that the forward assigned another one to, or a view of it, and that one's name.

        Two that change places (`self.a, self.b = self.b, self.a`) are no such case.
        """
        held = {name: tensor.untyped_storage()._cdata for name, tensor in self.tensors.items()}
        own = {memory._cdata: name for name, memory in self._memory.items() if held[name] == memory._cdata}
        return {name: own[place] for name, place in held.items() if own.get(place, name) != name}


def _form(tensor: Tensor) -> str:
    sizes = (str(size) if isinstance(size, int) else "a dynamic size" for size in tensor.shape)
    return f"{tensor.dtype} ({', '.join(sizes)})"


def copied_arguments(specs: Iterable[GraphInput], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch by name, for a forward and a loss that may change their arguments in place; `values` stay."""
    return {s.name: values[s.name].detach().clone().requires_grad_(values[s.name].requires_grad) for s in specs}


def refuse_held_state(
    program: CapturedProgram, state: Sequence[GraphInput], trained: Collection[str], references: Mapping[str, str]
) -> None:
    """Refuse a graph with the present values of tensors that training changes, for the next steps to read.

    Args:
        program: the trace, whose outputs say what the forward changes.
        state: the module's tensors. trained: names of those that the optimizer updates, in the graph or not.
        references: from `StandIns.references`.

    Raises:
        ArgumentTypeError: with their names.
    """
    changing = {output.target for output in program.outputs if output.kind == "buffer" and output.target}.union(trained)
    refuse_shared_memory(state, changing)
    for name, other in references.items():
        if other in changing:
            raise ArgumentTypeError(
                f"the forward assigns {other}, or a view of it ({other}.detach(), .data, a slice), to {name}: in "
                f"PyTorch {name} shows every later change of {other}, in an exported step it keeps these values. "
                f"Assign a copy (.clone()) if that is meant, or read {other} where {name} is read"
            )
    memory: dict[int, list[str]] = {}
    for spec in state:
        if spec.name in changing and spec.value.numel():
            memory.setdefault(spec.value.untyped_storage().data_ptr(), []).append(spec.name)
    held = {
        name
        for spec in program.inputs
        if spec.kind == "constant" and spec.value.numel()
        for name in memory.get(spec.value.untyped_storage().data_ptr(), ())
    }
    if held:
        raise ArgumentTypeError(
            f"the loss, a hook or the forward reads {', '.join(sorted(held))} by a reference of its own (a tensor or "
            "list made before), so that the step would hold the present values for ever: read it from the module where "
            "it is used (module.fc.weight, module.parameters()), or a copy (.clone()) if the present values are meant"
        )


def refuse_shared_memory(state: Sequence[GraphInput], changing: Collection[str]) -> None:
    """Refuse different tensors in one place of memory: PyTorch updates both at once, an exported step one by one.

    Args:
        changing: names of those that the optimizer or the forward changes.

    Raises:
        ArgumentTypeError: one of two such tensors is among them.
    """
    held = [spec for spec in state if spec.value.numel() and spec.value.data_ptr()]
    held.sort(key=lambda spec: spec.value.data_ptr())
    for position, first in enumerate(held):
        stop = _stop(first.value)
        for second in itertools.islice(held, position + 1, None):
            if second.value.data_ptr() >= stop:
                break
            if not {first.name, second.name}.isdisjoint(changing) and _share_elements(first.value, second.value):
                raise ArgumentTypeError(
                    f"{first.name} and {second.name} are two tensors in the same memory (one was made of the other's "
                    ".data, detached from it, or is a view of it), which an exported step would update apart: register "
                    "one tensor under both names (self.b.weight = self.a.weight), or make the second a copy (.clone())"
                )


def _stop(tensor: Tensor) -> int:
    """The address behind a tensor's last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _share_elements(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors whose memory overlaps have elements in common; columns of one matrix have not."""
    if first.element_size() != second.element_size():
        return True
    return bool(torch.isin(_addresses(first), _addresses(second)).any())


def _addresses(tensor: Tensor) -> Tensor:
    found = torch.tensor(tensor.data_ptr())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = found.unsqueeze(-1) + torch.arange(size) * (stride * tensor.element_size())
    return found
