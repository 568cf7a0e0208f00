"""The shell of every estimator: validation, scores, outlier detection, pickling."""

import copy
from abc import ABC, abstractmethod
from itertools import chain
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from skebm._sklearn_compat import Interval, StrOptions, _check_sample_weight, _fit_context

from ._columns import relative_precision
from ._threads import limit_threads

SCORED_ROWS = 8192
"""Rows that are scored at once, so that memory does not grow with n."""

SMOOTHED_ROWS = 4_000
"""Smoothing makes perturbed copies of few rows, until there are about this many."""

AUTO_CONTAMINATION = 0.05
"""``contamination="auto"``: share of new rows of the same law that `predict` calls outliers."""


class BaseDensity(DensityMixin, OutlierMixin, BaseEstimator, ABC):
    """What all estimators share; a family of them adds `_fit`, `_score`, `_score_with_std`.

    Parameters are documented in the estimators, whose signatures scikit-learn reads. A fitted one
    has `_columns` and `model_`, a module on standardised columns.
    """

    _parameter_constraints: dict = {
        "hidden_layer_sizes": ["array-like"],
        "learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_epochs": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "patience": [Interval(Integral, 1, None, closed="left")],
        "smoothing": [StrOptions({"scott"}), Interval(Real, 0, None, closed="left")],
        "contamination": [StrOptions({"auto"}), Interval(Real, 0, 0.5, closed="right")],
        "callbacks": [list, tuple, None],
        "device": [str, torch.device],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
    }

    # ------------------------------------------------------------------ what a family adds

    @abstractmethod
    def _fit(self, X, sample_weight, n_threads):
        """Set everything that ends in an underscore; training may use `n_threads`."""

    @abstractmethod
    def _score(self, X):
        """Log-density of validated rows, in the units of X."""

    @abstractmethod
    def _score_with_std(self, X):
        """Log-density of validated rows, and its standard error."""

    def _check_parameters(self):
        """Raise where parameters contradict each other: before anything is fitted."""

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
        try:
            with limit_threads(1):
                self._fit(X, sample_weight, n_threads)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        return self

    def _usable_rows(self, X, sample_weight, *, reset):
        """The rows of positive weight, an array, and their weights, of mean one."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2, reset=reset)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        used = weight > 0
        if used.sum() < 2:
            raise ValueError("sample_weight must be positive for at least 2 samples.")
        return X[used], weight[used] / weight[used].mean()

    def _column_names(self, X):
        return getattr(self, "feature_names_in_", range(X.shape[1]))

    def _draw_seed(self, random_state):
        return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))

    def _set_offset(self, rows, weight, scores):
        """Threshold of `predict`.

        Parameters
        ----------
        rows : ndarray of shape (n_rows, n_features)
            Those of positive weight.
        weight : ndarray of shape (n_rows,)
        scores : ndarray of shape (n_rows,)
            Out-of-fold scores, NaN where there are none.
        """
        self.out_of_fold_scores_ = scores
        if self.contamination == "auto":
            held = ~np.isnan(scores)
            self.offset_ = _weighted_quantile(scores[held], weight[held], AUTO_CONTAMINATION)
        else:
            self.offset_ = _weighted_quantile(self._score(rows), weight, self.contamination)

    # ------------------------------------------------------------------ density

    def _validate(self, X):
        check_is_fitted(self)
        checked = validate_data(self, X, dtype=np.float64, reset=False)
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
        return self._score_with_std(X) if return_std else self._score(X)

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

    def _sampling_generator(self, random_state, *, n_samples, n_steps=0):
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
        """Fit, then label the same rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : Ignored
            Present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        ndarray of shape (n_samples,), int
        """
        return self.fit(X, sample_weight=sample_weight).predict(X)

    # ------------------------------------------------------------------ pickling

    def __getstate__(self):
        state = super().__getstate__()
        if "model_" in state and self._device.type != "cpu":
            # so that a machine without that device can load it
            state = state | {"model_": copy.deepcopy(self.model_).to("cpu")}
        return state


def _weighted_quantile(values, weight, level):
    """Quantile of values of which each stands for the middle of its weight."""
    order = np.argsort(values)
    weight = weight[order]
    position = (np.cumsum(weight) - 0.5 * weight) / weight.sum()
    return float(np.interp(level, position, values[order]))


def scott(x):
    """Scott's rule, in standard deviations."""
    n, d = x.shape
    return n ** (-1.0 / (d + 4))


def perturbed_copies(x, weight, folds, columns, h):
    """Perturbed copies of the rows, their weights, and the folds of the copies.

    Without smoothing there is one copy. All copies of a row lie in one fold; the first alone is
    judged on.

    Returns
    -------
    draw : callable
        ``draw(seed)`` -> Tensor of the copies.
    weight : Tensor
    splits : list of (train, held_out) index tensors
    """
    n = len(x)
    n_copies = -(-SMOOTHED_ROWS // n) if h > 0 else 1
    starts = n * torch.arange(n_copies)[:, None]

    def draw(seed):
        tiled = np.tile(x, (n_copies, 1))
        return torch.as_tensor(columns.perturb(tiled, h, np.random.RandomState(seed)))

    splits = [((train + starts).flatten(), held) for train, held in folds]
    return draw, torch.as_tensor(weight).repeat(n_copies), splits


def resolve_device(device):
    """torch.device for "auto" (CUDA where there is one) or a device string."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: {error}") from error
    return device
