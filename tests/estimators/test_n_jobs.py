"""Candidates and members side by side: the same bits, wherever they run."""

import joblib
import numpy as np
import pytest
import torch
from joblib import delayed
from sklearn.base import clone

from skebm import Boosting, NCEDensity
from skebm._parallel import resolve_n_jobs, side_by_side
from skebm.datasets import make_two_moons

X = make_two_moons(120, random_state=0)
QUICK = {
    "base": ["gaussian", "uniform"], "energy_model": Boosting(max_iter=20, learning_rate=0.2),
    "n_members": 2, "n_partition_samples": 1000, "random_state": 0,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:the standard error of log Z")


def outcome(estimator):
    estimator.fit(X)
    assert estimator.accepted_ == "tilt"
    return {
        "scores": estimator.score_samples(X), "out of fold": estimator.out_of_fold_scores_,
        "log Z": estimator.log_partition_, "gains": estimator.history_["held_out_log_likelihood"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    return outcome(NCEDensity(**QUICK, n_jobs=1))


def assert_same(found, expected):
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_the_same_bits_in_threads(alone):
    estimator = NCEDensity(**QUICK, n_jobs=2)
    assert_same(outcome(estimator), alone)
    assert estimator.n_jobs == 2
    assert clone(estimator).n_jobs == 2


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_the_same_bits_where_joblib_is_told_to_run(backend, alone, monkeypatch):
    asked = []
    call = joblib.Parallel.__call__

    def counting(parallel, iterable):
        asked.append((type(parallel._backend).__name__, parallel.n_jobs))
        return call(parallel, iterable)

    monkeypatch.setattr(joblib.Parallel, "__call__", counting)
    with joblib.parallel_config(backend, n_jobs=2):
        assert_same(outcome(NCEDensity(**QUICK)), alone)
    name = {"threading": "ThreadingBackend", "loky": "LokyBackend"}[backend]
    assert asked.count((name, 2)) >= 3  # candidates, bins of the rows, trees


def test_none_is_what_joblib_says_and_else_the_threads_of_torch():
    def resolved(n_jobs=None):
        return resolve_n_jobs(n_jobs, 3)

    assert resolved() == 3
    assert [resolved(n) for n in (1, 2, -1)] == [1, 2, -1]
    for n_jobs in (1, 2):
        with joblib.parallel_config("threading", n_jobs=n_jobs):
            assert resolved() is None
    # within a search that has the cores already
    within = joblib.Parallel(n_jobs=2, backend="threading")(delayed(resolved)() for _ in range(2))
    assert within == [None, None]


def what_a_worker_sees(i):
    return i, torch.get_num_threads(), torch.is_grad_enabled()


@pytest.mark.parametrize("in_threads", [True, False])
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_every_worker_has_one_thread_and_no_gradients(n_jobs, in_threads):
    arguments = [(i,) for i in range(4)]
    found = side_by_side(what_a_worker_sees, arguments, n_jobs, in_threads=in_threads)
    assert found == [(i, 1, False) for i in range(4)]
