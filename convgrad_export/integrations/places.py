"""Where a recorded node or an error comes from: the module that was being called, and the line of the user's code."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx import traceback as fx_traceback
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from convgrad_export.integrations.program import GraphInput

MODULE_PATH = "nn_module_path"
_OWN_DIRECTORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH_DIRECTORY = os.path.dirname(os.path.abspath(torch.__file__))


@contextlib.contextmanager
def module_paths() -> Iterator[None]:
    """While active, every recorded node carries the names of the modules that are being called."""
    names: dict[int, str] = {}
    calls: list[str] = []
    here = threading.get_ident()  # the hooks see every module's calls, those of another thread too

    def publish() -> None:
        meta = fx_traceback.current_meta
        meta["nn_module_stack"] = {str(i): (path, torch.nn.Module) for i, path in enumerate(calls)}

    def enter(module: torch.nn.Module, _args: Any) -> None:
        if threading.get_ident() != here:
            return
        if not calls:
            names.update({id(m): name for name, m in module.named_modules()})
        calls.append(names.get(id(module), type(module).__name__))
        publish()

    def leave(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
        if threading.get_ident() == here and calls:
            calls.pop()
            publish()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def module_path(node: torch.fx.Node, inputs: Sequence[GraphInput]) -> str:
    """The calling module. A backward node has none of its own: it gets that of the parameter or value it reads."""
    stack = node.meta.get("nn_module_stack") or {}
    own = list(stack.values())[-1][0] if stack else ""
    if own or node.op != "call_function":
        return str(own)
    for argument in node.all_input_nodes:
        name = str(argument.meta.get("input_name", ""))
        if any(spec.name == name and spec.kind == "parameter" for spec in inputs):
            return name.rpartition(".")[0]
    return next((p for a in reversed(node.all_input_nodes) if (p := a.meta.get(MODULE_PATH, ""))), "")


def node_place(node: torch.fx.Node) -> str:
    trace = node.stack_trace or node.meta.get("lifted_from") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return f"at {lines[-1]}" if lines else ""


def user_frame(error: BaseException) -> str:
    """The innermost line of code that is neither PyTorch's nor this package's."""
    return _users_line(traceback.extract_tb(error.__traceback__)) or "in the forward"


def present_place() -> str:
    """What is being traced at this moment, as far as it can be told: line, module, operator, kind of derivative."""
    meta = fx_traceback.current_meta
    own = itertools.dropwhile(lambda frame: not _is_below(frame, _OWN_DIRECTORY), traceback.extract_stack())
    module = [path for path, _ in (meta.get("nn_module_stack") or {}).values()][-1:]
    line = _users_line(list(own))
    found = [
        f"at {line}" if line else "",
        f"in module {module[0]!r}" if module and module[0] else "",
        f"in {operator}" if (operator := _present_operator()) else "",
        "in a forward-mode derivative (torch.func.jvp)" if forward_ad._current_level >= 0 else "",
    ]
    return ", ".join(part for part in found if part)


def _present_operator() -> str:
    """Of the ATen calls that Python sees; PyTorch asks for a size by one of its own."""
    frame = inspect.currentframe()
    while frame is not None:
        function = frame.f_locals.get("func")
        if isinstance(function, torch._ops.OpOverload) and "size" not in function._opname:
            return str(function)
        frame = frame.f_back
    return ""


def _users_line(frames: Sequence[traceback.FrameSummary]) -> str:
    """Of the innermost frame; where there is none but PyTorch's, of its innermost layer."""
    layers = os.path.join(_TORCH_DIRECTORY, "nn", "modules")
    for skipped in ((_OWN_DIRECTORY, _TORCH_DIRECTORY), (_OWN_DIRECTORY,)):
        for frame in reversed(frames):
            users = not _is_below(frame, *skipped) and (len(skipped) == 2 or _is_below(frame, layers))
            if users and os.path.exists(frame.filename) and not frame.filename.endswith("module.py"):
                return f"{frame.filename}:{frame.lineno}, in {frame.name} ({frame.line})"
    return ""


def _is_below(frame: traceback.FrameSummary, *folders: str) -> bool:
    return os.path.abspath(frame.filename).startswith(folders)
