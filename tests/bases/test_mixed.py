"""Mixtures and kernel densities of rows with states and values."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from skebm._layout import Layout
from skebm.bases import (
    GaussianMixtureBase,
    KernelDensityBase,
    MarginalGaussianization,
    MixedKernelBase,
    MixedMixtureBase,
    StackedBase,
    TransformedBase,
    ValuesTransform,
    fit_gaussian_mixture,
    fit_mixed_mixture,
    marginal,
    values_given_states,
)

LAYOUT = Layout([3, 2], [-1, 0], 2)
"""A category, a number that may be missing, and one that may not."""

MASSES = [[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], [[0.8, 0.2], [0.4, 0.6]]]
MEANS = [[0.0, 1.0], [3.0, -1.0]]
FULL = [[[1.0, 0.5], [0.5, 1.0]], [[0.5, -0.2], [-0.2, 0.3]]]
DIAGONAL = [[[1.0, 0.0], [0.0, 0.7]], [[0.5, 0.0], [0.0, 0.3]]]


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def mixture(covariances=FULL):
    masses = [doubles(m) for m in MASSES]
    parameters = (doubles(a) for a in (MEANS, covariances))
    return MixedMixtureBase(LAYOUT, doubles([0.4, 0.6]), masses, *parameters)


def kernel():
    centers = mixture().sample(30, torch.Generator().manual_seed(1))
    weights = torch.arange(1.0, 31.0).double()
    mean, spread = doubles([1.0, 0.0]), doubles([1.5, 1.2])
    return MixedKernelBase(LAYOUT, centers, 0.4, 0.2, mean, spread, weights)


def gaussianized():
    rows = mixture().sample(500, torch.Generator().manual_seed(2))
    transform = MarginalGaussianization.fit(LAYOUT.values(rows).numpy())
    mapped = ValuesTransform(LAYOUT, transform)
    base = fit_mixed_mixture(mapped(rows)[0], LAYOUT, 2, torch.Generator().manual_seed(0))
    return TransformedBase(mapped, base)


DISTRIBUTIONS = {
    "mixture": mixture,
    "diagonal": lambda: mixture(DIAGONAL),
    "kernel": kernel,
    "gaussianized": gaussianized,
    "stack": lambda: StackedBase([mixture(), kernel()], [0.3, 0.7]),
}


@pytest.fixture(params=DISTRIBUTIONS)
def distribution(request):
    with torch.no_grad():
        yield DISTRIBUTIONS[request.param]()


def rows_of(codes, values):
    values = values.clone()
    if codes[1]:
        values[:, 0] = torch.nan
    return torch.cat([doubles(codes).expand(len(values), -1), values], dim=1)


def test_values_given_states(distribution):
    """Their moments are those of the conditional densities, by quadrature."""
    grid = torch.linspace(-14.0, 16.0, 601).double()
    patterns = torch.tensor(list(product(range(3), (1, 0))))  # first one without a value
    points = torch.quasirandom.SobolEngine(3, scramble=True, seed=0).draw(2**12).double()
    points = points.clamp(1e-9, 1 - 1e-9)
    values, index = values_given_states(distribution, patterns, points)
    for codes, own in zip(patterns.tolist(), index, strict=True):
        drawn = values[own]
        if codes[1]:
            at, drawn = torch.stack([torch.zeros_like(grid), grid], dim=1), drawn[:, 1:]
        else:
            at = torch.cartesian_prod(grid, grid)
        share = distribution.log_prob(rows_of(codes, at)).softmax(0)
        at = at[:, -drawn.shape[1] :]
        for moment in (torch.sin, torch.square):
            known = share @ moment(at)
            spread = (share @ (moment(at) - known).square()).sqrt()
            torch.testing.assert_close(
                (moment(drawn).mean(0) - known) / spread, torch.zeros_like(known), atol=0.02, rtol=0
            )
    for i in (4, 5):
        alone, place = values_given_states(distribution, patterns[i : i + 1], points)
        torch.testing.assert_close(alone[place[0]], values[index[i]], atol=1e-12, rtol=0)


def test_sums_and_integrals_are_one(distribution):
    grid = torch.linspace(-14.0, 16.0, 601).double()
    step, total = 0.05, 0.0
    for codes in product(range(3), range(2)):
        if codes[1]:
            values = torch.stack([torch.zeros_like(grid), grid], dim=1)
            cell = step
        else:
            values, cell = torch.cartesian_prod(grid, grid), step**2
        total += distribution.log_prob(rows_of(codes, values)).exp().sum().item() * cell
    assert total == pytest.approx(1.0, abs=2e-3)


def test_draws_agree_with_the_density(distribution):
    n = 40_000
    x = distribution.sample(n, torch.Generator().manual_seed(0))
    assert bool((x[:, 2].isnan() == (x[:, 1] == 1)).all())
    assert not x[:, 3].isnan().any()
    for codes in product(range(3), range(2)):
        shown = ((x[:, 0] == codes[0]) & (x[:, 1] == codes[1])).double().mean().item()
        mass = marginal(distribution, [0, 1]).log_prob(doubles([codes])).exp().item()
        assert shown == pytest.approx(mass, abs=5 * (mass / n) ** 0.5 + 1e-9)
    # the distribution function of the values that no state switches
    values = np.sort(x[:, 3].numpy())
    grid = torch.linspace(-14.0, 16.0, 6001).double()
    density = marginal(distribution, [3]).log_prob(grid[:, None]).exp()
    cdf = np.interp(values, grid.numpy(), np.cumsum(density.numpy()) * 0.005)
    assert stats.kstest(cdf, "uniform").pvalue > 1e-3


def test_marginals_are_sums_and_integrals(distribution):
    grid = torch.linspace(-14.0, 16.0, 3001).double()
    kept = [1, 2]
    given = rows_of((0, 0), doubles([[0.4, 0.0]]))
    total = 0.0
    for code in range(3):
        rows = given.repeat(len(grid), 1)
        rows[:, 0], rows[:, 3] = code, grid
        total += distribution.log_prob(rows).exp().sum().item() * 0.01
    found = marginal(distribution, kept).log_prob(given[:, kept]).exp().item()
    assert found == pytest.approx(total, rel=2e-3)


def test_the_mixture_is_a_sum_of_products():
    x = torch.cat(
        [rows_of(c, doubles([[0.3, -0.5], [2.0, 1.0]])) for c in product(range(3), (0, 1))]
    )
    expected = []
    for row in x.numpy():
        total = 0.0
        for k, weight in enumerate([0.4, 0.6]):
            there = ~np.isnan(row[2:])
            mean, covariance = np.array(MEANS[k])[there], np.array(FULL[k])[there][:, there]
            density = stats.multivariate_normal(mean, covariance).pdf(row[2:][there])
            total += weight * MASSES[0][k][int(row[0])] * MASSES[1][k][int(row[1])] * density
        expected.append(np.log(total))
    np.testing.assert_allclose(mixture().log_prob(x), expected, atol=1e-12)


def test_the_kernel_density_is_a_sum_over_centres():
    q = kernel()
    x = mixture().sample(20, torch.Generator().manual_seed(5))
    centers, weights = q.centers.numpy(), q.weights.numpy()
    expected = []
    for row in x.numpy():
        total = 0.0
        for center, weight in zip(centers, weights, strict=True):
            for i, size in enumerate(LAYOUT.sizes):
                same = row[i] == center[i]
                weight *= 1 - 0.2 * (size - 1) / size if same else 0.2 / size
            for j, (mean, spread) in enumerate([(1.0, 1.5), (0.0, 1.2)]):
                v, c = row[2 + j], center[2 + j]
                if not np.isnan(v):
                    around = (mean, spread) if np.isnan(c) else (c, 0.4 * spread)
                    weight *= stats.norm(*around).pdf(v)
            total += weight
        expected.append(np.log(total))
    np.testing.assert_allclose(q.log_prob(x), expected, atol=1e-10)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_known_mixture_is_found(diagonal):
    truth = mixture(DIAGONAL if diagonal else FULL)
    x = truth.sample(6_000, torch.Generator().manual_seed(0))
    options = {"diagonal": diagonal, "tol": 1e-7, "max_iter": 300}
    found = fit_mixed_mixture(x, LAYOUT, 2, torch.Generator().manual_seed(1), **options)
    order = found.means[:, 0].argsort()
    np.testing.assert_allclose(found.weights[order], truth.weights, atol=0.03)
    np.testing.assert_allclose(found.means[order], truth.means, atol=0.1)
    np.testing.assert_allclose(found.covariances[order], truth.covariances, atol=0.1)
    for own, known in zip(found.masses, truth.masses, strict=True):
        np.testing.assert_allclose(own[order], known, atol=0.03)


def test_absent_values_are_integrated_out_and_not_filled_in():
    """A Gaussian whose second value is missing at random: the likelihood has a known maximum."""
    rng = np.random.default_rng(0)
    z = rng.multivariate_normal([1.0, -2.0], [[1.0, 0.8], [0.8, 2.0]], 4_000)
    layout = Layout([2], [1], 2)
    codes = (rng.random(4_000) < 0.5).astype(float)
    z[codes == 1, 1] = np.nan
    x = torch.from_numpy(np.c_[codes, z])
    options = {"tol": 1e-10, "max_iter": 500, "prior_strength": 1e-6}
    found = fit_mixed_mixture(x, layout, 1, torch.Generator().manual_seed(0), **options)
    # maximum likelihood by regression of the second on the first (Little & Rubin, 7.2)
    there = codes == 0
    first = z[:, 0]
    slope = np.cov(first[there], z[there, 1], bias=True)
    beta = slope[0, 1] / slope[0, 0]
    mean = z[there, 1].mean() + beta * (first.mean() - first[there].mean())
    rest = slope[1, 1] - beta * slope[0, 1]
    variance = rest + beta**2 * first.var()
    np.testing.assert_allclose(found.means[0], [first.mean(), mean], atol=1e-4)
    expected = [[first.var(), beta * first.var()], [beta * first.var(), variance]]
    np.testing.assert_allclose(found.covariances[0], expected, atol=1e-4)


def test_without_states_it_is_the_gaussian_mixture():
    x = GaussianMixtureBase([0.5, 0.5], MEANS, FULL).sample(800, torch.Generator().manual_seed(0))
    plain = fit_gaussian_mixture(x, 2, torch.Generator().manual_seed(3))
    mixed = fit_mixed_mixture(x, Layout([], [], 2), 2, torch.Generator().manual_seed(3))
    np.testing.assert_allclose(mixed.log_prob(x), plain.log_prob(x), atol=1e-3)


def test_every_state_has_a_mass_though_no_row_shows_it():
    values = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.zeros(50, 1), values], dim=1).double()
    found = fit_mixed_mixture(x, Layout([3], [-1], 1), 2, torch.Generator().manual_seed(0))
    mass = found.marginal([0]).log_prob(doubles([[0.0], [1.0], [2.0]])).exp()
    assert mass.sum().item() == pytest.approx(1.0)
    assert mass.min() > 1e-4


def test_marginals_of_distributions_of_numbers():
    grid = torch.linspace(-12.0, 12.0, 4_001).double()
    gaussians = GaussianMixtureBase([0.3, 0.7], MEANS, FULL)
    centers = gaussians.sample(40, torch.Generator().manual_seed(0))
    density = KernelDensityBase(centers, 0.5, covariance=doubles(FULL[0]))
    for q in (gaussians, density, StackedBase([gaussians, density], [0.5, 0.5])):
        for kept in (0, 1):
            rows = torch.zeros(len(grid), 2).double()
            rows[:, kept], rows[:, 1 - kept] = 0.7, grid
            total = q.log_prob(rows).exp().sum().item() * 0.006
            found = marginal(q, [kept]).log_prob(doubles([[0.7]])).exp().item()
            assert found == pytest.approx(total, rel=1e-6)


def test_what_has_no_marginals_says_so():
    with pytest.raises(ValueError, match="cannot integrate"):
        marginal(torch.nn.Identity(), [0])


def test_unknown_cells():
    x = doubles(
        [[0, 0, 1.0, 2.0], [-1, 1, np.nan, 2.0], [2, 0, np.nan, 1.0], [1, 1, np.nan, np.nan]]
    )
    expected = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(LAYOUT.unknown(x), np.array(expected, dtype=bool))
