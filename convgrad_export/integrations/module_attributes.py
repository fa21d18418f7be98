"""A module's Python attributes, which its forward may change while it is traced or run beside the exported model."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch

# Parameters, buffers, submodules and hooks have their own ways back.
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
_CONTAINERS = (list, dict, set, OrderedDict, defaultdict)


@contextlib.contextmanager
def kept_attributes(module: torch.nn.Module) -> Iterator[None]:
    """Undo what a forward does to Python attributes, and to the lists, dicts and sets in them.

    A tensor that it keeps for the next call (a table of angles, the last activations) would be the trace's, without
    data, or in another type.
    """
    before = [(vars(part), _attributes(part)) for part in module.modules()]
    contents = [
        (value, copy.copy(value)) for _, kept in before for value in kept.values() if type(value) in _CONTAINERS
    ]
    try:
        yield
    finally:
        for attributes, kept in before:
            for name in [name for name in attributes if name not in kept and name not in _OF_EVERY_MODULE]:
                del attributes[name]
            attributes.update(kept)
        for value, content in contents:
            _fill(value, content)


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _fill(value: Any, content: Any) -> None:
    """The container `value` itself, with what is in `content`."""
    if isinstance(value, list):
        value[:] = content
        return
    value.clear()
    value.update(content)
