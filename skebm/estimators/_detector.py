"""What makes an outlier detector of a density: a threshold on its scores, and labels by it."""

from abc import ABC, abstractmethod
from numbers import Real
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import OutlierMixin

from skebm._sklearn_compat import Interval, StrOptions
from skebm._statistics import weighted_quantile
from skebm._tensors import results_like, without_tensors
from skebm._typing import FloatArray
from skebm.training import Columns, Fitted

AUTO_CONTAMINATION = 0.05
"""``contamination="auto"``: share of new rows of the same kind that `predict` calls outliers."""


def thresholds(
    contamination: float | Literal["auto"], seen: FloatArray, held: FloatArray, weight: FloatArray
) -> tuple[float, float]:
    """Scores below which new rows, and training rows, are outliers.

    Parameters
    ----------
    contamination : float or "auto"
    seen : ndarray of shape (n,)
        Scores of the training rows by the model that has seen them.
    held : ndarray of shape (n,)
        Their out-of-fold scores; NaN for rows that were never held out.
    weight : ndarray of shape (n,)

    Returns
    -------
    offset, out_of_fold_offset : float
    """
    there = ~np.isnan(held)
    if contamination == "auto":
        offset = float(weighted_quantile(held[there], weight[there], AUTO_CONTAMINATION))
        return offset, offset
    held = np.where(there, held, seen)
    return (
        float(weighted_quantile(seen, weight, contamination)),
        float(weighted_quantile(held, weight, contamination)),
    )


class Detector(OutlierMixin, ABC):
    """Threshold and labels of a density, which fits, and validates and scores rows."""

    contamination: float | Literal["auto"]

    # what a fit sets
    offset_: float
    out_of_fold_offset_: float
    out_of_fold_decision_function_: FloatArray
    _columns: Columns

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "contamination": [StrOptions({"auto"}), Interval(Real, 0, 0.5, closed="right")],
    }

    @abstractmethod
    def fit(
        self,
        X: ArrayLike,
        y: object = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self: ...

    @abstractmethod
    def _validate(self, X: Any) -> FloatArray: ...

    @abstractmethod
    def _log_density(self, X: np.ndarray) -> FloatArray: ...

    def _judge(
        self,
        rows: FloatArray,
        weight: FloatArray,
        groups: NDArray[np.int_] | None,
        fitted: Fitted,
    ) -> dict[str, FloatArray]:
        """Set the thresholds, and return what else there is to know of every row, by name."""
        held = self._comparable(fitted.scores, rows)
        seen = held
        if self.contamination != "auto":
            seen = self._comparable(self._log_density(rows), rows)
        self.offset_, self.out_of_fold_offset_ = thresholds(self.contamination, seen, held, weight)
        return {"out_of_fold_decision_function_": held - self.out_of_fold_offset_}

    def _comparable(self, scores, rows):
        """Scores as thresholds take them, which do not depend on units where values are absent.

        Rows of `rows` are in the units of X, and met by the columns of the fit.
        """
        columns = self._columns
        return scores + columns.absent_log_det(columns.encode(rows)) if columns.states else scores

    def decision_function(self, X: ArrayLike) -> FloatArray:
        """`score_samples` minus `offset_`: negative for outliers.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), float64
            In nats. Of a row without a value in some column (its cell is missing, or an atom) it
            also has the logarithm of one over the scale of the column, as of rows with the value,
            so that units make no difference.
        """
        rows, like = self._validate(X), results_like(X)
        return like(self._comparable(self._log_density(rows), rows) - self.offset_)

    def predict(self, X: ArrayLike) -> NDArray[np.int_]:
        """Label rows: +1 for inliers, -1 for outliers.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), int
        """
        rows = self._validate(X)
        scores = self._comparable(self._log_density(rows), rows)
        return results_like(X)(np.where(scores - self.offset_ < 0, -1, 1))

    def fit_predict(
        self,
        X: ArrayLike,
        y: object = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> NDArray[np.int_]:
        """Fit, then label the same rows, each by the member that has not seen it.

        The density of a training row is flattered by the row itself. So the labels come from
        `out_of_fold_scores_`, and not from `predict`, which is for new rows: with
        ``contamination="auto"`` the rows below `offset_` are outliers, with a number the share with
        the lowest out-of-fold scores. Rows that were never held out (with one member, beyond 50,000
        per member, or not looked at in a large table) are judged by `score_samples`, and so are
        rows of weight zero, which were left out of the fit.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : Ignored
            Present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
        groups : array-like of shape (n_samples,), default=None
            As in `fit`.

        Returns
        -------
        ndarray of shape (n_samples,), int
            +1 for inliers, -1 for outliers.
        """
        self.fit(X, sample_weight=sample_weight, groups=groups)
        decision = self.out_of_fold_decision_function_
        if sample_weight is not None and np.ndim(sample_weight) == 1:
            used = np.asarray(without_tensors(sample_weight), dtype=np.float64) > 0
            decision = np.full(len(used), np.nan)
            decision[used] = self.out_of_fold_decision_function_
        if np.isnan(decision).any():
            rows = self._validate(X)
            seen = self._comparable(self._log_density(rows), rows) - self.out_of_fold_offset_
            decision = np.where(np.isnan(decision), seen, decision)
        return results_like(X)(np.where(decision < 0, -1, 1))
