"""An outlier detector of ours with the names and signs of pyod."""

from numbers import Real
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import halfnorm
from sklearn.base import BaseEstimator, clone
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.validation import check_is_fitted

from skebm._sklearn_compat import Interval, _fit_context
from skebm._typing import FloatArray
from skebm.estimators._detector import Detector


class PyODAdapter(BaseEstimator):
    """Outlier detector of skebm with the names and signs of pyod.

    In pyod a high score is odd, outliers are labelled 1 and others 0, and `contamination` is always
    the share of training rows that are to be labelled. Training rows are judged by their
    out-of-fold scores, and the threshold is one of these, for new rows as well.

    Parameters
    ----------
    detector : OutlierDetector or density of skebm
        Cloned by `fit`. Its own `contamination` stays "auto".
    contamination : float, default=0.1
        Share of the training rows that are to be labelled as outliers, in (0, 0.5].

    Attributes
    ----------
    detector_ : object
        The fitted detector; it has what pyod has not, such as p-values and draws.
    decision_scores_ : ndarray of shape (n_samples,)
        Scores of the training rows, the higher the odder: minus their out-of-fold log-densities, in
        nats. Rows that no member has left out are scored by `decision_function`.
    threshold_ : float
        Quantile of `decision_scores_` at 1 - `contamination`. Rows above it are outliers.
    labels_ : ndarray of shape (n_samples,), int
        Labels of the training rows: 1 for outliers, and 0 for others.
    n_features_in_ : int
        Number of columns seen in `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns, where X had any.

    See Also
    --------
    skebm.OutlierDetector : The detector itself, with p-values and discoveries.

    Notes
    -----
    The conventions are those of ``BaseDetector`` of pyod (Zhao, Nasrullah and Li 2019), which need
    not be installed.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm import OutlierDetector
    >>> from skebm.compose import PyODAdapter
    >>> X = np.random.default_rng(0).normal(size=(300, 2))
    >>> clf = PyODAdapter(OutlierDetector(random_state=0), contamination=0.05).fit(X)
    >>> int(clf.labels_.sum())
    15
    >>> clf.predict([[0.0, 0.0], [5.0, 5.0]])
    array([0, 1])
    """

    # what a fit sets
    detector_: Any
    decision_scores_: FloatArray
    threshold_: float
    labels_: NDArray[np.int_]

    _parameter_constraints = {
        "detector": "no_validation",  # its own error says what to take
        "contamination": [Interval(Real, 0, 0.5, closed="right")],
    }

    def __init__(self, detector: Any, contamination: float = 0.1):
        self.detector = detector
        self.contamination = contamination

    @property
    def n_features_in_(self) -> int:
        """Number of columns seen in `fit`."""
        return self.detector_.n_features_in_

    @property
    def feature_names_in_(self) -> np.ndarray:
        """Names of the columns, where X had any."""
        return self.detector_.feature_names_in_

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Fit the detector, and label the training rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : Ignored
            Present for API consistency by convention.

        Returns
        -------
        self : PyODAdapter
        """
        if not isinstance(self.detector, Detector):
            raise ValueError(
                "detector must be an OutlierDetector or a density of skebm, such as "
                f"OutlierDetector(); got {self.detector!r}."
            )
        if self.detector.contamination != "auto":
            raise ValueError(
                f"detector has contamination={self.detector.contamination!r}, which does not act "
                "here: give it to PyODAdapter, and leave that of the detector at 'auto'."
            )
        detector: Any = clone(self.detector)
        self.detector_ = detector.fit(X)
        held = self.detector_.out_of_fold_decision_function_ + self.detector_.out_of_fold_offset_
        scores = -held
        if np.isnan(scores).any():
            scores = np.where(np.isnan(scores), self.decision_function(X), scores)
        self.decision_scores_ = scores
        self.threshold_ = float(np.percentile(scores, 100.0 * (1.0 - self.contamination)))
        self.labels_ = (scores > self.threshold_).astype(int)
        return self

    def decision_function(self, X: ArrayLike) -> FloatArray:
        """Score of every row: minus its log-density.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), float64
            In nats, the higher the odder. Where rows lack values it is corrected as that of the
            detector is, so that the units of columns make no difference.
        """
        check_is_fitted(self, "detector_")
        return -(np.asarray(self.detector_.decision_function(X)) + self.detector_.offset_)

    def predict(self, X: ArrayLike) -> NDArray[np.int_]:
        """Label rows: 1 for outliers, and 0 for others.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), int
        """
        return (self.decision_function(X) > self.threshold_).astype(int)

    def predict_proba(
        self, X: ArrayLike, method: Literal["linear", "unify"] = "linear"
    ) -> FloatArray:
        """Scores brought to [0, 1], as pyod does; they are no probabilities that promise anything.

        For such, see `p_values` of the detector.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        method : {"linear", "unify"}, default="linear"
            "linear" puts the range of `decision_scores_` on [0, 1]; "unify" is the probability of a
            normal variable, with their mean and standard deviation, to lie nearer to the mean, and
            0 below the mean (Kriegel et al. 2011).

        Returns
        -------
        ndarray of shape (n_samples, 2), float64
            Of others, and of outliers; rows sum to one.
        """
        if method not in ("linear", "unify"):
            raise ValueError(f"method={method!r} must be 'linear' or 'unify'.")
        scores, trained = self.decision_function(X), self.decision_scores_
        if method == "linear":
            scaler = MinMaxScaler(clip=True).fit(trained[:, None])
            odd = scaler.transform(scores[:, None])[:, 0]
        else:
            scale = max(trained.std(), np.finfo(float).tiny)
            odd = halfnorm(trained.mean(), scale).cdf(scores)
        return np.stack([1.0 - odd, odd], axis=1)
