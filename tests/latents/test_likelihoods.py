"""Likelihoods: normalised, equal to those of torch, and sampled as they say."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Bernoulli, Normal

from skebm.latents import BernoulliLikelihood, GaussianLikelihood
from skebm.latents._likelihoods import _quantile


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def randn(*shape, rng):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def test_gaussian_log_prob(rng):
    variance = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    likelihood = GaussianLikelihood(variance).double()
    torch.testing.assert_close(likelihood.variance, variance)
    x, output = randn(6, 1, 3, rng=rng), randn(6, 5, 3, rng=rng)
    expected = Normal(output, likelihood.variance.sqrt()).log_prob(x).sum(-1)
    torch.testing.assert_close(likelihood.log_prob(x, output), expected)
    assert likelihood.mean(output) is output
    assert likelihood.supports(1e6 * x[:, 0]).all()


def test_gaussian_variance_is_learned_and_bounded():
    likelihood = GaussianLikelihood(torch.tensor([0.0, 1e-12, 2.0]))
    assert likelihood.variance.isfinite().all()
    assert (likelihood.variance[:2] > 0).all()
    assert (likelihood.variance[:2] < 1e-5).all()
    with torch.no_grad():
        likelihood.log_variance.fill_(-200.0)  # where training on a noiseless column would take it
    assert (likelihood.variance >= 0.99e-6).all()
    likelihood.log_prob(torch.ones(3), torch.zeros(3)).backward()
    assert likelihood.log_variance.grad.isfinite().all()


def test_gaussian_samples(rng):
    likelihood = GaussianLikelihood(torch.tensor([0.25, 4.0])).double()
    output = torch.tensor([1.0, -2.0], dtype=torch.float64).expand(4000, 2)
    drawn = likelihood.sample(output, rng)
    assert drawn.dtype == torch.float64
    for column, mean, deviation in zip(drawn.T, (1.0, -2.0), (0.5, 2.0), strict=True):
        assert stats.kstest(column.detach(), "norm", (mean, deviation)).pvalue > 1e-3
    assert abs(torch.corrcoef(drawn.T)[0, 1]) < 4 / math.sqrt(4000)


def test_probabilities_of_all_binary_rows_sum_to_one(rng):
    likelihood = BernoulliLikelihood(binary=True)
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    logits = torch.cat([randn(10, 3, rng=rng), 100 * randn(3, 3, rng=rng)])
    log_p = likelihood.log_prob(x, logits[:, None])
    assert log_p.shape == (13, 8)
    torch.testing.assert_close(log_p.logsumexp(1), torch.zeros(13).double(), rtol=0, atol=1e-12)
    expected = Bernoulli(logits=logits[:10, None]).log_prob(x).sum(-1)
    torch.testing.assert_close(log_p[:10], expected)
    torch.testing.assert_close(likelihood.mean(logits), logits.sigmoid())


LOGITS = [0.0, 1e-6, 1e-3, 3.9e-3, 4.1e-3, 0.1, 1.0, 5.0, 15.0, 30.0, 50.0, 300.0]


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_density_integrates_to_one(logit, sign):
    likelihood = BernoulliLikelihood(binary=False)
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    output = torch.tensor([sign * logit], dtype=torch.float64)
    density = likelihood.log_prob(x, output).exp()
    # trapezoids are off by (logit / 100,000)^2 / 12
    assert torch.trapezoid(density, x[:, 0]).item() == pytest.approx(1, abs=1e-6)
    mean = torch.trapezoid(density * x[:, 0], x[:, 0]).item()
    assert likelihood.mean(output).item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("logit", [3e-3, 1.0, 8.0, 14.0, 18.0, 30.0, 50.0])
def test_continuous_density_in_single_precision(logit):
    # what training sees; the constant is log(logit / (2 sinh(logit / 2))) + logit / 2
    likelihood = BernoulliLikelihood(binary=False)
    output = torch.tensor([logit], requires_grad=True)
    value = likelihood.log_prob(torch.tensor([0.25]), output)
    wide = torch.tensor(logit, dtype=torch.float64)
    exact = wide.log() - (2 * (wide / 2).sinh()).log() + wide * (0.25 - 0.5)
    assert value.item() == pytest.approx(exact.item(), abs=1e-4 * max(1.0, logit))
    value.backward()
    # d/dlogit of the above
    slope = 1 / logit - 0.5 / math.tanh(logit / 2) + 0.25 - 0.5
    assert output.grad.item() == pytest.approx(slope, abs=2e-3)


@pytest.mark.parametrize("logit", [0.0, 1e-9, 0.02, -0.02, 0.04, -3.0, 12.0])
def test_continuous_samples_invert_the_distribution_function(logit):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    x = _quantile(torch.full_like(u, logit), u)
    cdf = x if logit == 0 else torch.expm1(logit * x) / math.expm1(logit)
    torch.testing.assert_close(cdf, u, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("logit", [0.0, -3.0, 2.0, 12.0])
def test_continuous_samples(logit, rng):
    likelihood = BernoulliLikelihood(binary=False)
    output = torch.full((4000, 1), logit, dtype=torch.float64)
    drawn = likelihood.sample(output, rng)[:, 0]
    assert ((drawn >= 0) & (drawn <= 1)).all()

    def cdf(x):
        return x if logit == 0 else np.expm1(logit * x) / np.expm1(logit)

    assert stats.kstest(drawn, cdf).pvalue > 1e-3
    error = drawn.std() / math.sqrt(4000)
    assert abs(drawn.mean() - likelihood.mean(output[0])) < 4 * error


def test_binary_samples(rng):
    likelihood = BernoulliLikelihood(binary=True)
    output = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64).expand(4000, 3)
    drawn = likelihood.sample(output, rng)
    assert ((drawn == 0) | (drawn == 1)).all()
    p = output[0].sigmoid()
    assert ((drawn.mean(0) - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all()


def test_supports():
    x = torch.tensor([[0.0, 1.0], [0.5, 1.0], [0.0, -1e-9], [1.0 + 1e-9, 0.0]])
    x = x.double() + torch.tensor([[0, 0], [0, 0], [0, -1e-9], [1e-9, 0]]).double()
    assert BernoulliLikelihood(binary=True).supports(x).tolist() == [True, False, False, False]
    assert BernoulliLikelihood(binary=False).supports(x).tolist() == [True, True, False, False]


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "continuous"])
def test_slope_and_information_are_derivatives(likelihood):
    d = 9
    module = {
        "gaussian": GaussianLikelihood(torch.linspace(0.1, 2.0, d)),
        "bernoulli": BernoulliLikelihood(binary=True),
        "continuous": BernoulliLikelihood(binary=False),
    }[likelihood].double()
    x = (
        torch.arange(d).double() % 2
        if likelihood == "bernoulli"
        else torch.linspace(0, 1, d).double()
    )
    output = torch.tensor([-40, -3, -0.5, -0.02, 0, 0.01, 0.04, 2, 50], dtype=torch.float64)
    output.requires_grad_()
    (slope,) = torch.autograd.grad(module.log_prob(x, output), output)
    torch.testing.assert_close(module.slope(x, output), slope, rtol=1e-7, atol=1e-9)
    # the mean of these exponential families is the derivative of the normalising constant, and the
    # information that of the mean, over the variance of normal noise
    (information,) = torch.autograd.grad(module.slope(x, output).sum(), output)
    torch.testing.assert_close(module.information(x, output), -information, rtol=1e-6, atol=1e-8)
