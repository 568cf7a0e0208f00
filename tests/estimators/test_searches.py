"""What makes searches quick, jobs side by side and a memory, changes not a bit of a fit."""

import copy
import os
import threading
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from joblib import delayed
from sklearn.base import clone
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV

from skebm import Boosting, NCEDensity, Network, _memory
from skebm._memory import key_of
from skebm._parallel import resolve_n_jobs, side_by_side
from skebm.datasets import make_two_moons

X = make_two_moons(120, random_state=0)
QUICK = {
    "base": ["gaussian", "uniform"], "energy_model": Boosting(max_iter=20, learning_rate=0.2),
    "n_members": 2, "n_partition_samples": 1000, "random_state": 0,
}  # fmt: skip
barrier = threading.Barrier(2)
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


def thread(i):
    barrier.wait(60)  # nobody returns before there are two of them
    return os.getpid(), threading.get_ident()


def test_threads_work_where_joblib_is_told_to_use_processes():
    with joblib.parallel_config("loky", n_jobs=2):
        found = side_by_side(thread, [(0,), (1,)], None, in_threads=True)
    assert {process for process, _ in found} == {os.getpid()}
    assert len(set(found)) == 2


# ---------------------------------------------------------------------- memory


def entries(memory):
    return sorted(Path(memory).rglob("output.pkl"))


def fit(memory, rows=X, **settings):
    estimator = NCEDensity(**QUICK, memory=str(memory))
    return clone(estimator).set_params(**settings).fit(rows)


def test_fits_share_what_their_settings_have_in_common(tmp_path, alone):
    for _ in range(2):
        assert_same(outcome(NCEDensity(**QUICK, memory=str(tmp_path))), alone)
        assert len(entries(tmp_path)) == 2  # bases, energies
    # nothing that these act on has been kept
    for change in ({"recalibration": False}, {"n_partition_samples": 2000}, {"contamination": 0.1}):
        fitted = fit(tmp_path, **change)
        assert len(entries(tmp_path)) == 2
        expected = NCEDensity(**QUICK | change).fit(X)
        np.testing.assert_array_equal(fitted.score_samples(X), expected.score_samples(X))
        assert fitted.offset_ == expected.offset_


@pytest.mark.parametrize(
    ("n_new", "change"),
    [
        (1, {"energy_model": Boosting(max_iter=20, learning_rate=0.3)}), (1, {"noise_ratio": 2}),
        (2, {"random_state": 1}), (2, {"base": "gaussian"}), (2, {"n_members": 3}),
        (2, {"smoothing": 0.1}), (2, {"rows": X + 1.0}), (2, {"rows": X[:-1]}),
        (0, {"random_state": None}), (0, {"random_state": None, "energy_model": None}),
        # may be another one under the same name, next time
        (0, {"energy_model": Network(module=lambda d: torch.nn.Linear(d, 1), max_epochs=1)}),
        (0, {"base": GaussianMixture(random_state=np.random.RandomState(0))}),
    ],
)  # fmt: skip
def test_fits_share_nothing_else(n_new, change, tmp_path_factory):
    memory = tmp_path_factory.getbasetemp() / "memory"
    if not entries(memory):
        fit(memory)
    before = entries(memory)
    fit(memory, **change)
    assert len(entries(memory)) == len(before) + n_new


def test_other_versions_share_nothing(tmp_path, monkeypatch):
    fit(tmp_path, energy_model=None)
    monkeypatch.setattr(_memory, "_VERSIONS", ("0.0",))
    fit(tmp_path, energy_model=None)
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_damaged_entry_is_computed_again(content, tmp_path, alone, caplog):
    fit(tmp_path)
    for entry in entries(tmp_path):
        entry.write_bytes(content)
    assert_same(outcome(NCEDensity(**QUICK, memory=str(tmp_path))), alone)
    assert caplog.text.count("Exception while loading") == 2


def test_a_memory_of_maps_that_cannot_be_written_to(tmp_path, alone):
    memory = joblib.Memory(tmp_path, mmap_mode="r", verbose=0)
    for _ in range(2):
        assert_same(outcome(NCEDensity(**QUICK, memory=memory)), alone)


def test_a_warm_start_goes_on_without_the_memory(tmp_path):
    estimator = NCEDensity(**QUICK, memory=str(tmp_path), warm_start=True).fit(X)
    estimator.fit(X)
    assert len(entries(tmp_path)) == 2


def test_keys_are_those_of_what_objects_hold():
    def values(size=3, member=torch.nn.ReLU):
        module = torch.nn.Sequential(torch.nn.Linear(2, 1), member())
        torch.nn.init.ones_(module[0].weight)
        torch.nn.init.zeros_(module[0].bias)
        return Boosting(max_iter=size), module, np.arange(3.0), [{"a": (1, None)}, {2, 1}]

    key = key_of(*values())
    assert key == key_of(*values())
    assert key == key_of(*copy.deepcopy(values()))
    others = [values(size=4), values(member=torch.nn.Tanh), values()[::-1]]
    others += [(*values()[:2], array, values()[3]) for array in (np.arange(3), np.arange(4.0))]
    assert len({key, *(key_of(*other) for other in others)}) == 1 + len(others)


def build(n_features):
    return torch.nn.Linear(n_features, 1)


class Own(torch.nn.Linear):
    pass


@pytest.mark.parametrize("value", [build, lambda: 0, Own(2, 1), Own, np.random.RandomState(0)])
def test_what_may_change_under_its_name_has_no_key(value):
    assert key_of(value) is None
    assert key_of([Network(module=value)]) is None


def test_a_search_in_processes_shares_by_the_same_keys(tmp_path):
    grid = {"recalibration": [True, False]}

    def search(memory, n_jobs):
        estimator = NCEDensity(**QUICK, memory=memory)
        found = GridSearchCV(estimator, grid, cv=2, n_jobs=n_jobs, refit=False).fit(X)
        return [found.cv_results_[f"split{k}_test_score"] for k in range(2)]

    expected = search(None, 1)
    for n_jobs in (2, 1):
        np.testing.assert_array_equal(search(str(tmp_path), n_jobs), expected)
        assert len(entries(tmp_path)) == 4  # two folds
