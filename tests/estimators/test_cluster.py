"""A search on a cluster of dask: the same scores, computed elsewhere."""

import os

import joblib
import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV

from skebm import NCEDensity
from skebm.datasets import make_two_moons

distributed = pytest.importorskip("distributed")


def test_a_search_on_a_dask_cluster_has_the_same_scores():
    X = make_two_moons(100, random_state=0)

    # functions in a function travel by value: workers cannot import this file
    def score(est, X, y=None):
        return est.score(X)

    def process(est, X, y=None):
        return os.getpid()

    def search(**options):
        density = NCEDensity(base="gmm", energy_model=None, n_members=2, random_state=0)
        scoring = {"score": score, "process": process}
        grid = {"smoothing": [0.0, 0.2]}
        found = GridSearchCV(density, grid, cv=2, refit=False, scoring=scoring, **options).fit(X)
        return [
            np.array([found.cv_results_[f"split{k}_test_{name}"] for k in range(2)])
            for name in scoring
        ]

    alone, here = search()
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        there, elsewhere = search(n_jobs=2)
    np.testing.assert_array_equal(there, alone)
    assert len(np.unique(alone)) == 4
    # it is the cluster that has computed them
    assert (here == os.getpid()).all()
    assert (elsewhere != os.getpid()).all()
