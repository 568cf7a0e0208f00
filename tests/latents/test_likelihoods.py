"""Likelihoods: normalised, equal to those of torch, and sampled as they say."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Bernoulli, Normal

from skebm._layout import Layout
from skebm.latents import (
    BernoulliLikelihood,
    GaussianLikelihood,
    MixedLikelihood,
    WithLogMasses,
)
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


# ---------------------------------------------------------------------- states, and values

# three categories; a number, missing or zero; and a number that all rows have
LAYOUT = Layout((3, 3), (-1, 0), 2)


def mixed(kind="gaussian"):
    of_values = {
        "gaussian": GaussianLikelihood(torch.tensor([0.5, 2.0])),
        "continuous": BernoulliLikelihood(binary=False),
    }[kind]
    return MixedLikelihood(LAYOUT, of_values.double().requires_grad_(False))


def mixed_output(n, rng, scale=1.0):
    """As a decoder makes it."""
    return WithLogMasses(torch.nn.Identity(), LAYOUT)(scale * randn(n, 8, rng=rng))


def test_log_masses_are_normalised(rng):
    output = mixed_output(20, rng, scale=30.0)
    for masses in output[:, :6].exp().split(3, dim=1):
        torch.testing.assert_close(masses.sum(1), torch.ones(20).double())


def test_mixed_log_prob_is_that_of_its_parts(rng):
    output = mixed_output(1, rng)[0]
    likelihood = mixed()
    normal = Normal(output[6:], likelihood.of_values.variance.sqrt())
    x = torch.tensor([[2.0, 0.0, 0.3, -1.0], [0.0, 2.0, math.nan, 0.5], [1.0, 1.0, math.nan, 4.0]])
    x = x.double()
    logs = normal.log_prob(x[:, 2:].nan_to_num(0.0))
    states = [output[2] + output[3], output[0] + output[5], output[1] + output[4]]
    expected = torch.stack(states) + logs[:, 1] + torch.where(x[:, 1] == 0, logs[:, 0], 0.0)
    torch.testing.assert_close(likelihood.log_prob(x, output.expand(3, -1)), expected)
    # a state that is not known takes its value with it
    x[0, :3] = torch.tensor([-1.0, -1.0, math.nan])
    torch.testing.assert_close(likelihood.log_prob(x[:1], output[None]), logs[:1, 1])


def test_values_that_are_not_there_are_left_out(rng):
    x, output = randn(5, 3, rng=rng).sigmoid(), randn(5, 3, rng=rng)
    x[:, 1] = math.nan
    for make in (
        lambda d: GaussianLikelihood(torch.ones(d)), lambda _: BernoulliLikelihood(binary=False)
    ):  # fmt: skip
        kept = make(2).double().log_prob(x[:, [0, 2]], output[:, [0, 2]])
        torch.testing.assert_close(make(3).double().log_prob(x, output), kept)
        assert make(3).supports(x).all()
    on = (x > 0.5).double()
    on[:, 1] = math.nan
    kept = BernoulliLikelihood(binary=True).log_prob(on[:, [0, 2]], output[:, [0, 2]])
    torch.testing.assert_close(BernoulliLikelihood(binary=True).log_prob(on, output), kept)


@pytest.mark.parametrize("kind", ["gaussian", "continuous"])
def test_mixed_slope_and_information_are_derivatives(kind, rng):
    """Through the logits, of which log-masses are functions."""
    likelihood, decoder = mixed(kind), WithLogMasses(torch.nn.Identity(), LAYOUT)
    logits = randn(8, rng=rng).requires_grad_()
    x = torch.tensor([1.0, 0.0, 0.3, 0.8]).double()
    (expected,) = torch.autograd.grad(likelihood.log_prob(x, decoder(logits)), logits)
    jacobian = torch.autograd.functional.jacobian(decoder, logits.detach())
    output = decoder(logits).detach()
    torch.testing.assert_close(likelihood.slope(x, output) @ jacobian, expected)
    information = likelihood.information(x, output)
    assert (information >= 0).all()
    hessian = torch.autograd.functional.hessian(
        lambda v: likelihood.log_prob(x, decoder(v)), logits.detach()
    )
    torch.testing.assert_close(jacobian.mT @ information.diag() @ jacobian, -hessian)
    # of what is not known nothing is known
    lost = torch.tensor([-1.0, -1.0, math.nan, math.nan]).double()
    assert not likelihood.information(lost, output).any()
    assert not likelihood.slope(lost, output).any()


@pytest.mark.parametrize("kind", ["gaussian", "continuous"])
def test_mixed_samples_have_the_means(kind, rng):
    likelihood, output = mixed(kind), mixed_output(1, rng)
    drawn = LAYOUT.as_numbers(likelihood.sample(output.expand(20_000, -1), rng))
    error = drawn.std(0) / math.sqrt(20_000)
    assert ((drawn.mean(0) - likelihood.mean(output)[0]).abs() < 4 * error).all()


def test_the_likeliest_rows():
    means = torch.tensor([[0.1, 0.5, 0.4, 0.4, 0.3, 0.3, 0.8, 3.0],
                          [0.7, 0.1, 0.2, 0.1, 0.3, 0.6, 0.2, -1.0]])  # fmt: skip
    found = LAYOUT.likeliest(means)
    # given that there is a number, its mean is .8 / .4
    expected = torch.tensor([[1.0, 0.0, 2.0, 3.0], [0.0, 2.0, math.nan, -1.0]])
    torch.testing.assert_close(found, expected, equal_nan=True)
