"""The eager gradients inside torch.compile and strict torch.export, which follow Python's bytecode.

To follow it through a session is not possible, and through the checks not worth the guards. So the compiler gets one
call that it does not look into; what traces it later records `aten::convolution_backward` (`by_torch.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
UNCOMPILED: dict[str, Callable[..., Any]] = {}


def one_call(function: Function) -> Function:
    """The same function, which a compiler sees as one call; whatever provider it names has no part in that."""
    name = function.__name__
    UNCOMPILED[name] = function

    @functools.wraps(function)
    def seen(*arguments: Any, **named: Any) -> Any:
        if _is_compiled((*arguments, *named.values())):
            from .compiled_call import call

            return call(name, *arguments, **{key: value for key, value in named.items() if key != "providers"})
        return function(*arguments, **named)

    return cast("Function", seen)


def _is_compiled(arguments: Iterable[Any]) -> bool:
    """Asked in terms that the compiler understands: it cannot read sys.modules."""
    if not any(hasattr(value, "requires_grad") for value in arguments):
        return False
    import torch  # which made one of them

    return torch.compiler.is_compiling()
