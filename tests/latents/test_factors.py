"""Factor analysis against scikit-learn's and against dense Gaussian algebra."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import FactorAnalysis
from torch.distributions import MultivariateNormal

from skebm.latents import AffinePlus, FactorModel, factor_analysis


def rows(n, d, k, seed=0):
    """Rows of a linear model with columns of different scales."""
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(d, k))
    x = rng.normal(size=(n, k)) @ loadings.T + rng.uniform(0.3, 1.0, d) * rng.normal(size=(n, d))
    return torch.as_tensor(x + rng.normal(size=d))


def model(d=4, k=2, seed=0):
    """Factors whose posterior is uncorrelated, as the attributes promise."""
    rng = torch.Generator().manual_seed(seed)
    like = {"generator": rng, "dtype": torch.float64}
    variance = torch.rand(d, **like) + 0.2
    turn, _ = torch.linalg.qr(torch.randn(d, k, **like))
    size = torch.linspace(3.0, 1.0, k, dtype=torch.float64)
    return FactorModel(torch.randn(d, **like), variance.sqrt()[:, None] * turn * size, variance)


def test_log_prob_is_that_of_dense_algebra():
    factors = model()
    covariance = factors.loadings @ factors.loadings.mT + factors.variance.diag()
    dense = MultivariateNormal(factors.center, covariance)
    x = rows(20, 4, 2)
    torch.testing.assert_close(factors.log_prob(x), dense.log_prob(x), rtol=1e-10, atol=1e-10)


def test_posterior_is_that_of_the_joint_distribution():
    factors = model()
    weight, bias, deviation = factors.posterior()
    covariance = factors.loadings @ factors.loadings.mT + factors.variance.diag()
    # the joint distribution of (z, x), conditioned
    gain = factors.loadings.mT @ torch.linalg.inv(covariance)
    posterior = torch.eye(2).double() - gain @ factors.loadings
    x = rows(20, 4, 2)
    mean = (x - factors.center) @ gain.mT
    torch.testing.assert_close(x @ weight.mT + bias, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(deviation.square().diag(), posterior, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "d", "k"), [(300, 6, 2), (300, 1, 1), (300, 5, 1), (60, 12, 3)])
def test_fit_is_as_likely_as_that_of_scikit_learn(n, d, k):
    x = rows(n, d, k)
    found = factor_analysis(x, torch.ones(n), k)
    best = FactorAnalysis(k, svd_method="lapack", tol=1e-8, max_iter=20_000).fit(x.numpy())
    level = found.log_prob(x).mean().item()
    # it stops early, and has a pseudo-row: less left to gain than a tenth of what chance adds,
    # p / 2n
    n_parameters = d + d * k - k * (k - 1) / 2
    assert -1e-6 < best.score(x.numpy()) - level < 0.1 * n_parameters / (2 * n)
    assert all(a.dtype == torch.float64 for a in found)


@pytest.mark.parametrize("k", [2, 3])
def test_axes_are_those_of_the_posterior(k):
    x = rows(200, 5, 3)
    found = factor_analysis(x, torch.ones(200), k)
    product = (found.loadings.mT / found.variance) @ found.loadings
    off = product - product.diagonal().diag()
    assert off.abs().max() < 1e-10 * product.max()
    assert (product.diagonal().diff() <= 0).all()


def test_weights_are_repetitions():
    x = rows(80, 4, 2)
    counts = torch.arange(80) % 4  # some of them zero
    weighted = factor_analysis(x, counts.double(), 2)
    repeated = factor_analysis(x.repeat_interleave(counts, 0), torch.ones(int(counts.sum())), 2)
    torch.testing.assert_close(weighted.center, repeated.center, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(weighted.variance, repeated.variance, rtol=1e-8, atol=1e-8)
    # the sign of a factor is free
    torch.testing.assert_close(
        weighted.loadings @ weighted.loadings.mT, repeated.loadings @ repeated.loadings.mT,
        rtol=1e-8, atol=1e-8,
    )  # fmt: skip


def test_more_components_than_columns():
    x = rows(100, 3, 2)
    found, full = (factor_analysis(x, torch.ones(100), k) for k in (7, 3))
    assert found.loadings.shape == (3, 7)
    assert (found.loadings[:, 3:] == 0).all()
    torch.testing.assert_close(found.log_prob(x), full.log_prob(x), rtol=1e-10, atol=1e-10)
    weight, bias, deviation = found.posterior()
    # what has no loadings keeps its prior
    assert (weight[3:] == 0).all()
    assert (bias[3:] == 0).all()
    assert (deviation[3:] == 1).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", ["collinear", "few rows", "two rows", "constant in the fold"])
def test_degenerate_rows(case):
    x = rows(100, 5, 2)
    if case == "collinear":
        x = torch.cat([x, 2 * x[:, :1], x.sum(1, keepdim=True)], 1)
    elif case == "few rows":
        x = x[:4]
    elif case == "two rows":
        x = x[:2]
    else:
        x[:, 1] = 0.3
    found = factor_analysis(x, torch.ones(len(x)), 2)
    assert all(a.isfinite().all() for a in found)
    assert (found.variance > 0).all()
    assert found.log_prob(x).isfinite().all()
    assert all(a.isfinite().all() for a in found.posterior())
    # at least one part in 10,000 is noise, so that no column is determined by the others
    assert (found.variance >= 0.999e-4 * x.var(0, correction=0)).all()


@pytest.mark.filterwarnings("error")
def test_a_single_row():
    # what the training fold of two rows is
    found = factor_analysis(rows(1, 3, 2), torch.ones(1), 1)
    assert all(a.isfinite().all() for a in found)
    assert all(a.isfinite().all() for a in found.posterior())


def test_affine_plus():
    weight, bias = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2)
    network = torch.nn.Linear(3, 2)
    module = AffinePlus(weight, bias, network)
    x = torch.linspace(-1, 1, 24).view(2, 4, 3)
    torch.testing.assert_close(module(x), x @ weight.mT + bias + network(x))
    assert len(list(module.parameters())) == 4
