"""Matrix exponentials and products of reflections, which orthogonal parametrizations compute, held to PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import convgrad_export as cg
from convgrad_export.integrations.linear_algebra import householder_product, matrix_exp

from .gradient_modules import Apply
from .onnx_check import compare_gradients

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


def _positive(x: Tensor) -> Tensor:
    return x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype)


SYSTEMS: dict[str, Callable[[Tensor], Tensor]] = {
    "det": torch.linalg.det,
    "det-transposed": lambda x: torch.linalg.det(x.mT),
    "slogdet": lambda x: torch.linalg.slogdet(x)[1] + torch.linalg.slogdet(x)[0],
    "slogdet-transposed": lambda x: torch.linalg.slogdet(x.mT)[1],
    "logdet": lambda x: torch.logdet(_positive(x)),
    "inv": torch.linalg.inv,
    "solve": lambda x: torch.linalg.solve(x, x[..., :2].sin()),
    "solve-vector": lambda x: torch.linalg.solve(x, x[..., 0].sin()),
    "solve-right": lambda x: torch.linalg.solve(x, x[..., :2, :].sin(), left=False),
    "lower": lambda x: torch.linalg.solve_triangular(_positive(x).tril(), x, upper=False),
    "upper-right": lambda x: torch.linalg.solve_triangular(_positive(x).triu(), x, upper=True, left=False),
    "unit": lambda x: torch.linalg.solve_triangular(x, x.sin(), upper=True, unitriangular=True),
    "cholesky": lambda x: torch.linalg.cholesky(_positive(x)),
    "cholesky-upper": lambda x: torch.linalg.cholesky(_positive(x), upper=True),
    "whitened": lambda x: torch.linalg.solve_triangular(torch.linalg.cholesky(_positive(x)), x, upper=False),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in SYSTEMS), ("slogdet", torch.float64), ("whitened", torch.float64)],
)
def test_systems_over_a_dynamic_batch(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, fresh = torch.randn(2, 3, 3, dtype=dtype), torch.randn(4, 3, 3, dtype=dtype)
    compare_gradients(
        Apply(SYSTEMS[name]), (x,), dynamic_shapes={"input": {0: "batch"}}, fresh=(fresh,), tolerance=20 * DTYPES[dtype]
    )


class Flow(nn.Module):
    """The negative log-likelihood under an invertible 1x1 convolution (Kingma and Dhariwal, Glow, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(3, 3)).Q)

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.conv2d(x, self.weight[:, :, None, None])
        return z.square().flatten(1).sum(1) / 2 - x[0, 0].numel() * torch.linalg.slogdet(self.weight).logabsdet


def test_an_invertible_convolution() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5)
    compare_gradients(Flow(), (x,), dynamic_shapes={"x": {0: "batch"}}, fresh=(torch.randn(5, 3, 4, 5),))


def test_singular_matrices_have_the_determinant_0() -> None:
    x = torch.tensor([[[0.0, 2.0], [0.0, 3.0]], [[1.0, 2.0], [2.0, 4.0]], [[0.0, 2.0], [3.0, 0.0]]])
    report = cg.export(Apply(torch.linalg.det), (torch.randn(3, 2, 2),))
    found = cg.GradientSession(report.model).run({"input": x})["output"]
    torch.testing.assert_close(found, torch.linalg.det(x))


def test_a_layer_parametrized_by_cayley_is_trained() -> None:
    torch.manual_seed(0)
    module = parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley")
    report = cg.export_training_step(module, "mse", "sgd", (torch.randn(2, 3), torch.randn(2, 3)))
    assert report.verified


def test_what_has_no_decomposition_is_named() -> None:
    module = Apply(lambda x: torch.linalg.eigvalsh(_positive(x)))
    with pytest.raises(cg.UnsupportedOperatorError, match=r"_linalg_eigh.*called by"):
        cg.export_gradient(module, (torch.randn(3, 3),), of="sum")
