"""Tables of more rows than a fit learns from."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from skebm import Boosting, NCEDensity, Network, ScoreMatchingEBM
from skebm.datasets import make_two_moons
from skebm.estimators import _reader

N, LIMIT = 500, 200
TREES = Boosting(max_iter=5, early_stopping=False)


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr(_reader, "MAX_ROWS", LIMIT)


@pytest.fixture(scope="module")
def X():
    return make_two_moons(n_samples=N, random_state=0)


def density(energy_model: Any = TREES, **parameters: Any) -> NCEDensity:
    parameters = {"base": "gmm", "n_members": 2, "random_state": 0} | parameters
    return NCEDensity(energy_model=energy_model, **parameters)


def looked_at(est):
    """Rows that were held out from a member: here all that a fit has looked at."""
    assert len(est.out_of_fold_scores_) == len(est.out_of_fold_members_)
    held = np.isfinite(est.out_of_fold_scores_)
    np.testing.assert_array_equal(held, est.out_of_fold_members_ >= 0)
    return held


@pytest.mark.parametrize("weighted", [False, True])
def test_a_large_table_is_fitted_as_its_subsample(X, weighted):
    weight = np.random.RandomState(1).randint(0, 4, size=N) if weighted else np.ones(N)
    used = weight > 0
    est = density().fit(X, sample_weight=weight)
    rows = looked_at(est)
    assert rows.shape == (used.sum(),)
    assert rows.sum() == LIMIT
    alone = density().fit(X[used][rows], sample_weight=weight[used][rows])
    np.testing.assert_array_equal(est.score_samples(X), alone.score_samples(X))
    np.testing.assert_array_equal(est.out_of_fold_scores_[rows], alone.out_of_fold_scores_)
    assert est.offset_ == alone.offset_


def test_the_seed_draws_the_rows_evenly(X):
    drawn = [looked_at(density(None, random_state=seed).fit(X)) for seed in range(8)]
    assert all(rows.sum() == LIMIT for rows in drawn)
    assert len({rows.tobytes() for rows in drawn}) == 8
    # of 8 x 250 rows of the first half 800 are expected, with a standard error of 12
    assert abs(sum(rows[: N // 2].sum() for rows in drawn) - 800) < 5 * 12.3


@pytest.mark.parametrize("n", [LIMIT, LIMIT + 1])
def test_the_limit_itself_is_no_large_table(X, n):
    assert looked_at(density(None).fit(X[:n])).sum() == LIMIT


def test_groups_and_copies_stay_together(X):
    groups = np.arange(N) // 5
    est = density(None).fit(X, groups=groups)
    rows = looked_at(est)
    assert rows.sum() == LIMIT
    members = pd.Series(est.out_of_fold_members_[rows]).groupby(groups[rows])
    assert members.nunique().max() == 1
    twice = np.repeat(X, 2, axis=0)
    est = density(None).fit(twice)
    both = looked_at(est).reshape(-1, 2).all(axis=1)
    pairs = est.out_of_fold_members_.reshape(-1, 2)[both]
    assert len(pairs) > 20
    np.testing.assert_array_equal(pairs[:, 0], pairs[:, 1])


def test_a_group_that_is_nearly_all_rows_is_refused(X):
    groups = np.zeros(5 * N, dtype=int)
    groups[-1] = 1
    rows = np.tile(X, (5, 1)) + np.random.RandomState(0).normal(scale=0.1, size=(5 * N, 2))
    with pytest.raises(ValueError, match=rf"fit looks at \({LIMIT} of {5 * N}.*one label"):
        density(None).fit(rows, groups=groups)


def test_every_row_is_checked(X):
    rows = X.copy()
    rows[np.flatnonzero(~looked_at(density(None).fit(X)))[0], 1] = np.inf
    with pytest.raises(ValueError, match="column 1 contains infinity"):
        density(None).fit(rows)


def test_a_category_beyond_the_rows_that_are_looked_at(X):
    left_out = np.flatnonzero(~looked_at(density(None).fit(X)))[0]
    half = np.where(X[:, 1] > 0.2, "upper", "lower").astype(object)
    half[left_out] = "rare"
    table = pd.DataFrame({"x": X[:, 0], "half": half})
    est = density(None, base="auto").fit(table)
    rows = looked_at(est)
    assert not rows[left_out]
    # rows without weight are left out, and their categories known
    alone = density(None, base="auto").fit(table, sample_weight=rows)
    np.testing.assert_array_equal(est.score_samples(table), alone.score_samples(table))
    usual = table.assign(half="upper")
    assert est.score_samples(table)[left_out] < est.score_samples(usual)[left_out] - np.log(20)


@pytest.mark.parametrize("contamination", ["auto", 0.1])
def test_fit_predict_labels_every_row(X, contamination):
    est = density(contamination=contamination)
    labels = est.fit_predict(X)
    rows = looked_at(est)
    scores = np.where(rows, est.out_of_fold_scores_, est.score_samples(X))
    np.testing.assert_array_equal(labels, np.where(scores < est.out_of_fold_offset_, -1, 1))
    # a quantile of 200 rows, asked of 300 others
    assert abs(np.mean(labels < 0) - (0.05 if contamination == "auto" else 0.1)) < 0.08


def test_who_learns_from_few_rows(X):
    short = Network(hidden_layer_sizes=(4,), max_epochs=1, patience=None)
    assert looked_at(density(short).fit(X)).all()
    est = ScoreMatchingEBM(energy_model=short, base="gmm", n_members=2, random_state=0).fit(X)
    assert looked_at(est).sum() == LIMIT


def test_a_memory_map_and_an_array_are_one_table(X, tmp_path):
    np.save(tmp_path / "rows.npy", X)
    mapped = density(None).fit(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    np.testing.assert_array_equal(
        mapped.out_of_fold_scores_, density(None).fit(X).out_of_fold_scores_
    )
