"""A fit without an estimator: what comes of a tilt that is known, in closed form.

The toy energies are f = a . x in the units of X, so that a base N(m, I) becomes N(m + a, I), and
log Z is a . m + |a|^2 / 2.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from torch import nn
from torch.distributions import Independent, Normal

from skebm._random import Seeds
from skebm.bases import AffineTransform, GaussianMixtureBase
from skebm.exceptions import LowEffectiveSampleSizeWarning
from skebm.models import FeatureMap, TiltedMixture
from skebm.training import Candidate, Columns, Recipe, Trained, fit_tilted, make_task
from skebm.training.fit import measure

BASE = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
MEAN = np.array([0.7, -0.3])
X = np.random.default_rng(0).normal(MEAN, 1.0, (400, 2))
WEIGHT = np.random.default_rng(1).uniform(0.5, 1.5, 400)
NEW = np.random.default_rng(2).normal(MEAN, 1.0, (100, 2))


def make(seed=0, n_members=2, fraction=0.1, start=None):
    return make_task(
        X, WEIGHT / WEIGHT.mean(), Columns.learn(X, range(2)), n_members=n_members,
        validation_fraction=fraction, smoothing=0.0, seeds=Seeds(seed), device=torch.device("cpu"),
        start=start,
    )  # fmt: skip


class Linear(nn.Module):
    """f_k = a_k . X, whatever the features: they are inverted first."""

    def __init__(self, slopes, features, columns):
        super().__init__()
        self.slopes = nn.Parameter(torch.as_tensor(slopes))  # as of any network, with gradients
        self.features, self.columns = features, columns

    def forward(self, z):
        x = torch.stack([self.features.transform.inverse(rows) for rows in z])
        X = x * torch.as_tensor(self.columns.scale) + torch.as_tensor(self.columns.center)
        return (X * self.slopes[:, None]).sum(-1)

    def member(self, k):
        return Linear(self.slopes.detach()[k : k + 1], self.features, self.columns)


def toy(slopes, n_iter=7, candidates=(), log_partition=None):
    """``train`` of a recipe: finds these slopes, one for each member."""

    def train(task):
        energy = Linear(np.array(slopes), task.features, task.columns)
        with torch.no_grad():
            held = [energy.member(k)(task.z[rows][None])[0] for k, rows in enumerate(task.held)]
            pool = energy(task.pool_z)
        gain = np.array([0.0, task.mean_gain(held, pool).item()])
        history = {"n_iter": np.array([0, n_iter]), "gain": gain}
        found = [candidate(task) for candidate in candidates]
        return Trained(
            energy, held, pool, n_iter, history, log_partition=log_partition, candidates=found
        )

    return train


def fit(train, task=None, base=BASE, **options):
    return fit_tilted(make() if task is None else task, Recipe(train, base, **options))


def plain(train, **options):
    """The same without recalibration, whose small change has no closed form."""
    return fit(train, recalibrates=False, **options)


def log_density(model, X, columns):
    with torch.no_grad():
        return model.log_prob(torch.as_tensor(columns.standardize(X))).numpy() + columns.log_factor


def log_normal(X, mean):
    return stats.multivariate_normal(mean).logpdf(X)


def held_mean(task, values):
    """Weighted mean of values at the held-out rows of all members."""
    return np.average(values, weights=WEIGHT[torch.cat(task.held)])


# ---------------------------------------------------------------- a tilt that is known


SLOPES = [[0.6, -0.4], [0.8, -0.2]]


def test_density_log_partition_and_out_of_fold_scores():
    task = make()
    fitted = plain(toy(SLOPES), task=task)
    found, error = (fitted.attributes[f"log_partition_{end}"] for end in ("", "std_error_"))
    expected = np.square(SLOPES).sum(1) / 2
    assert (error > 0).all()
    assert math.hypot(*error) / 2 <= 0.0105  # nats, of the mean of both: what "auto" aims at
    assert (np.abs(found - expected) < 3.5 * error).all()
    assert (fitted.attributes["effective_sample_size_"] > 1000).all()
    mixture = np.logaddexp(*(log_normal(NEW, a) for a in SLOPES)) - math.log(2.0)
    with torch.no_grad():
        std = fitted.model.log_prob_std(torch.as_tensor(task.columns.standardize(NEW))).numpy()
    assert (np.abs(log_density(fitted.model, NEW, task.columns) - mixture) < 4 * std).all()
    # with log Z corrected to the truth, all is exact
    fitted.model.log_partition = torch.as_tensor(expected)
    np.testing.assert_allclose(log_density(fitted.model, NEW, task.columns), mixture, atol=1e-9)
    scores = fitted.scores + (found - expected)[fold_of_rows(task)]
    truth = np.stack([log_normal(X, a) for a in SLOPES])[fold_of_rows(task), np.arange(len(X))]
    np.testing.assert_allclose(scores, truth, atol=1e-9)


def fold_of_rows(task):
    fold = np.empty(len(X), dtype=int)
    for k, rows in enumerate(task.held):
        fold[rows] = k
    return fold


def test_one_member_scores_the_rows_that_it_has_not_seen():
    task = make(n_members=1, fraction=0.5)
    scores = plain(toy([MEAN]), task=task).scores
    (held,) = task.held
    assert len(held) == 200
    assert np.flatnonzero(~np.isnan(scores)).tolist() == held.tolist()
    np.testing.assert_allclose(scores[held], log_normal(X[held], MEAN), atol=0.04)


def test_history_is_in_nats_per_row_and_begins_with_the_base():
    task = make()
    fitted = plain(toy(SLOPES), task=task)
    base, model = fitted.attributes["history_"]["held_out_log_likelihood"]
    held = X[torch.cat(task.held)]
    assert base == pytest.approx(held_mean(task, log_normal(held, [0.0, 0.0])), abs=1e-9)
    truth = held_mean(task, fitted.scores[torch.cat(task.held)])
    assert model == pytest.approx(truth, abs=0.04)  # log Z of the pool here, of more samples there
    assert fitted.attributes["n_iter_"] == 7


def test_recalibration_finds_the_inverse_temperature():
    half = [MEAN / 2, MEAN / 2]
    power = fit(toy(half)).model.inverse_temperature.item()
    # with its ridge r = .01 towards 1: argmax of p a . m - p^2 |a|^2 / 2 - r (p - 1)^2
    mean, squared = np.average(X, axis=0, weights=WEIGHT) @ half[0], np.square(half[0]).sum()
    assert power == pytest.approx((mean + 0.02) / (squared + 0.02), abs=0.1)
    assert plain(toy(half)).model.inverse_temperature == 1.0


# ---------------------------------------------------------------- the base, where that is better


def assert_is_base(fitted):
    assert fitted.model.is_untilted
    attributes = fitted.attributes
    assert attributes["n_iter_"] == 0
    assert attributes["log_partition_"].tolist() == [0.0, 0.0]
    assert attributes["log_partition_std_error_"].tolist() == [0.0, 0.0]
    assert np.isinf(attributes["effective_sample_size_"]).all()
    assert "log_partition_learned_" not in attributes
    np.testing.assert_allclose(fitted.scores, log_normal(X, [0.0, 0.0]), atol=1e-9)


@pytest.mark.parametrize("recalibrates", [True, False])
def test_a_rejected_tilt_gives_the_base(recalibrates):
    wrong = toy([-MEAN, -MEAN], log_partition=torch.ones(2))
    assert_is_base(fit(wrong, recalibrates=recalibrates))
    # nor is a gain believed that is but one standard error
    mean = np.average(X, axis=0, weights=WEIGHT)
    across = np.array([-mean[1], mean[0]])
    slope = 0.05 * (across + 0.1 * mean) / np.linalg.norm(mean)
    fitted = plain(toy([slope, slope], log_partition=torch.ones(2)))
    assert_is_base(fitted)
    base, tilted = fitted.attributes["history_"]["held_out_log_likelihood"]
    assert tilted > base


def decision(fitted):
    names = ("accepted_", "held_out_gain_", "held_out_gain_std_error_", "_summary")
    return [fitted.attributes[name] for name in names]


def test_the_decision_is_told_with_its_gain():
    accepted, gain, error, text = decision(plain(toy(SLOPES)))
    assert accepted == "tilt"
    task = make()
    values = exact_gains(task, SLOPES)
    assert gain == pytest.approx(held_mean(task, values), abs=0.05)
    share = task.held_weight.numpy() / task.held_weight.numpy().sum()
    spread = math.sqrt(np.square(share) @ np.square(values - held_mean(task, values)))
    assert 0.99 * spread < error < 1.1 * spread  # and a little for log Z
    assert text == f"tilt accepted: gain {gain:.3g} +- {error:.2g} nats per row on held-out rows"
    # rejected, found nothing, nothing trained, a candidate
    accepted, gain, error, text = decision(plain(toy([-MEAN, -MEAN])))
    assert accepted == "base"
    assert gain == pytest.approx(held_mean(task, exact_gains(task, [-MEAN] * 2)), abs=0.05)
    assert text.startswith(f"base kept; tilt rejected: gain {gain:.3g} +- {error:.2g} nats")
    found_nothing = decision(fit(toy(SLOPES, n_iter=0)))
    assert found_nothing == ["base", 0.0, 0.0, "base kept: training found no gain"]
    assert decision(fit(None))[::3] == ["base", "base alone: no energy was trained"]
    found = decision(fit(toy([[0.0, 0.0]] * 2, candidates=[candidate(gain=0.3, spread=0.01)])))
    assert found[0] == "candidate"
    assert found[1] == pytest.approx(0.3, abs=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LowEffectiveSampleSizeWarning)
        *_, text = decision(plain(toy([[-0.1, 0.0]] * 2), base=None))
    assert text.startswith("tilt kept without a test, as there is no base: gain ")


def exact_gains(task, slopes):
    """log N(x; s, I) - log N(x; 0, I) at the held-out rows of all members."""
    pairs = zip(slopes, task.held, strict=True)
    return np.concatenate([X[rows] @ s - np.square(s).sum() / 2 for s, rows in pairs])


def test_an_energy_of_the_user_that_is_rejected_is_told():
    for slopes, told in (([-MEAN, -MEAN], True), (SLOPES, False)):
        for own in (True, False):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fit(toy(slopes), own_energy=own)
            texts = [str(w.message) for w in caught]
            found = any("your energy_model was trained and rejected: base kept" in t for t in texts)
            assert found is (told and own)


def test_no_training_gives_the_base():
    assert_is_base(fit(None))
    assert_is_base(fit(toy(SLOPES, n_iter=0)))


def test_a_tilt_of_the_confining_distribution_is_always_kept():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LowEffectiveSampleSizeWarning)
        fitted = plain(toy([[-0.1, 0.0]] * 2), base=None)
    assert not fitted.model.is_untilted
    assert fitted.attributes["n_iter_"] == 7
    # it has three standard deviations of the columns, and moves by its variance times the slope
    center, scale = np.average(X, axis=0), 3.0 * X.std(axis=0)
    moved = center + [-0.1 * scale[0] ** 2, 0.0]
    truth = stats.multivariate_normal(moved, np.diag(scale**2)).logpdf(X)
    np.testing.assert_allclose(fitted.scores, truth, atol=0.05)


def test_a_warm_start_that_finds_nothing_better_stays_where_it_was():
    first = plain(toy(SLOPES))
    again = plain(toy(SLOPES, n_iter=0), task=make(start=first.model))
    assert again.attributes["n_iter_"] == 0
    np.testing.assert_allclose(again.scores, first.scores, atol=1e-9)
    assert_is_base(plain(toy(SLOPES, n_iter=0), task=make(start=fit(None).model)))


# ---------------------------------------------------------------- candidates


def other(task):
    """A model that no tilt below leads to."""
    wide = GaussianMixtureBase([1.0], [[0.0, 0.0]], np.diag([2.0, 3.0])[None])
    return TiltedMixture([wide, wide], [wide, wide], task.features, None)


def candidate(n_errors=None, gain=None, spread=1.0):
    """Candidate of a mean gain, in nats or in standard errors over the rows."""

    def make(task):
        values = torch.randn(len(task.held_weight), generator=torch.Generator().manual_seed(0))
        values = values.double() * spread
        share = task.held_weight / task.held_weight.sum()
        values -= share @ values
        error = (share.square() @ values.square()).sqrt()
        return Candidate(other(task), values + (gain if n_errors is None else n_errors * error))

    return make


def wins(fitted):
    """Whether a candidate is the model; else it is a tilt or the base."""
    return isinstance(fitted.model.bases[0], GaussianMixtureBase)


@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_a_candidate_wins_only_beyond_two_standard_errors(spread):
    nothing = [[0.0, 0.0]] * 2
    assert_is_base(fit(toy(nothing, candidates=[candidate(1.98, spread=spread)])))
    fitted = fit(toy(nothing, candidates=[candidate(2.02, spread=spread)]))
    assert wins(fitted)
    assert fitted.attributes["n_iter_"] == 0  # of energies that are not in it
    assert fitted.attributes["log_partition_"].tolist() == [0.0, 0.0]
    task = make()
    wide = stats.multivariate_normal(task.columns.center, np.diag(task.columns.scale**2 * [2, 3]))
    np.testing.assert_allclose(fitted.scores, wide.logpdf(X), atol=1e-9)


def test_a_candidate_has_to_beat_the_tilt_too():
    reached = np.square(MEAN).sum() / 2  # KL(N(a, I) || N(0, I)), about
    for gain, expected in ((0.5 * reached, False), (1.5 * reached, True)):
        fitted = plain(toy([MEAN, MEAN], candidates=[candidate(gain=gain, spread=0.01)]))
        assert wins(fitted) is expected
        assert fitted.attributes["n_iter_"] == (0 if expected else 7)


def test_the_best_of_several_candidates_wins():
    def marked(task, gain):
        found = candidate(gain=gain, spread=0.01)(task)
        found.model.gain = gain
        return found

    for order in ((0.1, 0.3, 0.2), (0.3, 0.2, 0.1), (0.1, 0.2, 0.3)):
        candidates = [lambda task, gain=gain: marked(task, gain) for gain in order]
        assert fit(toy([[0.0, 0.0]] * 2, candidates=candidates)).model.gain == 0.3


# ---------------------------------------------------------------- what a method leaves behind


@pytest.mark.parametrize(
    ("train", "n_iter"),
    [
        (toy(SLOPES), 7),
        (toy([-MEAN, -MEAN]), 0),
        (toy([-MEAN, -MEAN], candidates=[candidate(gain=0.5)]), 0),
        (None, 0),
    ],
    ids=["tilt", "base", "candidate", "nothing trained"],
)
def test_finish_sees_the_model_that_is_kept(train, n_iter):
    seen = []

    def finish(task, trained, model):
        seen.append((task, trained, model))
        return {"left_": model.is_untilted, "_mine": 3}

    fitted = fit(train, finish=finish)
    ((task, trained, model),) = seen
    assert model is fitted.model
    assert trained.n_iter == n_iter
    assert task.pool.shape[0] == 2
    assert fitted.attributes["left_"] is (n_iter == 0)
    assert fitted.attributes["_mine"] == 3


@pytest.mark.parametrize(("gap", "told"), [(0.4, False), (0.6, True)])
def test_a_wrong_learned_log_partition_is_told(gap, told):
    learned = torch.as_tensor(np.square(SLOPES).sum(1) / 2) + torch.tensor([0.0, gap])
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fitted = fit(toy(SLOPES, log_partition=learned))
    said = [str(w.message) for w in record if w.category is ConvergenceWarning]
    assert [text.startswith("the learned log Z differs") for text in said] == [True] * told
    np.testing.assert_array_equal(fitted.attributes["log_partition_learned_"], learned)


# ---------------------------------------------------------------- log Z


class Slopes(nn.Module):
    """f_k(z) = a_k . z."""

    def __init__(self, slopes):
        super().__init__()
        self.slopes = torch.as_tensor(slopes, dtype=torch.float64)

    def forward(self, z):
        return (z * self.slopes[:, None]).sum(-1)

    def member(self, k):
        return Slopes(self.slopes[k : k + 1])


def known(slopes):
    """Members N(0, I) tilted by a_k . x: log Z_k is |a_k|^2 / 2, but for the clipped tails."""
    n_members, d = np.shape(slopes)
    base = GaussianMixtureBase([1.0], np.zeros((1, d)), np.eye(d)[None])
    features = FeatureMap(AffineTransform(torch.zeros(d), torch.ones(d)))
    return TiltedMixture([base] * n_members, [base] * n_members, features, Slopes(slopes))


def measured(slopes, seed=0, n_partition_samples="auto"):
    with torch.no_grad():
        return measure(known(slopes), make(seed), n_partition_samples)


MEANS = [[0.7, -0.3], [-0.2, 0.5], [0.0, 0.9]]
TRUTH = np.square(MEANS).sum(1) / 2


def test_log_partition_of_a_known_model():
    partition = measured(MEANS)
    error = (partition.value.numpy() - TRUTH) / partition.std_error.numpy()
    assert np.abs(error).max() < 3.5
    # enough samples for .01 nats of their mean
    assert math.sqrt(partition.std_error.square().sum()) / 3 <= 0.01
    # effective sample size of an exponential tilt: exp(-|a|^2), here to 10 %
    share = partition.ess / partition.n_samples
    np.testing.assert_allclose(share, np.exp(-np.square(MEANS).sum(1)), rtol=0.1)


@pytest.mark.filterwarnings("ignore::skebm.exceptions.LowEffectiveSampleSizeWarning")
def test_standard_error_is_honest():
    errors = []
    for seed in range(40):
        partition = measured(MEANS, seed, n_partition_samples=1000)
        errors.append((partition.value.numpy() - TRUTH) / partition.std_error.numpy())
    errors = np.array(errors)
    # 120 independent standardised errors
    assert abs(errors.mean()) < 0.35
    assert 0.75 < errors.std() < 1.25
    assert (np.abs(errors) > 1.96).mean() < 0.12


@pytest.mark.filterwarnings("ignore::skebm.exceptions.LowEffectiveSampleSizeWarning")
@pytest.mark.parametrize("n", [1000, 30_000])
def test_samples_for_log_partition_are_counted(n):
    assert 0.7 * n <= measured(MEANS, n_partition_samples=n).n_samples <= n


def test_large_standard_error_is_told():
    with pytest.warns(LowEffectiveSampleSizeWarning, match="raise n_partition_samples"):
        partition = measured(MEANS, n_partition_samples=500)
    assert (partition.ess <= 500).all()
    assert (partition.ess > 10).all()


def test_low_effective_sample_size_is_told():
    # e^-16 of the samples count
    with pytest.warns(LowEffectiveSampleSizeWarning, match="not to be trusted"):
        measured([[4.0]], n_partition_samples=10_000)


def test_annealing_where_the_base_covers_the_model_badly():
    slopes = [[4.0], [0.3]]  # e^-16 of the samples count for the first
    model, t = known(slopes), torch.linspace(-12.0, 12.0, 20_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        logs = torch.stack([q.log_prob(t) for q in model.bases]) + model.tilt(t.expand(2, -1, 1))
    truth = (logs.logsumexp(1) + math.log(t[1] - t[0])).numpy()
    partition = measured(slopes)
    assert partition.method == "annealed"
    gap = np.abs(partition.value.numpy() - truth)
    assert (gap < 4 * partition.std_error.numpy()).all()
    assert (partition.std_error < 0.05).all()
    # importance sampling misses more often than not, whatever it claims
    with pytest.warns(LowEffectiveSampleSizeWarning):
        poor = [measured(slopes, seed, n_partition_samples=20_000) for seed in range(10)]
    assert np.median([abs(p.value[0].item() - truth[0]) for p in poor]) > 0.3
