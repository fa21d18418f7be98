"""The names users and acceptance checks call."""

from __future__ import annotations

import importlib.metadata
import inspect

import pytest

import convgrad_export as cg


@pytest.mark.parametrize("name", sorted(cg.__all__))
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(cg, name) is not None
    assert name in dir(cg)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'conv4d_input'"):
        _ = cg.conv4d_input


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_drop_ins_have_torch_nn_grads_signature(rank: int) -> None:
    import torch

    for gradient in ("input", "weight"):
        theirs = inspect.signature(getattr(torch.nn.grad, f"conv{rank}d_{gradient}"))
        ours = inspect.signature(getattr(cg, f"conv{rank}d_{gradient}"))
        positional = [p for p in ours.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs.parameters.values()]
        keywords = {p.name: p.default for p in ours.parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert keywords == {"lowering": "auto", "providers": None}


def test_errors_are_one_family_and_each_also_a_builtin() -> None:
    family = [value for value in vars(cg).values() if isinstance(value, type) and issubclass(value, cg.ConvGradError)]
    for error in family:
        if error is not cg.ConvGradError:
            builtin = [base for base in error.__mro__ if base.__module__ == "builtins"]
            assert builtin[0] not in (Exception, BaseException), error


def test_the_version_is_the_distributions() -> None:
    try:
        installed = importlib.metadata.version("convgrad-export")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, only importable")
    assert installed == cg.__version__
