import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from skebm.bases import GaussianMixtureBase, MarginalGaussianization, TransformedBase

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=1000)

COLUMNS = {
    "normal": NORMAL,
    "gamma": RNG.gamma(1.0, size=1000),
    "cauchy": RNG.standard_cauchy(1000),
    "lognormal": np.exp(3 * NORMAL),
    "integers": RNG.poisson(2.0, 1000).astype(float),
    "two values": RNG.integers(0, 2, 1000).astype(float),
    "one row differs": (np.arange(1000) == 3).astype(float),
    "atom": np.where(RNG.random(1000) < 0.9, 0.0, NORMAL),
    "constant": np.full(1000, 0.1),
    "gross outlier": np.r_[NORMAL, 1e9],
    "small atom, far rows": np.r_[np.full(900, 0.1), 1e9 * (1 + np.abs(NORMAL[:100]))],
    "narrow, far rows": np.r_[1e-4 * NORMAL, 1e9, 1e9, 1e9],
    "two modes": np.r_[NORMAL[:300], 100 + NORMAL[300:]],
    "tiny": 1e-6 * NORMAL,
    "offset": 1e4 + NORMAL,
    "three rows": NORMAL[:3],
    "two rows": NORMAL[:2],
    "one row": NORMAL[:1],
}


def fit(column, **options):
    return MarginalGaussianization.fit(np.reshape(column, (len(column), -1)), **options)


def around(column, n=4001, reach=2.0):
    """A grid over the column and far beyond both ends, and the column itself."""
    margin = reach * np.ptp(column) + 1e-3
    grid = np.linspace(column.min() - margin, column.max() + margin, n)
    inner = np.quantile(column, np.linspace(0, 1, n))
    return torch.as_tensor(np.unique(np.r_[grid, inner, column]))[:, None]


@pytest.fixture(params=COLUMNS)
def column(request):
    return COLUMNS[request.param]


@pytest.fixture(params=[1.0, 0.3])
def bandwidth(request):
    return request.param


# ---------------------------------------------------------------- laws of the map, any column


def test_valid_and_silent(column, bandwidth):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g = fit(column, bandwidth=bandwidth)
    for buffer in (g.knots, g.values, g.slopes):
        assert buffer.isfinite().all()
        assert buffer.dtype == torch.float64
    assert (g.knots.diff() > 0).all()
    assert (g.values.diff() > 0).all()
    assert (g.slopes > 0).all()


def test_monotone(column, bandwidth):
    g = fit(column, bandwidth=bandwidth)
    x = around(column)
    z, log_det = g(x)
    assert log_det.isfinite().all()
    assert (z.diff(dim=0) >= 0).all()
    # strictly, wherever floating-point numbers can tell
    expected = log_det[1:].exp() * x[:, 0].diff()
    told = expected > 1e-12 * (1 + z[1:, 0].abs())
    assert told.double().mean() > 0.5
    assert (z[:, 0].diff()[told] > 0).all()


def test_inverse(column, bandwidth):
    g = fit(column, bandwidth=bandwidth)
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)[:, None]
    x = g.inverse(z)
    # rounding x by half a unit in the last place moves z by that times the slope
    rounding = 4 * np.spacing(x.abs().numpy()) * g(x)[1].exp().numpy()[:, None]
    assert (np.abs((g(x)[0] - z).numpy()) <= 1e-10 + rounding).all()
    x = torch.as_tensor(column)[:, None]
    z, log_det = g(x)
    rounding = 8 * np.spacing(1.0 + z.abs().numpy()) / log_det.exp().numpy()[:, None]
    assert (np.abs((g.inverse(z) - x).numpy()) <= 1e-10 * (1 + np.abs(x.numpy())) + rounding).all()


@pytest.mark.parametrize("name", ["normal", "gamma", "integers", "tiny", "two modes"])
def test_inverse_to_ten_digits(name):
    # of ordinary columns, in both directions
    column = COLUMNS[name]
    g, scale = fit(column), column.std()
    x = around(column)
    assert (g.inverse(g(x)[0]) - x).abs().max() < 1e-10 * scale
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)[:, None]
    assert (g(g.inverse(z))[0] - z).abs().max() < 1e-10


def test_jacobian_against_autograd(column, bandwidth):
    g = fit(column, bandwidth=bandwidth)
    knots = g.knots[0, :, None]
    x = torch.cat([around(column, n=301), knots]).requires_grad_(True)
    z, log_det = g(x)
    (slope,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(slope[:, 0], log_det.exp(), rtol=1e-6, atol=0.0)
    # exactly at the knots: the slopes that it was built from
    torch.testing.assert_close(log_det[-len(knots) :].exp(), g.slopes[0], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(z[-len(knots) :, 0], g.values[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["normal", "gamma", "integers", "atom", "two modes"])
def test_jacobian_against_finite_differences(name):
    g = fit(COLUMNS[name])
    width = g.knots.diff().min().item()
    ends = torch.stack([g.knots[0, 0] - 1.0, g.knots[0, -1] + 1.0])
    middle = 0.5 * (g.knots[0, 1:] + g.knots[0, :-1])
    x = torch.cat([g.knots[0], middle, ends])[:, None]
    h = 1e-4 * width
    slope = (g(x + h)[0] - g(x - h)[0])[:, 0] / (2 * h)
    # central differences across a knot see both sides: second derivatives jump there
    torch.testing.assert_close(slope, g(x)[1].exp(), rtol=2e-3, atol=1e-7)
    inside = slice(len(g.knots[0]), None)
    torch.testing.assert_close(slope[inside], g(x)[1].exp()[inside], rtol=1e-5, atol=1e-6)


def test_beyond_the_outer_knots(column):
    # straight lines, or, where the tail is heavier than that of a Gaussian, generalised Pareto
    g = fit(column)
    reach = 10 * (g.knots[0, -1] - g.knots[0, 0])
    for side, sign in ((0, -1.0), (1, 1.0)):
        end = -side
        steps = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
        x = g.knots[0, end] + sign * reach * steps
        z, log_det = g(x[:, None])
        scale, shape = g.tails[0, side].tolist()
        if shape == 0.0:
            expected = g.values[0, end] + g.slopes[0, end] * (x - g.knots[0, end])
            torch.testing.assert_close(z[:, 0], expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(log_det.exp(), g.slopes[0, end].expand(7), rtol=1e-9, atol=0)
        else:
            tail = stats.genpareto(shape, scale=scale)
            start = stats.norm.logsf(abs(g.values[0, end].item()))
            y = reach.item() * steps.numpy()
            np.testing.assert_allclose(
                stats.norm.logsf(sign * z[:, 0].numpy()), start + tail.logsf(y), rtol=1e-9
            )
            density = log_det.numpy() + stats.norm.logpdf(z[:, 0].numpy())
            np.testing.assert_allclose(density, start + tail.logpdf(y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", [stats.t(1), stats.t(2), stats.t(3), stats.lognorm(1)])
def test_far_rows_of_heavy_tails_have_about_their_density(law):
    for seed in (0, 1):
        g = fit(law.rvs(3000, random_state=seed))
        x = law.ppf(1 - 1e-3 * np.linspace(0.01, 1.0, 200))
        z, log_det = g(torch.as_tensor(x)[:, None])
        density = stats.norm.logpdf(z[:, 0].numpy()) + log_det.numpy()
        assert np.abs(density - law.logpdf(x)).mean() < 2.5
        highest = g.inverse(torch.tensor([[stats.norm.isf(1e-4)]], dtype=torch.float64)).item()
        assert 1 / 3 < highest / law.ppf(1 - 1e-4) < 3


def test_light_tails_stay_those_of_a_gaussian():
    rng = np.random.default_rng(0)
    shapes = [fit(rng.normal(size=3000)).tails[..., 1].max().item() for _ in range(10)]
    assert max(shapes) < 0.1
    uniform = fit(rng.uniform(size=3000))
    assert (uniform.tails == 0.0).all()


def test_log_survival_of_the_farthest_rows():
    # far beyond what a double can hold as a probability, both ways, and differentiable
    g = MarginalGaussianization([[-1.0, 1.0]], [[-2.0, 2.0]], [[1.0, 1.0]], [[[1, 0.05], [1, 0.5]]])
    x = torch.tensor([[-1e80], [-1e30], [-50.0], [1e3], [1e100], [1e290]], dtype=torch.float64)
    x.requires_grad_(True)
    z, log_det = g(x)
    expected = stats.norm.logsf(2.0) - np.log1p([5e78, 5e28, 2.45, 499.5, 5e99, 5e289]) / np.array(
        [0.05] * 3 + [0.5] * 3
    )
    np.testing.assert_allclose(stats.norm.logsf(z.detach().abs()[:, 0]), expected, rtol=1e-9)
    torch.testing.assert_close(g.inverse(z.detach()), x.detach(), rtol=1e-9, atol=0.0)
    (slope,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(slope[:, 0].log(), log_det, rtol=1e-9, atol=1e-9)


def test_gradient_of_the_jacobian_is_finite(column):
    g = fit(column)
    x = torch.cat([around(column, n=301), g.knots.mT]).requires_grad_(True)
    (gradient,) = torch.autograd.grad(g(x)[1].sum(), x)
    assert gradient.isfinite().all()


# ---------------------------------------------------------------- what it is for


@pytest.mark.parametrize("name", ["normal", "gamma", "cauchy", "offset", "tiny", "gross outlier"])
def test_columns_become_standard_normal(name):
    column = COLUMNS[name]
    z = fit(column)(torch.as_tensor(column)[:, None])[0][:, 0].numpy()
    # kernels blur the edge of a gamma law
    assert stats.kstest(z, "norm").statistic < (0.08 if name == "gamma" else 0.03)
    assert np.std(z) == pytest.approx(1.0, abs=0.1)


def test_narrow_kernels_follow_two_modes_that_wide_ones_blur():
    column = COLUMNS["two modes"]
    x = torch.as_tensor(column)[:, None]
    distance = [
        stats.kstest(fit(column, bandwidth=b)(x)[0][:, 0], "norm").statistic for b in (0.01, 1.0)
    ]
    assert distance[0] < 0.03 < distance[1]


def test_knots_lie_on_the_smoothed_distribution_function():
    column, bandwidth, n = COLUMNS["gamma"], 0.7, 1000
    g = fit(column, bandwidth=bandwidth)
    iqr = np.subtract(*np.quantile(column, [0.75, 0.25], method="hazen")) / (
        2 * stats.norm.ppf(0.75)
    )
    width = bandwidth * 0.9 * min(column.std(), iqr) * n**-0.2
    smooth = stats.norm.cdf((g.knots[0].numpy()[:, None] - column) / width).mean(1)
    np.testing.assert_allclose(g.values[0], stats.norm.ppf(smooth), atol=1e-6)


def test_does_not_depend_on_units():
    column = COLUMNS["gamma"]
    z = fit(column)(torch.as_tensor(column)[:, None])[0]
    moved = 1000 * column - 7
    torch.testing.assert_close(fit(moved)(torch.as_tensor(moved)[:, None])[0], z, atol=1e-7, rtol=0)


def test_columns_do_not_mix():
    x = np.column_stack([COLUMNS["normal"], COLUMNS["gamma"], COLUMNS["cauchy"]])
    g = MarginalGaussianization.fit(x)
    assert g.n_features == 3
    z, log_det = g(torch.as_tensor(x))
    assert z.shape == (1000, 3)
    singles = [fit(column)(torch.as_tensor(column)[:, None]) for column in x.T]
    torch.testing.assert_close(z, torch.cat([s[0] for s in singles], dim=1))
    torch.testing.assert_close(log_det, sum(s[1] for s in singles))
    torch.testing.assert_close(g.inverse(z), torch.as_tensor(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["normal", "gamma", "cauchy", "integers", "two modes"])
def test_density_integrates_to_one(name, bandwidth):
    column = COLUMNS[name]
    g = fit(column, bandwidth=bandwidth)
    base = TransformedBase(g, GaussianMixtureBase([1.0], [[0.0]], [[[1.0]]]))

    knots = g.knots[0].numpy()
    outer = g.inverse(torch.linspace(-10.0, 10.0, 81, dtype=torch.float64)[:, None])[:, 0].tolist()
    # Gauss-Legendre piece by piece: the density is smooth inside of each
    edges = np.unique(np.r_[outer, knots])
    nodes, weights = np.polynomial.legendre.leggauss(60)
    x = 0.5 * np.diff(edges)[:, None] * nodes + 0.5 * (edges[1:] + edges[:-1])[:, None]
    density = base.log_prob(torch.as_tensor(x.reshape(-1, 1))).exp().numpy().reshape(x.shape)
    pieces = density @ weights * 0.5 * np.diff(edges)
    assert pieces.sum() == pytest.approx(1.0, abs=1e-6)
    z = g(torch.as_tensor(edges)[:, None])[0][:, 0].numpy()
    np.testing.assert_allclose(pieces, np.diff(stats.norm.cdf(z)), atol=1e-6)


# ---------------------------------------------------------------- weights, copies


def test_equal_weights_are_no_weights():
    column = COLUMNS["gamma"]
    weighted = fit(column, sample_weight=np.full(1000, 3.0))
    torch.testing.assert_close(weighted.knots, fit(column).knots)
    torch.testing.assert_close(weighted.values, fit(column).values)


@pytest.mark.parametrize("name", ["normal", "gamma"])
def test_weights_are_repetition(name):
    # not to the last digit: the effective number of rows sets the kernel width
    column = COLUMNS[name]
    times = np.where(column > np.median(column), 4, 1)
    grid = torch.as_tensor(np.quantile(column, np.linspace(0.02, 0.98, 50)))[:, None]
    weighted = fit(column, sample_weight=times.astype(float))(grid)[0]
    repeated = fit(np.repeat(column, times))(grid)[0]
    plain = fit(column)(grid)[0]
    assert (weighted - repeated).abs().max() < 0.08
    assert (plain - repeated).abs().mean() > 0.3


def test_rows_of_no_weight_leave_no_trace():
    column = np.r_[NORMAL, 50 + NORMAL]
    weight = np.r_[np.ones(1000), np.zeros(1000)]
    grid = torch.linspace(-2, 2, 50, dtype=torch.float64)[:, None]
    weighted, plain = fit(column, sample_weight=weight), fit(NORMAL)
    assert (weighted(grid)[0] - plain(grid)[0]).abs().max() < 0.02


def test_pickle():
    g = fit(COLUMNS["gamma"])
    x = torch.as_tensor(COLUMNS["gamma"])[:, None]
    assert torch.equal(pickle.loads(pickle.dumps(g))(x)[0], g(x)[0])


def test_input_is_not_changed():
    x = np.column_stack([COLUMNS["gamma"]])
    before = x.copy()
    MarginalGaussianization.fit(x)
    np.testing.assert_array_equal(x, before)
