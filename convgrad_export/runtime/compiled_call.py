"""A call that torch.compile puts into its graph as it is; imported by what it compiles, when torch._dynamo is there."""

from __future__ import annotations

from typing import Any

import torch

from .compiled import UNCOMPILED


@torch.compiler.allow_in_graph
def call(name: str, *arguments: Any, **named: Any) -> Any:
    return UNCOMPILED[name](*arguments, **named)
