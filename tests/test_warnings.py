"""Warnings point at the line of the user, whoever stands between that line and the warning."""

import pytest
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skebm import NCEDensity, Network
from skebm._warnings import warn
from skebm.datasets import make_two_moons
from skebm.exceptions import LowEffectiveSampleSizeWarning

X = make_two_moons(60, random_state=0)


def density():
    """One that says that 100 samples are too few for log Z."""
    network = Network(hidden_layer_sizes=(4,), max_epochs=1, patience=None)
    return NCEDensity(
        base=None, noise="gaussian", energy_model=network, n_members=1, n_partition_samples=100,
        random_state=0,
    )  # fmt: skip


def in_module(name, function):
    """`function`, called from a line of the module of that name."""
    namespace = {"__name__": name, "function": function}
    exec("call = lambda *args: function(*args)", namespace)
    return namespace["call"]


def assert_points_at(record, call):
    """Every warning has the place of `call`, which is written on one line."""
    assert len(record) > 0
    place = (call.__code__.co_filename, call.__code__.co_firstlineno)
    assert {(w.filename, w.lineno) for w in record} == {place}


@pytest.mark.parametrize(
    "modules",
    [
        [],
        ["skebm"],
        ["skebm.training.fit"] * 7,
        ["skebm.estimators._base", "contextlib", "sklearn.base"],
        ["skebm", "sklearn.utils.parallel", "joblib.parallel", "sklearn.model_selection._search"],
    ],
    ids=["none", "one", "seven", "of scikit-learn", "of joblib"],
)
def test_frames_that_are_passed_over(modules):
    deep = warn
    for module in modules:
        deep = in_module(module, deep)
    user = lambda: deep("deep", LowEffectiveSampleSizeWarning)  # noqa: E731
    with pytest.warns(LowEffectiveSampleSizeWarning, match="deep") as record:
        user()
    assert_points_at(record, user)


def test_code_of_the_user_between_two_of_ours():
    callback = lambda: in_module("skebm.samplers", warn)("from a callback")  # noqa: E731
    with pytest.warns(UserWarning, match="from a callback") as record:
        in_module("skebm.training", callback)()
    assert_points_at(record, callback)


def test_modules_of_others_whose_names_begin_like_ours():
    other = in_module("skebm_of_mine", in_module("skebm", warn))
    with pytest.warns(UserWarning, match="from there") as record:
        other("from there")
    assert_points_at(record, other)


@pytest.mark.parametrize(
    "call",
    [
        lambda: density().fit(X),
        lambda: density().fit_predict(X),
        lambda: make_pipeline(StandardScaler(), density()).fit(X),
        lambda: cross_val_score(density(), X, cv=2),
        lambda: GridSearchCV(density(), {"smoothing": [0.0, 0.3]}, cv=2).fit(X),
    ],
    ids=["fit", "fit_predict", "pipeline", "cross_val_score", "search"],
)
def test_warnings_of_a_fit(call):
    with pytest.warns(LowEffectiveSampleSizeWarning) as record:
        call()
    assert_points_at(record, call)
