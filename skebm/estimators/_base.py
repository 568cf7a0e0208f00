"""The shell of every estimator: validation, scores, outlier detection, pickling."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from skebm import _threads
from skebm._random import Seeds
from skebm._sklearn_compat import Interval, StrOptions, _check_sample_weight, _fit_context
from skebm._threads import limit_threads
from skebm._warnings import warn
from skebm.training import Columns, Progress, relative_precision, resolve_device
from skebm.training.degenerate import warn_of_degenerate_columns

from ._cells import bad_cell, refuse_what_would_be_read_through

AUTO_CONTAMINATION = 0.05
"""``contamination="auto"``: share of new rows of the same kind that `predict` calls outliers."""

parameters = dataclass(kw_only=True, eq=False, repr=False)
"""Makes the constructor of an estimator: keyword-only, of the fields of the class and its bases."""


@parameters
class BaseDensity(DensityMixin, OutlierMixin, BaseEstimator, ABC):
    """What all estimators share; a family of them adds the methods below.

    Parameters are documented in the estimators. A fitted one has `model_`, a module on standardised
    columns, and for itself `_columns` and `_seed`.
    """

    smoothing: object = 0.0
    contamination: object = "auto"
    device: object = "auto"
    random_state: object = None
    warm_start: bool = False
    verbose: int = 0

    _parameter_constraints = {
        "smoothing": [StrOptions({"scott"}), Interval(Real, 0, None, closed="left")],
        "contamination": [StrOptions({"auto"}), Interval(Real, 0, 0.5, closed="right")],
        "device": [str, torch.device],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
    }

    # ------------------------------------------------------------------ what a family adds

    @abstractmethod
    def _fit(self, rows, weight, columns, context):
        """Learn from rows of positive weight, and return a `Fitted`.

        Parameters
        ----------
        rows : ndarray of shape (n_rows, n_features)
            In the units of X.
        weight : ndarray of shape (n_rows,)
            Of mean one.
        columns : Columns
        context : dict
            `seeds`, `device`, `n_threads`, `progress` and `start`, for `make_task`.
        """

    @abstractmethod
    def _log_density_std(self, X):
        """Log-density of validated rows, in the units of X, and its standard error."""

    def _log_density(self, X):
        """The first of these; to be overridden where the second costs much."""
        return self._log_density_std(X)[0]

    def _check_parameters(self):
        """Raise where parameters contradict each other: before anything is fitted."""

    def _goes_on_from(self, model, n_rows):
        """Whether a warm start on so many rows can go on from that model."""
        return True

    def _learn_columns(self, rows, names, precision):
        """Columns of these rows; the last two as of `Columns.learn`."""
        return Columns.learn(rows, names, precision)

    # ------------------------------------------------------------------ fit

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None):
        """Learn the density of the rows of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows; numpy, pandas, polars or torch, finite, at least two different ones.
        y : Ignored
            Present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights of the rows; rows of weight zero are left out.

        Returns
        -------
        self : object
            Fitted. If fitting fails or is interrupted, the estimator stays as it was.
        """
        before = self.__dict__.copy()
        n_threads = torch.get_num_threads()  # for training; all else is made of small steps
        if _threads.was_forked:
            _threads.was_forked = False
            warn(
                "this process was forked from one that computed with several threads; torch keeps "
                "to one here, because it would wait for ever for the others. Start processes by "
                "'spawn' or 'forkserver', or by joblib's loky, to train with several."
            )
        try:
            with (
                torch.inference_mode(False),  # which training cannot do with; it allows gradients
                torch.no_grad(),
                limit_threads(1),
                Progress(self.verbose) as progress,
            ):
                self._check_parameters()
                model = getattr(self, "model_", None) if self.warm_start else None
                rows, weight, precision = self._read(X, sample_weight, reset=model is None)
                start = None
                if model is not None and self._goes_on_from(model, len(rows)):
                    start = copy.deepcopy(model).to("cpu")
                if start is None:
                    columns = self._learn_columns(rows, self._names(rows), precision)
                else:
                    columns = self._columns
                warn_of_degenerate_columns(rows, self._names(rows), precision)
                rows = columns.snap(rows, precision)
                seeds = Seeds(self._draw_seed(self.random_state))
                context = {
                    "seeds": seeds, "device": resolve_device(self.device),
                    "n_threads": n_threads, "progress": progress, "start": start,
                }  # fmt: skip
                fitted = self._fit(rows, weight, columns, context)
                self._keep(fitted, columns, seeds)
                self.offset_ = self._threshold(rows, weight)
                self.out_of_fold_offset_ = self._out_of_fold_threshold(rows, weight)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        return self

    def _read(self, X, sample_weight, *, reset):
        """The rows of positive weight, their weights of mean one, and the precision of X."""
        precision = relative_precision(X)
        refuse_what_would_be_read_through(sample_weight, "sample_weight")
        X = self._checked(X, ensure_min_samples=2, reset=reset)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        used = weight > 0
        if used.sum() < 2:
            raise ValueError("sample_weight must be positive for at least 2 samples.")
        return X[used], weight[used] / weight[used].mean(), precision

    def _checked(self, X, **options):
        """X as finite doubles; an error names the column that has something else."""
        refuse_what_would_be_read_through(X)
        try:
            return validate_data(self, X, dtype=np.float64, **options)
        except ValueError as error:
            problem = bad_cell(X)
            if problem is None:
                raise
            raise ValueError(problem) from error

    def _names(self, rows):
        """Names of the columns of X, for messages."""
        return getattr(self, "feature_names_in_", range(rows.shape[1]))

    def _keep(self, fitted, columns, seeds):
        """Set what a fit has learned, and forget an earlier one."""
        for name in [name for name in vars(self) if name.endswith("_") and name not in _OF_X]:
            delattr(self, name)
        self._columns, self._seed, self.model_ = columns, seeds.seed, fitted.model
        self.out_of_fold_scores_ = fitted.scores
        for name, value in fitted.attributes.items():
            setattr(self, name, value)

    def _threshold(self, rows, weight):
        """Score below which `predict` calls a row an outlier."""
        if self.contamination != "auto":
            return _weighted_quantile(self._log_density(rows), weight, self.contamination)
        scores = self.out_of_fold_scores_
        held = ~np.isnan(scores)
        return _weighted_quantile(scores[held], weight[held], AUTO_CONTAMINATION)

    def _out_of_fold_threshold(self, rows, weight):
        """Score below which `fit_predict` calls a training row an outlier."""
        if self.contamination == "auto":
            return self.offset_
        scores = self.out_of_fold_scores_.copy()
        seen = np.isnan(scores)
        if seen.any():
            scores[seen] = self._log_density(rows[seen])
        return _weighted_quantile(scores, weight, self.contamination)

    def _draw_seed(self, random_state):
        return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))

    def summary(self):
        """What the fit has kept, and why, in one line.

        Returns
        -------
        str
            With the held-out gain and its standard error, in nats per row.
        """
        check_is_fitted(self)
        return self._summary

    # ------------------------------------------------------------------ density

    def _validate(self, X):
        check_is_fitted(self)
        checked = self._checked(X, reset=False)
        return self._columns.snap(checked, relative_precision(X))

    @property
    def _device(self):
        return next(chain(self.model_.parameters(), self.model_.buffers())).device

    def _tensor(self, X):
        x, met = self._columns.standardize(X)
        return torch.as_tensor(x, device=self._device), met

    def score_samples(self, X, return_std=False):
        """Log-density of every row, normalised.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        return_std : bool, default=False
            Also return the standard error of the log-density: what the error of log Z, or of the
            integral over latent variables, puts on it.

        Returns
        -------
        log_density : ndarray of shape (n_samples,), float64
            In nats, in the units of X. Columns that were constant in `fit` are a point mass: a row
            that differs there has -inf.
        std_error : ndarray of shape (n_samples,), float64
            Only if `return_std`; in nats.
        """
        X = self._validate(X)
        return self._log_density_std(X) if return_std else self._log_density(X)

    def score(self, X, y=None, sample_weight=None):
        """Mean log-density of the rows of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : Ignored
            Present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the mean.

        Returns
        -------
        float
            In nats per row, in the units of X (a mean, as for GaussianMixture).
        """
        scores = self.score_samples(X)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(
                sample_weight, scores[:, None], ensure_non_negative=True
            )
        return float(np.average(scores, weights=sample_weight))

    # ------------------------------------------------------------------ sampling

    def _sampling_rng(self, random_state, *, n_samples, n_steps=0):
        check_is_fitted(self)
        for name, value, least in (("n_samples", n_samples, 1), ("n_steps", n_steps, 0)):
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
        return torch.Generator(self._device).manual_seed(self._draw_seed(random_state))

    # ------------------------------------------------------------------ outlier detector

    def decision_function(self, X):
        """`score_samples` minus `offset_`: negative for outliers.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), float64
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X):
        """Label rows: +1 for inliers, -1 for outliers.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), int
        """
        return np.where(self.decision_function(X) < 0, -1, 1)

    def fit_predict(self, X, y=None, sample_weight=None):
        """Fit, then label the same rows, each by the member that has not seen it.

        The density of a training row is flattered by the row itself. So the labels come from
        `out_of_fold_scores_`, and not from `predict`, which is for new rows: with
        ``contamination="auto"`` the rows below `offset_` are outliers, with a number the share with
        the lowest out-of-fold scores. Rows that were never held out (with one member, or beyond
        50,000 per member) are judged by `score_samples`, and so are rows of weight zero, which
        were left out of the fit.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : Ignored
            Present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        ndarray of shape (n_samples,), int
            +1 for inliers, -1 for outliers.
        """
        self.fit(X, sample_weight=sample_weight)
        scores = self.out_of_fold_scores_
        if np.ndim(sample_weight) == 1:
            used = np.asarray(sample_weight, dtype=np.float64) > 0
            scores = np.full(len(used), np.nan)
            scores[used] = self.out_of_fold_scores_
        if np.isnan(scores).any():
            scores = np.where(np.isnan(scores), self.score_samples(X), scores)
        return np.where(scores < self.out_of_fold_offset_, -1, 1)

    # ------------------------------------------------------------------ pickling

    def __getstate__(self):
        state = super().__getstate__()
        if "model_" in state and self._device.type != "cpu":
            # so that a machine without that device can load it
            state = state | {"model_": copy.deepcopy(self.model_).to("cpu")}
        return state


_OF_X = ("n_features_in_", "feature_names_in_")


def _weighted_quantile(values, weight, level):
    """Quantile of values of which each stands for the middle of its weight."""
    order = np.argsort(values)
    weight = weight[order]
    position = (np.cumsum(weight) - 0.5 * weight) / weight.sum()
    return float(np.interp(level, position, values[order]))
