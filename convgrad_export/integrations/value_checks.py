"""Where PyTorch's own Python code looks at a tensor's values, and nothing that it computes depends on what it sees.

A trace has no values, so the question alone would end it.

- TransformerEncoder and TransformerDecoder compare their mask with the causal one, to hand on a hint for faster
  kernels. Without the hint the mask itself is applied, with the same result.
- Distributions validate their parameters and values by default. A graph has no assertions; verification runs the module
  in PyTorch, which validates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.distributions import Distribution
from torch.nn.modules import transformer


@contextlib.contextmanager
def without_value_checks() -> Iterator[None]:
    """While active, masks are not compared with the causal one, and distributions validate only where told to."""
    detect, validate = transformer._detect_is_causal_mask, Distribution._validate_args

    def is_causal_mask(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    setattr(transformer, "_detect_is_causal_mask", is_causal_mask)  # noqa: B010  # mypy: no assignment to a function
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        setattr(transformer, "_detect_is_causal_mask", detect)  # noqa: B010
        Distribution.set_default_validate_args(validate)
