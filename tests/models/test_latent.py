"""The latent-variable model: what it draws, and what it says of its rows."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal, Normal

from skebm._layout import Layout
from skebm.latents import GaussianEncoder, GaussianLikelihood, MixedLikelihood, WithLogMasses
from skebm.models import LatentVariableModel, antithetic_noise
from skebm.models.latent import in_blocks


@pytest.fixture
def model():
    """With a linear decoder, so that rows are normal, and a poor encoder."""
    decoder, network = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.0]]))
        decoder.bias.copy_(torch.tensor([0.2, -0.4, 0.5]))
        network.weight.zero_()
        network.bias.zero_()
    likelihood = GaussianLikelihood(torch.ones(3) / 4)
    model = LatentVariableModel(decoder, likelihood, 2, GaussianEncoder(network, 2))
    return model.double().requires_grad_(False)


@pytest.fixture
def exact(model):
    weight = model.decoder.weight
    return MultivariateNormal(model.decoder.bias, weight @ weight.mT + torch.eye(3) / 4)


def test_samples_follow_the_density(model, exact):
    rng = torch.Generator().manual_seed(0)
    drawn = model.sample(20_000, rng)
    z = torch.randn(5, 2, generator=rng).double()
    assert torch.equal(model.mean(z), model.decoder(z))
    expected = Normal(0.0, 1.0).log_prob(z).sum(-1)
    expected += Normal(model.decoder(z), 0.5).log_prob(drawn[:5]).sum(-1)
    torch.testing.assert_close(model.log_joint(drawn[:5], z), expected, rtol=1e-6, atol=1e-6)
    white = torch.linalg.solve_triangular(
        exact.scale_tril.double(), (drawn - exact.loc).T, upper=False
    )
    for column in white:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    off = torch.corrcoef(white) - torch.eye(3)
    assert off.abs().max() < 4.5 / math.sqrt(20_000)


def test_log_prob_is_exact_within_its_error_and_reproducible(model, exact):
    x = model.sample(100, torch.Generator().manual_seed(1))
    value, error = model.log_prob(x, 0, n_samples=200)
    assert ((value - exact.log_prob(x)).abs() < stats.norm.isf(1e-6) * error).all()
    assert error.max() < 0.2
    again, _ = model.log_prob(x[50:], 0, n_samples=200)
    torch.testing.assert_close(again, value[50:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [1, 7, 8])
def test_noise_in_pairs_of_opposite_signs(model, n):
    rng = torch.Generator().manual_seed(0)
    noise = antithetic_noise(model.encoder, n, rng, torch.float64)
    assert noise.shape == (n, model.encoder.n_noise)
    half = -(-n // 2)
    assert torch.equal(noise[half:], -noise[: n - half])


# ---------------------------------------------------------------------- modes and blocks


def test_modes_of_a_linear_model_are_its_posteriors(model, exact):
    rng = torch.Generator().manual_seed(0)
    x = model.sample(50, rng)
    weight = model.decoder.weight
    covariance = torch.linalg.inv(torch.eye(2).double() + 4 * weight.mT @ weight)
    mean = 4 * (x - model.decoder.bias) @ weight @ covariance
    found, found_covariance = model.modes(x, torch.zeros(50, 1, 2).double())
    torch.testing.assert_close(found, mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found_covariance, covariance.expand(50, 2, 2), rtol=1e-7, atol=1e-7)


class Overflowing(torch.nn.Module):
    def forward(self, z):
        return torch.cat([z, z[..., :1] / 0.0], dim=-1)


def test_where_a_decoder_overflows_the_mode_is_where_it_began(model):
    model.decoder = Overflowing()
    start = torch.ones(4, 2).double()
    mode, covariance = model.modes(torch.zeros(4, 3).double(), start[:, None])
    torch.testing.assert_close(mode, start)
    torch.testing.assert_close(covariance, torch.eye(2).double().expand(4, 2, 2))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 20])
def test_blocks_have_one_shape_and_equal_the_whole(n):
    rng = torch.Generator().manual_seed(0)
    x, sizes = torch.randn(n, 3, generator=rng, dtype=torch.float64), set()
    weight = torch.randn(3, 2, generator=rng, dtype=torch.float64)

    def function(rows):
        sizes.add(len(rows))
        return (rows @ weight).tanh()

    torch.testing.assert_close(
        in_blocks(function, x, 8), (x @ weight).tanh(), rtol=1e-12, atol=1e-12
    )
    assert sizes == {8}


class Bent(torch.nn.Module):
    """A plane in three dimensions, bent far more than the noise is wide."""

    def forward(self, z):
        a, b = z.unbind(-1)
        return torch.stack([a, b + a.square(), (2 * a).sin() * b], dim=-1)


@pytest.mark.parametrize("at_modes", [True, False])
def test_bent_posteriors_against_quadrature(model, at_modes):
    model.decoder = Bent()
    model.likelihood = GaussianLikelihood(torch.full((3,), 0.04)).double().requires_grad_(False)
    x = model.sample(60, torch.Generator().manual_seed(0))
    axis = torch.linspace(-6.0, 6.0, 401, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    cell = 2 * math.log(axis[1] - axis[0])
    exact = torch.cat(
        [model.log_joint(rows[:, None], z).logsumexp(1) + cell for rows in x.split(10)]
    )
    found = model.log_likelihoods(x, 0, at_modes=at_modes, n_samples=180)
    errors = (found.value - exact) / found.std_error
    assert errors.abs().max() < stats.norm.isf(1e-4 / 60) + 2 * found.std_error.max()
    assert 0.5 < errors.std() < 1 + 4 / math.sqrt(120)
    if at_modes:
        assert found.std_error.median() < 0.08


class Logits(torch.nn.Module):
    """A curve: two categories, whether there is a number, and the number."""

    def forward(self, z):
        a, b = z.unbind(-1)
        return torch.stack([2 * a, 0 * a, a + b, 0 * a, b + 0.3 * a.square()], dim=-1)


def test_states_and_values_against_quadrature(model):
    layout = Layout((2, 2), (-1, 0), 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.encoder.network = torch.nn.Linear(5, 4).requires_grad_(False)
    model.encoder.layout = layout
    model.decoder = WithLogMasses(Logits(), layout)
    of_values = GaussianLikelihood(torch.full((1,), 0.04)).double().requires_grad_(False)
    model.likelihood = MixedLikelihood(layout, of_values)
    x = model.sample(40, torch.Generator().manual_seed(0))
    x[:5, 0] = -1.0  # not known
    axis = torch.linspace(-7.0, 7.0, 401, dtype=torch.float64)
    z, cell = torch.cartesian_prod(axis, axis), 2 * math.log(axis[1] - axis[0])
    exact = model.log_joint(x[:, None], z).logsumexp(1) + cell
    found = model.log_likelihoods(x, 0, n_samples=180)
    errors = (found.value - exact) / found.std_error
    assert errors.abs().max() < stats.norm.isf(1e-4 / 40) + 2 * found.std_error.max()
    assert found.std_error.max() < 0.15
