"""p-values, discoveries and thresholds of a fitted detector, beside what they promise."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control
from sklearn.base import clone

from skebm import NCEDensity, OutlierDetector
from skebm.estimators._base import parameters
from skebm.estimators._calibrated import CalibratedDetector


@parameters
class Calibrated(CalibratedDetector, NCEDensity):
    """The quickest detector: Gaussians."""

    base: str = "gaussian"
    energy_model: None = None
    random_state: int = 0

    _parameter_constraints = {
        **CalibratedDetector._parameter_constraints,
        **NCEDensity._parameter_constraints,
    }


def normal(n, seed, d=2):
    return np.random.default_rng(seed).normal(size=(n, d))


reserved_or_not = pytest.mark.parametrize("fraction", [None, 0.5])


def test_p_values_beside_rows_set_aside_are_exact():
    """The model is as it is; rows that are set aside, and new ones, are drawn again and again."""
    est = Calibrated(calibration_fraction=0.3, smoothing=0.5).fit(normal(100, 0))
    levels, shares = np.array([0.05, 0.1, 0.25, 0.5, 0.75]), []
    for seed in range(300):
        rows = normal(119, 1 + seed)
        est._calibrate(rows[:19], np.ones(19), None)
        shares.append((est.p_values(rows[19:])[:, None] <= levels + 1e-12).mean(axis=0))
    error = np.std(shares, axis=0) / np.sqrt(len(shares))
    assert (error < 0.01).all()
    assert (np.abs(np.mean(shares, axis=0) - levels) < 4.0 * error).all()


def test_rows_set_aside_teach_nothing():
    X, new = normal(200, 0), normal(50, 1)
    est = Calibrated(calibration_fraction=0.25).fit(X)
    apart = np.isnan(est.out_of_fold_scores_)
    assert apart.sum() == len(est.calibration_scores_) == 50
    np.testing.assert_array_equal(est.out_of_fold_members_ < 0, apart)
    np.testing.assert_array_equal(np.isnan(est.out_of_fold_decision_function_), apart)
    np.testing.assert_allclose(est.calibration_scores_, est.score_samples(X[apart]))
    other = np.where(apart[:, None], 100.0 + X, X)
    changed = clone(est).fit(other)
    np.testing.assert_array_equal(changed.score_samples(new), est.score_samples(new))
    assert changed.calibration_scores_.max() < est.calibration_scores_.min()
    assert (changed.p_values(new) == 1.0).all()
    assert est.p_values(new).min() < 0.2
    # the same as of rows of weight zero in their place
    learned = NCEDensity(base="gaussian", energy_model=None, random_state=0).fit(X[~apart])
    np.testing.assert_allclose(est.score_samples(new), learned.score_samples(new))


def test_without_them_a_row_is_compared_with_each_fold_by_the_member_that_has_not_seen_it():
    X, new = normal(90, 0), normal(30, 1)
    est = Calibrated(n_members=3).fit(X)
    by_member = est._member_scores(new)
    held, judges = est.out_of_fold_scores_, est.out_of_fold_members_
    assert set(judges) == {0, 1, 2}
    odder = sum((held[judges == k] <= by_member[k][:, None]).sum(axis=1) for k in range(3))
    np.testing.assert_allclose(est.p_values(new), (1 + odder) / 91)


def test_their_level_is_close_to_what_is_asked_for():
    shares = []
    for seed in range(25):
        est = Calibrated(random_state=seed).fit(normal(150, seed))
        p_values = est.p_values(normal(1000, 1000 + seed))
        shares.append([np.mean(p_values <= level) for level in (0.05, 0.1, 0.3)])
    mean, error = np.mean(shares, axis=0), np.std(shares, axis=0) / np.sqrt(len(shares))
    assert (mean <= np.array([0.05, 0.1, 0.3]) + 3.0 * error).all()
    assert (mean >= np.array([0.035, 0.08, 0.27])).all()


@reserved_or_not
def test_discoveries_are_those_of_the_true_density_and_few_are_false(fraction):
    false, ours, best = [], 0, 0
    for seed in range(15):
        est = Calibrated(calibration_fraction=fraction, random_state=seed).fit(normal(1000, seed))
        X, odd = normal(200, 100 + seed), np.arange(200) < 20
        X[odd] *= 3.0
        found = est.discoveries(X, fdr=0.2)
        exact = np.exp(-0.5 * (X**2).sum(axis=1))  # that a normal row is as far from the mean
        best += (false_discovery_control(exact) <= 0.2)[odd].sum()
        ours += found[odd].sum()
        false.append(found[~odd].sum() / max(found.sum(), 1))
    assert np.mean(false) <= 0.2 * 0.9 + 2.0 * np.std(false) / np.sqrt(len(false))
    assert best > 150
    assert ours >= 0.8 * best


def test_discoveries_that_cannot_be_are_warned_of():
    est = Calibrated().fit(normal(100, 0))
    clean, odd = normal(300, 1), normal(1, 2) + 100.0
    with pytest.warns(
        UserWarning, match=r"fewer than 30 among 300 rows.*at least 0.0099.*with 100"
    ):
        assert not est.discoveries(np.vstack([odd, clean[1:]])).any()
    np.testing.assert_array_equal(est.discoveries(np.vstack([odd, clean[:9]])), np.arange(10) < 1)
    with pytest.raises(ValueError, match="fdr=1.5 must be a number between 0 and 1"):
        est.discoveries(clean, fdr=1.5)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_the_threshold_of_a_false_alarm_rate_is_the_p_value(rate):
    est = Calibrated(calibration_fraction=0.5).fit(normal(400, 0))
    assert est.set_threshold(false_alarm_rate=rate) is est
    new = normal(2000, 1)
    np.testing.assert_array_equal(est.predict(new) < 0, est.p_values(new) <= rate)
    assert est.out_of_fold_offset_ == est.offset_
    assert est.contamination == "auto"


@reserved_or_not
def test_a_moved_threshold_is_that_of_a_fit(fraction):
    X, new = normal(300, 0), normal(100, 1)
    est = Calibrated(calibration_fraction=fraction).fit(X)
    assert (
        est.set_threshold(false_alarm_rate=0.2).offset_
        > est.set_threshold(contamination=0.01).offset_
    )
    given = Calibrated(calibration_fraction=fraction, contamination=0.1).fit(X)
    est.set_threshold(contamination=0.1)
    assert est.offset_ == given.offset_ == given.out_of_fold_offset_ == est.out_of_fold_offset_
    np.testing.assert_allclose(
        est.out_of_fold_decision_function_, given.out_of_fold_decision_function_
    )
    np.testing.assert_array_equal(est.predict(new), given.predict(new))
    assert clone(est).get_params() == est.get_params()


def test_wishes_that_cannot_be_met_are_refused():
    est = Calibrated().fit(normal(98, 0))
    before = est.offset_
    with pytest.raises(ValueError, match=r"at least 0.01, or there have to be 199 rows"):
        est.set_threshold(false_alarm_rate=0.005)
    for wish in ({}, {"contamination": 0.1, "false_alarm_rate": 0.1}):
        with pytest.raises(ValueError, match="either contamination or false_alarm_rate"):
            est.set_threshold(**wish)
    with pytest.raises(ValueError, match=r"contamination=0.7 must be a number in \(0, 0.5\]"):
        est.set_threshold(contamination=0.7)
    with pytest.raises(ValueError, match="false_alarm_rate=1 must be a number between"):
        est.set_threshold(false_alarm_rate=1)
    assert est.offset_ == before
    with pytest.raises(ValueError, match="sets 0 of 98 rows.*aside"):
        Calibrated(calibration_fraction=0.001).fit(normal(98, 0))
    with pytest.raises(ValueError, match="'calibration_fraction' parameter"):
        Calibrated(calibration_fraction=1.0).fit(normal(98, 0))


def test_groups_are_set_aside_and_counted_as_a_whole():
    random = np.random.default_rng(0)
    groups = random.permutation(np.repeat([f"patient {i}" for i in range(40)], 5))
    X = normal(200, 1)
    est = Calibrated(calibration_fraction=0.5).fit(X, groups=groups)
    apart = np.isnan(est.out_of_fold_scores_)
    assert apart.sum() == 100
    assert not set(groups[apart]) & set(groups[~apart])
    assert est.p_values([[9.0, 9.0]]) == pytest.approx(1 / 21)
    assert Calibrated().fit(X, groups=groups).p_values([[9.0, 9.0]]) == pytest.approx(1 / 41)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        est.fit(X, groups=groups[1:])


@reserved_or_not
def test_rows_of_weight_zero_are_left_out_and_others_count_by_it(fraction):
    X = normal(120, 0)
    weight = np.where(np.arange(120) < 20, 0.0, 1.0 + (np.arange(120) % 2))
    est = Calibrated(calibration_fraction=fraction).fit(X, sample_weight=weight)
    assert len(est.out_of_fold_p_values_) == 100
    effective = 150**2 / 250  # (sum w)^2 / sum w^2
    if fraction is None:
        assert est.p_values([[50.0, 50.0]]) == pytest.approx(1 / (1 + effective))
    else:
        assert len(est.calibration_scores_) == 50
        assert 0 < 1 / est.p_values([[50.0, 50.0]]).item() - 1 <= 50
    labels = clone(est).fit_predict(X, sample_weight=weight)
    assert len(labels) == 120


@reserved_or_not
def test_p_values_of_training_rows_are_ranks_within_what_shares_a_judge(fraction):
    est = Calibrated(calibration_fraction=fraction).fit(normal(160, 0))
    scores = est.out_of_fold_scores_.copy()
    if fraction is not None:
        scores[np.isnan(scores)] = est.calibration_scores_
    for k in np.unique(est.out_of_fold_members_):
        own = est.out_of_fold_members_ == k
        ranks = scores[own].argsort().argsort() + 1
        np.testing.assert_allclose(est.out_of_fold_p_values_[own], ranks / own.sum())


def test_ties_are_broken_at_random_on_request_only():
    pandas = pytest.importorskip("pandas")
    X = pandas.DataFrame({"colour": np.random.default_rng(0).choice(["red", "blue"], 300)})
    est = Calibrated(base="auto", n_members=2).fit(X)
    every, broken = est.p_values(X), est.p_values(X, random_state=0)
    assert len(np.unique(every)) == 2
    assert len(np.unique(broken)) > 50
    assert (broken <= every + 1e-12).all()
    np.testing.assert_array_equal(broken, est.p_values(X, random_state=0))


@reserved_or_not
def test_states_that_fit_has_not_met_have_p_values(fraction):
    pandas = pytest.importorskip("pandas")
    random = np.random.default_rng(0)
    X = pandas.DataFrame({"colour": random.choice(["red", "blue"], 300), "x": normal(300, 0)[:, 0]})
    est = Calibrated(base="auto", n_members=2, calibration_fraction=fraction).fit(X)
    new = pandas.DataFrame({"colour": ["red", "green", None], "x": [0.0, 0.0, 0.0]})
    with pytest.warns(UserWarning, match="which fit has not met"):
        p_values = est.p_values(new)
    assert p_values[0] > 0.3
    assert (p_values[1:] < 0.05).all()


def test_a_fit_that_fails_leaves_everything_as_it_was(monkeypatch):
    est = Calibrated(calibration_fraction=0.5).fit(normal(100, 0))
    before = est.p_values(normal(10, 1))

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Calibrated, "_calibrate", fail)
    with pytest.raises(KeyboardInterrupt):
        est.fit(3.0 + normal(80, 2))
    np.testing.assert_array_equal(est.p_values(normal(10, 1)), before)
    assert len(est.out_of_fold_scores_) == 100


@reserved_or_not
def test_views_keep_the_promise(fraction):
    p_values, flagged = [], []
    for seed in range(12):
        est = OutlierDetector(calibration_fraction=fraction, random_state=seed)
        est.fit(normal(200, seed)).set_threshold(false_alarm_rate=0.1)
        new = normal(1000, 100 + seed)
        p_values.append(np.mean(est.p_values(new) <= 0.1))
        flagged.append(np.mean(est.predict(new) < 0))
    for shares in (p_values, flagged):
        error = np.std(shares) / np.sqrt(len(shares))
        assert error < 0.015
        assert abs(np.mean(shares) - 0.1) < 3.0 * error + 0.01
    if fraction is not None:
        np.testing.assert_array_equal(p_values, flagged)
