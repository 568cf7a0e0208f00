import warnings

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_iris, load_wine

from skebm.training import join_groups, merge_copies

RNG = np.random.default_rng(0)


def merged(rows, weight=None, n_folds=4):
    rows = np.asarray(rows, dtype=float)
    weight = np.ones(len(rows)) if weight is None else weight
    kept, copy_of = merge_copies(rows, weight, n_folds)
    # rows are sorted, the first copy stands for the others
    if len(kept) < len(rows):
        np.testing.assert_array_equal(rows[kept], rows[kept][np.lexsort(rows[kept].T[::-1])])
    assert (kept[copy_of] <= np.arange(len(rows))).all()
    np.testing.assert_array_equal(copy_of[kept], np.arange(len(kept)))
    return kept, copy_of


CONTINUOUS = {
    "one column": RNG.normal(size=(400, 1)),
    "three columns": RNG.normal(size=(400, 3)),
    "ten heavy columns": RNG.standard_t(2, size=(400, 10)),
    "with categories": np.c_[RNG.normal(size=400), RNG.random((400, 5)) < 0.5],
    "with zeros": np.where(RNG.random((400, 3)) < 0.6, 0.0, RNG.lognormal(size=(400, 3))),
    "many, with two decimals": RNG.normal(size=(400, 10)).round(2),
}


@pytest.fixture(params=CONTINUOUS)
def table(request):
    return CONTINUOUS[request.param]


def test_rows_without_copies_stay(table):
    table = np.unique(table, axis=0)
    assert len(merged(table)[0]) == len(table)


def test_bootstrap(table):
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 400, 400)
    kept, copy_of = merged(table[drawn])
    np.testing.assert_array_equal(table[drawn][kept][copy_of], table[drawn])
    # rows of zeros alone are equal by chance
    chance = (table[drawn] == 0.0).all(axis=1).sum()
    assert len(np.unique(table[drawn], axis=0)) <= len(kept)
    assert len(kept) <= 1.15 * len(np.unique(drawn)) + chance


def test_twice():
    for name in ("one column", "three columns", "ten heavy columns", "with categories"):
        table = CONTINUOUS[name]
        kept, copy_of = merged(np.r_[table, table])
        np.testing.assert_array_equal(np.sort(kept), np.arange(400))
        np.testing.assert_array_equal(kept[copy_of], np.tile(np.arange(400), 2))


@pytest.mark.parametrize(
    ("d", "jitter"), [(d, j) for d in (1, 3, 10) for j in (1e-12, 1e-8, 1e-6)] + [(3, 1e-5)]
)
def test_jittered_copies(d, jitter):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(400, d))
    kept, copy_of = merged(np.r_[table, table] + jitter * rng.normal(size=(800, d)))
    # in a single column some independent rows are as near
    alike = copy_of[:400] == copy_of[400:]
    assert alike.mean() > (0.95 if d == 1 else 0.999)
    assert len(kept) > (390 if d == 1 else 399)


def test_a_tenth_is_copied():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(400, 3))
    assert len(merged(np.r_[table, table[:40]])[0]) == 400
    rows = np.r_[table, table[:40]] + 1e-6 * rng.normal(size=(440, 3))
    assert len(merged(rows)[0]) == 400


INDEPENDENT = {
    "yes or no": RNG.random((2000, 6)) < 0.5,
    "multinomial": RNG.multinomial(10, [0.5, 0.3, 0.1, 0.1], 2000),
    "one-hot": np.eye(10)[RNG.integers(0, 10, 500)],
    "one count": RNG.poisson(3.0, (400, 1)),
    "two counts": RNG.poisson(3.0, (400, 2)),
    "large counts": RNG.poisson(30.0, (2000, 1)),
    "a geometric law": RNG.geometric(0.3, (400, 1)),
    "a coarse grid": RNG.normal(size=(2000, 1)).round(1),
    "two coarse columns": RNG.normal(size=(2000, 2)).round(1),
    "a fine grid": RNG.normal(size=(10_000, 1)).round(3),
    "Celsius": (RNG.normal(60, 10, (2000, 1)).round() - 32) * 5 / 9,
    "prices": RNG.choice([5, 10, 20, 50, 99.9, 100, 250], (400, 1)),
    "two prices": RNG.choice([5, 10, 20, 50, 99.9, 100, 250], (400, 2)),
    "stores": RNG.normal(size=(60, 2))[RNG.integers(0, 60, 2000)],
    "an amount": np.where(RNG.random((400, 1)) < 0.1, 0.0, RNG.lognormal(size=(400, 1))),
    "two amounts": np.where(RNG.random((400, 2)) < 0.7, 0.0, RNG.lognormal(size=(400, 2))),
    "row numbers": np.arange(1000)[:, None],
    "tight clusters": np.where(RNG.random((800, 1)) < 0.5, 0.0, 40.0)
    + 1e-3 * RNG.normal(size=(800, 2)),
    "Cauchy": RNG.standard_cauchy((3000, 2)),
    "iris": load_iris().data[np.unique(load_iris().data, axis=0, return_index=True)[1]],
    "wine": load_wine().data,
    "breast cancer": load_breast_cancer().data,
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_equal_by_chance(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(merged(INDEPENDENT[name])[0]) == len(INDEPENDENT[name])


@pytest.mark.parametrize("rows", [np.ones((5, 2)), np.ones((1, 1)), np.arange(2.0)[:, None]])
def test_next_to_nothing(rows):
    assert len(merged(rows)[0]) == len(rows)


def test_more_copies_than_a_fold_holds():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(400, 3))
    rows = np.r_[table, np.tile(table[:1], (300, 1))]
    with pytest.warns(UserWarning, match="copies of one row, 43% of the table"):
        assert len(merged(rows)[0]) == 700
    few = np.r_[table, np.tile(table[:1], (30, 1))]
    assert len(merged(few)[0]) == 400
    # weights count
    weight = np.ones(430)
    weight[400:] = 10.0
    with pytest.warns(UserWarning, match="copies of one row"):
        assert len(merged(few, weight)[0]) == 430


def test_groups_that_share_copies_are_one():
    #                    rows 0 and 3 are copies, of patients b and c
    copy_of = np.array([0, 1, 2, 0, 3])
    labels = join_groups(copy_of, ["b", "a", "b", "c", "d"])
    assert labels[0] == labels[2]
    assert len(np.unique(labels)) == 3
    labels = join_groups(np.arange(5), ["b", "a", "b", "c", "d"])
    assert labels[0] == labels[2]
    assert len(np.unique(labels)) == 4
