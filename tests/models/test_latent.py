"""The latent-variable model: what it draws, and what it says of its rows."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal, Normal

from skebm.latents import GaussianEncoder, GaussianLikelihood
from skebm.models import LatentVariableModel, antithetic_noise


@pytest.fixture
def model():
    """With a linear decoder, so that rows are normal, and a poor encoder."""
    decoder, network = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.0]]))
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
