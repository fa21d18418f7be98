"""Where a recorded node or an error comes from: the module that was being called, and the line of the user's code."""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
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
    frames = list(reversed(traceback.extract_tb(error.__traceback__)))
    layers = os.path.join(_TORCH_DIRECTORY, "nn", "modules")
    for skipped in ((_OWN_DIRECTORY, _TORCH_DIRECTORY), (_OWN_DIRECTORY,)):
        for frame in frames:
            path = os.path.abspath(frame.filename)
            users = not path.startswith(skipped) and (len(skipped) == 2 or path.startswith(layers))
            if users and os.path.exists(path) and not path.endswith("module.py"):
                return f"{frame.filename}:{frame.lineno}, in {frame.name} ({frame.line})"
    return "in the forward"
