"""Random numbers from a seed: their distribution, and that ONNX draws the same ones."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import convgrad_export as cg
from convgrad_export.integrations.rounding import RandomRounding
from convgrad_export.integrations.tracing import run_backward
from convgrad_export.training.randomness import SeededRandomness

from ..torch_release import no_projections


def mode(seed: int = 0, step: int = 0) -> SeededRandomness:
    return SeededRandomness(torch.tensor(seed), torch.tensor(step))


def test_numbers_are_uniform_and_independent() -> None:
    drawn = mode().uniform((200_000,), torch.float64).numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts, _ = np.histogram(drawn, 100, (0, 1))
    # 99 degrees of freedom: beyond 160 with probability below 1e-4
    assert ((counts - 2000.0) ** 2 / 2000).sum() < 160
    for distance in (1, 2, 7, 64):
        assert abs(np.corrcoef(drawn[:-distance], drawn[distance:])[0, 1]) < 0.01


@pytest.mark.parametrize("other", [mode(1, 0), mode(0, 1)], ids=["seed", "step"])
def test_seeds_steps_and_draws_are_uncorrelated(other: SeededRandomness) -> None:
    first = mode()
    a, b, c = (x.numpy() for x in (first.bits((50_000,)), first.bits((50_000,)), other.bits((50_000,))))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert abs(np.corrcoef(a, c)[0, 1]) < 0.02
    assert (a == b).mean() < 1e-3


def test_normal_numbers_are_distributed_so() -> None:
    count = 200_000
    with mode(5):
        drawn, other = torch.randn(count, dtype=torch.float64), torch.randn(count, dtype=torch.float64)
    places = (torch.arange(count) + 0.5) / count
    # Kolmogorov and Smirnov: beyond 1.95 with probability below 1e-3
    assert (torch.special.ndtr(drawn.sort()[0]) - places).abs().max() * math.sqrt(count) < 1.95
    for product in (drawn * other, drawn[1:] * drawn[:-1]):
        assert abs(product.mean().item()) < 4 / math.sqrt(count)


def test_integers_permutations_and_exponential_numbers() -> None:
    with mode():
        counts = torch.randint(-2, 5, (70_000,)).unique(return_counts=True)
        assert counts[0].tolist() == list(range(-2, 5))
        assert (counts[1] - 10_000).abs().max() < 500
        assert [torch.randint(3, (4,)).shape, torch.randint(1, high=3, size=(4,)).shape] == [(4,), (4,)]
        assert torch.randint_like(torch.zeros(3), 7).dtype == torch.float32
        order = torch.randperm(1000)
        assert order.sort()[0].tolist() == list(range(1000)) != order.tolist()
        times = torch.empty(100_000).exponential_(2.0)
        assert times.min() > 0
        assert abs(times.mean().item() - 0.5) < 0.01
        limits = torch.empty(10_000).uniform_(-1, 3)
        assert (limits.min() >= -1, limits.max() < 3, abs(limits.mean().item() - 1) < 0.05) == (True, True, True)
        assert torch.empty(100).uniform_(**{"from": 2, "to": 3}).min() >= 2
        assert torch.normal(torch.zeros(2, 1), torch.ones(3)).shape == (2, 3)
        assert abs(torch.normal(4.0, 2.0, (10_000,)).mean().item() - 4) < 0.1


def test_dropout_keeps_the_mean_and_scales() -> None:
    x = torch.ones(1000, 100)
    with mode():
        y = functional.dropout(x, 0.3)
        channels = functional.dropout2d(torch.ones(50, 40, 3, 3), 0.25)
        assert functional.dropout(x, 0.3, training=False) is x
        assert functional.dropout(x, 1.0).abs().max() == 0
        alpha = functional.alpha_dropout(torch.randn(400, 500), 0.2, training=True)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert abs(y.mean().item() - 1) < 0.01
    assert all(len(channel.unique()) == 1 for channel in channels.flatten(0, 1))
    assert abs(alpha.mean().item()) < 0.02
    assert abs(alpha.std().item() - 1) < 0.02


class Random(nn.Module):
    """Everything that draws: dropout in all forms, stochastic depth's bernoulli_, rand, rand_like."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.drop, self.channels, self.alpha = nn.Dropout(0.4), nn.Dropout2d(0.3), nn.AlphaDropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(self.drop(self.conv(x)))
        depth = torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.7).div_(0.7)
        x = self.alpha(x * depth) * torch.rand_like(x) + torch.rand(4, 1, 1)
        return x * torch.bernoulli(torch.sigmoid(x.detach()))


def test_the_exported_step_draws_what_pytorch_draws() -> None:
    """Verification compares with eager PyTorch under the same mode; a step draws anew."""
    batch = (torch.randn(3, 2, 5, 6), torch.randn(3, 4, 5, 6))
    module = Random().train()
    report = cg.export_training_step(module, "mse", "sgd", batch, dynamic_shapes={"x": {0: "n"}, "target": {0: "n"}})
    assert report.verified
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.0, seed=5)
    for step in range(3):
        loss = session.step(*batch)["loss"]
        with SeededRandomness(torch.tensor(5), torch.tensor(step)), torch.no_grad():
            assert functional.mse_loss(module(batch[0]), batch[1]).item() == pytest.approx(loss, rel=1e-5)


def test_random_rounding_of_a_backward_pass_draws_its_own_numbers() -> None:
    """The pass runs under the mode, which refuses what verification draws: numbers of a generator."""
    x = torch.linspace(0.1, 1, 1000, dtype=torch.float64).requires_grad_()
    value = x.sin().sum()
    with mode() as drawing, RandomRounding(2.0**-21, None, 0):
        (gradient,) = run_backward(value, [x])
    assert gradient is not None
    assert 0 < (gradient - x.cos()).abs().max() < 2.0**-19
    assert drawing.draws == 0


class Diffusion(nn.Module):
    """Noise of a drawn strength, a mixture with other samples, and a latent variable, all from the seed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mean, self.scores = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(5, 3), nn.Linear(3, 5)
        self.strength = nn.Embedding(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        time = torch.randint(0, 10, (x.shape[0],))
        mixed = x + 0.5 * x[torch.randperm(x.shape[0])] * torch.empty(()).uniform_(0.2, 0.8)
        noise = torch.randn_like(mixed) * 0.1 + torch.randn(x.shape[0], 1, 1, 1, dtype=x.dtype)
        hidden = (self.conv(mixed + noise) + self.strength(time)[:, :, None, None]).tanh()
        mean = self.mean(hidden)
        latent = mean + torch.empty_like(mean).normal_() * torch.distributions.Normal(mean, 1.0).rsample()
        return self.scores(functional.gumbel_softmax(latent, hard=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_and_times_are_drawn_from_the_seed(dtype: torch.dtype) -> None:
    module, rtol = Diffusion().to(dtype), 1e-5 if dtype == torch.float32 else 1e-10
    batch = (torch.randn(3, 2, 4, 5, dtype=dtype), torch.randn(3, 4, 4, 5, dtype=dtype))
    report = cg.export_training_step(module, "mse", "sgd", batch, dynamic_shapes={"x": {0: "n"}, "target": {0: "n"}})
    assert len(report.verified_sizes) == 2
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.0, seed=5)
    losses = [session.step(*batch)["loss"] for _ in range(3)]
    assert len(set(map(float, losses))) == 3
    for step, loss in enumerate(losses):
        with SeededRandomness(torch.tensor(5), torch.tensor(step)), torch.no_grad():
            assert functional.mse_loss(module(batch[0]), batch[1]).item() == pytest.approx(float(loss), rel=rtol)


def test_categories_follow_their_weights() -> None:
    """With replacement and without, from weights that need not sum up to 1."""
    weights = torch.tensor([1.0, 0.0, 6.0, 3.0])
    with mode():
        shares = torch.multinomial(weights, 50_000, replacement=True).bincount(minlength=4) / 50_000
        assert (shares - weights / 10).abs().max() < 0.01
        pairs = weights.expand(20_000, 4).multinomial(2)
        sampled = torch.distributions.Categorical(logits=torch.zeros(3, 5)).sample((7,))
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert not (pairs == 1).any()
    assert abs((pairs[:, 0] == 2).float().mean().item() - 0.6) < 0.02
    assert abs((pairs[pairs[:, 0] == 2, 1] == 3).float().mean().item() - 0.75) < 0.02
    assert sampled.shape == (7, 3)


class Policy(nn.Module):
    """Drawn actions and their logarithmic probabilities, weighted with what is drawn without replacement."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        actions = torch.distributions.Categorical(logits=self.scores(x))
        chosen = torch.multinomial(actions.probs.detach(), 2)
        return actions.log_prob(actions.sample()) * chosen.sum(1)


def test_categories_are_drawn_from_the_seed() -> None:
    module, batch = Policy(), (torch.randn(8, 6), torch.randn(8))
    report = cg.export_training_step(module, "mse", "sgd", batch, dynamic_shapes={"x": {0: "n"}, "target": {0: "n"}})
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.0, seed=5)
    losses = [session.step(*batch)["loss"] for _ in range(3)]
    assert len(set(map(float, losses))) == 3
    for step, loss in enumerate(losses):
        with SeededRandomness(torch.tensor(5), torch.tensor(step)), torch.no_grad():
            assert functional.mse_loss(module(batch[0]), batch[1]).item() == pytest.approx(float(loss), rel=1e-5)


class Applied(nn.Module):
    """A function of the input times a weight."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.weight)


def outputs(function: Callable[[Tensor], Tensor], shape: Sequence[int], calls: int = 1, **options: Any) -> Any:
    """What a step's forward returns for ones, call by call, with the weight at 1."""
    report = cg.export_training_step(
        Applied(function),
        lambda output: output.square().mean(),
        "sgd",
        (torch.ones(shape),),
        return_outputs=True,
        **options,
    )
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.0)
    return [session.step(np.ones(shape, np.float32))["output"] for _ in range(calls)]


def added_in_place(x: Tensor) -> Tensor:
    dropped = functional.dropout(x, 0.5, True, inplace=True)
    return x + dropped


def dropped_in_place(x: Tensor) -> Tensor:
    nn.Dropout(0.5, inplace=True)(x)
    return x


def alpha_in_place(x: Tensor) -> Tensor:
    functional.alpha_dropout(x, 0.5, True, inplace=True)
    return x


@pytest.mark.parametrize("inplace", [False, True])
def test_rrelu_draws_its_slopes_from_the_seed(inplace: bool) -> None:
    (found,) = outputs(lambda x: nn.RReLU(0.25, 0.5, inplace=inplace)(x - 2), (16, 8))
    assert found.min() >= -0.5
    assert found.max() < -0.25
    assert len(np.unique(found)) > 100
    with mode():
        assert torch.equal(functional.rrelu(torch.ones(3), training=True), torch.ones(3))
        assert torch.equal(functional.rrelu(-torch.ones(3), 0.25, 0.5), torch.full((3,), -0.375))
        assert torch.rrelu(-torch.ones(500), training=True).unique().numel() > 400


def test_rrelu_in_a_network_is_verified_with_its_gradient() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.RReLU(), nn.Flatten(), nn.LazyLinear(4))
    batch = (torch.randn(3, 2, 5, 6), torch.tensor([0, 3, 1]))
    module(batch[0])
    report = cg.export_training_step(
        module, "cross_entropy", "sgd", batch, dynamic_shapes={"input": {0: "n"}, "target": {0: "n"}}
    )
    assert report.verified


@pytest.mark.parametrize(
    ("function", "values"),
    [(added_in_place, [0.0, 4.0]), (dropped_in_place, [0.0, 2.0]), (alpha_in_place, [-0.7791, 1.6655])],
)
def test_dropout_in_place_changes_its_input(function: Callable[[Tensor], Tensor], values: list[float]) -> None:
    torch.manual_seed(0)
    assert function(torch.ones(100)).unique().tolist() == pytest.approx(values, abs=1e-4)
    assert np.unique(outputs(function, (8, 8))[0]) == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize(
    ("function", "shape", "axes"),
    [
        (functional.dropout1d, (6, 50), 1),
        (functional.dropout1d, (5, 6, 50), 2),
        (functional.dropout2d, (5, 6, 50), 2),
        (functional.dropout2d, (5, 6, 7, 8), 2),
        (functional.dropout3d, (6, 5, 4, 4), 1),
        (functional.dropout3d, (5, 6, 3, 4, 4), 2),
        (functional.feature_alpha_dropout, (5, 6, 3, 4, 4), 2),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.filterwarnings("ignore:dropout2d")
def test_channel_dropout_drops_whole_channels(
    function: Callable[..., Tensor], shape: tuple[int, ...], axes: int, inplace: bool
) -> None:
    """Samples without a batch axis included; PyTorch's own masks have the same form and values."""
    torch.manual_seed(0)
    found = []
    for random in (contextlib.nullcontext(), mode()):
        with random:
            drawn = function(torch.ones(shape), 0.5, True, inplace)
        channels = drawn.reshape(int(np.prod(shape[:axes])), -1)
        assert all(len(channel.unique()) == 1 for channel in channels)
        found.append(channels.unique())
    torch.testing.assert_close(found[0], found[1])


def test_a_size_given_by_keyword_is_drawn_whole() -> None:
    (drawn,) = outputs(lambda x: x * torch.rand(size=(6, 5), device=x.device, generator=None), (6, 5))
    assert len(np.unique(drawn)) == 30
    with mode():
        assert torch.rand([2, 3], dtype=torch.float64).dtype == torch.float64
        assert torch.rand(2, 3, requires_grad=True).requires_grad
        assert torch.rand(()).shape == ()
        assert torch.rand_like(torch.ones(2, 3), dtype=torch.float64).dtype == torch.float64


def test_torchs_own_dropout_draws_as_the_functional_one() -> None:
    x = torch.ones(8, 8)
    with mode():
        expected = functional.dropout(x, 0.5)
    with mode():
        assert torch.equal(torch.dropout(x, 0.5, train=True), expected)
        assert torch.dropout(x, 0.5, False) is x
    (drawn,) = outputs(lambda x: torch.dropout(x, 0.5, True), (8, 8))
    assert set(np.unique(drawn)) == {0.0, 2.0}


def check_draws(module: nn.Module, x: Tensor, tolerance: float) -> None:
    """An exported step of a module that returns its loss draws anew at each step, what PyTorch draws from the seed."""
    report = cg.export_training_step(module, lambda output: output, "sgd", (x,))
    session = cg.TrainingSession(report.model, report.state, learning_rate=0.0, seed=5)
    losses = [session.step(x)["loss"] for _ in range(3)]
    assert len(set(losses)) == 3
    for step, loss in enumerate(losses):
        with mode(5, step), torch.no_grad():
            assert module(x).item() == pytest.approx(loss, rel=tolerance)


class Recurrent(nn.Module):
    """The outputs and last states of a recurrent layer."""

    def __init__(self, kind: type, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = kind(3, 4, 3, batch_first=True, dropout=0.5, **options)

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.layers(x)
        states = state if isinstance(state, tuple) else (state,)
        return output.sum(-1).sum() + sum(((index + 2) * s.sum() for index, s in enumerate(states)), torch.zeros(()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {}),
        pytest.param(nn.LSTM, {"bidirectional": True, "proj_size": 2}, marks=no_projections),
        (nn.GRU, {"bias": False}),
        (nn.RNN, {"bidirectional": True}),
        (nn.RNN, {"nonlinearity": "relu"}),
    ],
)
def test_dropout_between_recurrent_layers_draws_from_the_seed(kind: type, options: dict[str, Any]) -> None:
    module, x = Recurrent(kind, **options), torch.randn(2, 5, 3)
    check_draws(module, x, 1e-5)
    module.layers.dropout = 0.0
    expected = module(x)
    module.layers.dropout = 1e-9  # no number that is drawn is as small
    with mode():
        torch.testing.assert_close(module(x), expected)
    module.layers.dropout = 0.5
    with mode():
        torch.testing.assert_close(module.eval()(x), expected)


class Attending(nn.Module):
    """Attention of one of PyTorch's modules, or of its function, over what a convolution gives."""

    def __init__(self, layer: Callable[[], nn.Module], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.layer = layer()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, self.conv(x).transpose(1, 2)).square().sum()


def function_of(x: Tensor, **options: Any) -> Tensor:
    heads = x.reshape(x.shape[0], x.shape[1], 4, 2).transpose(1, 2)
    key = heads[:, :2] if options.get("enable_gqa") else heads
    return functional.scaled_dot_product_attention(heads, key, key, dropout_p=0.5, **options)


MASK = torch.tensor([[True, False, True, True, False]] * 4 + [[False] * 5])  # the last row sees nothing
ATTENTION: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True), lambda layer, x: layer(x)),
    "causal encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True),
        lambda layer, x: layer(x, nn.Transformer.generate_square_subsequent_mask(5), is_causal=True),
    ),
    "weights": (lambda: nn.MultiheadAttention(8, 2, 0.5, batch_first=True), lambda layer, x: layer(x, x, x)[0]),
    "no weights": (
        lambda: nn.MultiheadAttention(8, 2, 0.5, batch_first=True),
        lambda layer, x: layer(x, x, x, need_weights=False)[0],
    ),
    "function": (nn.Identity, lambda _, x: function_of(x)),
    "causal": (nn.Identity, lambda _, x: function_of(x, is_causal=True, scale=0.3)),
    "groups": (nn.Identity, lambda _, x: function_of(x, enable_gqa=True)),
    "mask": (nn.Identity, lambda _, x: function_of(x, attn_mask=MASK)),
    "numbers": (nn.Identity, lambda _, x: function_of(x, attn_mask=torch.linspace(-1, 1, 25).reshape(5, 5))),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_dropout_in_attention_draws_from_the_seed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Attending(*ATTENTION[name]), torch.randn(2, 3, 5)
    check_draws(module, x, 1e-4)
    # With masks of ones the written-out form is PyTorch's own without dropout.
    monkeypatch.setattr(
        SeededRandomness, "keep", lambda self, like, shape, probability: like.new_full(shape, probability)
    )
    with mode():
        found = module(x)
    monkeypatch.setattr(functional, "dropout", lambda input, *_, **__: input)
    original = functional.scaled_dot_product_attention

    def without_dropout(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", without_dropout)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    torch.testing.assert_close(found, module(x))


def test_sequences_that_were_packed_outside_of_the_forward_are_refused() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(2, 5, 3), torch.tensor([5, 3]), batch_first=True)
    with mode(), pytest.raises(cg.UnsupportedOperatorError, match="in another way than by pack_padded_sequence"):
        nn.LSTM(3, 4, 2, dropout=0.5)(packed)


def test_every_call_that_accumulates_gradients_draws_anew() -> None:
    calls = outputs(lambda x: functional.dropout(x, 0.5), (8, 8), 8, gradient_accumulation=4)
    masks = [call != 0 for call in calls]
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(masks, 2))
    assert all(0.2 < mask.mean() < 0.8 for mask in masks)


def test_accumulation_resumes_bit_for_bit_between_two_updates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    data = [(torch.randn(4, 2, 3).double(), torch.randn(4, 2).double()) for _ in range(7)]
    report = cg.export_training_step(module, "mse", "adam", data[0], tmp_path / "step.onnx", gradient_accumulation=3)
    whole = cg.TrainingSession(tmp_path / "step.onnx", seed=4)
    expected = [whole.step(*batch)["loss"] for batch in data]
    first = cg.TrainingSession(tmp_path / "step.onnx", seed=4)
    got = [first.step(*batch)["loss"] for batch in data[:4]]
    first.save(tmp_path / "half.safetensors")
    second = cg.TrainingSession(tmp_path / "step.onnx", tmp_path / "half.safetensors", seed=4)
    got += [second.step(*batch)["loss"] for batch in data[4:]]
    assert got == expected
    assert report.verified
    for name, value in whole.state().items():
        np.testing.assert_array_equal(second.state()[name], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_dtypes_draw_numbers_below_one(dtype: torch.dtype) -> None:
    drawn = mode().uniform((20_000,), dtype)
    assert drawn.dtype == dtype
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.float().mean().item() - 0.5) < 0.01


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: torch.rand(2, generator=torch.Generator()), cg.UnsupportedOperatorError, "generator="),
        (lambda x: torch.rand(2, out=torch.empty(2)), cg.UnsupportedOperatorError, "out="),
        (lambda x: torch.rand(2, device="meta"), cg.UnsupportedOperatorError, "device='meta'"),
        (lambda x: torch.rand(2, dtype=torch.int64), cg.DTypeError, "int64"),
        (lambda x: torch.rand_like(x, device="meta"), cg.UnsupportedOperatorError, "rand_like.*meta"),
        (
            lambda x: torch.bernoulli(x, generator=torch.Generator()),
            cg.UnsupportedOperatorError,
            "bernoulli.*generator",
        ),
        (lambda x: torch.bernoulli(x, out=torch.empty(3)), cg.UnsupportedOperatorError, "out="),
        (lambda x: x.bernoulli_(generator=torch.Generator()), cg.UnsupportedOperatorError, "bernoulli_.*generator"),
        (lambda x: x.bernoulli_(1.5), cg.ArgumentTypeError, "p is 1.5"),
        (lambda x: functional.dropout(x, -0.5), cg.ArgumentTypeError, "p is -0.5"),
        (lambda x: functional.dropout1d(x, 0.5), cg.GeometryError, "dropout1d: input has 1 dim"),
        (lambda x: torch.rand_like(x, nothing=1), TypeError, "nothing"),
        (lambda x: torch.randn(2, generator=torch.Generator()), cg.UnsupportedOperatorError, "randn.*generator="),
        (lambda x: torch.randn(2, dtype=torch.int64), cg.DTypeError, "normally.*int64"),
        (lambda x: x.normal_(generator=torch.Generator()), cg.UnsupportedOperatorError, "normal_.*generator"),
        (lambda x: torch.randint(2**30, (2,)), cg.ArgumentTypeError, r"from 0 to below 1073741824, expected 1 to"),
        (lambda x: torch.randint(3, 3, (2,)), cg.ArgumentTypeError, "from 3 to below 3"),
    ],
)
def test_what_a_seed_cannot_give_is_refused(call: Callable[[Tensor], Any], error: type, message: str) -> None:
    with mode(), pytest.raises(error, match=message):
        call(torch.ones(3))
