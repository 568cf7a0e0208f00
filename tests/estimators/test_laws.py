"""Laws that every estimator obeys. A new estimator joins by one line in ESTIMATORS."""

import copy
import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Event
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import sklearn
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GroupKFold, cross_validate
from sklearn.preprocessing import RobustScaler

from skebm import (
    TRUSTED_TYPES,
    AdversarialEBM,
    Boosting,
    ContrastiveDivergenceEBM,
    FlowContrastiveDensity,
    ImplicitVAE,
    NCEDensity,
    Network,
    OutlierDetector,
    ScoreMatchingEBM,
)
from skebm._random import Seeds
from skebm.compose import DensityPipeline
from skebm.datasets import make_two_moons
from skebm.estimators import _base
from skebm.estimators._detector import thresholds
from skebm.estimators._mixed import MixedDensity
from skebm.exceptions import InconsistentVersionWarning, LowEffectiveSampleSizeWarning
from skebm.training import Progress, fit, latent, task, views

UNTRAINED = {"nce-base-alone", "detector"}
WITH_TREES = {"nce-trees", "fce"}
"""Their densities jump; those of the others are continuous."""

COMMON = {"n_members": 2, "random_state": 0}
ON_GAUSSIAN = COMMON | {"base": "gaussian"}

TRAINING = {
    "hidden_layer_sizes": (16,), "learning_rate": 0.02, "max_epochs": 60, "batch_size": 64,
    "patience": 1000,
}  # fmt: skip


def trees(**particular):
    return ON_GAUSSIAN | {"energy_model": Boosting(learning_rate=0.1, max_iter=20)} | particular


def network(common=ON_GAUSSIAN, energy_model=(), **particular):
    return common | {"energy_model": Network(**TRAINING | dict(energy_model))} | particular


def linear_embedding(learning_rate=0.01, max_epochs=60, **particular):
    training = {"learning_rate": learning_rate, "max_epochs": max_epochs}
    return network(energy_model={"embedding": "piecewise_linear"} | training, **particular)


def chains(learning_rate=0.02, max_epochs=40, **particular):
    training = {"learning_rate": learning_rate, "max_epochs": max_epochs}
    return network(energy_model=training, **particular)


def flow(learning_rate=0.02, max_epochs=40, batch_size=128, **particular):
    training = {"learning_rate": learning_rate, "max_epochs": max_epochs, "batch_size": batch_size}
    return network(COMMON, training, **particular)


ESTIMATORS = {
    "nce-trees": lambda: NCEDensity(**trees(noise_ratio=4)),
    "nce-network": lambda: NCEDensity(**linear_embedding()),
    "nce-no-base": lambda: NCEDensity(  # which has more to learn
        **linear_embedding(0.03, 120, base=None, noise="gaussian")
    ),
    "nce-base-alone": lambda: NCEDensity(**trees(energy_model=None)),
    "detector": lambda: OutlierDetector(**COMMON),
    "sm-exact": lambda: ScoreMatchingEBM(**network(method="exact")),
    "sm-sliced": lambda: ScoreMatchingEBM(**network(method="sliced")),
    "sm-denoising": lambda: ScoreMatchingEBM(
        **linear_embedding(learning_rate=0.03, max_epochs=30, method="denoising")
    ),
    "cd-persistent": lambda: ContrastiveDivergenceEBM(**chains(0.03, 40, n_steps=3)),
    "cd-from-rows": lambda: ContrastiveDivergenceEBM(
        **chains(persistent=False, sampler="hmc", n_steps=1)
    ),
    "cd-no-base": lambda: ContrastiveDivergenceEBM(
        **chains(0.03, 20, base=None, sampler="random_walk", n_steps=3)
    ),
    "fce": lambda: FlowContrastiveDensity(**flow(0.02, 60, correction=Boosting(max_iter=40))),
    "fce-no-base": lambda: FlowContrastiveDensity(**flow(0.03, 30, batch_size=64, base=None)),
    "adversarial": lambda: AdversarialEBM(**flow(gradient_penalty=0.5)),
}
"""Name -> factory of an estimator at a setting that fits 400 rows in about a second."""

LATENT = {
    "vae": lambda: ImplicitVAE(
        **TRAINING | {"learning_rate": 0.03, "max_epochs": 30},
        n_components=2,
        n_importance_samples=50,
        validation_fraction=0.5,
        random_state=0,
    )
}
"""Those without bases, members and log Z: each row has an integral of its own."""

# module scope: the tests of one estimator follow each other, and share its fits in one process
every_tilted = pytest.mark.parametrize("name", ESTIMATORS, scope="module")
ESTIMATORS = ESTIMATORS | LATENT
every_estimator = pytest.mark.parametrize("name", ESTIMATORS, scope="module")

ONE_OF_EACH = ["nce-trees", "nce-network", "sm-sliced", "cd-from-rows", "fce", "adversarial", "vae"]
"""Every trained estimator, NCEDensity with trees and with a network, at its quickest setting."""

one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH, scope="module")
# for laws of code that estimators share, whatever their method
one_of_all = pytest.mark.parametrize("name", [*ONE_OF_EACH, "detector"], scope="module")

pytestmark = [
    pytest.mark.usefixtures("small_parts"),
    # the settings are meant to be quick
    pytest.mark.filterwarnings(
        "ignore:the learned log Z differs",
        "ignore:the standard error of log Z",
        "ignore:log Z rests",
    ),
]


def quick(name, epochs=2):
    """The same estimator, hardly trained, for laws that training has no part in."""
    estimator = ESTIMATORS[name]()
    if name in LATENT:
        return estimator.set_params(max_epochs=epochs)
    length = {Network: "energy_model__max_epochs", Boosting: "energy_model__max_iter"}
    if getattr(estimator, "energy_model", None) is not None:
        estimator.set_params(**{length[type(estimator.energy_model)]: epochs})
    if name == "fce":
        estimator.set_params(correction__max_iter=epochs)
    return estimator.set_params(n_partition_samples=1000)


def two_humps(n, seed):
    """Rows of a mixture of two normal laws, one column."""
    rng = np.random.default_rng(seed)
    left = rng.random(n) < 0.5
    return np.where(left, rng.normal(-2.0, 0.5, n), rng.normal(1.0, 0.8, n))[:, None]


@cache
def data(d):
    # few decimals, so that adding to them loses next to nothing
    return two_humps(400, 0) if d == 1 else make_two_moons(400, random_state=0).round(6)


@cache
def fresh(d, n=2000):
    return two_humps(n, 1) if d == 1 else make_two_moons(n, random_state=1).round(6)


@cache
def fitted_and_told(name, d):
    """The fitted estimator, and the texts of the warnings of its fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator = ESTIMATORS[name]().fit(data(d))
    return estimator, [str(w.message) for w in caught]


def fitted(name, d=2):
    return fitted_and_told(name, d)[0]


def brief(name):
    """The same estimator, trained just long enough to be more than its base."""
    return quick(name, epochs=10)


@cache
def briefly_fitted(name):
    return brief(name).fit(data(2))


@cache
def scores_of(name):
    return fitted(name).score_samples(fresh(2))


def grid(name, d):
    """Cell centres of a fine grid that holds all the mass, (m, d), and the volume of a cell."""
    fine = fineness(name)
    if d == 1:
        t = np.linspace(-14.0, 14.0, 2000 * fine + 1)
        return t[:, None], t[1] - t[0]
    across, up = np.linspace(-7.0, 8.0, 90 * fine + 1), np.linspace(-5.0, 5.5, 70 * fine + 1)
    points = np.stack(np.meshgrid(across, up, indexing="ij"), axis=-1).reshape(-1, 2)
    return points, (across[1] - across[0]) * (up[1] - up[0])


def fineness(name):
    """How fine a grid has to be: less where every density is an integral, dear but smooth."""
    return 4 if name in WITH_TREES else 1 if name in LATENT else 2


def threshold(estimator, contamination):
    """Threshold of the fitted estimator, had it been fitted with that contamination."""
    return np.quantile(judged_rows(estimator), contamination)


def judged_rows(estimator):
    """Scores of the training rows by which a number for contamination is a share of them."""
    of_fold = isinstance(estimator, OutlierDetector)
    return estimator.out_of_fold_scores_ if of_fold else estimator.score_samples(data(2))


@cache
def masses_and_errors(name, d):
    """Probability of each cell of `grid`, and the standard error of each."""
    points, volume = grid(name, d)
    log_density, error = fitted(name, d).score_samples(points, return_std=True)
    mass = np.exp(log_density) * volume
    return mass, mass * error


def masses(name, d):
    """Probability of each cell of `grid`."""
    return masses_and_errors(name, d)[0]


def log_z_error(name, d):
    """Standard error of the log of the integral: the mean of independent members, or of rows."""
    if name in LATENT:
        return np.sqrt(np.square(masses_and_errors(name, d)[1]).sum())
    error = fitted(name, d).log_partition_std_error_
    return np.sqrt(np.square(error).sum()) / len(error)


# ---------------------------------------------------------------------- density


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in UNTRAINED], scope="module")
def test_the_quick_settings_learn_something(name):
    # otherwise the laws below would be about bases only; a flow sees Gaussianised columns: a
    # single one is learned already
    for d in (2,) if name in ("fce", "adversarial") else (1, 2):
        if name in LATENT:
            base = ESTIMATORS[name]().set_params(max_epochs=0).fit(data(d)).score(fresh(d))
        else:
            base = fitted(name, d).base_score_samples(fresh(d)).mean()
        assert fitted(name, d).n_iter_ > 0
        assert fitted(name, d).score(fresh(d)) > base + 0.05
    assert briefly_fitted(name).n_iter_ > 0


@every_estimator
@pytest.mark.parametrize("d", [1, 2])
def test_density_integrates_to_one(name, d):
    error = log_z_error(name, d)
    assert error < 0.02
    # .003: quadrature, next to jumps of the trees
    assert abs(math.log(masses(name, d).sum())) < 3.5 * error + 0.003


@every_estimator
def test_score_is_the_mean_of_score_samples(name):
    estimator, scores = fitted(name), scores_of(name)
    assert scores.dtype == np.float64
    assert scores.shape == (len(fresh(2)),)
    mean = scores[:500].mean()
    assert estimator.score(fresh(2)[:500]) == pytest.approx(mean, abs=1e-12)


@every_estimator
def test_scores_do_not_depend_on_the_batch(name):
    estimator, rows = fitted(name), fresh(2)[:10]
    one_by_one = [estimator.score_samples(row[None])[0] for row in rows]
    np.testing.assert_allclose(estimator.score_samples(rows), one_by_one, atol=1e-7, rtol=0)
    many = estimator.score_samples(np.tile(rows, (850, 1)))  # more than one chunk
    np.testing.assert_allclose(many, np.tile(one_by_one, 850), atol=1e-7, rtol=0)


@every_tilted
def test_energy_is_minus_the_log_density_up_to_a_constant(name):
    estimator = fitted(name)
    total = estimator.energy(fresh(2)) + scores_of(name)
    np.testing.assert_allclose(total, total[0], atol=1e-9)


@pytest.mark.parametrize(
    "name", ["nce-base-alone", "sm-exact", "cd-from-rows", "fce-no-base", "adversarial", "vae"]
)
def test_behind_a_scaler_it_has_the_units_of_x(name):
    density = DensityPipeline([("scale", RobustScaler()), ("density", quick(name))]).fit(data(2))
    rows, inner = fresh(2)[:50], density[-1]
    log_det = -np.log(density[0].scale_).sum()
    value, error = density.score_samples(rows, return_std=True)
    inside, own = inner.score_samples(density[0].transform(rows), return_std=True)
    np.testing.assert_allclose(value, inside + log_det, atol=1e-12)
    np.testing.assert_array_equal(error, own)
    np.testing.assert_allclose(density.out_of_fold_scores_, inner.out_of_fold_scores_ + log_det)
    assert density.offset_ == pytest.approx(inner.offset_ + log_det, abs=1e-9)
    z = density[0].transform(density.sample(500, random_state=0))
    np.testing.assert_allclose(z.mean(0), inner.sample(5000, random_state=1).mean(0), atol=0.2)


@every_estimator
def test_offset_of_the_columns_changes_nothing(name):
    # training amplifies what adding loses
    offset, new = np.array([64.0, -128.0]), fresh(2)[:500]
    moved = brief(name).fit(data(2) + offset).score_samples(new + offset)
    np.testing.assert_allclose(moved, briefly_fitted(name).score_samples(new), atol=1e-3)


@every_estimator
def test_constant_columns_and_rows_of_weight_zero_change_nothing(name):
    # every fifth row is a bad one, which also carries a flag that is constant in the others
    bad = np.arange(500) % 5 == 0
    table = np.full((500, 4), 50.0)
    table[~bad, 0], table[~bad, 2] = data(2).T
    table[:, 1], table[:, 3] = 5.0, bad
    weight = np.where(bad, 0.0, 8.0)
    plain = briefly_fitted(name)
    estimator = brief(name).set_params(contamination=0.1).fit(table, sample_weight=weight)
    new = np.insert(fresh(2)[:100], [1, 2], [5.0, 0.0], axis=1)
    # two columns have shown one of their two states 400 times
    both = 2 * math.log(401 / 402)
    alone = plain.score_samples(fresh(2)[:100])
    np.testing.assert_allclose(estimator.score_samples(new), alone + both, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        estimator.out_of_fold_scores_, plain.out_of_fold_scores_ + both, rtol=1e-12
    )
    assert estimator.offset_ == pytest.approx(threshold(plain, 0.1) + both, abs=1e-12)
    # of the other state only the probability is known, wherever the value is
    new[:50, 1] = 5.0 + 1e-9
    new[50:60, [1, 3]] = 1e6
    with pytest.warns(UserWarning, match="column 1 was constant in fit"):
        scores, std = estimator.score_samples(new, return_std=True)
    n_elsewhere = np.repeat([1, 2, 0], [50, 10, 40])
    expected = alone + both - n_elsewhere * math.log(401)
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)
    assert np.isfinite(std).all()
    assert (estimator.sample(20)[:, [1, 3]] == [5.0, 0.0]).all()
    if name not in LATENT:
        with pytest.warns(UserWarning, match="was constant in fit"):
            assert (estimator.stein_score(new)[:, [1, 3]] == 0.0).all()


for_likelihood = [name for name in ESTIMATORS if name not in {"detector", *LATENT}]
"""Without what is for ranking."""


@pytest.mark.parametrize("name", for_likelihood, scope="module")
def test_never_below_the_base(name):
    gains = scores_of(name) - fitted(name).base_score_samples(fresh(2))
    assert gains.mean() > -2.0 * gains.std() / math.sqrt(len(gains)) - 1e-9


# the confining distribution is no model of the data
@pytest.mark.parametrize("name", [n for n in for_likelihood if "no-base" not in n], scope="module")
@pytest.mark.parametrize("seed", [0, 1])
def test_not_below_a_base_that_is_right(name, seed):
    rng = np.random.default_rng(seed)
    estimator = ESTIMATORS[name]().set_params(random_state=seed).fit(rng.normal(size=(300, 2)))
    new = rng.normal(size=(4000, 2))
    gains = estimator.score_samples(new) - estimator.base_score_samples(new)
    assert gains.mean() > -0.01


@every_estimator
def test_what_was_accepted_is_said_with_its_gain(name):
    estimator = fitted(name)
    accepted, gain = estimator.accepted_, estimator.held_out_gain_
    if name in LATENT:
        assert (accepted == "networks") is (estimator.n_iter_ > 0)
        start = ESTIMATORS[name]().set_params(max_epochs=0).fit(data(2))
        assert start.accepted_ == "start"
        assert start.summary() == "start alone: no network was trained"
        rise = np.nanmean(estimator.out_of_fold_scores_ - start.out_of_fold_scores_)
        assert gain == pytest.approx(rise, abs=0.02)
    else:
        kept_base = estimator.model_.is_untilted
        assert (accepted in ("base", "flow", "generator")) is kept_base
        # held-out scores of the model and of the base, of the same members
        x = torch.as_tensor(estimator._columns.standardize(data(2)))
        with torch.no_grad():
            base = torch.stack([q.log_prob(x) for q in estimator.model_.bases]).numpy()
        judge = estimator.out_of_fold_members_
        base = base[judge, np.arange(400)] + estimator._columns.log_factor
        rise = np.mean(estimator.out_of_fold_scores_ - base)
        # each half of the rows has judged the recalibration of the other; the model has that of all
        if name not in UNTRAINED:
            assert kept_base or -0.02 < rise - gain < 0.06
    if name in UNTRAINED:
        assert accepted == ("views" if name == "detector" else "base")
        assert estimator.summary().endswith("no energy was trained")
    else:
        error = estimator.held_out_gain_std_error_
        assert gain > 1.6 * error > 0.0
        assert f"gain {gain:.3g} +- {error:.2g} nats per row" in estimator.summary()
    assert "\n" not in estimator.summary()


trained = pytest.mark.parametrize(
    "name", [n for n in ESTIMATORS if n not in UNTRAINED], scope="module"
)


@trained
def test_training_that_its_limit_has_ended_says_so(name):
    # patience lasts longer than the training, in which the likelihood rises
    _, told = fitted_and_told(name, 2)
    assert any("training ended at its limit" in text and "raise " in text for text in told), told


def test_training_without_patience_ends_when_the_user_says():
    for patience, told in ((None, False), (1000, True)):
        network = Network(**TRAINING | {"max_epochs": 20, "patience": patience})
        estimator = NCEDensity(**ON_GAUSSIAN, energy_model=network, n_partition_samples=1000)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            estimator.fit(data(2))
        limits = [w for w in caught if "ended at its limit of 20" in str(w.message)]
        assert [w.category for w in limits] == [ConvergenceWarning] * told


@pytest.mark.parametrize("name", ["nce-trees", "vae"])
def test_columns_without_a_density_are_named(name):
    pandas = pytest.importorskip("pandas")
    rows = data(2)[:60]
    frame = pandas.DataFrame(rows, columns=["a", "b"])
    frame["sum"], frame["id"] = rows.sum(axis=1), np.random.default_rng(0).permutation(60) + 1001
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quick(name).fit(frame)
    texts = " ".join(str(w.message) for w in caught)
    assert "column 'id' numbers the rows" in texts
    assert "is an exact linear combination of" in texts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "training ended|the standard error|the learned|log Z")
        warnings.filterwarnings("ignore", "your energy_model")
        quick(name).fit(frame[["a", "b"]])


# ---------------------------------------------------------------------- errors of log Z


@every_tilted
def test_std_is_the_delta_method(name):
    estimator = fitted(name)
    rows = fresh(2)[:50]
    _, std = estimator.score_samples(rows, return_std=True)
    variance, step = 0.0, 1e-5
    for k, error in enumerate(estimator.log_partition_std_error_):
        up, down = copy.deepcopy(estimator), copy.deepcopy(estimator)
        up.model_.log_partition[k] += step
        down.model_.log_partition[k] -= step
        if estimator.model_.is_untilted:
            slope = 0.0
        else:
            slope = (up.score_samples(rows) - down.score_samples(rows)) / (2 * step)
        variance += np.square(slope * error)
    np.testing.assert_allclose(std, np.sqrt(variance), rtol=1e-6, atol=1e-12)


@every_tilted
def test_std_is_honest(name):
    estimator = copy.deepcopy(fitted(name))
    row, scores, claims = fresh(2)[:1], [], []
    for seed in range(30):
        task = SimpleNamespace(seeds=Seeds(seed), progress=Progress(0), n_jobs=1)
        with torch.no_grad():
            fit.measure(estimator.model_, task, 1000)
        score, claim = estimator.score_samples(row, return_std=True)
        scores.append(score[0])
        claims.append(claim[0])
    if estimator.model_.is_untilted:
        assert np.ptp(scores) == np.max(claims) == 0.0
        return
    # the spread of 30 has itself an error of 13 %, and of few batches the larger error is claimed
    assert 0.5 < np.std(scores) / np.sqrt(np.mean(np.square(claims))) < 1.5


# ---------------------------------------------------------------------- sampling


def uniform_order_statistic_test(name, rows):
    """p-value of rows of one column against the model's own distribution function."""
    points, _ = grid(name, 1)
    cdf = np.cumsum(masses(name, 1)) - 0.5 * masses(name, 1)
    u = np.interp(rows[:, 0], points[:, 0], cdf / masses(name, 1).sum())
    return stats.kstest(u, "uniform").pvalue


@every_estimator
def test_sample_follows_the_model(name):
    # 1-D: Kolmogorov-Smirnov against the integrated density
    p = [
        uniform_order_statistic_test(name, fitted(name, 1).sample(3000, random_state=seed))
        for seed in range(6)
    ]
    assert min(p) > 1e-5
    assert np.median(p) > 0.01


@every_estimator
def test_sample_follows_the_model_in_two_dimensions(name):
    points, _ = grid(name, 2)
    edges = []
    for column in points.T:  # cells of the test are made of whole cells of the grid
        centres = np.unique(column)
        borders = 0.5 * (centres[1:] + centres[:-1])
        low, high = np.quantile(data(2), [0.02, 0.98], axis=0)[:, len(edges)]
        inside = borders[(borders > low) & (borders < high)]
        edges.append(inside[:: 5 * fineness(name) // 2])
    shape = tuple(len(edge) + 1 for edge in edges)

    def counts(rows, weights=None):
        index = [np.searchsorted(edge, rows[:, j]) for j, edge in enumerate(edges)]
        cell = np.ravel_multi_index(index, shape)
        return np.bincount(cell, weights=weights, minlength=math.prod(shape))

    n, expected, p = 4000, counts(points, masses(name, 2)), []
    expected *= n / expected.sum()
    order = np.argsort(expected)
    # small cells are put together, the rest tested one by one
    start = max(2, np.searchsorted(np.cumsum(expected[order]) > 5, True), (expected < 5).sum())
    starts = np.r_[0, np.arange(start, len(order))]
    for seed in range(4):
        drawn = counts(fitted(name).sample(n, random_state=seed))
        observed, mean = (np.add.reduceat(a[order], starts) for a in (drawn, expected))
        p.append(stats.chisquare(observed, mean).pvalue)
    # repeated rows are not independent, which lowers p; a wrong law has p < 1e-30
    assert min(p) > 1e-10
    assert max(p) > 0.01


@every_tilted
def test_langevin_steps_keep_the_law(name):
    estimator = fitted(name, 1)
    rows = estimator.sample(2000, random_state=0, n_steps=10)
    assert uniform_order_statistic_test(name, rows) > 1e-3
    # and they do move
    still = estimator.sample(2000, random_state=0)
    assert (rows != still).mean() > 0.9


class Rare(torch.nn.Module):
    """Proposal that hits a distribution once in two thousand times, and is far away otherwise."""

    def __init__(self, base):
        super().__init__()
        self.base, self.n_features, self.share = base, base.n_features, 1 / 2000

    def sample(self, n, rng):
        away = torch.rand(n, 1, generator=rng) > self.share
        return self.base.sample(n, rng) + 1000.0 * away

    def log_prob(self, x):
        here = self.base.log_prob(x) + math.log(self.share)
        return torch.logaddexp(here, self.base.log_prob(x - 1000.0) + math.log1p(-self.share))


@pytest.mark.parametrize(
    "name",
    ["nce-trees", "detector", "sm-exact", "cd-from-rows", "fce-no-base", "adversarial"],
    scope="module",
)
def test_sample_is_not_silent_about_repeated_rows(name, recwarn):
    estimator = copy.deepcopy(fitted(name))
    estimator.model_.proposals = torch.nn.ModuleList(map(Rare, estimator.model_.bases))
    for n_steps in (0, 20):
        recwarn.clear()
        drawn = estimator.sample(200, random_state=0, n_steps=n_steps)
        n_distinct = len(np.unique(drawn, axis=0))
        assert n_distinct > 190 if n_steps else n_distinct < 40
        said = [w for w in recwarn if "drawn rows repeat others" in str(w.message)]
        assert len(said) == (n_distinct < 190)
        for w in said:
            assert w.category is LowEffectiveSampleSizeWarning
            assert str(w.message).startswith(f"{200 - n_distinct} of 200")
            assert w.filename == __file__


@every_estimator
def test_sample_is_reproducible(name):
    estimator = fitted(name)
    first = estimator.sample(100, random_state=3)
    assert first.shape == (100, 2)
    assert first.dtype == np.float64
    np.testing.assert_array_equal(first, estimator.sample(100, random_state=3))
    if name not in LATENT:
        np.testing.assert_array_equal(
            estimator.sample(20, random_state=3, n_steps=2),
            estimator.sample(20, random_state=3, n_steps=2),
        )
    assert (first != estimator.sample(100, random_state=4)).any()
    assert (estimator.sample(5) != estimator.sample(5)).any()
    assert estimator.sample().shape == (1, 2)


@every_tilted
@pytest.mark.parametrize("d", [1, 2])
def test_stein_score_is_the_gradient(name, d):
    estimator = fitted(name, d)
    assert getattr(estimator.model_.energy, "softness", None) != 0.0  # hard trees have none
    rows, step = fresh(d)[:200], 1e-5
    gradient = estimator.stein_score(rows, smoothing=0)
    assert gradient.shape == rows.shape
    for j in range(d):
        move = step * np.eye(d)[j]
        rise = estimator.score_samples(rows + move) - estimator.score_samples(rows - move)
        error = np.abs(rise / (2 * step) - gradient[:, j]) / (1 + np.abs(gradient[:, j]))
        # a row in a hundred may sit on a kink of a piecewise-linear embedding
        assert np.quantile(error, 0.98) < 1e-4


@one_of_all
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
def test_a_constant_column_is_met_within_the_precision_of_what_is_given(name, dtypes):
    X = np.c_[data(1)[:50].astype("float32"), np.full(50, 0.1)]
    given, asked = (X.astype(dtype) for dtype in dtypes)
    estimator = quick(name).fit(given)
    np.testing.assert_array_equal(estimator.score_samples(asked), estimator.score_samples(given))
    moved = X + [0.0, 1e-3]
    with pytest.warns(UserWarning, match="column 1 was constant in fit"):
        lost = estimator.score_samples(given) - estimator.score_samples(moved)
    np.testing.assert_allclose(lost, math.log(51), rtol=1e-3)


# ---------------------------------------------------------------------- tensors as tables


@pytest.fixture
def array_api_dispatch(monkeypatch):
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    try:
        context = sklearn.config_context(array_api_dispatch=True)
        context.__enter__()
    except ImportError as error:  # older versions of scikit-learn need array-api-compat
        pytest.skip(str(error))
    yield
    context.__exit__(None, None, None)


OF_ROWS = (
    "score_samples", "decision_function", "predict", "base_score_samples", "energy", "stein_score",
    "transform", "reconstruct",
)  # fmt: skip


@one_of_all
def test_tensors_come_back_under_array_api_dispatch(name, array_api_dispatch):
    estimator, rows, x = fitted(name), fresh(2)[:50], torch.from_numpy(fresh(2)[:50])
    for method in OF_ROWS:
        if hasattr(estimator, method):
            result, array = (getattr(estimator, method)(X) for X in (x, rows))
            assert isinstance(result, torch.Tensor)
            np.testing.assert_array_equal(result, array)
            assert result.numpy().dtype == array.dtype
    for result, array in zip(
        estimator.score_samples(x, return_std=True),
        estimator.score_samples(rows, return_std=True),
        strict=True,
    ):
        assert isinstance(result, torch.Tensor)
        np.testing.assert_array_equal(result, array)
    for flow in ("flow_", "generator_"):
        if hasattr(estimator, flow):
            result, array = (getattr(estimator, flow).score_samples(X) for X in (x, rows))
            np.testing.assert_array_equal(result, array)
            assert isinstance(result, torch.Tensor)
    if name in LATENT:
        result, array = (estimator.inverse_transform(X) for X in (x, rows))
        np.testing.assert_array_equal(result, array)
        assert isinstance(result, torch.Tensor)
    weight = np.arange(50.0)
    score = estimator.score(x, sample_weight=torch.from_numpy(weight))
    assert score == estimator.score(rows, sample_weight=weight)
    assert estimator.offset_ == fitted(name).offset_
    # a fit learns the same from them
    rows, weight = data(1)[:50], 1.0 + np.arange(50.0)
    plain = quick(name).fit(rows, sample_weight=weight)
    again = quick(name).fit(torch.from_numpy(rows), sample_weight=torch.from_numpy(weight))
    np.testing.assert_array_equal(again.score_samples(rows), plain.score_samples(rows))


def test_tensors_come_back_as_from_a_gaussian_mixture(array_api_dispatch):
    x = torch.from_numpy(data(2))
    theirs = GaussianMixture(2, init_params="random_from_data", random_state=0).fit(x)
    for method in ("score_samples", "predict", "score", "fit_predict"):
        ours, expected = (getattr(e, method)(x) for e in (quick("nce-base-alone").fit(x), theirs))
        assert type(ours) is type(expected)
        if method != "score":
            assert (ours.dtype, ours.shape, ours.device) == (
                expected.dtype, expected.shape, expected.device,
            )  # fmt: skip


@every_estimator
def test_coarse_tensors_are_taken_as_their_values(name):
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.from_numpy(fresh(2)[:50]).to(dtype)
        scores = fitted(name).score_samples(x)
        assert isinstance(scores, np.ndarray)
        np.testing.assert_array_equal(scores, fitted(name).score_samples(x.double().numpy()))


# ---------------------------------------------------------------------- determinism and state


def global_state():
    return (
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )


@every_estimator
def test_fits_depend_on_rows_and_seed_alone(name):
    before = global_state()
    used, scale = quick(name).fit(data(1)[:50]), np.array([8.0, 0.25])
    used.sample(10, random_state=0, **({} if name in LATENT else {"n_steps": 2}))
    getattr(used, "reconstruct" if name in LATENT else "stein_score")(data(1))
    assert global_state() == before
    # a second fit forgets the first, and two fits at once do not disturb each other
    used.set_params(**brief(name).get_params(deep=False))
    with ThreadPoolExecutor(2) as pool:
        jobs = [(used, 1.0), (brief(name), scale)]
        again, scaled = pool.map(lambda job: job[0].fit(data(2) * job[1]), jobs)
    assert global_state() == before
    reference = briefly_fitted(name)
    scores = reference.score_samples(fresh(2))
    np.testing.assert_array_equal(again.score_samples(fresh(2)), scores)
    if name not in LATENT:
        np.testing.assert_array_equal(again.log_partition_, reference.log_partition_)
    assert again.offset_ == reference.offset_
    assert again.n_features_in_ == 2
    assert set(vars(again)) == set(vars(reference))
    # powers of two: not a bit is lost, and the units change scores by a constant
    shift = np.log(scale).sum()
    np.testing.assert_allclose(scaled.score_samples(fresh(2) * scale), scores - shift, atol=1e-9)
    np.testing.assert_allclose(
        scaled.sample(50, random_state=0), reference.sample(50, random_state=0) * scale
    )
    assert scaled.offset_ == pytest.approx(reference.offset_ - shift, abs=1e-9)


@contextmanager
def doubles_in_inference_mode():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@one_of_each
def test_settings_of_torch_around_the_calls_change_nothing(name):
    rows = data(2)[:60]

    def used(estimator):
        yield estimator.score_samples(rows)
        yield estimator.sample(10, random_state=0)
        if name in LATENT:
            yield estimator.reconstruct(rows)
        else:
            yield estimator.stein_score(rows)
            yield estimator.sample(5, random_state=0, n_steps=2)

    before = quick(name).fit(rows)
    expected = list(used(before))
    with doubles_in_inference_mode():
        inside = quick(name).fit(rows)
        found = list(used(before)), list(used(inside))
    for values in (*found, list(used(inside))):
        for got, wanted in zip(values, expected, strict=True):
            # two calls may differ by a rounding: sums of torch depend on where memory begins
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


def test_modules_of_users_are_built_alike_whatever_the_default_dtype():
    def fit():
        energy_model = Network(Noisy, max_epochs=2)
        return NCEDensity(**network() | {"base": None, "noise": "gaussian", "energy_model":
                          energy_model, "n_partition_samples": 1000}).fit(data(2)[:60])  # fmt: skip

    expected = fit().score_samples(fresh(2)[:50])
    with doubles_in_inference_mode():
        found = fit().score_samples(fresh(2)[:50])
    np.testing.assert_allclose(found, expected, rtol=1e-9)


class Noisy(torch.nn.Module):
    """A user's energy that draws on torch's global generator while it trains."""

    def __init__(self, n_features):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(n_features, 16), torch.nn.SiLU(), torch.nn.Dropout(0.2),
            torch.nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, z):
        return self.layers(z)


def test_fits_are_bit_identical_beside_other_estimators_that_use_the_global_generators():
    normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    common = {"n_members": 1, "random_state": 0, "n_partition_samples": 2000}

    def with_dropout():
        energy_model = Network(Noisy, max_epochs=20, patience=None)
        estimator = NCEDensity(energy_model=energy_model, base="gaussian", **common)
        return estimator.fit(data(2)).history_["train_loss"]

    def on_a_distribution():
        energy_model = Network(hidden_layer_sizes=(8,), max_epochs=2, patience=None)
        return NCEDensity(base=normal, energy_model=energy_model, **common).fit(data(2))

    alone, state = with_dropout(), torch.get_rng_state()
    stop = Event()

    def others():
        while not stop.is_set():
            on_a_distribution()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(others)
        try:
            beside = [with_dropout() for _ in range(3)]
        finally:
            stop.set()
        other.result()
    for losses in beside:
        np.testing.assert_array_equal(losses, alone)
    assert torch.equal(torch.get_rng_state(), state)


@every_estimator
def test_equal_fits_have_equal_hashes_and_another_seed_gives_another_fit(name):
    tokenize = pytest.importorskip("dask.base").tokenize
    one, twin, other = (
        quick(name).set_params(random_state=seed).fit(data(1)[:50]) for seed in (0, 0, 1)
    )
    assert (one.score_samples(fresh(1)) != other.score_samples(fresh(1))).any()
    other.set_params(random_state=0)
    loaded = pickle.loads(pickle.dumps(one))
    for hash_of in (joblib.hash, tokenize):
        assert hash_of(one) == hash_of(twin) == hash_of(loaded) != hash_of(other)


@every_estimator
def test_stored_models_are_the_same(name, tmp_path):
    skops = pytest.importorskip("skops.io")
    reference, stored, rows = fitted(name), skops.dumps(fitted(name)), fresh(2)[:50]
    assert set(skops.get_untrusted_types(data=stored)) <= set(TRUSTED_TYPES)
    joblib.dump(reference, tmp_path / "model")
    for twin in (
        skops.loads(stored, trusted=TRUSTED_TYPES),
        pickle.loads(pickle.dumps(reference)),
        joblib.load(tmp_path / "model", mmap_mode="r"),  # as workers get large ones
        copy.deepcopy(reference),
    ):
        assert set(vars(twin)) == set(vars(reference))
        scores = (e.score_samples(rows) for e in (twin, reference))
        np.testing.assert_array_equal(*scores)
        for part in ("", "flow_", "generator_"):
            if hasattr(reference, part or "sample"):
                whole = (getattr(e, part) if part else e for e in (twin, reference))
                draws = (e.sample(20, random_state=0) for e in whole)
                np.testing.assert_array_equal(*draws)


@every_estimator
@pytest.mark.filterwarnings("error")
def test_an_estimator_of_another_version_is_loaded_with_a_warning(name, monkeypatch):
    stored = pickle.dumps(fitted(name))
    pickle.loads(stored)
    monkeypatch.setattr(_base, "__version__", "9.9")
    with pytest.warns(InconsistentVersionWarning, match=r"stored by skebm .* loaded by 9\.9"):
        loaded = pickle.loads(stored)
    scores = (e.score_samples(fresh(2)[:50]) for e in (loaded, fitted(name)))
    np.testing.assert_array_equal(*scores)
    with pytest.warns(InconsistentVersionWarning, match="stored by skebm of no stated version"):
        loaded.__setstate__(vars(fitted(name)))


@one_of_all
def test_interrupted_fit_leaves_the_estimator_as_it_was(name, monkeypatch):
    rows = data(1)[:50]
    unfitted, estimator = quick(name), quick(name).fit(rows)
    before = dict(vars(unfitted))
    scores, state = estimator.score_samples(rows), dict(vars(estimator))
    steps = [(latent, "_finished")] if name in LATENT else [(fit, "measure"), (fit, "finished")]
    if name == "detector":
        steps = [(views, "by_importance"), (views, "finished")]
    for where, step in [*steps, (type(estimator), "_judge")]:
        for victim, error in ((unfitted, KeyboardInterrupt), (estimator, RuntimeError)):

            def interrupt(*args, error=error, **kwargs):
                raise error("now")

            with monkeypatch.context() as patch:
                patch.setattr(where, step, interrupt)
                with pytest.raises(error, match="now"):
                    victim.fit(data(2)[:50])
        assert vars(unfitted) == before
        assert vars(estimator) == state
    with pytest.raises(NotFittedError):
        unfitted.score_samples(rows)
    np.testing.assert_array_equal(estimator.score_samples(rows), scores)


# ---------------------------------------------------------------------- weights, ties, smoothing


@every_estimator
def test_weights_stand_for_repeated_rows(name):
    # 400 rows, those of the right hump three times as heavy; the truth is known
    rows = np.sort(data(1), axis=0)
    weight = np.where(rows[:, 0] > -0.5, 3, 1)
    new = fresh(1)
    heavy = np.where(new[:, 0] > -0.5, 3.0, 1.0)
    weighted, repeated = ESTIMATORS[name]().set_params(contamination=0.1), ESTIMATORS[name]()
    if name in LATENT:  # the two hold out other rows
        for estimator in (weighted, repeated):
            estimator.set_params(validation_fraction=0.25)
    weighted.fit(rows, sample_weight=weight.astype(float))
    repeated.fit(np.repeat(rows, weight, axis=0))
    plain = fitted(name, 1)
    scores = [e.score(new, sample_weight=heavy) for e in (weighted, repeated, plain)]
    # copies of a row are one row of that weight
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)
    # weights do matter
    assert scores[0] > scores[2] + 0.02
    share, other = ((e.sample(4000, random_state=0) > -0.5).mean() for e in (weighted, repeated))
    assert share == pytest.approx(other, abs=0.04)
    if not weighted.get_params().get("smoothing"):  # smoothing moves some mass across -0.5
        assert share == pytest.approx(np.average(rows[:, 0] > -0.5, weights=weight), abs=0.05)
    # contamination is a share of the weight, and so is what "auto" takes of the out-of-fold scores
    is_odd = weighted.predict(rows) == -1
    if name == "detector":
        is_odd = weighted.out_of_fold_decision_function_ < 0
    flagged = weight[is_odd].sum() / weight.sum()
    assert abs(flagged - 0.1) <= weight.max() / weight.sum()
    held = np.isfinite(weighted.out_of_fold_scores_)
    in_sample = weighted.score_samples(rows)
    offset, _ = thresholds("auto", in_sample, weighted.out_of_fold_scores_, weight)
    flagged = weighted.out_of_fold_scores_[held] < offset
    assert np.average(flagged, weights=weight[held]) == pytest.approx(0.05, abs=0.01)


@one_of_each
def test_copies_of_rows_are_weights(name):
    generator = np.random.default_rng(0)
    rows, new = data(2)[:100], fresh(2)[:50]
    drawn = rows[generator.integers(0, 100, 100)]
    distinct, first, copy_of, count = np.unique(
        drawn, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    weighted = quick(name).fit(distinct, sample_weight=count.astype(float))
    repeated = quick(name).fit(drawn)
    np.testing.assert_allclose(repeated.score_samples(new), weighted.score_samples(new), atol=1e-9)
    assert repeated.offset_ == pytest.approx(weighted.offset_, abs=1e-9)
    # what is known of a row is known of its copies
    assert len(repeated.out_of_fold_scores_) == 100
    for attribute in ("out_of_fold_scores_", "out_of_fold_members_"):
        values = getattr(repeated, attribute)
        np.testing.assert_array_equal(values, values[first][copy_of])
    # a jitter makes them no other rows
    jittered = drawn + 1e-7 * generator.normal(size=drawn.shape)
    moved = quick(name).fit(jittered)
    assert moved.score(new) == pytest.approx(weighted.score(new), abs=2e-2)


def test_a_bootstrap_sample_is_scored_as_it_deserves():
    # a tenth of a nat is what is lost by having only two thirds of the rows
    generator = np.random.default_rng(0)
    rows, new = generator.normal(size=(400, 3)), generator.normal(size=(4000, 3))
    truth = stats.multivariate_normal(np.zeros(3)).logpdf(new).mean()
    estimator = NCEDensity(base="gmm", **COMMON)
    drawn = rows[generator.integers(0, 400, 400)]
    assert estimator.fit(drawn).score(new) > truth - 0.15
    assert estimator.out_of_fold_scores_.mean() < truth + 0.25
    # 250 rows: the quantile has an error of 1.4 %
    assert (estimator.predict(new) == -1).mean() < 0.1


@one_of_each
def test_groups_are_held_out_together(name):
    generator = np.random.default_rng(0)
    rows, groups = data(2)[:120], generator.choice(list("abcdefgh"), 120)
    weight = (np.arange(120) >= 10).astype(float)
    estimator = quick(name).fit(rows, sample_weight=weight, groups=groups)
    members = estimator.out_of_fold_members_
    assert len(np.unique(members)) == 2  # of two members, or of the validation split and the rest
    for group in np.unique(groups):
        assert len(np.unique(members[groups[10:] == group])) == 1
    labels = quick(name).fit_predict(rows, groups=groups)
    assert labels.shape == (120,)
    for wrong, message in (
        (groups[:-1], "inconsistent numbers"),
        (["a"] * 120, "groups"),
        (np.array(["a", None] * 60, dtype=object), "several types, NoneType, str"),
    ):
        with pytest.raises(ValueError, match=message):
            quick(name).fit(rows, groups=wrong)
    with pytest.raises(ValueError, match="join them all"):
        quick(name).fit(np.tile(rows, (2, 1)), groups=np.arange(240) // 120)


def test_groups_are_routed():
    rows, groups = data(2)[:120], np.arange(120) // 10
    seen = []

    class Density(NCEDensity):
        def fit(self, X, y=None, sample_weight=None, groups=None):
            seen.append(groups)
            return super().fit(X, y, sample_weight, groups)

    with sklearn.config_context(enable_metadata_routing=True):
        estimator = Density(**COMMON, base="gaussian", energy_model=None)
        estimator.set_fit_request(groups=True)
        cross_validate(estimator, rows, cv=GroupKFold(3), params={"groups": groups})
    assert len(seen) == 3
    for fold in seen:
        assert len(np.unique(fold)) == 8  # of twelve, four are in the test fold


def test_blocks_of_a_time_series_keep_the_promise_of_the_threshold():
    # autocorrelation .99: a fold chosen at random is known from its neighbours in time
    generator = np.random.default_rng(0)
    rows = np.empty((2000, 2))
    rows[0], noise = 0.0, generator.normal(size=(2000, 2))
    for t in range(1, 2000):
        rows[t] = 0.99 * rows[t - 1] + math.sqrt(1 - 0.99**2) * noise[t]
    new = generator.normal(size=(4000, 2))
    estimator = NCEDensity(base="gmm", energy_model=None, n_members=5, random_state=0)
    blocks = np.arange(2000) // 200
    random, grouped = (
        (estimator.fit(rows, groups=groups).predict(new) == -1).mean() for groups in (None, blocks)
    )
    assert random > 0.15
    assert grouped < 0.6 * random


COLD = {
    "other columns": lambda X: X[:, :2],
    "other dtypes": lambda X: X.astype("float32"),
    "other columns are constant": lambda X: np.c_[X[:, :2], X[:, 0] ** 2],
    "a fresh start": lambda X: np.c_[5.0 + 3.0 * X[:, :2], X[:, 2]],
}


@one_of_each
def test_a_warm_start_from_another_table_is_a_cold_one(name):
    X = np.c_[data(2)[:80], np.ones(80)]
    before = quick(name).set_params(warm_start=True).fit(X)
    for reason, change in COLD.items():
        warm, cold = copy.deepcopy(before), quick(name)
        with pytest.warns(UserWarning, match=f"warm_start=True, but .*{reason}.*: this fit starts"):
            warm.fit(change(X))
        scores = cold.fit(change(X)).score_samples(change(X))
        np.testing.assert_array_equal(warm.score_samples(change(X)), scores)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="warm_start")
        before.fit(X)


@every_estimator
def test_ties_make_no_spike(name):
    rows = np.random.default_rng(0).poisson(6.0, size=(400, 1)).astype(float)
    estimator = ESTIMATORS[name]().fit(rows)
    # probability of the cell of an integer: what a histogram would say
    t = np.arange(0.5, 14.5, 0.01)
    cells = np.exp(estimator.score_samples(t[:, None])).reshape(14, 100).mean(axis=1)
    truth = stats.poisson(6.0).pmf(np.arange(1, 15))
    assert np.abs(cells - truth).sum() < 0.25
    # density at the integers is about that of their cells
    peaks = np.exp(estimator.score_samples(np.arange(1.0, 15.0)[:, None]))
    assert (peaks < 2.0 * truth.max()).all()


@pytest.mark.parametrize(
    ("name", "h"),
    [(n, 0.7) for n in ESTIMATORS if n != "detector"] + [("nce-trees", "scott"), ("vae", "scott")],
    scope="module",
)
def test_smoothing_adds_noise_of_that_width(name, h, monkeypatch):
    monkeypatch.setattr(task, "SMOOTHED_ROWS", 1600)  # four copies of every row
    epochs = 60 if name.endswith("no-base") else 10 if name in LATENT else 5
    estimator = quick(name, epochs=epochs).set_params(smoothing=h)
    if name in LATENT:  # it knows no more of the mean than the rows that it is trained on
        estimator.set_params(validation_fraction=0.1)
    estimator.fit(data(1))
    width = 400 ** (-1 / 5) if h == "scott" else h
    points, volume = grid(name, 1)
    mass = np.exp(estimator.score_samples(points)) * volume
    mean = mass @ points[:, 0] / mass.sum()
    variance = mass @ np.square(points[:, 0] - mean) / mass.sum()
    assert mean == pytest.approx(data(1).mean(), abs=0.15)
    assert variance == pytest.approx(data(1).var() * (1 + width**2), rel=0.15)


# ---------------------------------------------------------------------- outlier detector


@every_estimator
def test_contamination_is_the_share_of_flagged_training_rows(name):
    for contamination in (0.05, 0.5):
        flagged = judged_rows(fitted(name)) < threshold(fitted(name), contamination)
        assert flagged.sum() == contamination * 400
    # of rows with one score none is flagged where only some could be
    scores = fitted(name).score_samples(np.repeat(data(2)[:2], [37, 13], axis=0))
    rare_is_odd = scores[-1] < scores[0]
    for share, n_flagged in ((0.1, 0), (0.2, 0), (0.3, 13), (0.5, 13)):
        offset, _ = thresholds(share, scores, np.full(50, np.nan), np.ones(50))
        assert (scores < offset - 1e-9).sum() == n_flagged * rare_is_odd


@one_of_all
def test_labels_of_training_rows_are_out_of_fold(name):
    # rows of weight zero are new to the fit
    rows, weight = data(2)[:120], np.where(np.arange(120) % 6 == 5, 0.0, 1.0)
    used, new = weight > 0, weight == 0
    for contamination in ("auto", 0.1):
        estimator = quick(name).set_params(contamination=contamination)
        labels = estimator.fit_predict(rows, sample_weight=weight)
        assert labels.dtype.kind == "i"
        scores, in_sample = estimator.out_of_fold_scores_, estimator.score_samples(rows)
        held = np.isfinite(scores)
        scores = np.where(held, scores, in_sample[used])
        threshold = estimator.out_of_fold_offset_
        np.testing.assert_array_equal(labels[used] == -1, scores < threshold)
        np.testing.assert_array_equal(labels[new] == -1, in_sample[new] < threshold)
        # predict keeps its own threshold
        np.testing.assert_array_equal(estimator.predict(rows) == -1, in_sample < estimator.offset_)
        if contamination == "auto":
            assert threshold == estimator.offset_
            assert (scores[held] < threshold).mean() == pytest.approx(0.05, abs=1.0 / held.sum())
        else:
            assert (labels[used] == -1).sum() == 10
    if held.all():  # the test would be idle if the two agreed
        assert (in_sample[used] != scores).any()


def test_one_member_labels_what_it_has_not_held_out_by_its_own_scores():
    estimator = quick("nce-network").set_params(n_members=1, contamination=0.1)
    labels = estimator.fit_predict(data(2)[:100])
    scores = estimator.out_of_fold_scores_
    assert np.isfinite(scores).sum() == 10
    scores = np.where(np.isfinite(scores), scores, estimator.score_samples(data(2)[:100]))
    np.testing.assert_array_equal(np.flatnonzero(labels == -1), np.sort(scores.argsort()[:10]))


@every_estimator
def test_auto_contamination_flags_a_twentieth_of_new_rows(name):
    # the quantile of 400 rows has an error of 1.1 %, the mean of two one of .8 %
    shares = [(fitted(name, d).predict(fresh(d)) == -1).mean() for d in (1, 2)]
    assert 0.022 < np.mean(shares) < 0.078


@every_estimator
def test_decision_function_is_the_score_minus_the_offset(name):
    estimator, rows = fitted(name), fresh(2)[:500]
    decision = estimator.decision_function(rows)
    # two calls may differ by a rounding: sums of torch depend on where memory begins
    np.testing.assert_allclose(decision, scores_of(name)[:500] - estimator.offset_, rtol=1e-12)
    np.testing.assert_array_equal(estimator.predict(rows), np.where(decision < 0, -1, 1))
    assert estimator.predict(np.full((1, 2), 50.0)) == -1


@every_tilted
def test_out_of_fold_scores_are_of_members_that_have_not_seen_the_row(name):
    estimator = fitted(name)
    scores = estimator.out_of_fold_scores_
    assert np.isfinite(scores).all()
    # each is the score of one of the members
    x = torch.as_tensor(estimator._columns.standardize(data(2)))
    with torch.no_grad():
        members = estimator.model_.log_members(x).numpy() + estimator._columns.log_factor
    which = np.abs(members - scores).argmin(axis=0)
    np.testing.assert_allclose(members[which, np.arange(400)], scores, atol=1e-9)
    assert np.bincount(which).tolist() == [200, 200]
    # and, on average, of the one that likes the row less
    assert scores.mean() <= members.mean()


# ---------------------------------------------------------------------- bad input


def bad_inputs():
    rows = make_two_moons(30, random_state=0)
    with_nan, with_inf, huge = rows.copy(), rows.copy(), rows.copy()
    with_nan[3, 1], with_inf[3, 1], huge[3, 1] = np.nan, np.inf, 1e200
    tiny = rows * [1.0, 1e-320]
    weight = np.ones(30)
    weight[3] = -1.0
    masked = np.ma.masked_array(rows, mask=np.eye(30, 2))
    days = np.arange(60).reshape(30, 2).astype("M8[D]")
    yield (
        "nan",
        with_nan,
        None,
        "^column 1 contains NaN, .* row 3: .*SimpleImputer .* models? missing cells",
    )
    yield "nan in a list", with_nan.tolist(), None, "^column 1 contains NaN"
    yield "nan in a tensor", torch.as_tensor(with_nan), None, "^column 1 contains NaN"
    yield "inf", with_inf, None, "^column 1 contains infinity, .* row 3: .* clip"
    yield "masked cells", masked, None, "2 masked cell.*first in column 0, row 0: masks are not"
    yield "dates", days, None, "column 0 of X holds dates or times; turn it into numbers"
    yield "durations", days - days[0, 0], None, "column 0 of X holds durations; turn it into"
    yield (
        "objects",
        np.c_[rows.astype(object), days[:, 0].astype(object)],
        None,
        "column 2 of X holds dates",
    )
    yield "one row", rows[:1], None, r"1 sample.*minimum of 2"
    yield "one distinct row", rows[[0] * 10], None, "every column of X is constant"
    yield "one axis", rows[:, 0], None, "Expected 2D array"
    yield "no column", rows[:, :0], None, "0 feature"
    yield "strings", np.array([["1", "b"], ["2", "d"]]), None, "^column 1 holds text .'b' in row 0"
    yield "huge", huge, None, "column 1 spans"
    yield "tiny", tiny, None, "column 1 varies by less than"
    yield "negative weight", rows, weight, "Negative values in data passed to `sample_weight`"
    yield "wrong weights", rows, weight[:7], "sample_weight.shape"
    yield "one weight", rows, np.eye(30)[0], "positive for at least 2 samples"
    yield "nan weight", rows, np.full(30, np.nan), "sample_weight contains NaN"
    masked = np.ma.masked_array(np.ones(30), mask=np.arange(30) == 3)
    yield "masked weight", rows, masked, "sample_weight is a masked array .* row 3"


@every_estimator
@pytest.mark.parametrize(
    ("X", "weight", "message"), [pytest.param(*case, id=what) for what, *case in bad_inputs()]
)
def test_bad_rows_are_refused_by_name(name, X, weight, message):
    estimator = ESTIMATORS[name]()
    if isinstance(estimator, MixedDensity):
        estimator.set_params(handle_missing="error")
    with pytest.raises(ValueError, match=message):
        estimator.fit(X, sample_weight=weight)


def test_bad_column_of_a_frame_is_named():
    pandas = pytest.importorskip("pandas")
    days = pandas.date_range("2024-01-01", periods=3)
    bad = {
        "spans": [0.0, 1.0, 1e200],
        "contains NaN": [0.0, None, 1.0],
        "contains infinity": [0.0, np.inf, 1.0],
        "holds text": ["x", "y", "x"],
        "(of X )?holds dates": days,
        "of X holds dates": days.tz_localize("UTC"),
        "of X holds durations": days - days[0],
        " of X holds dates": list(days.date),
        "contains NaN, a missing": pandas.array([1, None, 2], dtype="Int64"),
    }
    for message, values in bad.items():
        frame = pandas.DataFrame({"good": [0.0, 1.0, 2.0], "bad": values})
        for factory in ESTIMATORS.values():
            estimator = factory()
            if isinstance(estimator, MixedDensity):
                if message == "holds text":  # a category
                    continue
                estimator.set_params(handle_missing="error")
            with pytest.raises(ValueError, match=f"column 'bad' {message.strip()}"):
                estimator.fit(frame)
    # alone they are no counts of their unit
    for values in (days, days - days[0]):
        with pytest.raises(ValueError, match="column 'bad' of X holds"):
            NCEDensity().fit(pandas.DataFrame({"bad": values}))
    estimator = fitted("adversarial")
    with pytest.raises(ValueError, match="^column 1 contains NaN"):
        estimator.score_samples([[0.0, 1.0], [0.0, np.nan]])


BAD_VALUES = {
    "base": ["nonsense", 3, [], ["gaussian", "nonsense"]], "energy_model": ["nonsense", Boosting],
    "n_members": [0, 1.5], "n_partition_samples": [10], "recalibration": ["yes"],
    "smoothing": [-0.1, "silverman"], "contamination": [0.6], "device": [3, "nonsense"],
    "random_state": ["seed"], "warm_start": ["yes"], "verbose": [-1], "n_jobs": [1.5],
    "memory": [3],
}  # fmt: skip
BAD_TRAINING = {
    "hidden_layer_sizes": [0, -1, 2.5], "learning_rate": [-1.0], "weight_decay": [-1.0],
    "batch_size": [0], "max_epochs": [-1], "patience": [0], "callbacks": [[7], "print"],
}  # fmt: skip


@every_estimator
def test_bad_parameters_are_refused_by_name(name):
    def refused(parameter, **params):
        with pytest.raises(ValueError, match=parameter):
            ESTIMATORS[name]().set_params(**params).fit(data(1)[:50])

    shared = set(ESTIMATORS[name]().get_params())
    bad = {key: values for key, values in BAD_VALUES.items() if key in shared}
    if name in LATENT:
        bad |= BAD_TRAINING | {"validation_fraction": [1.0]}
    elif name == "detector":
        bad |= {"density": [3, "nce"], "training": ["dirty"]}
    else:
        for parameter, values in BAD_TRAINING.items():
            for value in values:
                refused(parameter, energy_model=Network(**{parameter: value}))
    for parameter, values in bad.items():
        for value in values:
            refused(parameter, **{parameter: value})


def test_history_of_skorch_and_sizes_of_a_latent_variable_model():
    one, same = (quick("vae").set_params(hidden_layer_sizes=n).fit(data(2)) for n in (16, (16,)))
    losses = [row["train_loss"] for row in one.training_log_]
    np.testing.assert_array_equal(losses, one.history_["train_loss"][1:])
    np.testing.assert_array_equal(losses, same.history_["train_loss"][1:])


@every_estimator
def test_new_rows_of_another_width_are_refused(name):
    methods = ("energy", "stein_score", "base_score_samples")
    if name in LATENT:
        methods = ("transform", "reconstruct")
    for method in ("score_samples", "predict", *methods):
        with pytest.raises(ValueError, match="expecting 2 features"):
            getattr(fitted(name), method)(data(1))


@every_estimator
def test_bad_sample_sizes_are_refused(name):
    for n in (0, -3, 2.5, "ten"):
        with pytest.raises(ValueError, match="n_samples"):
            fitted(name).sample(n)
    if name not in LATENT:
        for n in (-1, 2.5):
            with pytest.raises(ValueError, match="n_steps"):
                fitted(name).sample(3, n_steps=n)


@every_estimator
def test_unfitted_estimators_say_so(name):
    estimator = clone(fitted(name))
    methods = ("transform", "reconstruct") if name in LATENT else ("energy",)
    for method in ("score_samples", "predict", "decision_function", "score", *methods):
        with pytest.raises(NotFittedError):
            getattr(estimator, method)(data(2))
    with pytest.raises(NotFittedError):
        estimator.sample()


# ---------------------------------------------------------------------- small data


@every_estimator
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [2, 5])
def test_a_handful_of_rows(name, n):
    estimator = quick(name)
    if name not in LATENT:
        estimator.set_params(n_members=4)
    estimator.fit(data(2)[:n])
    assert np.isfinite(estimator.score_samples(fresh(2))).all()
    assert np.isfinite(estimator.sample(10)).all()
