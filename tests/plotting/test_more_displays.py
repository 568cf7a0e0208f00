"""Calibration, stages and chains."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest, norm

pytest.importorskip("matplotlib").use("Agg")

import matplotlib.pyplot as plt

from skebm import NCEDensity
from skebm.datasets import TwoMoons, make_bayesian_network
from skebm.plotting import CalibrationDisplay, ChainsDisplay, SamplesDisplay, StagesDisplay


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


class Normal:
    """A density that is known, of any scale."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def score_samples(self, X):
        return norm.logpdf(np.asarray(X), scale=self.scale).sum(axis=1)

    def sample(self, n_samples, random_state=None):
        return np.random.default_rng(random_state).normal(scale=self.scale, size=(n_samples, 2))


def test_distances_are_those_of_kolmogorov_and_smirnov():
    levels = np.random.default_rng(0).beta(2.0, 3.0, size=(200, 2))
    display = CalibrationDisplay(levels, names=["a", "b"])
    expected = [kstest(column, "uniform").statistic for column in levels.T]
    np.testing.assert_allclose(display.distances_, expected)


def test_band_has_its_level():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        display = CalibrationDisplay(rng.uniform(size=(100, 1)), names=["x"])
        inside.append(display.distances_[0] < display.bands_[0])
    assert abs(np.mean(inside) - 0.95) < 3 * (0.95 * 0.05 / 400) ** 0.5 + 0.01


def test_levels_are_probability_integrals():
    X = np.random.default_rng(0).normal(size=(300, 2))
    display = CalibrationDisplay.from_estimator(Normal(), X, n_draws=20_000, random_state=1)
    assert display.names == ["log-density", "x0", "x1"]
    np.testing.assert_allclose(display.levels[:, 1:], norm.cdf(X), atol=0.02)
    # A row lies below a threshold on its density if it lies far out.
    np.testing.assert_allclose(display.levels[:, 0], np.exp(-0.5 * (X**2).sum(1)), atol=0.02)
    assert (display.distances_ < display.bands_).all()


def test_a_wrong_width_is_seen():
    X = np.random.default_rng(0).normal(size=(300, 2))
    display = CalibrationDisplay.from_estimator(Normal(1.5), X, random_state=1)
    assert (display.distances_ > display.bands_).all()


def test_ties_are_spread_and_categories_have_no_level():
    class Table:
        def sample(self, n_samples, random_state=None):
            return make_bayesian_network(n_samples, random_state=random_state)

        def score_samples(self, X):
            return np.zeros(len(X))

    X = make_bayesian_network(500, random_state=3)
    X.loc[:99, "age"] = np.nan
    display = CalibrationDisplay.from_estimator(Table(), X, random_state=4)
    assert list(display.names) == ["log-density", "age", "spend", "visits"]
    assert np.isnan(display.levels[:100, 1]).all()
    assert not np.isnan(display.levels[:, 2:]).any()
    assert (display.distances_ < display.bands_).all()  # counts and equal scores included
    with pytest.raises(ValueError, match="Column 'region' holds categories"):
        CalibrationDisplay.from_estimator(Table(), X, columns=["region"])


def test_calibration_is_drawn():
    display = CalibrationDisplay(np.random.default_rng(0).uniform(size=(50, 2)), names=["a", "b"])
    texts = [text.get_text() for text in display.plot().ax_.get_legend().get_texts()]
    assert texts == ["95% band of a right model", "a", "b"]


def test_stages_are_those_of_the_fit():
    moons = TwoMoons()
    X, fresh = moons.sample(400, random_state=0), moons.sample(1000, random_state=1)
    est = NCEDensity(base="gaussian", n_members=2, random_state=0).fit(X)
    display = StagesDisplay.from_estimator(est, fresh)
    assert display.names == ("base", "tilt, held-out rows", "model, new rows")
    gain = est.score_samples(fresh) - est.base_score_samples(fresh)
    expected = [0.0, est.held_out_gain_, gain.mean()]
    np.testing.assert_allclose(display.gains, expected)
    np.testing.assert_allclose(
        display.errors[1:], [est.held_out_gain_std_error_, gain.std(ddof=1) / 1000**0.5]
    )
    labels = [text.get_text() for text in display.ax_.get_yticklabels()]
    assert labels == list(display.names)


def test_stages_of_a_game_and_a_rejected_tilt():
    class Game:
        stages_ = {"flow": -2.0, "energy_after_game": -1.5}
        held_out_gain_, held_out_gain_std_error_, accepted_ = 0.01, 0.02, "base"

    display = StagesDisplay.from_estimator(Game(), plot=False)
    assert display.names == ("flow", "energy after game", "tilt rejected, held-out rows")
    np.testing.assert_allclose(display.gains, [0.0, 0.5, 0.01])


def test_chains_show_traces_and_ranks():
    samples = np.random.default_rng(0).normal(size=(100, 3, 5))
    samples[:, 0] += 5.0
    display = ChainsDisplay(samples, names=list("abcde")).plot()
    assert display.ax_.shape == (3, 2)
    assert display.figure_.get_suptitle() == "3 of 5 columns"
    assert len(display.ax_[0, 0].lines) == 3
    low = display.ax_[0, 1].patches[0].get_data().values
    assert low[0] == 0  # the chain that lies high has no low rank
    assert low.sum() == 100
    with pytest.raises(ValueError, match="samples must have the shape"):
        ChainsDisplay(samples[:, 0])


def test_a_cut_table_is_said_to_be_cut():
    data = pd.DataFrame(np.random.default_rng(0).normal(size=(50, 5)), columns=list("abcde"))

    class Model(Normal):
        def sample(self, n_samples, random_state=None):
            return data.sample(n_samples, random_state=random_state)

    display = SamplesDisplay.from_estimator(Model(), data, random_state=0)
    assert display.figure_.legends[0].get_title().get_text() == "3 of 5 columns"
    chosen = SamplesDisplay.from_estimator(Model(), data, columns=["a", "b", "c"], random_state=0)
    assert chosen.figure_.legends[0].get_title().get_text() == ""
