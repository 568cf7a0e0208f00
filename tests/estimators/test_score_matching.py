"""ScoreMatchingEBM: closed-form scores, mode weights, and what the knobs do."""

import math
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.distributions import Independent, Normal

from skebm import Network, ScoreMatchingEBM
from skebm.datasets import make_two_moons
from skebm.training import acceptance

METHODS = ("exact", "sliced", "denoising")
every_method = pytest.mark.parametrize("method", METHODS)

NETWORK = {"hidden_layer_sizes": (16,), "learning_rate": 0.01, "max_epochs": 30, "batch_size": 128}

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of log Z")


def density(**options):
    """A quick estimator; settings of its network may be given among its parameters."""
    names = options.keys() & Network().get_params()
    settings = NETWORK | {name: options.pop(name) for name in names}
    if "module" in settings:  # has layers of its own
        del settings["hidden_layer_sizes"]
    quick = {"base": "gaussian", "n_members": 2, "random_state": 0}
    return ScoreMatchingEBM(**quick | {"energy_model": Network(**settings)} | options)


def normal(mean, std, d=1):
    """Normal columns as a torch distribution in float64."""
    mean, std = (torch.full((d,), float(v), dtype=torch.float64) for v in (mean, std))
    return Independent(Normal(mean, std), 1)


class Residual(nn.Module):
    """A user's smooth module with a residual sum."""

    def __init__(self, n_features, width=32):
        super().__init__()
        self.first = nn.Linear(n_features, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)

    def forward(self, z):
        h = nn.functional.silu(self.first(z))
        return self.last(h + nn.functional.silu(self.second(h))).squeeze(-1)


class Quartic(nn.Module):
    """A polynomial in every column: what it fits is not a matter of taste."""

    def __init__(self, n_features):
        super().__init__()
        self.last = nn.Linear(4 * n_features, 1)

    def forward(self, z):
        return self.last(torch.cat([(z / 2) ** k for k in (1, 2, 3, 4)], dim=-1))


@cache
def moons():
    return make_two_moons(600, random_state=0)


@cache
def new_moons():
    return make_two_moons(3000, random_state=1)


@cache
def fitted_to_moons(method):
    return density(method=method, max_epochs=60).fit(moons())


@cache
def base_alone():
    return density(energy_model=None).fit(moons())


def gain_over_base(estimator):
    """Mean over new moons, in nats."""
    base = estimator.base_score_samples(new_moons())
    return (estimator.score_samples(new_moons()) - base).mean()


def line(low, high, n=12_001):
    """Cell centres as a column, and the length of a cell."""
    t = np.linspace(low, high, n)
    return t[:, None], t[1] - t[0]


# ---------------------------------------------------------------------- scores in closed form


def score_problem(name, d):
    """Independent rows, the distribution of a column, its score, and a base that is not right."""
    rng = np.random.default_rng(0)
    if name == "gamma":
        truth = stats.gamma(4.0, scale=0.5)
        return rng.gamma(4.0, 0.5, (5000, d)), truth, lambda x: 3.0 / x - 2.0, "gaussian"
    truth = stats.norm(1.0, 2.0)
    return rng.normal(1.0, 2.0, (5000, d)), truth, lambda x: (1.0 - x) / 4.0, normal(0.0, 4.0, d)


@pytest.mark.filterwarnings("ignore:recalibration=False")
@pytest.mark.parametrize("name", ["normal", "gamma"])
@every_method
def test_score_in_closed_form(name, method):
    # in one column random directions are no different from the exact method
    d = 2 if method == "sliced" else 1
    X, truth, score, base = score_problem(name, d)
    x = np.repeat(truth.ppf(np.linspace(0.05, 0.95, 1001))[:, None], d, axis=1)

    def relative_error(**options):
        """Root mean square over the bulk, on that of the score itself."""
        gap = density(base=base, **options).fit(X).stein_score(x) - score(x)
        return math.sqrt(np.mean(gap**2) / np.mean(score(x) ** 2))

    assert relative_error(energy_model=None) > 0.4
    # the temperature that is best for the likelihood is not always best for the score
    options = {"recalibration": False, "n_projections": 2}
    settings = {"module": Quartic, "learning_rate": 0.05, "batch_size": 256, "max_epochs": 25}
    assert relative_error(method=method, **options, **settings) < 0.1


# ---------------------------------------------------------------------- weights of modes


FAR_LEFT, FAR_RIGHT = -4.0, 5.0


def far_apart(weights):
    """A fitted mixture of two normal distributions nine standard deviations apart."""
    mixture = GaussianMixture(2)
    mixture.weights_, mixture.means_ = np.array(weights), np.array([[FAR_LEFT], [FAR_RIGHT]])
    mixture.covariances_ = mixture.precisions_cholesky_ = np.ones((2, 1, 1))
    mixture.n_features_in_ = 1
    return mixture


@cache
def far_rows():
    rng = np.random.default_rng(0)
    means = np.repeat([FAR_LEFT, FAR_RIGHT], [800, 200])
    return rng.permutation(rng.normal(means, 1.0))[:, None]


def left_mass(estimator):
    t, dt = line(-40.0, 40.0)
    p = np.exp(estimator.score_samples(t)) * dt
    return p[t[:, 0] < 0.5].sum() / p.sum()


def fit_to_modes(weights, method, **options):
    options = {"base": far_apart(weights), "max_epochs": 15} | options
    return density(method=method, **options).fit(far_rows())


@every_method
def test_right_mode_weights_stay(method):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights of separate modes")
        assert left_mass(fit_to_modes((0.8, 0.2), method)) == pytest.approx(0.8, abs=0.03)


@every_method
def test_wrong_mode_weights_are_recalibrated(method, monkeypatch):
    # the masses of bins, which would be mended even then, are another matter
    monkeypatch.setattr(acceptance, "misplaced_bin", lambda task, pool_tilt: None)
    with pytest.warns(UserWarning, match="recalibration=False.*weights of separate modes") as seen:
        plain = fit_to_modes((0.5, 0.5), method, recalibration=False)
    assert seen[0].filename == __file__
    recalibrated = fit_to_modes((0.5, 0.5), method)
    assert plain.n_iter_ > 0
    # score matching alone does not see them
    assert abs(left_mass(plain) - 0.8) > 0.1
    assert left_mass(recalibrated) == pytest.approx(0.8, abs=0.03)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="recalibration=False"):
        by_bins = fit_to_modes((0.5, 0.5), method, recalibration=False)
    assert left_mass(by_bins) == pytest.approx(0.8, abs=0.03)


def test_without_a_base_it_warns_and_is_normalised():
    with pytest.warns(UserWarning, match="base=None.*weights of separate modes") as seen:
        estimator = density(base=None, max_epochs=20, learning_rate="auto").fit(far_rows())
    assert seen[0].filename == __file__
    t, dt = line(-60.0, 60.0)
    # the confining distribution: three standard deviations of the column
    confining = stats.norm(far_rows().mean(), 3.0 * far_rows().std())
    np.testing.assert_allclose(
        estimator.base_score_samples(t), confining.logpdf(t[:, 0]), atol=1e-6
    )
    total = np.exp(estimator.score_samples(t)).sum() * dt
    # standard error of log of the integral of the mean of the members, at most
    error = math.sqrt(np.square(estimator.log_partition_std_error_).sum()) / estimator.n_members
    assert abs(math.log(total)) < 4.0 * error
    assert estimator.score(far_rows()) > confining.logpdf(far_rows()).mean() + 0.5


# ---------------------------------------------------------------------- a density


@every_method
def test_moons_are_learned(method):
    estimator = fitted_to_moons(method)
    assert estimator.method_ == method
    assert gain_over_base(estimator) > 0.2


def test_module_of_a_user():
    module = Residual(2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for model in (module, Residual):
        estimator = density(module=model, max_epochs=40, learning_rate=0.03).fit(moons())
        assert gain_over_base(estimator) > 0.3
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_kinks_are_told_but_not_for_denoising():
    for method in ("exact", "sliced"):
        with pytest.warns(UserWarning, match=f'has kinks, and method="{method}" does not') as seen:
            density(method=method, embedding="piecewise_linear", max_epochs=1).fit(moons()[:100])
        assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*kinks")
        options = {"embedding": "piecewise_linear", "sigma": 0.2}
        estimator = density(method="denoising", **options).fit(moons())
    assert gain_over_base(estimator) > 0.1


class Kinked(nn.Module):
    """Piecewise-linear activations, as a module and as a function."""

    def __init__(self, n_features):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(n_features, 8), nn.LeakyReLU())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
        self.last = nn.Linear(8, 1)

    def forward(self, z):
        return self.last(nn.functional.relu(self.second(self.first(z)))).squeeze(-1)


def test_piecewise_linear_activations_are_named():
    def fit(method, module):
        density(method=method, module=module, max_epochs=1).fit(moons()[:100])

    for method in ("exact", "sliced"):
        for module in (Kinked, Kinked(2)):
            with pytest.warns(UserWarning, match="piecewise linear") as seen:
                fit(method, module)
            ours = [w for w in seen if "piecewise linear" in str(w.message)]
            assert {w.filename for w in ours} == {__file__}
            for name, warning in zip(("leaky_relu", "relu"), ours, strict=True):
                assert f"energy_model calls {name}," in str(warning.message)
                assert 'SiLU or softplus, or method="denoising"' in str(warning.message)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*kinks")
        for module in (Kinked, Kinked(2)):
            fit("denoising", module)
        for method in ("exact", "sliced"):
            fit(method, Residual)


# ---------------------------------------------------------------------- options


def test_auto_is_exact_up_to_ten_columns():
    rng = np.random.default_rng(0)
    for d, expected in ((2, "exact"), (10, "exact"), (12, "sliced")):
        estimator = density(max_epochs=1).fit(rng.normal(size=(60, d)))
        assert estimator.method_ == expected
        assert estimator.sigma_ == pytest.approx([0.2 * 60 ** (-1 / (d + 4))])
    # constant columns do not count
    X = np.c_[rng.normal(size=(60, 10)), np.ones((60, 3))]
    assert density(max_epochs=1).fit(X).method_ == "exact"


@pytest.mark.parametrize("sigma", [0, 0.3, [0.1, 0.5], np.geomspace(0.05, 0.4, 4)])
@every_method
def test_sigma(sigma, method):
    estimator = density(method=method, sigma=sigma, max_epochs=15, batch_size=64)
    if method == "denoising" and np.ndim(sigma) == 0 and sigma == 0:
        with pytest.raises(ValueError, match='sigma=0 leaves method="denoising" no noise to pred'):
            estimator.fit(moons())
        return
    estimator.fit(moons())
    np.testing.assert_allclose(estimator.sigma_, np.atleast_1d(sigma))
    assert estimator.n_iter_ > 0
    assert gain_over_base(estimator) > 0.05


@pytest.mark.parametrize(
    "sigma", [-0.1, [0.1, 0.0], [0.1, -0.2], [[0.1, 0.2]], [], [0.1, np.nan], [np.inf]]
)
def test_sigma_that_makes_no_sense(sigma):
    estimator = density(sigma=sigma)
    with pytest.raises(ValueError, match="sigma"):
        estimator.fit(moons())
    assert not hasattr(estimator, "model_")


def test_denoising_needs_noise():
    for sigma in (0.0, [0.0]):
        with pytest.raises(ValueError, match="sigma=0 leaves"):
            density(method="denoising", sigma=sigma).fit(moons())


def test_directions_of_sliced():
    scores = {}
    for n in (1, 2, 4):
        estimator = density(method="sliced", n_projections=n, max_epochs=15, batch_size=64)
        scores[n] = estimator.fit(moons()).score_samples(new_moons())
        assert scores[n].mean() > base_alone().score(new_moons()) + 0.05
    for a, b in ((1, 2), (2, 4), (1, 4)):
        assert np.abs(scores[a] - scores[b]).max() > 1e-3


@pytest.mark.filterwarnings("ignore:recalibration=False")
@pytest.mark.parametrize("method", ["exact", "denoising"])
def test_smoothing_by_the_noise_is_taken_out(method):
    """Data N(0, 1), base N(0, 1.3^2), sigma = .5: the limit is a normal distribution, too."""
    X = np.random.default_rng(0).normal(size=(4000, 1))
    truth, wide = stats.norm(X.mean(), X.std()), 1.69
    # sigma is in units of z, whose distribution function is that of X smoothed by Silverman's rule
    noise = 0.25 * (X.var() + (0.9 * X.std() * len(X) ** -0.2) ** 2)
    corrected = 1.0 / (1.0 / wide + 1.0 / (X.var() + noise) - 1.0 / (wide + noise))
    estimator = density(
        method=method, sigma=0.5, recalibration=False, base=normal(0.0, 1.3), module=Quartic,
        batch_size=256, max_epochs=60, patience=None, learning_rate=0.02,
    ).fit(X)  # fmt: skip
    assert estimator.n_iter_ == 60
    bulk = np.linspace(-1.6, 1.6, 101)
    slope = estimator.stein_score(bulk[:, None])[:, 0] @ bulk / (bulk @ bulk)
    assert -1.0 / slope == pytest.approx(corrected, abs=0.05)
    t, dt = line(-9.0, 9.0, 4001)

    def divergence(log_density):
        return (truth.pdf(t[:, 0]) * (truth.logpdf(t[:, 0]) - log_density)).sum() * dt

    smoothed = stats.norm(X.mean(), math.sqrt(X.var() + noise)).logpdf(t[:, 0])
    assert divergence(estimator.score_samples(t)) < 0.7 * divergence(smoothed)


# ---------------------------------------------------------------------- training


def test_early_stopping_is_by_likelihood():
    """Long training on few rows: the loss goes on falling where the likelihood does, too."""
    options = {"max_epochs": 80, "patience": 80, "hidden_layer_sizes": (64,), "batch_size": 32,
               "learning_rate": 2e-3, "sigma": 0}  # fmt: skip
    X = moons()[:400]
    estimator = density(**options).fit(X)
    history = estimator.history_
    assert set(history) == {"n_iter", "held_out_log_likelihood", "train_loss"}
    level = history["held_out_log_likelihood"]
    best = np.nanargmax(level)
    assert estimator.n_iter_ == history["n_iter"][best]
    assert 0 < best < len(level) - 20
    loss = history["train_loss"]
    assert np.mean(loss[-5:]) < 2.0 * np.mean(loss[best : best + 5]) < 0.0
    assert np.nanmin(level[best:]) < level[best] - 0.05
    # what is kept is that state, not the last one
    last = density(**options | {"patience": None}).fit(X)
    assert estimator.out_of_fold_scores_.mean() > level[best] - 0.02
    assert estimator.score(new_moons()) > last.score(new_moons())
    assert gain_over_base(estimator) > 0.0


def test_history_begins_at_the_base():
    history = fitted_to_moons("exact").history_
    assert history["n_iter"][0] == 0
    assert history["held_out_log_likelihood"][0] == pytest.approx(
        base_alone().out_of_fold_scores_.mean(), abs=1e-6
    )


def test_no_energy_is_the_base():
    estimator = base_alone()
    assert estimator.n_iter_ == 0
    np.testing.assert_array_equal(
        estimator.score_samples(new_moons()), estimator.base_score_samples(new_moons())
    )
    assert (estimator.log_partition_ == 0).all()
    assert np.isinf(estimator.effective_sample_size_).all()


@every_method
def test_weights_turn_one_mixture_into_another(method):
    rng = np.random.default_rng(0)

    def rows(share, n):
        left = rng.random(n) < share
        return np.where(left, rng.normal(-2.0, 0.5, n), rng.normal(1.0, 0.8, n))[:, None]

    X, new = rows(0.5, 800), rows(0.2, 4000)
    weight = np.where(X[:, 0] < -0.5, 1.0, 4.0)
    estimator = density(method=method, max_epochs=25).fit(X, sample_weight=weight)
    parts = [0.2 * stats.norm(-2.0, 0.5).pdf(new), 0.8 * stats.norm(1.0, 0.8).pdf(new)]
    # without weights it would be at least .19, the divergence of the two mixtures
    assert np.log(sum(parts)).mean() - estimator.score(new) < 0.06


@every_method
def test_ties_are_smeared_out(method):
    X = moons().copy()
    X[:, 0] = np.round(X[:, 0] / 0.1) * 0.1
    estimator = density(method=method, max_epochs=60).fit(X)
    assert np.isfinite(estimator.score_samples(X)).all()
    assert gain_over_base(estimator) > 0.1
    # no spikes at the rounded values: a density about as good as from the rows themselves
    assert estimator.score(new_moons()) > fitted_to_moons(method).score(new_moons()) - 0.15


def test_warm_start_goes_on():
    estimator = density(max_epochs=15, warm_start=True).fit(moons())
    first, base = estimator.score(new_moons()), estimator.base_score_samples(new_moons())
    reached = np.nanmax(estimator.history_["held_out_log_likelihood"])
    estimator.fit(moons())
    again = estimator.history_["held_out_log_likelihood"]
    assert again[0] == pytest.approx(reached, abs=0.03)
    assert estimator.score(new_moons()) > first - 0.03
    np.testing.assert_array_equal(estimator.base_score_samples(new_moons()), base)


@every_method
def test_scores_beside_a_constant_column(method):
    X, rows = moons()[:100], np.insert(moons()[:100], 1, 7.0, axis=1)
    estimator, without = (density(method=method, max_epochs=3).fit(data) for data in (rows, X))
    expected = np.insert(without.stein_score(X), 1, 0.0, axis=1)
    np.testing.assert_allclose(estimator.stein_score(rows), expected)


@every_method
def test_thirty_rows(method):
    estimator = density(method=method).fit(moons()[:30])
    assert np.isfinite(estimator.score_samples(new_moons())).all()
    # f is kept only if it gains: not below the base
    assert gain_over_base(estimator) > -0.05
    assert np.isfinite(estimator.stein_score(new_moons())).all()
