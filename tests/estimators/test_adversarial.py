"""AdversarialEBM: the game, the bound that the generator gives, and samples from the generator."""

import copy
import math
import pickle
from functools import cache, partial

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.exceptions import NotFittedError

from skebm import TRUSTED_TYPES, AdversarialEBM, Network
from skebm._engine import Budget
from skebm.bases import _flow_training
from skebm.datasets import Rings, TwoMoons
from skebm.training import adversarial, distributions

GENERATORS = ("flow", "implicit")
every_generator = pytest.mark.parametrize("generator", GENERATORS)

NETWORK = {
    "hidden_layer_sizes": (16,), "learning_rate": 0.01, "max_epochs": 60, "batch_size": 128,
    "patience": 1000,
}  # fmt: skip
TINY = {"max_epochs": 2, "n_partition_samples": 1000}

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of log Z", "ignore:log Z rests")


@pytest.fixture(autouse=True, scope="module")
def quick_parts():
    """Flows that fit in a fraction of a second, and shorter stages of the generator alone."""
    with pytest.MonkeyPatch.context() as patch:
        small = partial(distributions.build_flow, n_layers=2, hidden=(16,), n_bins=4)
        patch.setattr(distributions, "build_flow", small)
        patch.setattr(_flow_training, "FLOW_BUDGET", Budget(epochs=10, steps=1))
        patch.setattr(adversarial, "HEAD_START", 40)
        patch.setattr(adversarial, "GENERATOR_STEPS", 50)
        patch.setattr(adversarial, "SETTLING_STEPS", dict.fromkeys(adversarial.SETTLING_STEPS, 100))
        patch.setattr(
            adversarial, "SETTLING_SAMPLES", dict.fromkeys(adversarial.SETTLING_SAMPLES, 128)
        )
        yield


@pytest.fixture
def short_stages(monkeypatch):
    """For what neither the stages of the generator nor the bound have a part in."""
    monkeypatch.setattr(adversarial, "GENERATOR_STEPS", 10)
    monkeypatch.setattr(adversarial, "BOUND_SAMPLES", dict.fromkeys(GENERATORS, 2048))
    settling = dict.fromkeys(adversarial.SETTLING_STEPS, 10)
    monkeypatch.setattr(adversarial, "SETTLING_STEPS", settling)


def density(**options):
    """An estimator; options are those of its network, too."""
    network = {name: options.pop(name, value) for name, value in NETWORK.items()}
    options = {"n_members": 2, "random_state": 0, "n_partition_samples": 20_000} | options
    return AdversarialEBM(**{"energy_model": Network(**network)} | options)


@cache
def moons(n=500):
    return TwoMoons().sample(n, random_state=0)


@cache
def new_moons():
    return TwoMoons().sample(4000, random_state=1)


def fitted(generator="flow", seed=0):
    return fitted_once(generator, seed)


@cache  # by position: it would take arguments by name, or left out, for others
def fitted_once(generator, seed):
    return density(generator=generator, random_state=seed).fit(moons())


def gains(estimator, rows):
    return estimator.score_samples(rows) - estimator.base_score_samples(rows)


def gap(estimator):
    """Of log Z over the bound, and its standard error, (K,) each."""
    error = np.hypot(estimator.log_partition_std_error_, estimator.log_partition_bound_std_error_)
    return estimator.log_partition_ - estimator.log_partition_bound_, error


# ---------------------------------------------------------------------- a density


@every_generator
def test_learns_something(generator):
    # otherwise the tests below would be about bases only
    estimator = fitted(generator)
    assert estimator.n_iter_ > 0
    assert gains(estimator, new_moons()).mean() > 0.05
    divergence = TwoMoons().log_density(new_moons()) - estimator.score_samples(new_moons())
    assert divergence.mean() > 0.0  # of Kullback and Leibler


def test_improves_on_the_flow_on_rings():
    rows, new = Rings().sample(1000, random_state=0), Rings().sample(4000, random_state=1)
    estimator = density(hidden_layer_sizes=(32,), learning_rate=0.005, max_epochs=30).fit(rows)
    assert gains(estimator, new).mean() > 0.05


@pytest.mark.usefixtures("short_stages")
@every_generator
def test_without_a_gradient_penalty_no_gradient_is_computed(generator, monkeypatch):
    rows, options = moons(100), {"generator": generator, **TINY}
    nearly = density(gradient_penalty=1e-30, **options).fit(rows)

    def refuse(energy, z):
        raise AssertionError("the penalty is not wanted")

    monkeypatch.setattr(adversarial, "gradient_penalties", refuse)
    without = density(gradient_penalty=0.0, **options).fit(rows)
    np.testing.assert_allclose(
        without.history_["train_loss"][1:], nearly.history_["train_loss"][1:], rtol=1e-4
    )
    np.testing.assert_allclose(
        without.score_samples(rows), nearly.score_samples(rows), rtol=1e-4, atol=1e-4
    )


# ---------------------------------------------------------------------- bound


@every_generator
@pytest.mark.parametrize("seed", [0, 1])
def test_bound_is_below_log_z(generator, seed):
    estimator = fitted(generator, seed)
    assert estimator.log_partition_bound_.shape == (2,)
    assert estimator.log_partition_bound_.dtype == np.float64
    assert np.isfinite(estimator.log_partition_bound_).all()
    assert (estimator.log_partition_bound_std_error_ < 0.02).all()
    above, error = gap(estimator)
    assert (above > -4.0 * error - 1e-12).all()


@every_generator
def test_bound_is_below_log_z_without_base(generator):
    estimator = density(generator=generator, base=None).fit(moons())
    above, error = gap(estimator)
    assert (above > -4.0 * error - 1e-12).all()


def test_bound_says_how_far_the_generator_is_from_the_model():
    # the divergence, of one member, by the densities of both
    estimator = density(n_members=1).fit(moons())
    assert estimator.n_iter_ > 0
    rows = estimator.generator_.sample(20_000, random_state=0)
    terms = estimator.generator_.score_samples(rows) - estimator.score_samples(rows)
    divergence, its_error = terms.mean(), terms.std() / math.sqrt(len(terms))
    above, error = gap(estimator)
    assert above[0] == pytest.approx(divergence, abs=4.0 * math.hypot(error[0], its_error))


def test_bound_is_tight_where_the_flow_follows(monkeypatch):
    # a flow that has learned nothing yet, and an energy that learns a correlation
    monkeypatch.setattr(_flow_training, "FLOW_BUDGET", Budget(epochs=1, steps=1))
    rng = np.random.default_rng(0)
    rows = rng.multivariate_normal([0.0, 0.0], [[1.0, 0.8], [0.8, 1.0]], 1000)
    estimator = density(generator_learning_rate=5e-3, max_epochs=100).fit(rows)
    above, error = gap(estimator)
    assert (above > -4.0 * error - 1e-12).all()
    assert (above < 0.03 + 4.0 * error).all()


# ---------------------------------------------------------------------- generator


@every_generator
def test_generator_draws_rows_in_the_units_of_X(generator):
    rows = np.insert(moons(200) * [100.0, 0.01] + [3e4, -7.0], 1, 5.0, axis=1)
    made = density(generator=generator, **TINY).fit(rows).generator_
    drawn = made.sample(501, random_state=0)
    assert drawn.shape == (501, 3)
    assert drawn.dtype == np.float64
    assert (drawn[:, 1] == 5.0).all()
    for column in (0, 2):
        assert drawn[:, column].mean() == pytest.approx(
            rows[:, column].mean(), abs=0.3 * rows[:, column].std()
        )
        assert drawn[:, column].std() == pytest.approx(rows[:, column].std(), rel=0.35)
    np.testing.assert_array_equal(drawn, made.sample(501, random_state=0))
    assert (drawn != made.sample(501, random_state=1))[:, 0].any()
    assert made.sample().shape == (1, 3)
    assert hasattr(made, "score_samples") == (generator == "flow")


@every_generator
def test_generator_is_stored_as_arrays(generator):
    skops, made = pytest.importorskip("skops.io"), fitted(generator).generator_
    again = skops.loads(skops.dumps(made), trusted=TRUSTED_TYPES)
    np.testing.assert_array_equal(again.sample(9, random_state=0), made.sample(9, random_state=0))


def test_density_of_a_generator_that_is_a_flow_is_normalised():
    made = fitted("flow").generator_
    across, up = np.linspace(-8.0, 9.0, 301), np.linspace(-6.0, 6.5, 241)
    points = np.stack(np.meshgrid(across, up, indexing="ij"), axis=-1).reshape(-1, 2)
    volume = (across[1] - across[0]) * (up[1] - up[0])
    assert np.exp(made.score_samples(points)).sum() * volume == pytest.approx(1.0, abs=0.01)
    assert made.score(points) == pytest.approx(made.score_samples(points).mean())


# ---------------------------------------------------------------------- sampling


@every_generator
def test_samples_from_the_generator_follow_the_model(generator):
    estimator = fitted(generator)
    base = estimator.sample(4000, random_state=1)
    drawn = estimator.sample(4000, random_state=2, start="generator")
    assert drawn.shape == (4000, 2)
    assert drawn.dtype == np.float64
    # repeated rows make p small; draws that nothing corrects have p < 1e-20 in some column
    for column in (base.T, drawn.T), (base.sum(1)[None], drawn.sum(1)[None]):
        for a, b in zip(*column, strict=True):
            assert stats.ks_2samp(a, b).statistic < 0.06
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(base.T), atol=0.15)
    level = estimator.score(base)
    assert estimator.score(drawn) == pytest.approx(level, abs=0.08)
    # and better than the generator's own
    raw = estimator.score(estimator.generator_.sample(4000, random_state=2))
    assert abs(estimator.score(drawn) - level) < abs(raw - level)


def test_rows_of_the_generator_are_repeated_as_often_as_their_cap_allows(monkeypatch):
    # one row in a hundred weighs 500 times the others: weights above ten times the mean repeat
    class Made:
        def sample(self, n, rng):
            return np.arange(n, dtype=float)[:, None]

        def score_samples(self, rows):
            return np.zeros(len(rows))

    estimator = density()
    estimator.generator_ = Made()
    monkeypatch.setattr(
        AdversarialEBM,
        "_log_density",
        lambda self, X: np.where(X[:, 0] % 100 == 0, np.log(500), 0.0),
    )
    rows = estimator._rows_by_importance(20_000, 0)
    assert rows.shape == (20_000, 1)
    _, copies = np.unique(rows, return_counts=True)
    assert copies.max() < 50  # 500 / 5.99 / 10, in several batches of the same names
    heavy = (rows[:, 0] % 100 == 0).mean()
    assert heavy == pytest.approx(500 / (500 + 99), abs=0.02)


def test_draws_of_an_implicit_generator_are_left_alone_on_demand():
    estimator = fitted("implicit")
    raw = estimator.sample(200, random_state=0, start="generator", n_steps=0)
    moved = estimator.sample(200, random_state=0, start="generator")
    few = estimator.sample(200, random_state=0, start="generator", n_steps=100)
    np.testing.assert_array_equal(moved, few)  # a hundred by default
    assert (raw != moved).any(axis=1).mean() > 0.9


@every_generator
def test_samples_from_the_generator_are_reproducible(generator):
    estimator = fitted(generator)
    draw = partial(estimator.sample, start="generator", n_steps=2)
    np.testing.assert_array_equal(draw(30, 0), draw(30, 0))
    assert (draw(30, 0) != draw(30, 1)).any()
    assert draw(1, 0).shape == (1, 2)
    before = torch.get_rng_state()
    draw(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_arguments_of_sample_are_refused():
    for start in ("rows", None, 3):
        with pytest.raises(ValueError, match=r"start=.* must be 'base' or 'generator'"):
            fitted().sample(3, start=start)
    for start in ("base", "generator"):
        for n in (0, -3, 2.5, "ten"):
            with pytest.raises(ValueError, match="n_samples"):
                fitted().sample(n, start=start)
        for n in (-1, 2.5):
            with pytest.raises(ValueError, match="n_steps"):
                fitted().sample(3, start=start, n_steps=n)
        with pytest.raises(NotFittedError):
            density().sample(3, start=start)


# ---------------------------------------------------------------------- parameters and state


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("generator", "gan"), ("generator", None), ("generator_learning_rate", 0.0),
        ("generator_learning_rate", "quick"), ("gradient_penalty", -0.1), ("flow", 3),
        ("flow", "nonsense"), ("base", "gaussian"),
    ],
)  # fmt: skip
def test_bad_parameters_are_refused_by_name(parameter, value):
    with pytest.raises(ValueError, match=parameter):
        density(**{parameter: value}).fit(moons(50))


@every_generator
def test_pickle(generator):
    estimator = fitted(generator)
    payload = pickle.dumps(estimator)
    assert b"skorch" not in payload
    assert len(payload) < 1_000_000
    twin = pickle.loads(payload)
    np.testing.assert_array_equal(twin.score_samples(moons()), estimator.score_samples(moons()))
    np.testing.assert_array_equal(
        twin.sample(20, 0, start="generator"), estimator.sample(20, 0, start="generator")
    )
    np.testing.assert_array_equal(twin.generator_.sample(20, 0), estimator.generator_.sample(20, 0))


@pytest.mark.usefixtures("short_stages")
def test_refit_keeps_nothing_of_the_first():
    estimator = density(generator="implicit", **TINY).fit(moons(100)[:, :1])
    estimator.set_params(generator="flow").fit(moons(100))
    other = density(generator="flow", **TINY).fit(moons(100))
    np.testing.assert_array_equal(estimator.score_samples(moons()), other.score_samples(moons()))
    assert set(vars(estimator)) == set(vars(other))
    assert {name for name in vars(other) if name.startswith("_")} == {
        "_columns",
        "_schema",
        "_seed",
        "_summary",
    }
    assert not any(p.requires_grad for p in estimator.model_.parameters())
    assert estimator.generator_.sample(3).shape == (3, 2)


@every_generator
def test_warm_start_goes_on(generator):
    estimator = copy.deepcopy(fitted(generator)).set_params(warm_start=True)
    before = estimator.score(new_moons())
    estimator.set_params(energy_model__max_epochs=5).fit(moons())
    assert estimator.score(new_moons()) > before - 0.05
    above, error = gap(estimator)
    assert (above > -4.0 * error - 1e-12).all()


@pytest.mark.usefixtures("short_stages")
@every_generator
def test_fits_are_bit_identical(generator):
    options = {"generator": generator, "device": "cpu", **TINY}
    mine, other = (density(**options).fit(moons(100)) for _ in range(2))
    for name in ("log_partition_", "log_partition_bound_", "log_partition_bound_std_error_"):
        np.testing.assert_array_equal(getattr(other, name), getattr(mine, name))
    np.testing.assert_array_equal(other.score_samples(moons()), mine.score_samples(moons()))
    np.testing.assert_array_equal(other.generator_.sample(9, 0), mine.generator_.sample(9, 0))
    third = density(**options | {"random_state": 1}).fit(moons(100))
    assert (third.score_samples(moons()) != mine.score_samples(moons())).any()
    assert (third.generator_.sample(9, 0) != mine.generator_.sample(9, 0)).any()


# ---------------------------------------------------------------------- odd data


@pytest.mark.usefixtures("short_stages")
@every_generator
@pytest.mark.parametrize("kind", ["one column", "three columns", "ties", "few"])
def test_other_rows(generator, kind):
    rng = np.random.default_rng(0)
    if kind == "ties":
        rows = rng.poisson(6.0, size=(200, 2)).astype(float)
    else:
        shape = {"one column": (200, 1), "three columns": (200, 3), "few": (20, 2)}[kind]
        rows = rng.gamma(2.0, size=shape)
    estimator = density(generator=generator, max_epochs=10, n_members=4 if kind == "few" else 2)
    estimator.fit(rows)
    assert np.isfinite(estimator.score_samples(rows)).all()
    for start in ("base", "generator"):
        drawn = estimator.sample(10, start=start)
        assert drawn.shape == (10, rows.shape[1])
        assert np.isfinite(drawn).all()
    if kind == "ties":  # no spikes at the integers
        peaks = np.exp(estimator.score_samples(rows))
        assert peaks.max() < 2.5 * stats.poisson(6.0).pmf(6) ** 2
    above, error = gap(estimator)
    assert (above > -4.0 * error - 1e-12).all()
