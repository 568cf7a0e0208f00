"""Columns that number the rows, and columns that others determine."""

import warnings

import numpy as np
import pytest

from skebm.training.degenerate import dependent_columns, numbers_rows, warn_of_degenerate_columns

N = 300
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(N, 3)) * [1.0, 1e-3, 1e4] + [0.0, 5.0, -1e5]
ROUNDING = 2.0**-52


def told(X, precision=ROUNDING):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_degenerate_columns(X, list("abcdef"), precision, np.ones(X.shape[1], bool))
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    "column",
    [
        np.arange(N), RNG.permutation(N) + 10_000, np.linspace(0.0, 1.0, N)[::-1],
        1.7e9 + 3600.0 * np.arange(N), RNG.choice(2 * N, N, replace=False),
    ],
    ids=["counter", "shuffled", "grid", "time stamps", "half of a counter"],
)  # fmt: skip
def test_columns_that_number_the_rows(column):
    assert numbers_rows(column.astype(float))
    (text,) = told(np.c_[TABLE, column])
    assert text.startswith("column 'd' numbers the rows")


@pytest.mark.parametrize(
    "column",
    [
        RNG.normal(size=N), RNG.normal(size=N).round(5), RNG.poisson(50.0, N), RNG.random(N) > 0.5,
        np.arange(N) // 2, np.geomspace(1.0, 2.0, N), np.zeros(N), RNG.choice(10**6, N),
    ],
)  # fmt: skip
def test_columns_that_do_not(column):
    assert not numbers_rows(column.astype(float))
    assert told(np.c_[TABLE, column]) == []


def test_chance_makes_no_counter_of_a_few_rows():
    assert not numbers_rows(np.arange(10.0))
    # draws that are counted as different by chance: one table in e^10, by the rule of birthdays
    flagged = [numbers_rows(np.random.default_rng(s).integers(0, 40, 9) * 1.0) for s in range(500)]
    assert not any(flagged)


def test_exact_linear_combinations_are_named_with_what_they_are_made_of():
    a, b, _ = TABLE.T
    (text,) = told(np.c_[TABLE, 2.0 * a - 100.0 * b + 7.0])
    assert "is an exact linear combination of" in text
    assert "'c'" not in text  # takes no part
    (text,) = told(np.c_[TABLE, b])
    assert sorted(text.split("'")[1::2]) == ["b", "d"]
    dummies = np.eye(3)[RNG.integers(0, 3, N)]
    assert len(told(dummies)) == 1  # they sum to one
    # in the precision of what was given
    single = TABLE.astype(np.float32)
    single = np.c_[single, single[:, 0] + single[:, 1]]
    assert told(single.astype(float), 2.0**-23)[0].count("linear combination") == 1


def test_what_is_only_nearly_dependent_is_left_alone():
    a, b, c = TABLE.T
    assert told(np.c_[TABLE, a + 1e-6 * RNG.normal(size=N)]) == []
    assert told(np.c_[TABLE, a * (b - 5.0)]) == []
    # fewer rows than columns depend on each other by nature
    assert told(RNG.normal(size=(4, 6))) == []
    assert told(np.c_[TABLE, np.full(N, 3.0)]) == []


def test_dependence_has_to_hold_in_every_row():
    z = RNG.normal(size=(20_000, 3))
    z[:, 2] = z[:, 0]
    assert [j for j, _ in dependent_columns(z, np.full(3, 1e-9))] in ([0], [2])
    z[1, 2] += 1.0  # not among the rows that are looked at first
    assert list(dependent_columns(z, np.full(3, 1e-9))) == []
