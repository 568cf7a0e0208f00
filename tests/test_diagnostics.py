import sys

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from skebm.diagnostics import (
    _draws,
    _stein,
    effective_sample_size,
    kernel_stein_discrepancy,
    mcse,
    rank_data,
    split_r_hat,
    summarize,
    to_datatree,
)
from skebm.samplers import hmc, mala, run

KINDS = ["bulk", "tail", "mean"]
MEASURES = [
    *(lambda x, kind=kind: effective_sample_size(x, kind) for kind in KINDS),
    split_r_hat,
    mcse,
    lambda x: mcse(x, quantile=0.1),
]


def autoregression(n, m, rho, seed=0):
    """Stationary chains of standard normal law, (n, m)."""
    x = np.random.default_rng(seed).normal(size=(n, m))
    for t in range(1, n):
        x[t] = rho * x[t - 1] + np.sqrt(1 - rho**2) * x[t]
    return x


# -- the measures of chains, against ArviZ ----------------------------------------------------

CHAINS = {
    "slow": autoregression(1000, 4, 0.95),
    "antithetic": autoregression(1000, 4, -0.7),
    "independent": np.random.default_rng(1).normal(size=(500, 3)),
    "odd length": autoregression(333, 5, 0.6),
    "one chain": autoregression(500, 1, 0.5),
    "other means": autoregression(400, 4, 0.3) + np.arange(4),
    "other scales": autoregression(400, 4, 0.3) * [1, 1, 1, 5],
    "drift": autoregression(400, 4, 0.3) + np.linspace(0, 2, 400)[:, None],
    "heavy tails": np.random.default_rng(2).standard_cauchy(size=(600, 4)),
    "ties": np.round(autoregression(500, 4, 0.5)),
    "binary": autoregression(500, 4, 0.9) > 1.0,
    "one is stuck": np.where(np.arange(4) == 2, 0.3, autoregression(500, 4, 0.5)),
    "far from zero": 1e6 + autoregression(400, 3, 0.4),
    **{f"{n} draws": autoregression(n, 3, 0.5) for n in range(4, 14)},
}


@pytest.mark.parametrize("name", CHAINS)
def test_measures_are_those_of_arviz(name):
    array_stats = pytest.importorskip("arviz_stats.base").array_stats
    x = CHAINS[name]
    theirs = x.T.astype(np.float64)  # (chain, draw)
    for kind in KINDS:
        options = {"prob": (0.05, 0.95)} if kind == "tail" else {}
        assert effective_sample_size(x, kind) == pytest.approx(
            array_stats.ess(theirs, method=kind, **options), rel=1e-6
        )
    assert mcse(x) == pytest.approx(array_stats.mcse(theirs, method="mean"), rel=1e-6)
    for quantile in (0.1, 0.5):
        assert mcse(x, quantile=quantile) == pytest.approx(
            array_stats.mcse(theirs, method="quantile", prob=quantile), rel=1e-6
        )
    if x.shape[1] > 1:  # for one chain ArviZ has no R-hat
        assert split_r_hat(x) == pytest.approx(array_stats.rhat(theirs, method="rank"), rel=1e-6)


@pytest.mark.parametrize("name", ["slow", "odd length", "ties", "4 draws"])
def test_ranks_are_those_of_arviz(name):
    x, n_bins = CHAINS[name], 10
    below = (x.ravel() < x[..., None]).sum(-1)
    ranks = below + ((x.ravel() == x[..., None]).sum(-1) + 1) / 2  # equal draws share their ranks
    if name != "ties":  # there ArviZ ranks equal draws by their place
        array_stats = pytest.importorskip("arviz_stats.base").array_stats
        np.testing.assert_array_equal(ranks.T, array_stats.compute_ranks(x.T, axis=(0, 1)))
    # a rank r stands for the interval from r - 1 to r; so none falls on the edge of two bins
    expected = [np.histogram(r - 0.5, bins=n_bins, range=(0, x.size))[0] for r in ranks.T]
    result = rank_data(x, n_bins)
    np.testing.assert_array_equal(result.counts, expected)
    assert result.expected == len(x) / n_bins


# -- and against what they should be ----------------------------------------------------------


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5, 0.9])
def test_effective_sample_size_of_an_autoregression(rho):
    n, m = 10_000, 4
    x = autoregression(n, m, rho, seed=3)
    expected = n * m * (1 - rho) / (1 + rho)
    assert effective_sample_size(x, "mean") == pytest.approx(expected, rel=0.1)
    # an increasing function of the draws has the ranks of the draws
    assert effective_sample_size(x) == pytest.approx(effective_sample_size(np.exp(x)))
    assert mcse(x) == pytest.approx(np.sqrt(1 / expected), rel=0.1)


def test_mcse_is_the_spread_of_the_estimates():
    runs = [autoregression(1000, 4, 0.6, seed) for seed in range(100)]
    spread = np.std([x.mean() for x in runs])
    assert np.mean([mcse(x) for x in runs]) == pytest.approx(spread, rel=0.2)
    spread = np.std([np.quantile(x, 0.9) for x in runs])
    assert np.mean([mcse(x, quantile=0.9) for x in runs]) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize(
    "x", [CHAINS[name] for name in ("other means", "other scales", "drift", "one is stuck")]
)
def test_chains_that_disagree_have_a_large_r_hat(x):
    assert split_r_hat(x) > 1.05


def test_ranks_show_which_chain_is_astray():
    counts, expected = rank_data(CHAINS["other means"], n_bins=4)
    assert counts.sum() == 1600
    np.testing.assert_array_equal(counts.sum(0), 400)  # every bin has its share of all draws
    assert counts[0, 0] > 1.5 * expected
    assert counts[3, 3] > 1.5 * expected
    counts, expected = rank_data(CHAINS["other scales"], n_bins=4)
    assert min(counts[3, 0], counts[3, 3]) > 1.4 * expected


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_measures_have_no_unit(unit):
    x = autoregression(200, 4, 0.5)
    for kind in KINDS:
        assert effective_sample_size(unit * x, kind) == pytest.approx(
            effective_sample_size(x, kind)
        )
    assert split_r_hat(unit * x) == pytest.approx(split_r_hat(x))
    assert mcse(unit * x) == pytest.approx(unit * mcse(x))
    assert mcse(unit * x, quantile=0.1) == pytest.approx(unit * mcse(x, quantile=0.1))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9])
def test_a_constant_is_unknown_not_perfect(value):
    x = autoregression(100, 4, 0.5)
    x = np.stack([x, np.full_like(x, value)], axis=-1)
    for measure in MEASURES:
        assert np.isnan(measure(x)).tolist() == [False, True]


def test_stuck_chains():
    x = np.ones((100, 1)) * [0.1, 0.2, 0.3]
    assert split_r_hat(x) == np.inf
    assert effective_sample_size(x) < 4
    assert effective_sample_size(x, "mean") < 4


@pytest.mark.parametrize("measure", [*MEASURES, lambda x: rank_data(x).counts])
def test_columns_containers_and_blocks(measure, monkeypatch):
    x = np.stack([autoregression(101, 3, rho, seed=4) for rho in (0.1, 0.5, 0.9)], axis=-1)
    whole = measure(x)
    single = np.stack([measure(x[:, :, j]) for j in range(3)], axis=-1)
    np.testing.assert_allclose(whole, single, rtol=1e-12)
    tensor = torch.tensor(x, requires_grad=True)
    np.testing.assert_array_equal(measure(tensor), whole)
    np.testing.assert_array_equal(measure(x.tolist()), whole)
    short = tensor.bfloat16()  # which numpy does not know
    np.testing.assert_array_equal(measure(short), measure(short.double()))
    monkeypatch.setattr(_draws, "BLOCK", 100)  # one column at a time
    np.testing.assert_allclose(measure(x), whole, rtol=1e-10)


def test_types_of_results():
    x = autoregression(50, 2, 0.5)
    for measure in MEASURES:
        assert type(measure(x)) is float
        assert measure(x[:, :, None]).shape == (1,)
    assert rank_data(x, 5).counts.shape == (2, 5)
    assert rank_data(x[:, :, None], 5).counts.shape == (2, 5, 1)
    assert effective_sample_size(np.arange(40).reshape(10, 4)) > 0


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.zeros(10), r"samples must have shape .* got \(10,\)"),
        (np.zeros((10, 0)), r"samples must have shape .* got \(10, 0\)"),
        (np.zeros((10, 2, 0)), r"samples must have shape"),
        (np.zeros((3, 2)), "samples must hold at least 4 draws per chain, got 3"),
        ([[0.0], [np.nan], [np.inf], [1.0]], "samples must be finite, but 2 of 4"),
    ],
)
def test_bad_samples_are_named(x, match):
    for measure in [*MEASURES, rank_data, to_datatree]:
        with pytest.raises(ValueError, match=match):
            measure(x)


def test_bad_parameters_are_named():
    x = autoregression(10, 2, 0.5)
    with pytest.raises(ValueError, match="kind must be 'bulk', 'tail' or 'mean', got 'median'"):
        effective_sample_size(x, "median")
    for quantile in (0, 1.0):
        with pytest.raises(ValueError, match="quantile must lie between 0 and 1"):
            mcse(x, quantile=quantile)
    with pytest.raises(ValueError, match="n_bins must be at least 1, got 0"):
        rank_data(x, 0)


# -- runs -------------------------------------------------------------------------------------


def normal_run(kernel=mala, n_keep=200, **options):
    rng = torch.Generator().manual_seed(0)
    return run(
        kernel, torch.randn(4, 3, generator=rng), lambda x: -0.5 * (x**2).sum(1), rng,
        n_steps=400, n_burn_in=100, n_keep=n_keep, step_size=1.0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kernel", [mala, hmc])
def test_summary_of_a_run(kernel):
    result = normal_run(kernel)
    summary = summarize(result)
    assert summary[:3] == (200, 4, 3)
    assert summary.acceptance_rate == result.acceptance_rate
    lowest, highest = summary.acceptance_range
    assert 0.3 < lowest < summary.acceptance_rate < highest < 1
    assert summary.n_diverged == 0
    assert summary.ess_bulk == effective_sample_size(result.samples).min()
    assert summary.ess_tail == effective_sample_size(result.samples, "tail").min()
    assert summary.r_hat == split_r_hat(result.samples).max()
    lines = str(summary).splitlines()
    assert lines[0] == "200 draws x 4 chains x 3 columns"
    assert lines[3] == f"step size    {result.step_size:.3g}"
    assert f"bulk {summary.ess_bulk:,.0f}" in lines[4]


def test_summary_of_a_run_that_kept_too_little():
    with pytest.raises(ValueError, match="run must hold at least 4 draws .* n_keep=2"):
        summarize(normal_run(n_keep=2))


@pytest.mark.parametrize("step_size", [None, torch.tensor([[[0.5]], [[1.0]]])])
def test_summary_prints_any_step_size(step_size):
    text = str(summarize(normal_run()._replace(step_size=step_size)))
    assert ("step size" in text) == (step_size is not None)
    assert step_size is None or "0.5 to 1\n" in text


def test_summary_of_parallel_tempering_has_the_worst_exchange():
    result = normal_run()._replace(swap_rates=torch.tensor([0.5, 0.03]))
    assert summarize(result).swap_rate == pytest.approx(0.03)
    assert "exchanges    0.03 (worst" in str(summarize(result))
    assert "exchanges" not in str(summarize(normal_run()))


# -- ArviZ ------------------------------------------------------------------------------------


def test_datatree_of_a_run():
    pytest.importorskip("arviz_base")
    array_stats = pytest.importorskip("arviz_stats.base").array_stats
    result = normal_run()
    data = to_datatree(result, names=["a", "b", "c"])
    x = data["posterior"]["x"]
    assert x.dims == ("chain", "draw", "feature")
    assert x.feature.values.tolist() == ["a", "b", "c"]
    assert x.dtype == np.float64
    np.testing.assert_array_equal(x.sel(chain=1, feature="b"), result.samples[:, 1, 1])
    stats = data["sample_stats"]
    np.testing.assert_allclose(stats["acceptance_rate"], result.acceptance_rates)
    np.testing.assert_array_equal(stats["n_diverged"], 0)
    theirs = np.moveaxis(x.values, -1, 0)
    np.testing.assert_allclose(
        array_stats.ess(theirs), effective_sample_size(result.samples), rtol=1e-6
    )
    np.testing.assert_allclose(array_stats.rhat(theirs), split_r_hat(result.samples), rtol=1e-6)


def test_datatree_of_arrays():
    pytest.importorskip("arviz_base")
    x = autoregression(20, 3, 0.5)
    data = to_datatree(x)
    assert list(data.children) == ["posterior"]
    np.testing.assert_array_equal(data["posterior"]["x"][:, :, 0], x.T)
    with pytest.raises(ValueError, match="names must hold one name for each of 1 columns, got 2"):
        to_datatree(x, names=["a", "b"])


def test_missing_packages_are_named_with_the_remedy(monkeypatch):
    for package in ("arviz_base", "arviz_stats.base"):
        monkeypatch.setitem(sys.modules, package, None)
    x = autoregression(20, 3, 0.5)
    with pytest.raises(ImportError, match=r'needs arviz-base: pip install "skebm\[arviz\]"'):
        to_datatree(x)
    for measure in (effective_sample_size, mcse):
        with pytest.raises(ImportError, match=r'arviz-stats: pip install "skebm\[diagnostics\]"'):
            measure(x)
    # what the estimators need is there without
    assert split_r_hat(x) > 0.9
    assert rank_data(x).counts.sum() == 60


# -- the kernel Stein discrepancy -------------------------------------------------------------


def normal_score(x):
    return -x


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
@pytest.mark.parametrize("bandwidth", [0.7, 3.0])
def test_stein_kernel_is_what_autograd_says(kernel, bandwidth):
    rng = torch.Generator().manual_seed(0)
    x, y, s, t = torch.randn(4, 3, dtype=torch.float64, generator=rng)
    x, y = x.requires_grad_(), y.requires_grad_()
    r2 = ((x - y) ** 2).sum() / bandwidth**2
    k = (1 + r2) ** -0.5 if kernel == "imq" else (-0.5 * r2).exp()
    of_x, of_y = torch.autograd.grad(k, (x, y), create_graph=True)
    trace = sum(torch.autograd.grad(of_x[i], y, retain_graph=True)[0][i] for i in range(3))
    expected = (s @ t * k + s @ of_y + t @ of_x + trace).item()
    # a second row each, and far from the origin
    rows = [torch.stack([v, 2 * v]).detach().numpy() for v in (x, y, s, t)]
    rows[0], rows[1] = rows[0] + 1e3, rows[1] + 1e3
    u = _stein._stein_kernel(*rows, kernel, bandwidth)
    assert u.shape == (2, 2)
    assert u[0, 0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_stein_discrepancy_is_the_mean_over_pairs(kernel, monkeypatch):
    x = np.random.default_rng(0).normal(size=(2500, 2))  # blocks of 1,024 rows, a rest
    result = kernel_stein_discrepancy(
        x, normal_score, kernel=kernel, bandwidth=1.5, n_bootstrap=3, random_state=0
    )
    u = _stein._stein_kernel(x, x, -x, -x, kernel, 1.5)
    np.fill_diagonal(u, 0.0)
    assert result.statistic == pytest.approx(u.sum() / (2500 * 2499), abs=1e-12)
    signs = _stein._signs(2500, 3, 0.5, np.random.RandomState(0)).astype(np.float64)
    forms = np.einsum("ib,ij,jb->b", signs, u, signs, optimize=True) / (2500 * 2499)
    np.testing.assert_allclose(result.bootstrap, forms[1:], rtol=1e-9)
    assert result.p_value == (1 + (forms[1:] >= result.statistic).sum()) / 4


def p_values(draw, score, n_seeds, **options):
    options = {"n_bootstrap": 200} | options
    return np.array([
        kernel_stein_discrepancy(
            draw(np.random.default_rng(seed)), score, random_state=seed, **options
        ).p_value
        for seed in range(n_seeds)
    ])  # fmt: skip


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_under_the_law_the_mean_is_zero_and_p_values_are_uniform(kernel):
    results = [
        kernel_stein_discrepancy(
            np.random.default_rng(seed).normal(size=(100, 2)), normal_score,
            kernel=kernel, bandwidth=1.5, n_bootstrap=200, random_state=seed,
        )
        for seed in range(400)
    ]  # fmt: skip
    statistics = np.array([result.statistic for result in results])
    assert abs(statistics.mean()) < 4 * statistics.std() / 20
    assert kstest([result.p_value for result in results], "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("transform", "power"),
    [(lambda z: z + 0.3, 0.9), (lambda z: 1.4 * z, 0.7), (lambda z: 0.7 * z, 0.9)],
)
def test_power_against_a_shift_and_wrong_widths(transform, power):
    p = p_values(lambda rng: transform(rng.normal(size=(200, 2))), normal_score, 40)
    assert (p < 0.05).mean() > power


def test_blind_to_the_weights_of_modes():
    def two_modes(share):
        def draw(rng):
            return rng.normal(size=(200, 1)) + np.where(rng.random((200, 1)) < share, 8.0, -8.0)

        return draw

    def score(x):  # of half N(-8, 1), half N(8, 1)
        return 8 * np.tanh(8 * x) - x

    for share in (0.9, 1.0):
        p = p_values(two_modes(share), score, 40, bandwidth=1.0)
        assert (p < 0.05).mean() < 0.2


def test_correlated_draws_need_multipliers_that_are_correlated():
    def rejections(shift=0.0, n_seeds=40, **options):
        def draw(rng):
            return shift + autoregression(500, 1, 0.8, rng)

        p = p_values(draw, normal_score, n_seeds, bandwidth=1.0, n_bootstrap=100, **options)
        return (p < 0.05).mean()

    assert rejections() > 0.4
    assert rejections(change_probability=0.02) < 0.12
    assert rejections(shift=0.8, change_probability=0.02) > 0.8


def test_signs_change_as_often_as_asked():
    signs = _stein._signs(5000, 250, 0.1, np.random.RandomState(0))
    assert set(np.unique(signs)) == {-1, 1}
    assert (signs[1:] != signs[:-1]).mean() == pytest.approx(0.1, abs=0.002)
    assert signs[0].mean() == pytest.approx(0.0, abs=0.2)


def test_stein_discrepancy_takes_tensors_seeds_and_units():
    x = np.random.default_rng(0).normal(size=(50, 2))
    first = kernel_stein_discrepancy(x, -x, n_bootstrap=20, random_state=0)
    assert type(first.statistic) is type(first.p_value) is float
    for again in (
        kernel_stein_discrepancy(x, normal_score, n_bootstrap=20, random_state=0),
        kernel_stein_discrepancy(torch.tensor(x), normal_score, n_bootstrap=20, random_state=0),
    ):
        np.testing.assert_array_equal(again.bootstrap, first.bootstrap)
    # in centimetres rather than metres: the same test
    scaled = kernel_stein_discrepancy(100 * x, -x / 100, n_bootstrap=20, random_state=0)
    assert scaled.p_value == first.p_value
    assert scaled.statistic == pytest.approx(first.statistic / 100**2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": np.zeros(5)}, r"x must have shape \(n, d\), got \(5,\)"),
        ({"x": [[0.0], [np.nan], [1.0]]}, "x must be finite, but 1 of 3"),
        ({"x": np.zeros((1, 1)), "score": np.zeros((1, 1))}, "x must have 2 to 50,000 rows"),
        ({"score": np.zeros((4, 1))}, r"score must have the shape of x, \(3, 1\), got \(4, 1\)"),
        ({"score": lambda x: np.full_like(x, np.inf)}, "score must be finite"),
        ({"kernel": "linear"}, "kernel must be one of .* got 'linear'"),
        ({"bandwidth": "scott"}, "bandwidth must be 'median' or a positive number, got 'scott'"),
        ({"bandwidth": 0.0}, "bandwidth must be"),
        ({"x": np.zeros((3, 1))}, "bandwidth='median' is zero"),
        ({"n_bootstrap": 0}, "n_bootstrap must be at least 1"),
        ({"change_probability": 0.0}, "change_probability must lie in"),
        ({"change_probability": 0.6}, "change_probability must lie in"),
    ],
)
def test_stein_discrepancy_names_what_is_wrong(change, match):
    arguments = {"x": np.arange(3.0)[:, None], "score": np.zeros((3, 1))} | change
    with pytest.raises(ValueError, match=match):
        kernel_stein_discrepancy(**arguments)


def test_stein_discrepancy_refuses_what_would_take_hours():
    with pytest.raises(ValueError, match="got 50,001; the time grows as the square"):
        kernel_stein_discrepancy(np.zeros((50_001, 1)), np.zeros((50_001, 1)))
