"""Columns before the model: constants, robust scales, resolution."""

import numpy as np
import pytest

from skebm import NCEDensity
from skebm.training import Columns, merge_near_ties

RNG = np.random.default_rng(0)


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
    x = columns.standardize(X)
    np.testing.assert_allclose(columns.spread, x.std(axis=0))


def test_outliers_do_not_move_the_scale(X):
    scale = learn(X).scale
    X[:5] = 1e9
    np.testing.assert_allclose(learn(X).scale, scale, rtol=0.1)


def test_restore_undoes_standardize(X):
    X = np.insert(X, 1, 7.0, axis=1)
    columns = learn(X)
    x = columns.standardize(X)
    assert x.shape == (500, 3)
    np.testing.assert_allclose(columns.restore(x), X, rtol=1e-12)


def test_log_det_is_that_of_the_map(X):
    columns = learn(X)
    unit = np.eye(3)
    jacobian = columns.standardize(unit) - columns.standardize(np.zeros((1, 3)))
    assert columns.log_factor == pytest.approx(np.linalg.slogdet(jacobian)[1])


def test_weights_are_repetition(X):
    times = np.random.default_rng(1).integers(1, 5, len(X))
    weighted = Columns.learn(X, range(3), times.astype(float))
    repeated = learn(np.repeat(X, times, axis=0))
    np.testing.assert_allclose(weighted.center, repeated.center, rtol=1e-2, atol=1e-1)
    np.testing.assert_allclose(weighted.scale, repeated.scale, rtol=1e-2)
    np.testing.assert_allclose(weighted.spread * weighted.scale, np.repeat(X, times, 0).std(0))
    equal = Columns.learn(X, range(3), np.full(len(X), 7.0))
    np.testing.assert_allclose(equal.center, learn(X).center)


def test_constant_columns(X):
    X[:, 1] = 0.1 + 0.2  # no round number
    columns = learn(X)
    assert columns.varying.tolist() == [True, False, True]
    new = X[:3].copy()
    new[1, 1] = 0.3
    assert columns.elsewhere(new)[:, 1].tolist() == [False, True, False]
    assert (columns.restore(np.zeros((4, 2)))[:, 1] == 0.1 + 0.2).all()
    # two states, of which 500 rows have shown one: 501 / 502 and 1 / 502
    factors = columns.log_factors(new) + np.log(columns.scale).sum()
    np.testing.assert_allclose(np.exp(factors), [501 / 502, 1 / 502, 501 / 502])
    assert columns.log_factor == pytest.approx(columns.log_factors(new)[0])


def test_rounding_dust_is_one_value():
    rng = np.random.default_rng(0)
    tenths = rng.integers(80, 120, 400)
    zero = rng.random(400) < 0.7
    X = np.c_[
        np.where(rng.random(400) < 0.5, tenths * 0.1, tenths / 10),
        np.where(zero, 1e-17 * rng.normal(size=400), rng.lognormal(size=400)),
        np.where(zero, 1e-9 * rng.normal(size=400), rng.lognormal(size=400)),
        tenths / 10 + 1e-12 * rng.normal(size=400),
        np.where(zero, 0.3, 0.1 + 0.2),
    ]
    merged = merge_near_ties(X)
    assert np.abs(merged - X).max() < 1e-8
    for j in (0, 3):
        assert len(np.unique(merged[:, j])) == len(np.unique(tenths))
    for j in (1, 2):
        assert len(np.unique(merged[zero, j])) == 1
        np.testing.assert_array_equal(merged[~zero, j], X[~zero, j])
    assert len(np.unique(merged[:, 4])) == 1
    single = merge_near_ties(tenths.astype(np.float32)[:, None] / np.float32(3), 2.0**-23)
    assert len(np.unique(single)) == len(np.unique(tenths))


@pytest.mark.parametrize(
    "column",
    [
        RNG.normal(size=1000),
        RNG.standard_cauchy(1000),
        np.exp(5 * RNG.normal(size=1000)),
        1e-9 * RNG.normal(size=1000),
        1.7e9 + RNG.random(1000),
        np.r_[RNG.normal(size=990), np.full(10, -9999999.0)],
        np.r_[RNG.normal(size=999), 1e9],
        RNG.normal(size=1000).round(3),
        np.where(RNG.random(1000) < 0.5, 0.0, 3000.0) + RNG.normal(size=1000),
        np.where(RNG.random(1000) < 0.7, 1e-5, 1.0) * RNG.normal(size=1000),
    ],
)
def test_other_values_are_left_alone(column):
    np.testing.assert_array_equal(merge_near_ties(column[:, None])[:, 0], column)


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


@pytest.mark.filterwarnings("error")
def test_the_largest_and_smallest_scales_make_no_warnings():
    X = np.random.default_rng(0).normal(size=(60, 2))
    with pytest.raises(ValueError, match="column 0 spans more"):
        NCEDensity(energy_model=None, random_state=0).fit(1e300 * X)
    tiny = NCEDensity(base="gaussian", energy_model=None, random_state=0).fit(1e-300 * X)
    plain = NCEDensity(base="gaussian", energy_model=None, random_state=0).fit(X)
    expected = plain.score_samples(X) + 2 * np.log(1e300)
    np.testing.assert_allclose(tiny.score_samples(1e-300 * X), expected, rtol=1e-9)


# ---------------------------------------------------------------------- resolution


def test_distinct_values_are_left_alone(X):
    columns = learn(X)
    assert not columns.has_ties
    x = columns.standardize(X)
    np.testing.assert_array_equal(columns.perturb(x, 0.0, np.random.RandomState(0)), x)


def test_integers_are_spread_over_their_cells():
    X = np.random.default_rng(0).poisson(20.0, size=(5000, 1)).astype(float)
    columns = learn(X)
    assert columns.has_ties
    x = columns.standardize(X)
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
    x = columns.standardize(X)
    draws = [columns.perturb(x, 0.0, np.random.RandomState(seed)) for seed in range(50)]
    shift = np.abs(columns.restore(np.concatenate(draws)) - np.tile(X, (50, 1))).reshape(50, 5, 20)
    # gaps 1, 1, 10, 988, median 5.5
    np.testing.assert_allclose(shift.max(axis=(0, 2)), [0.5, 0.5, 0.5, 2.75, 2.75], rtol=0.01)


@pytest.mark.parametrize(
    "column",
    [
        RNG.random(1000) < 0.1,
        RNG.poisson(1.0, 1000),
        RNG.choice([0.0, 1.0, 2.0, 3.0, 100.0], 1000, p=[0.4, 0.3, 0.1, 0.1, 0.1]),
        5.0 * np.round(RNG.lognormal(3, 1, 1000) / 5),
        np.where(RNG.random(1000) < 0.5, RNG.integers(18, 80, 1000), 10 * RNG.integers(2, 8, 1000)),
    ],
)
def test_draws_show_every_value_as_often_as_rows_do(column):
    X = np.array(column, dtype=float)[:, None]
    columns, rng = learn(X), np.random.RandomState(0)
    values, counts = np.unique(X, return_counts=True)
    share, n = counts / len(X), 100_000
    spread = columns.perturb(columns.standardize(rng.permutation(np.repeat(X, 100, 0))), 0.0, rng)
    drawn = columns.restore(spread, rng)
    found = np.mean(drawn == values, axis=0)
    # ranks that are moved beyond an end stay there: up to a quarter of a hundredth
    np.testing.assert_allclose(found, share, atol=0.0025 + 5.0 * np.sqrt(0.25 / n))
    assert np.isin(drawn, values).all()


def test_perturbing_does_not_touch_its_input():
    X = np.repeat([0.0, 1.0], 10)[:, None]
    columns = learn(X)
    x = columns.standardize(X)
    before = x.copy()
    columns.perturb(x, 0.3, np.random.RandomState(0))
    np.testing.assert_array_equal(x, before)


def test_only_columns_with_ties_are_spread(X):
    X[:, 2] = X[:, 2].round()
    columns = learn(X)
    x = columns.standardize(X)
    jittered = columns.perturb(x, 0.0, np.random.RandomState(0))
    np.testing.assert_array_equal(jittered[:, :2], x[:, :2])
    assert (jittered[:, 2] != x[:, 2]).all()


def test_smoothing_counts_in_standard_deviations(X):
    X[:50] *= 30.0  # so that the interquartile range and the standard deviation differ
    columns = learn(X)
    x = columns.standardize(np.tile(X, (40, 1)))
    moved = columns.restore(columns.perturb(x, 0.3, np.random.RandomState(0)))
    shift = moved - np.tile(X, (40, 1))
    np.testing.assert_allclose(shift.std(axis=0), 0.3 * X.std(axis=0), rtol=0.03)
    np.testing.assert_allclose(shift.mean(axis=0) / X.std(axis=0), 0.0, atol=0.01)
