"""Matrix exponentials and products of reflections, which orthogonal parametrizations compute, held to PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import convgrad_export as cg
from convgrad_export.integrations.linear_algebra import householder_product, matrix_exp

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 0.3, 3.0, 40.0])
def test_exponentials_of_any_norm(size: float, dtype: torch.dtype) -> None:
    x = size * torch.randn(2, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x = x - x.mT  # whose exponential is a rotation
    torch.testing.assert_close(matrix_exp(x), torch.linalg.matrix_exp(x), rtol=0, atol=DTYPES[dtype] * max(size, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponentials_of_large_norms(dtype: torch.dtype) -> None:
    """A decay to nothing, as fast as one likes, and a shear."""
    decay = torch.tensor([[-3.0, 1.0], [1.0, -2.0]], dtype=dtype)
    shear = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=dtype)
    for size in (1e4, 1e5, 3e6):
        for x in (size * decay, size * shear):
            torch.testing.assert_close(matrix_exp(x), torch.linalg.matrix_exp(x), rtol=10 * DTYPES[dtype], atol=0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e8), (torch.float64, 1e17)])
def test_an_exponential_beyond_all_squarings_is_no_number(dtype: torch.dtype, size: float) -> None:
    assert matrix_exp(torch.tensor([[0.0, size], [-size, 0.0]], dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 4])
def test_reflections(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, tau = torch.randn(3, 6, 4, dtype=dtype, generator=generator), torch.rand(3, count, dtype=dtype)
    torch.testing.assert_close(
        householder_product(x, tau), torch.linalg.householder_product(x, tau), rtol=0, atol=100 * DTYPES[dtype]
    )


@pytest.mark.parametrize("name", ["matrix_exp", "householder"])
def test_orthogonal_layers_are_trained(name: str) -> None:
    torch.manual_seed(0)
    orthogonal = parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map=name)
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), orthogonal)
    report = cg.export_training_step(module, "mse", "sgd", (torch.randn(6, 5), torch.randn(6, 3)))
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.1)
    for _ in range(3):
        session.step(torch.randn(6, 5), torch.randn(6, 3))
    module.load_state_dict({name: torch.from_numpy(value) for name, value in session.state_dict().items()})
    weight = orthogonal.weight
    torch.testing.assert_close(weight @ weight.mT, torch.eye(3), rtol=0, atol=1e-5)


def test_what_has_no_decomposition_is_named() -> None:
    module = parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley")
    with pytest.raises(cg.UnsupportedOperatorError, match=r"_linalg_solve_ex.*called by parametrizations\.weight"):
        cg.export_training_step(module, "mse", "sgd", (torch.randn(2, 3), torch.randn(2, 3)))
