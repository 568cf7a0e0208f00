"""Every law integrates to one, matches its sampler, and is reproducible."""

import inspect
import pickle

import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from skebm import datasets
from skebm.datasets import DISTRIBUTIONS

PLANE = [name for name, law in DISTRIBUTIONS.items() if law.n_features == 2]
HIGHER = [name for name, law in DISTRIBUTIONS.items() if law.n_features > 2]

N_PROPOSAL = 40_000


def edges(law, n_cells, margin=0.7):
    """Edges of a grid about the law, whole numbers among them (the checkerboard jumps there)."""
    X = law.sample(20_000, random_state=1)
    low, high = np.floor(X.min(0) - margin), np.ceil(X.max(0) + margin)
    return [np.linspace(a, b, int(b - a) * n_cells + 1) for a, b in zip(low, high, strict=True)]


def cell_masses(law, axes, refine):
    """Mass in every cell, by the midpoint rule with refine points per side."""
    fine = [a[:-1, None] + np.diff(a)[:, None] * (np.arange(refine) + 0.5) / refine for a in axes]
    fine = [f.ravel() for f in fine]
    grid = np.stack(np.meshgrid(*fine, indexing="ij"), -1).reshape(-1, law.n_features)
    volume = np.prod([f[1] - f[0] for f in fine])
    mass = np.exp(law.log_density(grid)).reshape([len(f) for f in fine]) * volume
    for axis, a in enumerate(axes):
        mass = np.add.reduceat(mass, np.arange(len(a) - 1) * refine, axis=axis)
    return mass


@pytest.mark.parametrize("name", ["claw", *PLANE])
def test_integrates_to_one_and_matches_the_sampler(name):
    """Quadrature over cells sums to one, and the counts of fresh rows fit it by chi-square."""
    law = DISTRIBUTIONS[name]
    axes = edges(law, 4)
    mass = cell_masses(law, axes, refine=6)
    assert mass.sum() == pytest.approx(1.0, abs=1e-4)

    n = 50_000
    X = law.sample(n, random_state=2)
    counts, _ = np.histogramdd(X, axes)
    kept = n * mass > 5
    observed = np.r_[counts[kept], n - counts[kept].sum()]
    expected = np.r_[n * mass[kept], n * (1 - mass[kept].sum())]
    rest = slice(None) if expected[-1] > 5 else slice(-1)
    statistic = ((observed - expected)[rest] ** 2 / expected[rest]).sum()
    assert stats.chi2.sf(statistic, len(expected[rest]) - 1) > 1e-3


def proposal(law, rng):
    """Rows and log-density of a broad law that covers the given one, in its own coordinates."""
    d = law.n_features
    if law.name == "funnel":  # wide normal head, Student tail at the head's own scale
        head = stats.norm(0, 1.3 * law.scale)
        v = head.rvs(N_PROPOSAL, random_state=rng)
        e = rng.standard_t(10, (N_PROPOSAL, d - 1))
        X = np.column_stack([v, e * np.exp(v / 2)[:, None]])
        return X, head.logpdf(v) + (stats.t(10).logpdf(e) - v[:, None] / 2).sum(1)
    # Otherwise a multivariate t about a pilot sample; for the gamma law about its logarithm.
    log = law.name == "gamma_copula"
    pilot = law.sample(20_000, random_state=3)
    pilot = np.log(pilot) if log else pilot
    if law.name == "gaussian_mixture":
        parts = law._mixture
        broad = [
            stats.multivariate_t(m, 1.2 * f @ f.T, df=10)
            for m, f in zip(parts.means, parts.factors, strict=True)
        ]
    else:
        centre = np.median(pilot, axis=0)
        df = 2 if law.name == "multivariate_t" else 10
        broad = [stats.multivariate_t(centre, 1.2 * np.cov(pilot[:5000].T), df=df)]
    y = np.vstack([b.rvs(N_PROPOSAL // len(broad), random_state=rng) for b in broad])
    log_q = logsumexp([b.logpdf(y) for b in broad], axis=0) - np.log(len(broad))
    return (np.exp(y), log_q - y.sum(1)) if log else (y, log_q)


@pytest.mark.parametrize("name", HIGHER)
def test_integrates_to_one_by_importance_sampling(name):
    law = DISTRIBUTIONS[name]
    X, log_q = proposal(law, np.random.RandomState(4))
    weight = np.exp(law.log_density(X) - log_q)
    error = weight.std() / np.sqrt(len(weight))
    assert error < 0.03
    assert abs(weight.mean() - 1.0) < 4 * error


@pytest.mark.parametrize("name", HIGHER)
def test_density_matches_the_sampler(name):
    """E_p[q / p] = 1 for a second normalised q, with X from the law's own sampler.

    Together with the integral of p against a proposal this would fail for a sampler that puts
    its mass elsewhere. Here q is the law itself moved by a little in each direction.
    """
    law = DISTRIBUTIONS[name]
    X = law.sample(20_000, random_state=5)
    log_p = law.log_density(X)
    assert np.isfinite(log_p).all()
    rng = np.random.RandomState(6)
    for _ in range(5):
        direction = rng.standard_normal(law.n_features)
        if law.name == "funnel":  # move the head and scale the others with it
            step = 0.2 * direction[0]
            Y = np.column_stack([X[:, 0] + step, X[:, 1:] * np.exp(step / 2)])
            log_jacobian = (law.n_features - 1) * step / 2
        elif law.name == "gamma_copula":  # scale, which keeps the support
            Y, log_jacobian = X * np.exp(0.1 * direction), 0.1 * direction.sum()
        else:
            Y, log_jacobian = X + 0.1 * direction, 0.0
        ratio = np.exp(law.log_density(Y) + log_jacobian - log_p)
        assert abs(ratio.mean() - 1.0) < 4 * ratio.std() / np.sqrt(len(ratio))


def test_closed_form_entropies_and_moments():
    n = 40_000
    # Entropy of the Gaussian laws: minus the mean log-density of their own rows.
    X, log_p = datasets.make_sheared_gaussian(n, random_state=0, return_log_density=True)
    assert log_p.mean() == pytest.approx(-10 * np.log(2 * np.pi * np.e), abs=4 * np.sqrt(10 / n))
    assert X[:, -1].var() == pytest.approx(20.0, rel=0.05)
    X, log_p = datasets.make_funnel(n, random_state=0, return_log_density=True)
    entropy = 5 * np.log(2 * np.pi * np.e)
    assert log_p.mean() == pytest.approx(-entropy, abs=4 * log_p.std() / np.sqrt(n))
    # Marginals by Kolmogorov-Smirnov: Student t and gamma.
    X = datasets.make_multivariate_t(n, df=4.0, random_state=0)
    assert min(stats.kstest(x, stats.t(4.0).cdf).pvalue for x in X.T) > 1e-3
    shapes = datasets.GammaCopula().shapes
    X = datasets.make_gamma_copula(n, random_state=0)
    for x, shape in zip(X.T, shapes, strict=True):
        assert stats.kstest(x, stats.gamma(shape).cdf).pvalue > 1e-3


def test_agrees_with_scipy():
    X = DISTRIBUTIONS["multivariate_t"].sample(50, random_state=0)
    shape = 0.7 ** np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    expected = stats.multivariate_t(np.zeros(5), shape, df=3).logpdf(X)
    np.testing.assert_allclose(DISTRIBUTIONS["multivariate_t"].log_density(X), expected, rtol=1e-10)
    law = DISTRIBUTIONS["gaussian_mixture"]
    X, parts = law.sample(50, random_state=0), law._mixture
    expected = logsumexp(
        [
            np.log(w) + stats.multivariate_normal(m, f @ f.T).logpdf(X)
            for w, m, f in zip(parts.weights, parts.means, parts.factors, strict=True)
        ],
        axis=0,
    )
    np.testing.assert_allclose(law.log_density(X), expected, rtol=1e-9)


def test_zero_density_outside_the_support():
    assert DISTRIBUTIONS["checkerboard"].log_density([[0.5, -0.5], [2.5, 0.5]]).max() == -np.inf
    assert DISTRIBUTIONS["gamma_copula"].log_density([[-1.0, 1, 1, 1, 1]])[0] == -np.inf
    far = DISTRIBUTIONS["gamma_copula"].log_density([[1e-12] * 5, [600.0] * 5])
    assert np.isfinite(far).all()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_reproducible_and_make_agrees(name):
    law = DISTRIBUTIONS[name]
    X = law.sample(100, random_state=7)
    assert X.shape == (100, law.n_features)
    assert X.dtype == np.float64
    np.testing.assert_array_equal(X, law.sample(100, random_state=7))
    assert not np.array_equal(X, law.sample(100, random_state=8))

    make = getattr(datasets, f"make_{name}")
    Y, log_p = make(100, random_state=7, return_log_density=True)
    np.testing.assert_array_equal(X, Y)
    np.testing.assert_array_equal(log_p, law.log_density(X))
    np.testing.assert_allclose(law.log_density(X[:1]), log_p[:1], rtol=1e-12)
    # The two sets of defaults are one, and the docstring names every parameter.
    own = inspect.signature(type(law)).parameters
    for key, parameter in inspect.signature(make).parameters.items():
        assert key in make.__doc__
        if key in own:
            assert parameter.default == own[key].default
    with pytest.raises(ValueError, match="features"):
        law.log_density(np.zeros((3, law.n_features + 1)))


def test_make_functions_are_ordinary_functions():
    assert str(inspect.signature(datasets.make_banana)) == (
        "(n_samples=1000, *, curvature=1.0, noise=0.3, random_state=None, return_log_density=False)"
    )
    assert pickle.loads(pickle.dumps(datasets.make_banana)) is datasets.make_banana
    with pytest.raises(TypeError, match="unexpected keyword argument 'curve'"):
        datasets.make_banana(10, curve=2.0)


def test_parameters_move_the_law():
    X = datasets.make_two_moons(1000, noise=0.01, random_state=0)
    radii = np.hypot(*X.T), np.hypot(X[:, 0] - 1, X[:, 1] - 0.5)
    assert np.min(np.abs(np.subtract(radii, 1)), axis=0).max() < 0.06
    assert datasets.make_gamma_copula(10, shapes=(1.0, 2.0), random_state=0).shape == (10, 2)
    assert datasets.make_funnel(10, n_features=3, random_state=0).shape == (10, 3)
