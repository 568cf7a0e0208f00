"""Outliers by a density at the end of a pipeline."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.metaestimators import available_if

from skebm._statistics import weighted_quantile
from skebm._typing import FloatArray, RandomState
from skebm.estimators._base import BaseDensity
from skebm.estimators._calibration import discovered
from skebm.estimators._detector import AUTO_CONTAMINATION


def is_detector(pipeline: Any) -> bool:
    """Whether the last step of a pipeline is a density of skebm, which is a detector."""
    return isinstance(pipeline.steps[-1][1], BaseDensity)


def has(method: str) -> Callable[[Any], bool]:
    """Whether the last step of a pipeline has a method."""
    return lambda pipeline: hasattr(pipeline.steps[-1][1], method)


class DetectorBehind(ABC):
    """Threshold and labels in the units of the rows that reach the first step."""

    steps: list[Any]

    # what a fit sets
    offset_: float
    out_of_fold_scores_: FloatArray

    @abstractmethod
    def score_samples(self, X: ArrayLike) -> Any: ...

    @abstractmethod
    def _forward(self, X: Any) -> Any: ...

    @abstractmethod
    def _behind(self, X: Any) -> Any: ...

    @abstractmethod
    def _learn(self, X: Any, y: Any, sample_weight: Any, params: Any) -> Any: ...

    def _set_threshold(self, X, weight, log_mass):
        if not is_detector(self):
            return
        density = self.steps[-1][1]
        z, log_det, _, absent = self._forward(X)
        self.out_of_fold_scores_ = density.out_of_fold_scores_ + log_det - log_mass
        if density.contamination == "auto":
            held = ~np.isnan(self.out_of_fold_scores_)
            scores, level = (self.out_of_fold_scores_ + absent)[held], AUTO_CONTAMINATION
            weight = weight[held]
        else:
            scores = density.score_samples(z) + log_det + absent - log_mass
            level = density.contamination
        self.offset_ = float(weighted_quantile(scores, weight, level))

    @available_if(is_detector)
    def decision_function(self, X: ArrayLike) -> FloatArray:
        """`score_samples` minus `offset_`: negative for outliers.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), float64
        """
        return self.score_samples(X) + self._absent(X) - self.offset_

    def _absent(self, X):
        """What values that rows have not would add to a log-density; thresholds count it in."""
        if not self.steps[-1][1]._columns.states:
            return 0.0
        n, *_, where, absent = self._behind(X)
        every = np.zeros(n)
        every[where] = absent
        return every

    @available_if(has("predict"))
    def predict(self, X: ArrayLike, **params: Any) -> NDArray[np.int_]:
        """Label rows: +1 for inliers, -1 for outliers; with a mixture, its components.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        **params : dict
            As in :class:`~sklearn.pipeline.Pipeline`; none for densities of skebm.

        Returns
        -------
        ndarray of shape (n_samples,), int
        """
        if is_detector(self):
            return np.where(self.decision_function(X, **params) < 0, -1, 1)
        return super().predict(X, **params)  # pyright: ignore[reportAttributeAccessIssue]

    @available_if(has("fit_predict"))
    def fit_predict(
        self, X: ArrayLike, y: Any = None, sample_weight: ArrayLike | None = None, **params: Any
    ) -> NDArray[np.int_]:
        """Fit, then label the same rows.

        Densities of skebm label rows by their out-of-fold scores, where there are some: with
        ``contamination="auto"`` those below `offset_` are outliers, and with a number the share
        with the lowest.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : Ignored
            Handed to the steps, as Pipeline does.
        sample_weight : array-like of shape (n_samples,), default=None
        **params : dict
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,), int
        """
        used, weight = self._learn(X, y, sample_weight, params)
        labels = self.predict(X)
        if is_detector(self):
            scores = self.out_of_fold_scores_
            scores = np.where(np.isnan(scores), self.score_samples(X)[used], scores)
            scores = scores + np.broadcast_to(self._absent(X), len(labels))[used]
            level, threshold = self.steps[-1][1].contamination, self.offset_
            if level != "auto":
                threshold = weighted_quantile(scores, weight, level)
            labels[used] = np.where(scores < threshold, -1, 1)
        return labels

    @available_if(has("p_values"))
    def p_values(self, X: ArrayLike, random_state: RandomState = None) -> FloatArray:
        """How odd new rows are: the share of rows of the same distribution that are as odd.

        Rows are compared behind the transformers, by `p_values` of the density, and what that
        promises holds here. Behind transformers that stretch one part of a column more than another
        they may be ordered otherwise than by `decision_function`, which is in the units of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            New rows.
        random_state : int, RandomState instance or None, default=None
            As in the density.

        Returns
        -------
        ndarray of shape (n_samples,), float64
            In (0, 1]; rows outside of the domain of a transformer have the least that there is.
        """
        density = self.steps[-1][1]
        n, z, _, where, _ = self._behind(X)
        p_values = np.full(n, density._calibration.least)
        if len(where):
            p_values[where] = density.p_values(z, random_state)
        return p_values

    @available_if(has("discoveries"))
    def discoveries(self, X: ArrayLike, fdr: float = 0.1) -> NDArray[np.bool_]:
        """Choose rows so that hardly any of them is a false discovery.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            New rows.
        fdr : float, default=0.1
            Expected share of false discoveries, in (0, 1), by the rule of Benjamini and Hochberg on
            `p_values`.

        Returns
        -------
        ndarray of shape (n_samples,), bool
        """
        return discovered(self.p_values(X), fdr, self.steps[-1][1]._calibration.least)
