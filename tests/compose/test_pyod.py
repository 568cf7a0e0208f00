"""PyODAdapter: what pyod's BaseDetector makes of scores, and where the scores come from."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.neighbors import KernelDensity

from skebm import ImplicitVAE, NCEDensity, OutlierDetector
from skebm.compose import PyODAdapter
from skebm.estimators._detector import Detector

DETECTORS = {
    "views": OutlierDetector(n_members=2, random_state=0),
    "members": NCEDensity(base="gmm", energy_model=None, n_members=3, random_state=0),
    "one member": NCEDensity(base="gmm", energy_model=None, n_members=1, random_state=0),
    "latent": ImplicitVAE(
        n_components=2, hidden_layer_sizes=(8,), max_epochs=3, n_importance_samples=20,
        random_state=0,
    ),
}  # fmt: skip
every_detector = pytest.mark.parametrize("name", DETECTORS)


def table(seed, n=300):
    """Numbers with heavy tails; an amount that often is zero, with holes."""
    random = np.random.default_rng(seed)
    X = random.standard_t(4, size=(n, 3))
    X[random.random(n) < 0.3, 0] = 0.0
    X[random.random(n) < 0.1, 0] = np.nan
    return X


@every_detector
def test_scores_are_minus_those_of_rows_that_a_member_has_not_seen(name):
    X, new = table(0), table(1)
    adapter = PyODAdapter(DETECTORS[name]).fit(X)
    detector = adapter.detector_
    held = ~np.isnan(detector.out_of_fold_scores_)
    assert held.all() == (name in ("views", "members"))
    has_values = ~np.isnan(X[:, 0]) & (X[:, 0] != 0.0)
    chosen = held & has_values
    assert chosen.any()
    np.testing.assert_allclose(
        adapter.decision_scores_[chosen], -detector.out_of_fold_scores_[chosen]
    )
    seen = ~held & has_values
    np.testing.assert_allclose(adapter.decision_scores_[seen], -detector.score_samples(X)[seen])
    np.testing.assert_allclose(
        adapter.decision_function(new), -(detector.decision_function(new) + detector.offset_)
    )
    assert isinstance(detector, Detector)
    assert detector is not DETECTORS[name]


@pytest.mark.parametrize("contamination", [0.02, 0.1, 0.5])
def test_labels_are_those_of_pyod(contamination):
    X, new = table(0), table(1)
    adapter = PyODAdapter(DETECTORS["members"], contamination).fit(X)
    # BaseDetector._process_decision_scores, predict and predict_proba of pyod 3.6
    trained, scores = adapter.decision_scores_, adapter.decision_function(new)
    threshold = np.quantile(trained, 1 - contamination)
    assert adapter.threshold_ == pytest.approx(threshold)
    np.testing.assert_array_equal(adapter.labels_, trained > threshold)
    assert adapter.labels_.sum() == pytest.approx(contamination * len(X), abs=1)
    np.testing.assert_array_equal(adapter.predict(new), scores > threshold)
    assert set(adapter.predict(new)) == {0, 1}
    odd = (scores - trained.min()) / (trained.max() - trained.min())
    np.testing.assert_allclose(adapter.predict_proba(new)[:, 1], odd.clip(0, 1))
    assert (odd > 1).any()
    z = (scores - trained.mean()) / trained.std()
    unified = adapter.predict_proba(new, method="unify")
    np.testing.assert_allclose(unified[:, 1], (2 * norm.cdf(z) - 1).clip(0), atol=1e-12)
    np.testing.assert_allclose(unified.sum(axis=1), 1.0)


def test_columns_and_parameters_are_those_of_the_detector():
    pandas = pytest.importorskip("pandas")
    adapter = PyODAdapter(DETECTORS["members"], contamination=0.2)
    assert clone(adapter).get_params()["detector__n_members"] == 3
    adapter.fit(pandas.DataFrame(table(0), columns=["amount", "a", "b"]))
    assert adapter.n_features_in_ == 3
    assert list(adapter.feature_names_in_) == ["amount", "a", "b"]


def test_errors_say_what_to_do():
    X = table(0)[:, 1:]
    with pytest.raises(ValueError, match=r"OutlierDetector or a density of skebm.*KernelDensity"):
        PyODAdapter(KernelDensity()).fit(X)
    given = clone(DETECTORS["members"]).set_params(contamination=0.1)
    with pytest.raises(ValueError, match=r"contamination=0.1, which.*give it to PyODAdapter"):
        PyODAdapter(given).fit(X)
    with pytest.raises(ValueError, match="'contamination' parameter of PyODAdapter"):
        PyODAdapter(DETECTORS["members"], contamination=0.6).fit(X)
    with pytest.raises(NotFittedError):
        PyODAdapter(DETECTORS["members"]).predict(X)
    with pytest.raises(ValueError, match="method='ranks' must be 'linear' or 'unify'"):
        PyODAdapter(DETECTORS["members"]).fit(X).predict_proba(X, method="ranks")
