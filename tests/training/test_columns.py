"""Columns before the model: constants, robust scales, resolution."""

import numpy as np
import pytest

from skebm.training import Columns


def learn(X):
    return Columns.learn(X, range(X.shape[1]))


@pytest.fixture
def X():
    rng = np.random.default_rng(0)
    return rng.normal([3.0, -100.0, 0.0], [2.0, 1e-3, 50.0], size=(500, 3))


def test_center_and_scale_are_median_and_interquartile_range(X):
    columns = learn(X)
    low, median, high = np.percentile(X, [25, 50, 75], axis=0)
    np.testing.assert_allclose(columns.center, median)
    np.testing.assert_allclose(columns.scale, (high - low) / 1.349)
    np.testing.assert_allclose(columns.scale, [2.0, 1e-3, 50.0], rtol=0.15)
    x, met = columns.standardize(X)
    assert met.all()
    np.testing.assert_allclose(columns.spread, x.std(axis=0))


def test_outliers_do_not_move_the_scale(X):
    scale = learn(X).scale
    X[:5] = 1e9
    np.testing.assert_allclose(learn(X).scale, scale, rtol=0.1)


def test_restore_undoes_standardize(X):
    X = np.insert(X, 1, 7.0, axis=1)
    columns = learn(X)
    x, _ = columns.standardize(X)
    assert x.shape == (500, 3)
    np.testing.assert_allclose(columns.restore(x), X, rtol=1e-12)


def test_log_det_is_that_of_the_map(X):
    columns = learn(X)
    unit = np.eye(3)
    jacobian = columns.standardize(unit)[0] - columns.standardize(np.zeros((1, 3)))[0]
    assert columns.log_det == pytest.approx(np.linalg.slogdet(jacobian)[1])


def test_constant_columns(X):
    X[:, 1] = 0.1 + 0.2  # no round number
    columns = learn(X)
    assert columns.varying.tolist() == [True, False, True]
    new = X[:3].copy()
    new[1, 1] = 0.3
    assert columns.standardize(new)[1].tolist() == [True, False, True]
    assert (columns.restore(np.zeros((4, 2)))[:, 1] == 0.1 + 0.2).all()


def test_mostly_constant_column_takes_its_standard_deviation(X):
    X[:, 0] = 0.0
    X[:10, 0] = 5.0
    assert learn(X).scale[0] == pytest.approx(X[:, 0].std())


def test_nothing_varies():
    with pytest.raises(ValueError, match=r"every column of X is constant \(4 sample"):
        learn(np.ones((4, 2)))


@pytest.mark.parametrize(("factor", "message"), [(1e200, "'b' spans"), (1e-320, "'b' varies by")])
def test_ranges_that_cannot_be_computed_with(X, factor, message):
    X[:, 1] = factor * (X[:, 1] + 100.0) * 1e3
    with pytest.raises(ValueError, match=message):
        Columns.learn(X, ["a", "b", "c"])


# ---------------------------------------------------------------------- resolution


def test_distinct_values_are_left_alone(X):
    columns = learn(X)
    assert not columns.has_ties
    x, _ = columns.standardize(X)
    np.testing.assert_array_equal(columns.perturb(x, 0.0, np.random.RandomState(0)), x)


def test_integers_are_spread_over_their_cells():
    X = np.random.default_rng(0).poisson(20.0, size=(5000, 1)).astype(float)
    columns = learn(X)
    assert columns.has_ties
    x, _ = columns.standardize(X)
    jittered = columns.restore(columns.perturb(x, 0.0, np.random.RandomState(1)))
    shift = jittered - X
    common = np.abs(X[:, 0] - 20) < 8  # where all neighbours occur
    assert np.abs(shift).max() <= 0.5 + 1e-9
    # even over (-1/2, 1/2): as many in every tenth
    counts, _ = np.histogram(shift[common], bins=10, range=(-0.5, 0.5))
    expected = common.sum() / 10
    assert ((counts - expected) ** 2 / expected).sum() < 28  # chi-squared, 9 degrees, p = .001
    assert (np.round(jittered[common]) == X[common]).all()


def test_the_step_is_the_gap_to_the_nearest_value():
    # steps 1 and 10; a value far off does not get a wide cell (the median gap caps it)
    X = np.repeat([0.0, 1.0, 2.0, 12.0, 1000.0], 20)[:, None]
    columns = learn(X)
    x, _ = columns.standardize(X)
    draws = [columns.perturb(x, 0.0, np.random.RandomState(seed)) for seed in range(50)]
    shift = np.abs(columns.restore(np.concatenate(draws)) - np.tile(X, (50, 1))).reshape(50, 5, 20)
    # gaps 1, 1, 10, 988, median 5.5
    np.testing.assert_allclose(shift.max(axis=(0, 2)), [0.5, 0.5, 0.5, 2.75, 2.75], rtol=0.01)


def test_perturbing_does_not_touch_its_input():
    X = np.repeat([0.0, 1.0], 10)[:, None]
    columns = learn(X)
    x, _ = columns.standardize(X)
    before = x.copy()
    columns.perturb(x, 0.3, np.random.RandomState(0))
    np.testing.assert_array_equal(x, before)


def test_only_columns_with_ties_are_spread(X):
    X[:, 2] = X[:, 2].round()
    columns = learn(X)
    x, _ = columns.standardize(X)
    jittered = columns.perturb(x, 0.0, np.random.RandomState(0))
    np.testing.assert_array_equal(jittered[:, :2], x[:, :2])
    assert (jittered[:, 2] != x[:, 2]).all()


def test_smoothing_counts_in_standard_deviations(X):
    X[:50] *= 30.0  # so that the interquartile range and the standard deviation differ
    columns = learn(X)
    x, _ = columns.standardize(np.tile(X, (40, 1)))
    moved = columns.restore(columns.perturb(x, 0.3, np.random.RandomState(0)))
    shift = moved - np.tile(X, (40, 1))
    np.testing.assert_allclose(shift.std(axis=0), 0.3 * X.std(axis=0), rtol=0.03)
    np.testing.assert_allclose(shift.mean(axis=0) / X.std(axis=0), 0.0, atol=0.01)
