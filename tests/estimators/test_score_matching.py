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

from skebm import ScoreMatchingEBM
from skebm.bases import GaussianMixtureBase
from skebm.datasets import make_two_moons
from skebm.estimators._members import Members, make_splits, recalibrate

METHODS = ("exact", "sliced", "denoising")
every_method = pytest.mark.parametrize("method", METHODS)

QUICK = {
    "base": "gaussian", "n_members": 2, "hidden_layer_sizes": (16,), "learning_rate": 0.01,
    "max_epochs": 30, "batch_size": 128, "random_state": 0,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of log Z")


def normal(mean, std):
    """One normal column as a torch distribution in float64."""
    mean, std = (torch.tensor([float(v)], dtype=torch.float64) for v in (mean, std))
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
    return ScoreMatchingEBM(method=method, **QUICK | {"max_epochs": 60}).fit(moons())


def hump_law(shares=(0.5, 0.5)):
    """A normal mixture in one column: density, and rows of it."""
    parts = [stats.norm(-2.0, 0.5), stats.norm(1.0, 0.8)]

    def pdf(t):
        return sum(w * part.pdf(t) for w, part in zip(shares, parts, strict=True))

    def rows(n, seed):
        rng = np.random.default_rng(seed)
        left = rng.random(n) < shares[0]
        return np.where(left, rng.normal(-2.0, 0.5, n), rng.normal(1.0, 0.8, n))[:, None]

    return pdf, rows


def line(low, high, n=12_001):
    """Cell centres as a column, and the length of a cell."""
    t = np.linspace(low, high, n)
    return t[:, None], t[1] - t[0]


def log_partition_error(estimator):
    """Standard error of log of the integral of the mean of the members, at most."""
    return math.sqrt(np.square(estimator.log_partition_std_error_).sum()) / estimator.n_members


# ---------------------------------------------------------------------- scores in closed form


def score_problem(name):
    """Rows, law, its score, and a base that is not right."""
    rng = np.random.default_rng(0)
    if name == "gamma":
        law = stats.gamma(4.0, scale=0.5)
        return rng.gamma(4.0, 0.5, (5000, 1)), law, lambda x: 3.0 / x - 2.0, "gaussian"
    law = stats.norm(1.0, 2.0)
    return rng.normal(1.0, 2.0, (5000, 1)), law, lambda x: -(x - 1.0) / 4.0, normal(0.0, 4.0)


def relative_error(estimator, law, score):
    """Root mean square over the bulk, on that of the score itself."""
    x = law.ppf(np.linspace(0.05, 0.95, 1001))
    gap = estimator.stein_score(x[:, None])[:, 0] - score(x)
    return math.sqrt(np.mean(gap**2) / np.mean(score(x) ** 2))


@pytest.mark.filterwarnings("ignore:recalibration=False")
@pytest.mark.parametrize("name", ["normal", "gamma"])
@every_method
def test_score_in_closed_form(name, method):
    X, law, score, base = score_problem(name)
    estimator = ScoreMatchingEBM(
        method=method, base=base, energy_model=Quartic, n_members=2, max_epochs=40,
        learning_rate=0.03, random_state=0,
        # the temperature that is best for the likelihood is not always best for the score
        recalibration=False,
        # in one column +-1 would be the exact method once more
        projection="gaussian", n_projections=2,
    ).fit(X)  # fmt: skip
    before = ScoreMatchingEBM(base=base, n_members=2, max_epochs=0, random_state=0).fit(X)
    assert relative_error(before, law, score) > 0.4
    assert relative_error(estimator, law, score) < 0.1


# ---------------------------------------------------------------------- weights of modes


FAR_LEFT, FAR_RIGHT = -4.0, 5.0


def far_apart(weights):
    """A fitted mixture of two normal laws nine standard deviations apart."""
    law = GaussianMixture(2)
    law.weights_, law.means_ = np.array(weights), np.array([[FAR_LEFT], [FAR_RIGHT]])
    law.covariances_ = law.precisions_cholesky_ = np.ones((2, 1, 1))
    law.n_features_in_ = 1
    return law


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
    options = QUICK | {"base": far_apart(weights), "method": method} | options
    return ScoreMatchingEBM(**options).fit(far_rows())


@every_method
def test_right_mode_weights_stay(method):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights of separate modes")
        assert left_mass(fit_to_modes((0.8, 0.2), method)) == pytest.approx(0.8, abs=0.03)


@every_method
def test_wrong_mode_weights_are_recalibrated(method):
    with pytest.warns(UserWarning, match="recalibration=False.*weights of separate modes"):
        plain = fit_to_modes((0.5, 0.5), method, recalibration=False)
    recalibrated = fit_to_modes((0.5, 0.5), method)
    assert plain.n_iter_ > 0
    # score matching alone does not see them
    assert abs(left_mass(plain) - 0.8) > 0.1
    assert left_mass(recalibrated) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("n", "d"), [(400, 10), (1000, 20), (4000, 10)])
@pytest.mark.parametrize("seed", [0, 1])
def test_modes_have_not_seen_the_rows_they_are_judged_on(n, d, seed):
    # the base is the truth and f = 0: whatever recalibration adds is an error
    estimator = ScoreMatchingEBM()
    law = GaussianMixtureBase([1.0], torch.zeros(1, d), torch.eye(d)[None])
    generator = torch.Generator().manual_seed(seed)
    x = law.sample(n, generator)
    splits = make_splits(n, 4, 0.1, generator)
    modes = estimator._modes(x, torch.ones(n).double(), n, splits, [law] * 4, generator)
    assert modes is not None
    members = Members(
        x, torch.ones(n).double(), splits, [law] * 4, [law] * 4, torch.nn.Identity(), generator,
        modes=modes,
    )  # fmt: skip
    zero = [torch.zeros(len(held)).double() for _, held in splits]
    _, mode_weights, _ = recalibrate(members, zero, torch.zeros_like(members.pool_log_ratio))
    if len(mode_weights):
        new = law.sample(20_000, generator)
        for mode in modes:
            tilt = mode.responsibilities(new) @ mode_weights
            log_z = torch.logsumexp(
                mode.responsibilities(law.sample(20_000, generator)) @ mode_weights, 0
            ) - math.log(20_000)
            assert tilt.mean() - log_z > -0.02


def test_warning_of_modes_points_at_the_call():
    options = QUICK | {"max_epochs": 1, "recalibration": False}
    with pytest.warns(UserWarning, match="recalibration=False") as seen:
        ScoreMatchingEBM(**options).fit(moons())
    assert seen[0].filename == __file__


def test_without_a_base_it_warns_and_is_normalised():
    options = QUICK | {"base": None, "max_epochs": 20, "learning_rate": "auto"}
    with pytest.warns(UserWarning, match="base=None.*weights of separate modes") as seen:
        estimator = ScoreMatchingEBM(**options).fit(far_rows())
    assert seen[0].filename == __file__
    t, dt = line(-60.0, 60.0)
    # the confining law: three standard deviations of the column
    confining = stats.norm(far_rows().mean(), 3.0 * far_rows().std())
    np.testing.assert_allclose(
        estimator.base_score_samples(t), confining.logpdf(t[:, 0]), atol=1e-6
    )
    total = np.exp(estimator.score_samples(t)).sum() * dt
    assert abs(math.log(total)) < 4.0 * log_partition_error(estimator)
    assert estimator.score(far_rows()) > confining.logpdf(far_rows()).mean() + 0.5


# ---------------------------------------------------------------------- a density


@every_method
def test_integral_is_one_in_one_column(method):
    _, rows = hump_law()
    estimator = ScoreMatchingEBM(method=method, **QUICK).fit(rows(500, 0))
    assert estimator.n_iter_ > 0
    t, dt = line(-15.0, 15.0)
    total = np.exp(estimator.score_samples(t)).sum() * dt
    assert abs(math.log(total)) < 4.0 * log_partition_error(estimator)


@every_method
def test_moons_are_learned(method):
    estimator = fitted_to_moons(method)
    assert estimator.method_ == method
    gain = estimator.score_samples(new_moons()) - estimator.base_score_samples(new_moons())
    assert gain.mean() > 0.2
    # and the integral is one in two columns
    across, up = np.linspace(-7.0, 8.0, 401), np.linspace(-5.0, 5.5, 351)
    points = np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2)
    total = np.exp(estimator.score_samples(points)).sum() * np.diff(across)[0] * np.diff(up)[0]
    assert abs(math.log(total)) < 4.0 * log_partition_error(estimator)
    # the score is the gradient of the log-density
    x, step = new_moons()[:50], 1e-5
    for k in range(2):
        move = step * np.eye(2)[k]
        difference = estimator.score_samples(x + move) - estimator.score_samples(x - move)
        np.testing.assert_allclose(
            estimator.stein_score(x)[:, k], difference / (2 * step), rtol=1e-4, atol=1e-3
        )


def test_module_of_a_user():
    module = Residual(2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for model in (module, Residual):
        options = QUICK | {"max_epochs": 80, "learning_rate": 0.03, "energy_model": model}
        estimator = ScoreMatchingEBM(**options).fit(moons())
        gain = estimator.score_samples(new_moons()) - estimator.base_score_samples(new_moons())
        assert gain.mean() > 0.3
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_kinks_are_told_but_not_for_denoising():
    options = QUICK | {"max_epochs": 1, "energy_model": "mlp"}
    for method in ("exact", "sliced"):
        with pytest.warns(UserWarning, match=f'method="{method}" does not see the kinks') as seen:
            ScoreMatchingEBM(method=method, **options).fit(moons())
        assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*kinks")
        estimator = ScoreMatchingEBM(
            method="denoising", **options | {"max_epochs": 60}, sigma=0.2
        ).fit(moons())
    assert estimator.score(new_moons()) > estimator.base_score_samples(new_moons()).mean() + 0.1


class Kinked(nn.Module):
    """Piecewise-linear activations, as a module and as a function."""

    def __init__(self, n_features):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(n_features, 8), nn.LeakyReLU())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
        self.last = nn.Linear(8, 1)

    def forward(self, z):
        return self.last(nn.functional.relu(self.second(self.first(z)))).squeeze(-1)


@pytest.mark.parametrize("model", [Kinked, Kinked(2)])
def test_piecewise_linear_activations_are_named(model):
    options = QUICK | {"max_epochs": 1, "energy_model": model}
    for method in ("exact", "sliced"):
        with pytest.warns(UserWarning, match="piecewise linear") as seen:
            ScoreMatchingEBM(method=method, **options).fit(moons())
        ours = [w for w in seen if "piecewise linear" in str(w.message)]
        assert {w.filename for w in ours} == {__file__}
        for name, warning in zip(("leaky_relu", "relu"), ours, strict=True):
            assert f"energy_model calls {name}," in str(warning.message)
            assert 'SiLU or softplus, or method="denoising"' in str(warning.message)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*kinks")
        ScoreMatchingEBM(method="denoising", **options).fit(moons())
        for method in ("exact", "sliced"):
            ScoreMatchingEBM(method=method, **options | {"energy_model": Residual}).fit(moons())


# ---------------------------------------------------------------------- options


def test_auto_is_exact_up_to_ten_columns():
    rng = np.random.default_rng(0)
    for d, expected in ((2, "exact"), (10, "exact"), (12, "sliced")):
        X = rng.normal(size=(60, d))
        estimator = ScoreMatchingEBM(**QUICK | {"max_epochs": 1}).fit(X)
        assert estimator.method_ == expected
        assert estimator.sigma_ == pytest.approx([0.2 * 60 ** (-1 / (d + 4))])
    # constant columns do not count
    X = np.c_[rng.normal(size=(60, 10)), np.ones((60, 3))]
    assert ScoreMatchingEBM(**QUICK | {"max_epochs": 0}).fit(X).method_ == "exact"


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(0, [0.0]), (0.3, [0.3]), ([0.1, 0.5], [0.1, 0.5]), (np.geomspace(0.05, 0.4, 4), None)],
)
@every_method
def test_sigma(sigma, expected, method):
    estimator = ScoreMatchingEBM(method=method, sigma=sigma, **QUICK)
    if method == "denoising" and np.ndim(sigma) == 0 and sigma == 0:
        with pytest.raises(ValueError, match="no noise to predict"):
            estimator.fit(moons())
        return
    estimator.fit(moons())
    np.testing.assert_allclose(estimator.sigma_, sigma if expected is None else expected)
    assert estimator.n_iter_ > 0
    assert estimator.score(new_moons()) > estimator.base_score_samples(new_moons()).mean() + 0.05


@pytest.mark.parametrize(
    "sigma", [-0.1, [0.1, 0.0], [0.1, -0.2], [[0.1, 0.2]], [], [0.1, np.nan], [np.inf]]
)
def test_sigma_that_makes_no_sense(sigma):
    estimator = ScoreMatchingEBM(sigma=sigma, **QUICK | {"max_epochs": 1})
    with pytest.raises(ValueError, match="sigma"):
        estimator.fit(moons())
    assert not hasattr(estimator, "model_")


def test_denoising_needs_noise():
    for sigma in (0, 0.0, [0.0]):
        with pytest.raises(ValueError, match="sigma=0 leaves"):
            ScoreMatchingEBM(method="denoising", sigma=sigma, **QUICK).fit(moons())


@pytest.mark.parametrize("projection", ["rademacher", "gaussian"])
@pytest.mark.parametrize("n_projections", [1, 4])
def test_directions_of_sliced(projection, n_projections):
    options = QUICK | {"n_projections": n_projections, "projection": projection}
    scores = ScoreMatchingEBM(method="sliced", **options).fit(moons()).score_samples(new_moons())
    base = ScoreMatchingEBM(**QUICK | {"max_epochs": 0}).fit(moons()).score(new_moons())
    assert scores.mean() > base + 0.05
    other = options | {"n_projections": 2}
    again = ScoreMatchingEBM(method="sliced", **other).fit(moons()).score_samples(new_moons())
    assert np.abs(scores - again).max() > 1e-3


@pytest.mark.filterwarnings("ignore:recalibration=False")
@pytest.mark.parametrize("method", ["exact", "denoising"])
def test_bias_correction_takes_smoothing_out(method):
    """Data N(0, 1), base N(0, 1.3^2), sigma = .5: both limits are normal laws of known variance."""
    X = np.random.default_rng(0).normal(size=(4000, 1))
    law, wide = stats.norm(X.mean(), X.std()), 1.69
    # sigma is in units of z, whose distribution function is that of X smoothed by Silverman's rule
    noise = 0.25 * (X.var() + (0.9 * X.std() * len(X) ** -0.2) ** 2)
    corrected = 1.0 / (1.0 / wide + 1.0 / (X.var() + noise) - 1.0 / (wide + noise))
    t, dt = line(-9.0, 9.0, 4001)
    divergences = []
    for bias_correction, expected in ((True, corrected), (False, X.var() + noise)):
        estimator = ScoreMatchingEBM(
            method=method, sigma=0.5, bias_correction=bias_correction, recalibration=False,
            base=normal(0.0, 1.3), energy_model=Quartic, n_members=2, max_epochs=60,
            patience=1000, early_stopping=False, learning_rate=0.02, random_state=0,
        ).fit(X)  # fmt: skip
        assert estimator.n_iter_ == 60
        bulk = np.linspace(-1.6, 1.6, 101)
        slope = estimator.stein_score(bulk[:, None])[:, 0] @ bulk / (bulk @ bulk)
        assert -1.0 / slope == pytest.approx(expected, abs=0.05)
        gap = law.logpdf(t[:, 0]) - estimator.score_samples(t)
        divergences.append((law.pdf(t[:, 0]) * gap).sum() * dt)
    assert divergences[0] < 0.7 * divergences[1]


# ---------------------------------------------------------------------- training


def test_early_stopping_is_by_likelihood():
    """Long training on few rows: the loss goes on falling where the likelihood does, too."""
    options = QUICK | {"max_epochs": 80, "patience": 80, "hidden_layer_sizes": (64,),
                       "batch_size": 32, "learning_rate": 2e-3, "sigma": 0}  # fmt: skip
    X = moons()[:400]
    estimator = ScoreMatchingEBM(**options).fit(X)
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
    last = ScoreMatchingEBM(**options, early_stopping=False).fit(X)
    assert estimator.out_of_fold_scores_.mean() > level[best] - 0.02
    assert estimator.score(new_moons()) > last.score(new_moons())
    assert estimator.score(new_moons()) > estimator.base_score_samples(new_moons()).mean()


def test_multiscale_has_no_method():
    estimator = ScoreMatchingEBM(**QUICK | {"max_epochs": 1}).fit(moons())
    assert hasattr(estimator, "method_")
    estimator.set_params(smoothing="multiscale").fit(moons())
    assert estimator.n_iter_ == 0
    assert not hasattr(estimator, "method_")
    assert not hasattr(estimator, "sigma_")


def test_first_entry_of_the_history_is_the_base():
    history = fitted_to_moons("exact").history_
    assert history["n_iter"][0] == 0
    base = ScoreMatchingEBM(**QUICK | {"max_epochs": 0}).fit(moons())
    assert history["held_out_log_likelihood"][0] == pytest.approx(
        base.out_of_fold_scores_.mean(), abs=1e-6
    )


def test_no_epochs_is_the_base():
    estimator = ScoreMatchingEBM(**QUICK | {"max_epochs": 0}).fit(moons())
    assert estimator.n_iter_ == 0
    np.testing.assert_array_equal(
        estimator.score_samples(new_moons()), estimator.base_score_samples(new_moons())
    )
    assert (estimator.log_partition_ == 0).all()
    assert np.isinf(estimator.effective_sample_size_).all()


@every_method
def test_fits_are_reproducible(method):
    def scores(random_state):
        options = QUICK | {"max_epochs": 10, "random_state": random_state}
        return ScoreMatchingEBM(method=method, **options).fit(moons()).score_samples(new_moons())

    np.testing.assert_array_equal(scores(3), scores(3))
    assert np.abs(scores(3) - scores(4)).max() > 1e-3


@every_method
def test_weights_are_about_repeated_rows(method):
    """Weights of one to four turn one mixture into another, the density of which is known."""
    _, rows = hump_law()
    X = rows(800, 0)
    weight = np.where(X[:, 0] < -0.5, 1.0, 4.0)
    pdf, draw = hump_law((0.2, 0.8))
    new = draw(4000, 1)
    options = QUICK | {"max_epochs": 25, "method": method}
    weighted = ScoreMatchingEBM(**options).fit(X, sample_weight=weight)
    repeated = ScoreMatchingEBM(**options).fit(np.repeat(X, weight.astype(int), axis=0))
    unweighted = ScoreMatchingEBM(**options).fit(X)
    truth = np.log(pdf(new[:, 0])).mean()
    assert truth - weighted.score(new) < 0.06
    assert truth - unweighted.score(new) > 0.15
    assert abs(weighted.score(new) - repeated.score(new)) < 0.05


@every_method
def test_ties_are_smeared_out(method):
    X = moons().copy()
    X[:, 0] = np.round(X[:, 0] / 0.1) * 0.1
    estimator = ScoreMatchingEBM(method=method, **QUICK | {"max_epochs": 60}).fit(X)
    base = estimator.base_score_samples(new_moons()).mean()
    assert np.isfinite(estimator.score_samples(X)).all()
    assert estimator.score(new_moons()) > base + 0.1
    # no spikes at the rounded values: a density about as good as from the rows themselves
    assert estimator.score(new_moons()) > fitted_to_moons(method).score(new_moons()) - 0.15


def test_warm_start_goes_on():
    options = QUICK | {"max_epochs": 15, "warm_start": True}
    estimator = ScoreMatchingEBM(**options).fit(moons())
    first, base = estimator.score(new_moons()), estimator.base_score_samples(new_moons())
    reached = np.nanmax(estimator.history_["held_out_log_likelihood"])
    estimator.fit(moons())
    again = estimator.history_["held_out_log_likelihood"]
    assert again[0] == pytest.approx(reached, abs=0.03)
    assert estimator.score(new_moons()) > first - 0.03
    np.testing.assert_array_equal(estimator.base_score_samples(new_moons()), base)


@every_method
def test_constant_column(method):
    X = np.c_[moons()[:, :1], np.full(600, 7.0), moons()[:, 1:]]
    options = QUICK | {"max_epochs": 10, "method": method}
    estimator = ScoreMatchingEBM(**options).fit(X)
    without = ScoreMatchingEBM(**options).fit(moons())
    np.testing.assert_allclose(estimator.score_samples(X), without.score_samples(moons()))
    np.testing.assert_array_equal(estimator.stein_score(X)[:, 1], 0.0)
    np.testing.assert_allclose(estimator.stein_score(X)[:, [0, 2]], without.stein_score(moons()))
    X[0, 1] = 8.0
    assert estimator.score_samples(X)[0] == -np.inf


@every_method
def test_thirty_rows(method):
    X = moons()[:30]
    estimator = ScoreMatchingEBM(method=method, **QUICK).fit(X)
    scores = estimator.score_samples(new_moons())
    assert np.isfinite(scores).all()
    # f is kept only if it gains: not below the base
    assert scores.mean() > estimator.base_score_samples(new_moons()).mean() - 0.05
    assert np.isfinite(estimator.stein_score(new_moons())).all()
