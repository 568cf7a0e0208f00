"""p-values and thresholds of scores alone, whose distributions are known."""

import numpy as np
import pytest
from scipy.stats import norm

from skebm.estimators._calibration import Calibration, calibration_weight

N_REPETITIONS = 4000


def plain(scores):
    """Calibration by rows of one judge that count alike."""
    return Calibration(scores, np.ones(len(scores)), np.zeros(len(scores), dtype=int))


def is_promised(p_values, level):
    """Whether no larger share of p-values than the level is up to it, but for what chance does."""
    chance = 4.0 * np.sqrt(level * (1.0 - level) / len(p_values))
    return np.mean(np.array(p_values) <= level + 1e-12) <= level + chance


@pytest.fixture
def several():
    """Scores with ties, of three judges, weighted; and new ones."""
    random = np.random.default_rng(0)
    calibration = Calibration(
        random.integers(8, size=60) / 2.0, random.uniform(0.5, 2.0, 60), random.integers(3, size=60)
    )
    return calibration, random.integers(-1, 9, size=(3, 40)) / 2.0


def test_a_p_value_counts_the_rows_that_are_as_odd_under_their_own_judge(several):
    calibration, new = several
    expected = [
        (1.0 + sum(
            w for s, w, k in zip(*vars(calibration).values(), strict=True) if s <= new[k, j]
        )) / (1.0 + calibration.weight.sum())
        for j in range(new.shape[1])
    ]  # fmt: skip
    np.testing.assert_allclose(calibration.p_values(new), expected)
    assert calibration.p_values(np.full((3, 1), -np.inf)) == pytest.approx(calibration.least)


def test_ties_broken_at_random_lie_between_none_and_all_of_them(several):
    calibration, new = several
    broken = calibration.p_values(new, np.random.RandomState(0))
    every = calibration.p_values(new)
    none = calibration.p_values(new - 0.1)
    assert (none <= broken + 1e-12).all()
    assert (broken <= every + 1e-12).all()
    assert (broken < every - 0.01).any()
    np.testing.assert_array_equal(broken, calibration.p_values(new, np.random.RandomState(0)))


def test_p_values_are_uniform_and_not_below_it_where_scores_tie():
    random, n = np.random.RandomState(0), 19
    kept, broken = [], []
    for _ in range(N_REPETITIONS):
        scores = random.poisson(1.0, size=n + 1).astype(float)
        calibration, new = plain(scores[:n]), scores[None, n:]
        kept.append(calibration.p_values(new).item())
        broken.append(calibration.p_values(new, random).item())
    for level in np.arange(1, 20) / 20:
        share = np.mean(np.array(broken) <= level + 1e-12)
        assert share == pytest.approx(level, abs=4.0 * np.sqrt(level * (1 - level) / len(broken)))
        assert is_promised(kept, level)


def test_groups_are_the_unit_and_rows_are_not():
    """Rows of a group are alike, and large groups are odd ones."""
    random = np.random.default_rng(0)
    by_groups, by_rows = [], []
    for _ in range(N_REPETITIONS):
        sizes = random.integers(1, 30, size=20)
        groups = np.repeat(np.arange(20), sizes)
        scores = random.normal(size=20)[groups] - 0.1 * sizes[groups]
        scores += 0.1 * random.normal(size=len(groups))
        known = groups < 19
        new = random.choice(scores[~known], size=(1, 1))
        weight = calibration_weight(np.ones(known.sum()), groups[known])
        judges = np.zeros(known.sum(), dtype=int)
        by_groups.append(Calibration(scores[known], weight, judges).p_values(new).item())
        by_rows.append(plain(scores[known]).p_values(new).item())
    for level in (0.05, 0.1, 0.2, 0.5):
        assert is_promised(by_groups, level)
    assert np.mean(np.array(by_groups) <= 0.2) > 0.15  # and they are not valid for being large
    # groups that are odd and large have more than their share of the rows
    assert np.mean(np.array(by_rows) <= 0.5) < 0.4


def test_weights_make_p_values_of_the_distribution_that_they_stand_for():
    """Rows of N(0, 1), weighted to N(0.5, 1), beside new rows of that."""
    random = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        x, new = random.normal(size=800), 0.5 + random.normal(size=500)
        weight = calibration_weight(norm.pdf(x, 0.5) / norm.pdf(x))
        assert weight.sum() == pytest.approx(weight.sum() ** 2 / np.square(weight).sum())
        calibration = Calibration(-x, weight, np.zeros(800, dtype=int))
        shares.append(np.mean(calibration.p_values(-new[None]) <= 0.1))
        unweighted = np.mean(plain(-x).p_values(-new[None]) <= 0.1)
    assert np.mean(shares) == pytest.approx(0.1, abs=0.01)
    assert unweighted > 0.15


@pytest.mark.parametrize("level", [0.02, 0.05, 0.1, 0.37, 0.999])
@pytest.mark.parametrize("weighted", [False, True])
def test_below_the_threshold_lie_the_p_values_up_to_the_level(several, level, weighted):
    calibration, new = several
    weight = calibration.weight if weighted else np.ones(60)
    calibration = Calibration(calibration.scores, weight, np.zeros(60, dtype=int))
    p_values = calibration.p_values(new[:1])
    np.testing.assert_array_equal(new[0] < calibration.threshold(level), p_values <= level)


def test_a_threshold_that_too_few_rows_can_promise_is_minus_infinity():
    scores = np.random.default_rng(0).normal(size=98)
    assert plain(scores).threshold(0.01) == -np.inf
    assert plain(np.append(scores, 0.0)).threshold(0.01) == scores.min()


def test_the_p_value_of_a_row_of_the_calibration_is_its_rank_under_its_judge(several):
    calibration, _ = several
    expected = [
        sum(calibration.weight[(calibration.judges == k) & (calibration.scores <= s)])
        / sum(calibration.weight[calibration.judges == k])
        for s, k in zip(calibration.scores, calibration.judges, strict=True)
    ]
    np.testing.assert_allclose(calibration.own_p_values(), expected)
